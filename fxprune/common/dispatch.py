"""Seeing ATen operations: a mode that does so, and the tensors among their arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.common.contents import tensors_of

aten = torch.ops.aten

__all__ = [
    "META",
    "DispatchMode",
    "aten",
    "holds_tensors",
    "is_composite",
    "map_tensors",
    "tensors_in",
]

META = torch.device("meta")


def tensors_in(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among an ATen op's arguments, which nest them in lists at most."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def holds_tensors(value: Any) -> bool:
    """Whether there is a tensor anywhere in nested containers."""
    return bool(tensors_of(value))


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Nested arguments of an ATen op, with the function's result in the place of each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        items = [map_tensors(function, item) for item in value]
        # a named tuple takes its entries one by one
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    return value


@functools.cache
def is_composite(func: Any) -> bool:
    """Whether an op is made of others, for every kind of tensor."""
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    )


class DispatchMode(TorchDispatchMode):
    """A mode whose ``__torch_dispatch__`` is called as it is.

    torch wraps that of any other mode in what keeps the compiler out of it, which imports the
    compiler and sympy at the first call, hundreds of modules, and takes longer at every call than
    most operations on meta tensors.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
