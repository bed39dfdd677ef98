"""Versions of the example with other sizes: batch sizes, resolutions and lengths."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fxprune.common.contents import tensors_of
from fxprune.inputs import Call, batch_size

__all__ = ["lengths", "other_batch", "other_sizes", "replace_sizes", "single_axis_sizes"]


def other_batch(call: Call, rows: int | None = None) -> Call | None:
    """Return the example with another batch size.

    Parameters
    ----------
    call:
        The example.
    rows:
        The new batch size. Default: 1, or 2 if the example's is 1.

    Returns
    -------
    The example with its rows cut or repeated; None if none of its tensors has a batch axis.
    """
    before = batch_size(call)
    resizing = _BatchResizing(before, rows or (2 if before == 1 else 1))
    kwargs = {name: resizing.resize(value) for name, value in call.kwargs.items()}
    changed = Call(tuple(resizing.resize(value) for value in call.args), kwargs)
    return changed if resizing.has_found_batch else None


@dataclass
class _BatchResizing:
    """Resizes the batch axes of nested arguments from one size to another."""

    before: int
    after: int
    has_found_batch: bool = False

    def resize(self, value: Any) -> Any:
        """Return the value with its batch axes resized."""
        if _is_list_of_tensors(value) and len(value) == self.before:
            self.has_found_batch = True
            return [value[i % self.before] for i in range(self.after)]
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == self.before:
            self.has_found_batch = True
            return _resized_tensor(value, 0, self.after)
        if type(value) in (tuple, list):
            return type(value)(self.resize(item) for item in value)
        if type(value) is dict:
            return {key: self.resize(item) for key, item in value.items()}
        return value


def _is_list_of_tensors(value: Any) -> bool:
    return type(value) is list and all(isinstance(item, Tensor) for item in value)


def other_sizes(call: Call) -> Iterator[tuple[str, Call]]:
    """Yield the example at other resolutions and lengths, each with a text of what changed.

    Axes of equal size change together.
    """
    first = _first_size_axis(call)
    images = [tensor for tensor in tensors_of(call) if tensor.dim() - first > 2]
    resolution = {size for image in images for size in image.shape[-2:] if size > 2}
    together = [tuple(sorted(resolution))] if len(resolution) > 1 else []
    for sizes in [*together, *((size,) for size in lengths(call) if size > 2)]:
        for other in (_half, _odd, _next):
            new = {size: other(size) for size in sizes}
            text = ", ".join(f"{to} for {size}" for size, to in new.items())
            yield text, replace_sizes(call, new)


def single_axis_sizes(call: Call) -> Iterator[tuple[str, Call]]:
    """Yield the example with one axis longer by one, each with a text of what changed.

    Only axes of the same size as another axis are taken: the two need not be equal.
    """
    first, tensors = _first_size_axis(call), tensors_of(call)
    sizes = [size for tensor in tensors for size in tensor.shape[first:] if size > 1]
    for dim in range(first, max((tensor.dim() for tensor in tensors), default=0)):
        along = {tensor.shape[dim] for tensor in tensors if tensor.dim() > dim} - {0, 1}
        if len(along) == 1 and sizes.count(size := along.pop()) > 1:
            longer = functools.partial(_longer, dim=dim, size=size)
            changed = Call(*tree_map_only(Tensor, longer, call))
            yield f"{size + 1} for {size} along axis {dim}", changed


def replace_sizes(call: Call, new: dict[int, int]) -> Call:
    """Return the example with sizes replaced; batch axes keep theirs.

    ``new`` leads from an old size to the new one.
    """
    resized = functools.partial(_with_sizes, new=new, first=_first_size_axis(call))
    return Call(*tree_map_only(Tensor, resized, call))


def lengths(call: Call) -> list[int]:
    """Return the distinct sizes of all axes but batch axes, the largest first."""
    first = _first_size_axis(call)
    return sorted(
        {size for tensor in tensors_of(call) for size in tensor.shape[first:]}, reverse=True
    )


def _first_size_axis(call: Call) -> int:
    """Return the first axis after the batch axis; images in a list have no batch axis."""
    return 0 if any(type(value) is list for value in call.values) else 1


def _half(size: int) -> int:
    """Return half of an even size; an odd one less 1."""
    return size // 2 if size % 2 == 0 else size - 1


def _odd(size: int) -> int:
    """Return the size plus 1, which has no divisor but 1 in common with the size."""
    return size + 1


def _next(size: int) -> int:
    """Return another size that is a multiple of 32 if the old one is.

    Small sizes are doubled. Large ones get smaller, because that takes less time.
    """
    return size - 32 if size > 64 else 2 * size


def _longer(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Return the tensor longer by one along a dimension, if its size there is ``size``."""
    return (
        _resized_tensor(tensor, dim, size + 1)
        if tensor.dim() > dim and tensor.shape[dim] == size
        else tensor
    )


def _with_sizes(tensor: Tensor, new: dict[int, int], first: int) -> Tensor:
    """Return the tensor with sizes replaced, from the dimension ``first`` on."""
    for dim, size in enumerate(tensor.shape[first:], start=first):
        if size in new:
            tensor = _resized_tensor(tensor, dim, new[size])
    return tensor


def _resized_tensor(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Return the tensor with another size along a dimension: cut, or repeated from its start."""
    if tensor.is_meta:  # no data to copy
        shape = [*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]]
        return torch.empty(shape, dtype=tensor.dtype, device="meta")
    return tensor.index_select(dim, torch.arange(size, device=tensor.device) % tensor.shape[dim])
