"""The example at other sizes: with more rows or fewer, at other resolutions and lengths."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fxprune.common.contents import tensors_of
from fxprune.inputs import Call, batch_size

__all__ = ["lengths", "other_batch", "other_sizes", "sizes_alone", "with_sizes"]


def other_batch(call: Call, rows: int | None = None) -> Call | None:
    """The example with so many rows, default: 1 if it has more; None where its tensors have
    none.
    """
    before = batch_size(call)
    wanted = rows or (2 if before == 1 else 1)
    found = False

    def value(given: object) -> object:
        nonlocal found
        if (
            type(given) is list
            and len(given) == before
            and all(isinstance(item, Tensor) for item in given)
        ):
            found = True
            return [given[i % before] for i in range(wanted)]
        if isinstance(given, Tensor) and given.dim() and given.shape[0] == before:
            found = True
            return _resized_tensor(given, 0, wanted)
        if type(given) in (tuple, list):
            return type(given)(value(item) for item in given)  # type: ignore[call-arg, attr-defined]
        return {key: value(item) for key, item in given.items()} if type(given) is dict else given

    kwargs = {name: value(given) for name, given in call.kwargs.items()}
    changed = Call(tuple(value(given) for given in call.args), kwargs)
    return changed if found else None


def other_sizes(call: Call) -> Iterator[tuple[str, Call]]:
    """The example at other resolutions and lengths, with what changed: sizes that are equal change
    together.
    """
    first = _first_size_axis(call)
    tensors = tensors_of(call)
    images = {
        size
        for tensor in tensors
        for size in tensor.shape[-2:]
        if tensor.dim() - first > 2 and size > 2
    }
    together = [tuple(sorted(images))] if len(images) > 1 else []
    for sizes in [*together, *((size,) for size in lengths(call) if size > 2)]:
        for other in (_half, _odd, _next):
            new = {size: other(size) for size in sizes}
            text = ", ".join(f"{to} for {size}" for size, to in new.items())
            yield text, with_sizes(call, new)


def sizes_alone(call: Call) -> Iterator[tuple[str, Call]]:
    """The example with one axis longer by one, where another axis has the same size: they need not
    be equal.
    """
    first, tensors = _first_size_axis(call), tensors_of(call)
    for dim in range(first, max((tensor.dim() for tensor in tensors), default=0)):
        sizes = [
            size
            for tensor in tensors
            for d, size in enumerate(tensor.shape)
            if d >= first and size > 1
        ]
        own = {
            tensor.shape[dim] for tensor in tensors if tensor.dim() > dim and tensor.shape[dim] > 1
        }
        if len(own) == 1 and sizes.count(size := own.pop()) > 1:
            longer = functools.partial(_longer, dim=dim, size=size)
            changed = Call(*tree_map_only(Tensor, longer, call))
            yield f"{size + 1} for {size} along axis {dim}", changed


def with_sizes(call: Call, new: dict[int, int]) -> Call:
    """The example with other numbers for its sizes, but for those of its batch."""
    resized = functools.partial(_with_sizes, new=new, first=_first_size_axis(call))
    return Call(*tree_map_only(Tensor, resized, call))


def lengths(call: Call) -> list[int]:
    """The sizes of the example's tensors but for those of its batch, the largest first."""
    first = _first_size_axis(call)
    return sorted(
        {size for tensor in tensors_of(call) for size in tensor.shape[first:]}, reverse=True
    )


def _first_size_axis(call: Call) -> int:
    """The first axis that is none of the batch: images in a list have no such axis."""
    return 0 if any(type(value) is list for value in call.values) else 1


def _half(size: int) -> int:
    return size // 2 if size % 2 == 0 else size - 1


def _odd(size: int) -> int:
    """One more: a multiple of nothing that the example's size is a multiple of."""
    return size + 1


def _next(size: int) -> int:
    """Another multiple of 32, if it is one; small ones get larger, large ones smaller, which takes
    less time.
    """
    return size - 32 if size > 64 else 2 * size


def _longer(tensor: Tensor, dim: int, size: int) -> Tensor:
    return (
        _resized_tensor(tensor, dim, size + 1)
        if tensor.dim() > dim and tensor.shape[dim] == size
        else tensor
    )


def _with_sizes(tensor: Tensor, new: dict[int, int], first: int) -> Tensor:
    for dim, size in enumerate(tensor.shape[first:], start=first):
        if size in new:
            tensor = _resized_tensor(tensor, dim, new[size])
    return tensor


def _resized_tensor(tensor: Tensor, dim: int, size: int) -> Tensor:
    """The tensor with another size along one dimension: cut, or repeated from its beginning."""
    return tensor.index_select(dim, torch.arange(size, device=tensor.device) % tensor.shape[dim])
