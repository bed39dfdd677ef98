"""Numbers and switches as callers write them, checked, as Python's own: NumPy's numbers and
tensors of one number are numbers.
"""

from __future__ import annotations

import math
import numbers
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.common.public import shown
from fxprune.errors import ArgumentError

__all__ = ["device_of", "number", "path_of", "share", "switch", "whole"]


def number(value: Any) -> int | float | None:
    """A real number as an int or a float; None if it is something else, as a bool is.

    A number of less than double precision means the decimal that it is written as.

    >>> given = 3, np.int64(3), np.float32(0.7), torch.tensor(0.5), True, "3"
    >>> tuple(map(number, given))
    (3, 3, 0.7, 0.5, None, None)
    """
    if isinstance(value, Tensor):
        if value.dim() or value.is_meta or value.is_complex() or value.dtype is torch.bool:
            return None
        value = value.detach().cpu()
        value = (
            value
            if value.dtype in (torch.float16, torch.float64) or not value.is_floating_point()
            else value.float()
        ).numpy()
    if isinstance(value, np.ndarray) and not value.ndim:
        value = value[()]
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(str(value)) if isinstance(value, np.floating) else float(value)


def share(name: str, value: Any, meaning: str) -> float:
    """A number in (0, 1].

    Raises
    ------
    ArgumentError
    """
    found = number(value)
    if found is None or not math.isfinite(found) or not 0 < found <= 1:
        raise ArgumentError(
            f"{name}={shown(value)} is outside (0, 1]: it is {meaning}, e.g. {name}=0.5."
        )
    return float(found)


def whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least ``least``.

    Raises
    ------
    ArgumentError
    """
    found = number(value)
    if not isinstance(found, int) or found < least:
        raise ArgumentError(f"{name}={shown(value)} must be a whole number of at least {least}.")
    return found


def switch(name: str, value: Any) -> bool:
    """True or False.

    Raises
    ------
    ArgumentError
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentError(f"{name}={shown(value)} is neither True nor False.")
    return bool(value)


def path_of(name: str, value: Any) -> Path:
    """A file or a folder as a path.

    Raises
    ------
    ArgumentError
    """
    if not isinstance(value, (str, os.PathLike)):
        raise ArgumentError(f"{name} is {shown(value)}, a {type(value).__name__}: give a path.")
    try:
        named = b"\0" not in os.fsencode(value)
    except ValueError:  # characters that no file name can have here
        named = False
    if not named:
        raise ArgumentError(
            f"{name} {shown(value)} is a name that no file system takes: give another."
        )
    return Path(os.fsdecode(value))


def device_of(name: str, value: Any, *, here: bool = True) -> torch.device:
    """A device, on which tensors can be made ``here``.

    Raises
    ------
    ArgumentError
    """
    try:
        device = torch.device(value)
        if here:
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        # torch raises any of them where there is no such device
        raise ArgumentError(
            f"{name}={shown(value)} cannot be used here: {str(error).splitlines()[0]:.200}"
        ) from error
    return device
