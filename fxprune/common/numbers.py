"""Checks of arguments, which turn numbers, switches, paths and devices into plain types.

NumPy numbers and tensors with a single element count as numbers.
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

from fxprune.common.public import short_repr
from fxprune.errors import ArgumentError

__all__ = [
    "as_device",
    "as_number",
    "as_path",
    "check_bool",
    "check_integer",
    "check_number",
    "check_share",
]


def as_number(value: Any) -> int | float | None:
    """Return a real number as an int or a float; None for anything else, including bools.

    A number of less than double precision becomes the decimal number that it is printed as.

    >>> given = 3, np.int64(3), np.float32(0.7), torch.tensor(0.5), True, "3"
    >>> tuple(map(as_number, given))
    (3, 3, 0.7, 0.5, None, None)
    """
    if isinstance(value, Tensor):
        if value.dim() or value.is_meta or value.is_complex() or value.dtype is torch.bool:
            return None
        value = value.detach().cpu()
        if value.is_floating_point() and value.dtype not in (torch.float16, torch.float64):
            value = value.float()  # NumPy does not have bfloat16 and smaller types
        value = value.numpy()
    if isinstance(value, np.ndarray) and not value.ndim:
        value = value[()]
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(str(value)) if isinstance(value, np.floating) else float(value)


def check_share(name: str, value: Any, meaning: str) -> float:
    """Return a number in (0, 1] as a float.

    Parameters
    ----------
    name:
        Name of the argument, for the error message.
    value:
        The argument.
    meaning:
        What the number means, for the error message.

    Raises
    ------
    ArgumentError
        If the value is not a number in (0, 1].
    """
    found = as_number(value)
    if found is None or not math.isfinite(found) or not 0 < found <= 1:
        raise ArgumentError(
            f"{name}={short_repr(value)} is outside (0, 1]: it is {meaning}, e.g. {name}=0.5."
        )
    return float(found)


def check_integer(name: str, value: Any, least: int = 1) -> int:
    """Return a whole number as an int.

    ``name`` is the name of the argument, for the error message.

    Raises
    ------
    ArgumentError
        If the value is not a whole number or is below ``least``.
    """
    found = as_number(value)
    if not isinstance(found, int) or found < least:
        message = f"{name}={short_repr(value)} must be a whole number of at least {least}."
        raise ArgumentError(message)
    return found


def check_number(
    name: str, value: Any, *, above: float | None = None, least: float = 0.0
) -> float:
    """Return a finite number as a float.

    Parameters
    ----------
    name:
        Name of the argument, for the error message.
    value:
        The argument.
    above:
        A number that the value must exceed, in the place of ``least``.
    least:
        The smallest number that is allowed.

    Raises
    ------
    ArgumentError
        If the value is no finite number, or is too small.

    >>> check_number("rate", 0, least=0)
    0.0
    """
    found = as_number(value)
    small = found is not None and (found < least if above is None else found <= above)
    if found is None or small or not math.isfinite(found):
        bound = f"of at least {least:g}" if above is None else f"above {above:g}"
        raise ArgumentError(f"{name}={short_repr(value)} must be a finite number {bound}.")
    return float(found)


def check_bool(name: str, value: Any) -> bool:
    """Return a boolean as a bool.

    ``name`` is the name of the argument, for the error message.

    Raises
    ------
    ArgumentError
        If the value is neither True nor False.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentError(f"{name}={short_repr(value)} is neither True nor False.")
    return bool(value)


def as_path(name: str, value: Any) -> Path:
    """Return the name of a file or a folder as a path.

    ``name`` is the name of the argument, for the error message.

    Raises
    ------
    ArgumentError
        If the value is not a path, or contains characters that no file name can have.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise ArgumentError(
            f"{name} is {short_repr(value)}, a {type(value).__name__}: give a path."
        )
    try:
        is_valid = b"\0" not in os.fsencode(value)
    except ValueError:  # characters that no file name can have on this system
        is_valid = False
    if not is_valid:
        raise ArgumentError(
            f"{name} {short_repr(value)} is a name that no file system takes: give another."
        )
    return Path(os.fsdecode(value))


def as_device(name: str, value: Any, *, here: bool = True) -> torch.device:
    """Return a device.

    Parameters
    ----------
    name:
        Name of the argument, for the error message.
    value:
        Name of the device, or the device itself.
    here:
        Check that tensors can be created on the device.

    Raises
    ------
    ArgumentError
        If there is no such device.
    """
    try:
        device = torch.device(value)
        if here:
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        # torch raises any of these if there is no such device
        raise ArgumentError(
            f"{name}={short_repr(value)} cannot be used here: {str(error).splitlines()[0]:.200}"
        ) from error
    return device
