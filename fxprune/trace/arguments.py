"""The arguments of a model's call, and the names of forward's parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from fxprune.errors import InputError
from fxprune.inputs import Call, read, shapes_of

__all__ = ["check_keywords", "example_of", "omitted_integers", "parameter_names"]


def example_of(example_inputs: Any) -> Call:
    """Return the call that example inputs describe, with meta tensors."""
    return shapes_of(read(example_inputs))


def parameter_names(function: Any, count: int, skipped: int = 1) -> list[str]:
    """Return names for the positional arguments of a call.

    Parameters
    ----------
    function:
        The function that is called.
    count:
        The number of positional arguments.
    skipped:
        The number of parameters in front of them: 1 for ``self``.

    Raises
    ------
    InputError
        If the function takes fewer positional arguments.
    """
    code = function.__code__
    names = list(code.co_varnames[skipped : code.co_argcount])
    if count > len(names) and not code.co_flags & 0x04:  # 0x04: the function takes *args
        raise InputError(
            f"example_inputs has {count} positional inputs, but forward takes {len(names)} "
            f"({', '.join(names)}). Pass a tuple of positional arguments or a dict of keyword "
            "arguments."
        )
    return (names + [f"args_{i}" for i in range(count)])[:count]


def omitted_integers(function: Any, given: Mapping[str, Any]) -> dict[str, int]:
    """Return the parameters that a call leaves out and whose default is an ``int``.

    Parameters
    ----------
    function:
        The function that is called.
    given:
        The call's arguments by name.

    Returns
    -------
    dict
        The defaults, by the names of the parameters.
    """
    omitted = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in given and type(parameter.default) is int:
            omitted[name] = parameter.default
    return omitted


def check_keywords(function: Any, kwargs: Mapping[str, Any], skipped: int = 1) -> None:
    """Refuse keyword arguments that a function does not take.

    Parameters
    ----------
    function:
        The function that is called.
    kwargs:
        The keyword arguments.
    skipped:
        The number of parameters in front of the inputs: 1 for ``self``.

    Raises
    ------
    InputError
    """
    code = function.__code__
    known = code.co_varnames[skipped : code.co_argcount + code.co_kwonlyargcount]
    unknown = [name for name in kwargs if name not in known]
    if unknown and not code.co_flags & 0x08:  # 0x08: the function takes **kwargs
        raise InputError(
            f"example_inputs has {unknown[0]!r}, but forward takes {', '.join(known)}: use its "
            "argument names as keys."
        )
