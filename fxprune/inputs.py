"""Example inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments, tensors nested inside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["as_call", "batch_size", "drawn"]


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: a tuple holds the former, a mapping the latter; anything else, a list too, is one argument.

    >>> as_call(1), as_call((1, 2)), as_call([1, 2]), as_call({"x": 1})
    (((1,), {}), ((1, 2), {}), (([1, 2],), {}), ((), {'x': 1}))
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    return (example_inputs,), {}


def batch_size(example_inputs: Any) -> int:
    """How many examples: the length of the first list of tensors (a detector's images), or the rows of the first tensor; else 1.

    >>> batch_size((torch.tensor(3.0), torch.zeros(4, 2))), batch_size(([torch.zeros(3, 8, 8)] * 2,)), batch_size(None)
    (4, 2, 1)
    """
    for value in _values(example_inputs):
        if _is_list(value):
            return len(value)
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.dim():
                return leaf.shape[0]
    return 1


def drawn(example_inputs: Any, *, batch: int | None = None, seed: int = 0) -> Any:
    """Inputs like the example's: floating-point values drawn from a normal distribution, others as they are, repeated.

    ``batch`` gives every tensor that has as many rows as there are examples, and every list of so many tensors, so many instead.

    >>> x, index = drawn((torch.zeros(2, 3), torch.tensor([5, 7])), batch=3)
    >>> x.shape, index
    (torch.Size([3, 3]), tensor([5, 7, 5]))
    """
    rows, generator = batch_size(example_inputs), torch.Generator().manual_seed(seed)
    wanted = rows if batch is None else batch

    def one(tensor: Tensor, of_list: bool = False) -> Tensor:
        tensor = tensor.detach()
        if not of_list and tensor.dim() and tensor.shape[0] == rows and wanted != rows:
            tensor = tensor[torch.arange(wanted, device=tensor.device) % rows]
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)

    def value(given: Any) -> Any:
        if _is_list(given) and len(given) == rows:
            return [one(given[i % rows], of_list=True) for i in range(wanted)]
        return tree_map_only(Tensor, one, given)

    if isinstance(example_inputs, Mapping):
        return {name: value(given) for name, given in example_inputs.items()}
    if isinstance(example_inputs, tuple):
        return tuple(value(given) for given in example_inputs)
    return value(example_inputs)


def _values(example_inputs: Any) -> Iterable[Any]:
    args, kwargs = as_call(example_inputs)
    return (*args, *kwargs.values())


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Tensor) for item in value)
