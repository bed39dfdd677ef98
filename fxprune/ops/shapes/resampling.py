"""Shapes of poolings, resamplings, spatial paddings and windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxprune.ops.shapes.common import as_many, given_arguments, spatial_rank, with_positions
from fxprune.ops.shapes.movement import padded_shape


def pool_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of a max or average pooling whose windows lie inside the padded input."""
    given = given_arguments(func, args, kwargs)
    x, count = given["self"], spatial_rank(func)
    kernel = as_many(given["kernel_size"], count)
    stride = as_many(given.get("stride") or kernel, count)
    padding = as_many(given.get("padding") or 0, count)
    dilation = as_many(given.get("dilation") or 1, count)
    if not _is_image(x, count) or given.get("ceil_mode"):
        return None
    sizes = list(zip(x.shape[-count:], kernel, stride, padding, dilation, strict=True))
    if any(2 * p > k or s < 1 or n < k for n, k, s, p, _ in sizes):
        return None  # PyTorch reports an error, if it is one
    spatial = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    return x.new_empty([*x.shape[:-count], *spatial]) if min(spatial) > 0 and x.numel() else None


def pool_with_indices_shape(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Return the shapes of a max pooling with indices."""
    return with_positions(pool_shape(func, args, kwargs))


def adaptive_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of an adaptive pooling."""
    x, size = args[0], args[1] if len(args) > 1 else kwargs["output_size"]
    size = [int(s) for s in size]
    if any(s < 0 for s in size) or x.dim() < len(size) + 1:
        return None
    return x.new_empty([*x.shape[: x.dim() - len(size)], *size])


def adaptive_with_indices_shape(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Return the shapes of an adaptive max pooling with indices."""
    x, count = args[0], len(args[1])
    fits = _is_image(x, count) and x.numel() and count == spatial_rank(func)
    return with_positions(adaptive_shape(func, args, kwargs)) if fits else None


def upsample_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of an upsampling to given sizes or by given factors."""
    if func._overloadname != "vec":
        return None
    given = given_arguments(func, args, kwargs)
    x, size = given["input"], given.get("output_size")
    if size is None:
        factors = given["scale_factors"]
        size = [int(n * factor) for n, factor in zip(x.shape[2:], factors, strict=True)]
    return x.new_empty([*x.shape[:2], *size])


def grid_sampler_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``grid_sampler``, whose grid has a coordinate per spatial dimension."""
    x, grid = args[:2]
    rank = spatial_rank(func)
    if not x.is_meta or not x.numel() or x.dtype != grid.dtype:
        return None
    fits = x.dim() == grid.dim() == rank + 2 and x.shape[0] == grid.shape[0]
    if not fits or grid.shape[-1] != rank:
        return None
    return x.new_empty([*x.shape[:2], *grid.shape[1:-1]])


def pad_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of a reflection or replication padding with non-negative amounts."""
    x, pads = args
    count = spatial_rank(func)
    if not _is_image(x, count) or not x.numel() or min(pads) < 0:
        return None
    if len(pads) != 2 * count:
        return None  # PyTorch reports the error
    is_too_large = any(pad >= x.shape[-1 - n // 2] for n, pad in enumerate(pads))
    if is_too_large and "reflection" in func._schema.name:
        return None
    return padded_shape(x, pads)


def _is_image(x: Tensor, count: int) -> bool:
    """Tell whether a meta tensor is a batch of images with ``count`` dimensions, or one image."""
    return x.is_meta and x.is_floating_point() and x.dim() in (count + 1, count + 2)


def _windows(
    sizes: Sequence[int], kernel: Any, dilation: Any, padding: Any, stride: Any
) -> list[int] | None:
    """Return the number of windows along each of two dimensions, or None if it is invalid."""
    lists = [list(value) for value in (sizes, kernel, dilation, padding, stride)]
    if any(len(values) != 2 for values in lists) or min(padding) < 0:
        return None
    if min(map(min, (sizes, kernel, dilation, stride))) < 1:
        return None
    counts = [1 + (n + 2 * p - d * (k - 1) - 1) // s for n, k, d, p, s in zip(*lists, strict=True)]
    return counts if min(counts) > 0 else None


def im2col_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``im2col``: a column of channels per window."""
    x, kernel = args[:2]
    if not x.is_meta or x.dim() not in (3, 4) or not x.numel():
        return None
    counts = _windows(x.shape[-2:], *args[1:])
    if counts is None:
        return None
    return x.new_empty([*x.shape[:-3], x.shape[-3] * math.prod(kernel), math.prod(counts)])


def col2im_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``col2im``, the reverse of ``im2col``."""
    x, size, kernel = args[:3]
    counts = _windows(size, *args[2:]) if x.is_meta and x.dim() in (2, 3) and x.numel() else None
    if counts is None or x.shape[-1] != math.prod(counts) or x.shape[-2] % math.prod(kernel):
        return None
    return x.new_empty([*x.shape[:-2], x.shape[-2] // math.prod(kernel), *size])
