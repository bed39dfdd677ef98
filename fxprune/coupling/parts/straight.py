"""Whether the Python between parts can go one way only, whatever the numbers that it has taken out
of tensors.
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
from fxprune.trace.user_code import is_ours

__all__ = ["is_straight"]


def is_straight(model: nn.Module, parts: Collection[str], run: Callable[[], object]) -> bool:
    """Whether what runs outside of parts has no branch, no handler of exceptions, no loop that
    calls parts, and chooses no module.

    A loop without calls of parts computes more or less of the same; a branch may choose what goes
    into the next part.

    Parameters
    ----------
    run:
        Calls the model, whose modules at the paths of ``parts`` are called as they are.
    """
    seen = _Profile()

    def part(path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        seen.note_callers()
        with seen.looking_away():
            return call()

    before = sys.getprofile()
    with intercepted(model, parts, part):
        sys.setprofile(seen)
        try:
            run()
        finally:
            sys.setprofile(before)
    return not seen.chooses and not any(
        _can_turn(code, code in seen.callers) for code in seen.codes
    )


class _Profile:
    """What :func:`sys.setprofile` tells of the model's own functions."""

    def __init__(self) -> None:
        self.codes: set[CodeType] = set()
        self.callers: set[CodeType] = set()  # those that call parts, directly or not
        self.chooses = False
        self._away = False

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if self._away:
            return
        code = frame.f_code
        if event == "c_call" and arg is getattr and _is_models(frame):
            self.chooses = True
        if event != "call":
            return
        if _is_models(frame):
            self.codes.add(code)
        elif code.co_name == "__getitem__" and isinstance(frame.f_locals.get("self"), nn.Module):
            self.chooses = True

    def note_callers(self) -> None:
        """Note the functions that are running."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            self.callers.add(frame.f_code)
            frame = frame.f_back

    @contextmanager
    def looking_away(self) -> Iterator[None]:
        self._away = True
        try:
            yield
        finally:
            self._away = False


def _is_models(frame: FrameType) -> bool:
    """Whether a function may have to do with the tensors and modules of the model: not torch's,
    nor Python's, nor NumPy's.
    """
    code = frame.f_code
    if is_ours(code.co_filename) or (
        code.co_filename.startswith(_STANDARD_LIBRARY)
        and not code.co_filename.startswith(_PACKAGES)
    ):
        return False
    given = [
        frame.f_locals.get(name)
        for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    ]
    return (
        "torch" in frame.f_globals
        or bool(code.co_freevars)
        or any(
            isinstance(value, (Tensor, nn.Module))
            or (callable(value) and not isinstance(value, type))
            for value in given
        )
    )


_STANDARD_LIBRARY = (
    f"{sysconfig.get_paths()['stdlib']}/",
    f"{sysconfig.get_paths()['platstdlib']}/",
    "<frozen",
)
_PACKAGES = (f"{sysconfig.get_paths()['purelib']}/", f"{sysconfig.get_paths()['platlib']}/")


def _can_turn(code: CodeType, calls_parts: bool) -> bool:
    names = {at.opname for at in dis.get_instructions(code)}
    turns = {"PUSH_EXC_INFO", "SEND"} | ({"FOR_ITER"} if calls_parts else set())
    return any("JUMP" in name and "IF" in name for name in names) or bool(names & turns)
