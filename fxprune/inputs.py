"""Example inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments, tensors nested inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["as_call", "batch_size", "drawn"]


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments.

    >>> as_call(1), as_call([1, 2]), as_call({"x": 1})
    (((1,), {}), ((1, 2), {}), ((), {'x': 1}))
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def batch_size(example_inputs: Any) -> int:
    """The rows of the first tensor that has any; 1 where none has.

    >>> batch_size((torch.tensor(3.0), torch.zeros(4, 2))), batch_size(None)
    (4, 1)
    """
    return next((leaf.shape[0] for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor) and leaf.dim()), 1)


def drawn(example_inputs: Any, *, batch: int | None = None, seed: int = 0) -> Any:
    """Inputs like the example's: floating-point values drawn from a normal distribution, others as they are, repeated.

    ``batch`` gives every tensor that has as many rows as the first one so many instead.

    >>> x, index = drawn((torch.zeros(2, 3), torch.tensor([5, 7])), batch=3)
    >>> x.shape, index
    (torch.Size([3, 3]), tensor([5, 7, 5]))
    """
    rows, generator = batch_size(example_inputs), torch.Generator().manual_seed(seed)

    def one(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if batch is not None and tensor.dim() and tensor.shape[0] == rows:
            tensor = tensor[torch.arange(batch, device=tensor.device) % rows]
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)

    return tree_map_only(Tensor, one, example_inputs)
