"""Shapes of joins, repetitions, other movements of data, and look-ups by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune.common.dispatch import META, aten
from fxprune.ops.shapes.common import (
    broadcast,
    empty,
    empty_like,
    given_arguments,
    like_first_shape,
)


def cat_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``cat``."""
    tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    first = tensors[0]
    if any(t.dtype != first.dtype or t.dim() != first.dim() or not t.is_meta for t in tensors):
        return None
    if not -first.dim() <= dim < first.dim():
        return None
    dim %= first.dim()
    rest = [*first.shape[:dim], *first.shape[dim + 1 :]]
    if any([*t.shape[:dim], *t.shape[dim + 1 :]] != rest for t in tensors):
        return None
    total = sum(t.shape[dim] for t in tensors)
    return first.new_empty([*first.shape[:dim], total, *first.shape[dim + 1 :]])


def stack_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``stack``."""
    given = given_arguments(func, args, kwargs)
    tensors, dim = given["tensors"], given.get("dim", 0)
    first = tensors[0]
    if any(t.dtype != first.dtype or t.shape != first.shape or not t.is_meta for t in tensors):
        return None
    if not -first.dim() - 1 <= dim <= first.dim():
        return None
    dim %= first.dim() + 1
    sizes = [*first.shape[:dim], len(tensors), *first.shape[dim:]]
    return empty(sizes, dtype=first.dtype, device=META)


def repeat_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``repeat``."""
    x, times = args
    if len(times) < x.dim() or any(count < 0 for count in times):
        return None
    old = [1] * (len(times) - x.dim()) + list(x.shape)
    sizes = [count * size for count, size in zip(times, old, strict=True)]
    return empty(sizes, dtype=x.dtype, device=META)


def reordered_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``roll`` or ``flip`` over valid, distinct dimensions."""
    x, given = args[0], given_arguments(func, args, kwargs)
    dims = given.get("dims") or ()
    if not all(-x.dim() <= dim < x.dim() for dim in dims):
        return None
    is_distinct = len({dim % x.dim() for dim in dims}) == len(dims)
    if not is_distinct or len(given.get("shifts", dims)) != len(dims):
        return None
    return like_first_shape(func, args, kwargs)


def pixel_shuffle_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``pixel_shuffle`` or ``pixel_unshuffle``."""
    x, factor = args
    if x.dim() < 3 or factor < 1:
        return None
    *batch, channels, height, width = x.shape
    if func.overloadpacket is aten.pixel_shuffle:
        fits = channels % factor**2 == 0
        sizes = (channels // factor**2, height * factor, width * factor)
    else:
        fits = height % factor == width % factor == 0
        sizes = (channels * factor**2, height // factor, width // factor)
    return x.new_empty([*batch, *sizes]) if fits else None


def channel_shuffle_shape(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """Return the shape of ``channel_shuffle``."""
    x, groups = args
    if not (x.is_meta and x.is_floating_point() and x.dim() > 2 and x.numel()):
        return None
    return empty_like(x) if groups > 0 and x.shape[1] % groups == 0 else None


def padded_shape(x: Tensor, pads: Sequence[int]) -> Tensor | None:
    """Return a padded tensor; the pads come in pairs, for the last dimension first."""
    sizes = list(x.shape)
    for n, pad in enumerate(pads):
        sizes[-1 - n // 2] += pad
    return x.new_empty(sizes) if min(sizes) > 0 else None


def constant_pad_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``constant_pad_nd``."""
    x, pads = args[:2]
    if not x.is_meta or not x.numel() or len(pads) % 2 or len(pads) > 2 * x.dim():
        return None
    is_within = all(-pad <= x.shape[-1 - n // 2] for n, pad in enumerate(pads))
    return padded_shape(x, pads) if is_within else None


def index_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``index`` with integer indices.

    If the indexed dimensions are not adjacent, the dimensions of the indices come first.
    """
    x, indices = args
    given = [index for index in indices if index is not None]
    if not given or len(indices) > x.dim() or not x.numel():
        return None
    if any(t.dtype not in (torch.int64, torch.int32) for t in given):
        return None
    found = broadcast({index.shape for index in given})
    if found is None:
        return None
    indexed = [dim for dim, index in enumerate(indices) if index is not None]
    is_adjacent = indexed[-1] - indexed[0] + 1 == len(indexed)
    first = indexed[0] if is_adjacent else 0
    kept = [dim for dim in range(x.dim()) if dim not in indexed]
    sizes = [x.shape[dim] for dim in kept]
    return empty([*sizes[:first], *found, *sizes[first:]], dtype=x.dtype, device=META)


def index_put_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``index_put``."""
    x, indices, values = args[:3]
    place = index_shape(func, (x, indices), {})
    if place is None or not x.is_meta or values.dtype != x.dtype:
        return None
    return empty_like(x) if broadcast({values.shape, place.shape}) == place.shape else None


def gather_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``gather``."""
    x, dim, index = args
    if not -x.dim() <= dim < x.dim() or index.dim() != x.dim():
        return None
    if index.dtype not in (torch.int64, torch.int32):
        return None
    others = [d for d in range(x.dim()) if d != dim % x.dim()]
    fits = all(index.shape[d] <= x.shape[d] for d in others)
    return empty(index.shape, dtype=x.dtype, device=META) if fits else None


def embedding_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``embedding``."""
    weight, indices = args[:2]
    fits = weight.is_meta and weight.dim() == 2 and indices.dtype in (torch.int64, torch.int32)
    return weight.new_empty([*indices.shape, weight.shape[1]]) if fits else None
