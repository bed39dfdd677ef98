"""The lines of the user's code at which something happens."""

from __future__ import annotations

import functools
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from fxprune.errors import TraceError

__all__ = [
    "UNKNOWN",
    "ElsewhereError",
    "calling_function",
    "following",
    "higher_order_message",
    "is_library_file",
    "user_frames",
    "user_line",
]

UNKNOWN = "an unknown line"


class _Followed(threading.local):
    """The frame in which this thread entered the model that it follows."""

    entry: FrameType | None = None


_followed = _Followed()


@contextmanager
def following() -> Iterator[None]:
    """Follow a model's code inside this context.

    Frames outside of it, such as the caller of ``prune``, are no lines of the model.
    """
    outer = _followed.entry
    _followed.entry = sys._getframe(2)  # past contextlib
    try:
        yield
    finally:
        _followed.entry = outer


class ElsewhereError(TraceError):
    """An error because forward lets another thread compute, which nobody can follow."""

    @classmethod
    def at(cls, thread: int) -> ElsewhereError:
        """Return the error for a thread that runs forward.

        Parameters
        ----------
        thread:
            The identifier of the thread.
        """
        return cls(
            "forward lets another thread compute with tensors (at "
            f"{_line_of(sys._current_frames().get(thread))}), which cannot be followed. Compute "
            "in one thread, as torch uses several by itself."
        )


def _line_of(frame: FrameType | None) -> str:
    """Return the innermost line of a thread outside of Python's libraries, torch and fxprune."""
    while frame is not None:
        filename = frame.f_code.co_filename
        if not _is_internal(filename) and not filename.startswith(_THREAD_FILES):
            return f"{filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return UNKNOWN


def user_line(stack: Any = None) -> str:
    """Return ``file:line`` of the innermost frame outside of torch and fxprune.

    If a model that is followed consists of torch's own code alone, return the innermost line of
    torch.

    Parameters
    ----------
    stack:
        The entries of a traceback (see :func:`traceback.extract_tb`). Default: the present stack.
    """
    if stack is not None:
        for entry in reversed(stack):
            if not _is_internal(entry.filename):
                return f"{entry.filename.rsplit('/', 1)[-1]}:{entry.lineno}"
        return UNKNOWN
    frame, of_torch = sys._getframe(1), ""
    while frame is not None and frame is not _followed.entry:
        filename = frame.f_code.co_filename
        line = f"{filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        if not _is_internal(filename):
            return line
        if not of_torch and filename.startswith(_TORCH) and filename != _CALL_FILE:
            of_torch = line
        frame = frame.f_back  # type: ignore[assignment]
    return of_torch or UNKNOWN


def calling_function() -> str:
    """Return who runs the present operation.

    Either ``"forward"``, or the function or module of torch that a line of forward calls.
    """
    frame, found = sys._getframe(1), "forward"
    while (
        frame is not None
        and frame is not _followed.entry
        and (is_library_file(frame.f_code.co_filename) or found == "forward")
    ):
        filename, name = frame.f_code.co_filename, frame.f_code.co_name
        if filename.startswith(_TORCH) and filename != _CALL_FILE and not name.startswith("<"):
            module = frame.f_locals.get("self")
            is_module = isinstance(module, torch.nn.Module)
            found = f"torch's {type(module).__name__ if is_module else name.strip('_')}"
        elif not is_library_file(filename):
            break
        frame = frame.f_back  # type: ignore[assignment]
    return found


def higher_order_message(error: BaseException) -> str:
    """Return the message for an error of a torch operation that takes functions.

    Such an operation cannot be looked into. Empty for other errors.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not frames or frames[-1].f_code is not torch._ops.HigherOrderOperator.dispatch.__code__:
        return ""
    name = frames[-1].f_locals["self"].name()
    line = user_line(traceback.extract_tb(error.__traceback__))
    return (
        f"forward calls torch's {name} (at {line}), an operation that takes functions, into "
        "which nothing can look. Use operations on tensors alone, as "
        "F.scaled_dot_product_attention with a mask."
    )


def user_frames() -> tuple[tuple[str, int], ...]:
    """Return file and line of each frame of a followed model, the innermost first.

    Frames of torch and fxprune are left out. Generated code has no file, and its name differs in
    each copy of a module, so it has the name of its function instead.
    """
    frame, found = sys._getframe(1), []
    while frame is not None and frame is not _followed.entry:
        filename = frame.f_code.co_filename
        if not is_library_file(filename):
            name = frame.f_code.co_name if filename.startswith("<") else filename
            found.append((name, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(found)


_PACKAGE_FOLDER = f"{Path(__file__).parents[1]}/"
_THREAD_FILES = (
    f"{Path(threading.__file__).parent}/concurrent",
    f"{Path(threading.__file__).parent}/asyncio",
    threading.__file__,
)
_TORCH = f"{Path(torch.__file__).parent}/"
_CALL_FILE = torch.nn.Module.__call__.__code__.co_filename  # each call of a module goes through it


def is_library_file(filename: str) -> bool:
    """Tell whether a file belongs to fxprune or to torch."""
    return filename.startswith((_PACKAGE_FOLDER, _TORCH))


@functools.cache
def _is_internal(filename: str) -> bool:
    """Tell whether a file is not the user's: generated, of torch, fxprune or Python's helpers."""
    is_helper = "/contextlib.py" in filename or "/unittest/" in filename
    return filename.startswith("<") or is_library_file(filename) or is_helper
