"""Tools to observe ATen operations: a dispatch mode, and the tensors among arguments."""

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
    """Return the tensors among the arguments of an ATen op.

    Such arguments hold tensors directly or in a list, never deeper.
    """
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def holds_tensors(value: Any) -> bool:
    """Tell whether nested containers hold a tensor."""
    return bool(tensors_of(value))


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return nested arguments with each tensor replaced by the result of ``function``."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        items = [map_tensors(function, item) for item in value]
        # a named tuple takes its entries as separate arguments
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    return value


@functools.cache
def is_composite(func: Any) -> bool:
    """Tell whether an ATen op is composed of other ops for every kind of tensor.

    Such an op has a ``CompositeImplicitAutograd`` kernel.
    """
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    )


class DispatchMode(TorchDispatchMode):
    """A dispatch mode whose ``__torch_dispatch__`` is called without a wrapper.

    Torch wraps the method of other modes to keep the compiler out of it. At the first call the
    wrapper imports the compiler and sympy, hundreds of modules. At every call it takes longer than
    most operations on meta tensors.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
