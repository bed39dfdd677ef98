"""What a model is called with: examples become meta tensors, and their names those of forward's parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fxprune.errors import InputError
from fxprune.shapes import META

__all__ = ["check_keywords", "example_of", "left_out", "parameter_names"]


def example_of(example_inputs: Any, batch: int | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Normalise ``example_inputs`` to (args, kwargs) of meta tensors; ``batch`` replaces a leading size of 1.

    A batch of 1 is ambiguous (an axis of size 1 broadcasts), so the analysis prefers 2.

    Raises
    ------
    InputError
        If a leaf is not a tensor.
    """
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    if isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    elif isinstance(example_inputs, tuple):
        args, kwargs = example_inputs, {}
    else:
        args, kwargs = (example_inputs,), {}
    leaves = tree_leaves((args, kwargs))
    if not leaves:
        raise InputError("example_inputs is empty: pass the tensor (or tuple, or dict of tensors) that the model is called with.")
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise InputError(
                f"example_inputs must consist of tensors, got {type(leaf).__name__}: {leaf!r:.60}. Pass a tensor, a tuple "
                "of positional arguments or a dict of keyword arguments; bind anything else with functools.partial or a "
                "wrapper module."
            )
    ranked = [leaf for leaf in leaves if leaf.dim() > 0]
    widen = batch is not None and bool(ranked) and all(leaf.shape[0] == 1 for leaf in ranked)

    def to_meta(leaf: Tensor) -> Tensor:
        shape = list(leaf.shape)
        if batch is not None and widen and shape:
            shape[0] = batch
        return torch.empty(shape, dtype=leaf.dtype, device=META)

    return tree_map(to_meta, (args, kwargs))


def parameter_names(function: Any, count: int) -> list[str]:
    code = function.__code__
    names = list(code.co_varnames[1 : code.co_argcount])
    if count > len(names) and not code.co_flags & 0x04:  # 0x04: the function takes *args
        raise InputError(
            f"example_inputs has {count} positional inputs, but forward takes {len(names)} ({', '.join(names)}). "
            "Pass a tuple of positional arguments or a dict of keyword arguments."
        )
    return (names + [f"args_{i}" for i in range(count)])[:count]


def left_out(function: Any, given: Mapping[str, Any]) -> dict[str, int]:
    """The arguments that a call leaves to their defaults, and these are whole numbers."""
    parameters = inspect.signature(function).parameters.items()
    return {name: parameter.default for name, parameter in parameters if name not in given and type(parameter.default) is int}


def check_keywords(function: Any, kwargs: Mapping[str, Any]) -> None:
    code = function.__code__
    known = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    unknown = [name for name in kwargs if name not in known]
    if unknown and not code.co_flags & 0x08:  # 0x08: the function takes **kwargs
        raise InputError(
            f"example_inputs has {unknown[0]!r}, but forward takes {', '.join(known)}: use its argument names as keys."
        )
