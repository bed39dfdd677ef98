"""Where in the user's code something happens."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["is_ours", "user_line"]


def user_line(stack: Any = None) -> str:
    """``file:line`` of the innermost frame that belongs neither to torch nor to fxprune."""
    if stack is not None:
        for entry in reversed(stack):
            if not _internal(entry.filename):
                return f"{entry.filename.rsplit('/', 1)[-1]}:{entry.lineno}"
        return "an unknown line"
    frame = sys._getframe(1)
    while frame is not None:
        if not _internal(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "an unknown line"


_OWN = f"{Path(__file__).parents[1]}/"
_TORCH = f"{Path(torch.__file__).parent}/"


def is_ours(filename: str) -> bool:
    """Whether a file belongs to this package or to torch."""
    return filename.startswith((_OWN, _TORCH))


@functools.cache
def _internal(filename: str) -> bool:
    return filename.startswith("<") or is_ours(filename) or "/contextlib.py" in filename or "/unittest/" in filename
