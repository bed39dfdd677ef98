"""A test whether the Python code between parts can go one way only.

If it can, numbers that it takes out of tensors cannot change which parts it calls.
"""

from __future__ import annotations

import dis
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, nn

from fxprune.coupling.parts.calls import intercepted
from fxprune.trace.user_code import is_library_file

__all__ = ["is_straight"]


def is_straight(model: nn.Module, parts: Collection[str], run: Callable[[], object]) -> bool:
    """Tell whether the code that runs outside of parts can go one way only.

    It must have no branch, no exception handler and no loop that calls parts, and it must not
    choose a module by name or index. A branch could choose the input of the next part. A loop that
    calls no parts only computes more or less of the same.

    Parameters
    ----------
    model:
        A private copy of the model.
    parts:
        Paths of its parts.
    run:
        Calls the model.
    """
    seen = _Profile()

    def part(path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        seen.note_callers()
        with seen.paused():
            return call()

    before = sys.getprofile()
    with intercepted(model, parts, part):
        sys.setprofile(seen)
        try:
            run()
        finally:
            sys.setprofile(before)
    turns = any(_can_turn(code, code in seen.callers) for code in seen.codes)
    return not seen.chooses and not turns


class _Profile:
    """A profiler for :func:`sys.setprofile` that collects the model's own functions that run.

    Attributes
    ----------
    codes:
        Their code objects.
    callers:
        Code of functions that call parts, directly or not.
    chooses:
        Whether a module was chosen by name or index.
    """

    def __init__(self) -> None:
        self.codes: set[CodeType] = set()
        self.callers: set[CodeType] = set()
        self.chooses = False
        self._away = False

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if self._away:
            return
        code = frame.f_code
        if event == "c_call" and arg is getattr and _handles_model(frame):
            self.chooses = True
        if event != "call":
            return
        if _handles_model(frame):
            self.codes.add(code)
        elif code.co_name == "__getitem__" and isinstance(frame.f_locals.get("self"), nn.Module):
            self.chooses = True

    def note_callers(self) -> None:
        """Record the code of all functions that are running, because a part is being called."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            self.callers.add(frame.f_code)
            frame = frame.f_back

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore the functions that run inside this context."""
        self._away = True
        try:
            yield
        finally:
            self._away = False


def _handles_model(frame: FrameType) -> bool:
    """Tell whether a function may handle tensors or modules of the model.

    Functions of torch, of fxprune and of the standard library do not count. Functions of other
    packages count only if they can reach tensors, modules or functions.
    """
    code = frame.f_code
    file = code.co_filename
    if is_library_file(file) or (
        file.startswith(_STANDARD_LIBRARY) and not file.startswith(_PACKAGES)
    ):
        return False
    if "torch" in frame.f_globals or code.co_freevars:
        return True
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return any(_is_tensor_or_code(frame.f_locals.get(name)) for name in arguments)


def _is_tensor_or_code(value: Any) -> bool:
    """Tell whether a value is a tensor, a module or a function."""
    if isinstance(value, (Tensor, nn.Module)):
        return True
    return callable(value) and not isinstance(value, type)


_STANDARD_LIBRARY = (
    f"{sysconfig.get_paths()['stdlib']}/",
    f"{sysconfig.get_paths()['platstdlib']}/",
    "<frozen",
)
_PACKAGES = (f"{sysconfig.get_paths()['purelib']}/", f"{sysconfig.get_paths()['platlib']}/")


def _can_turn(code: CodeType, calls_parts: bool) -> bool:
    """Tell whether code can go another way: by a branch, a handler, or a loop that calls parts."""
    names = {each.opname for each in dis.get_instructions(code)}
    turns = {"PUSH_EXC_INFO", "SEND"} | ({"FOR_ITER"} if calls_parts else set())
    return any("JUMP" in name and "IF" in name for name in names) or bool(names & turns)
