"""Poolings, resamplings and spatial paddings: they act on positions and keep the channels."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from torch import Tensor

from fxprune.labels import Field
from fxprune.ops.context import Context
from fxprune.ops.shapes import movement as shapes_of_movements
from fxprune.ops.shapes import resampling as shapes
from fxprune.ops.table import Axes, moves

_SPATIAL = {"1d": 1, "2d": 2, "3d": 3}


_pooling = functools.partial(moves, axes=Axes.POOLED)
_pooling_in_order = functools.partial(_pooling, in_order=True)
_upsampling = functools.partial(moves, axes=Axes.RESAMPLED)


@_pooling_in_order("avg_pool1d", "adaptive_max_pool1d")
@_pooling_in_order("avg_pool2d", "avg_pool3d", shape=shapes.pool_shape)
@_pooling_in_order("max_pool1d", "max_pool2d", "max_pool3d", shape=shapes.pool_shape)
@_pooling_in_order(
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    shape=shapes.adaptive_shape,
)
@_pooling_in_order(
    "adaptive_max_pool2d", "adaptive_max_pool3d", shape=shapes.adaptive_with_indices_shape
)
@_pooling("_adaptive_avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
@_pooling("max_pool1d_with_indices")
@_pooling(
    "max_pool2d_with_indices", "max_pool3d_with_indices", shape=shapes.pool_with_indices_shape
)
@_pooling("reflection_pad1d", "reflection_pad2d", "reflection_pad3d", shape=shapes.pad_shape)
@_pooling("replication_pad1d", "replication_pad2d", "replication_pad3d", shape=shapes.pad_shape)
@_upsampling(
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_trilinear3d",
    "upsample_bicubic2d",
    shape=shapes.upsample_shape,
)
@_upsampling(
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)
def positions(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Pin the last one to three dimensions, which are positions; others keep their labels."""
    x = a["self"] if "self" in a else a["input"]
    count = next(n for tag, n in _SPATIAL.items() if tag in func._schema.name)
    where = range(x.dim() - count, x.dim())
    passing = ctx.spared(x, where, "is an axis of positions that is resampled")
    for result in out if isinstance(out, (tuple, list)) else (out,):
        if isinstance(result, Tensor):  # an index may be non-zero where the maximum is 0
            keeps_zeros = result.is_floating_point()
            ctx.put(result, [Field(f.labels, f.zero and keeps_zeros) for f in passing])


@moves("grid_sampler_2d", "grid_sampler_3d", shape=shapes.grid_sampler_shape)
@moves("grid_sampler", "torchvision::roi_align", "torchvision::roi_pool")
def sampled(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Pin all but the channels (dimension 1): positions are sampled at a grid or in boxes."""
    ctx.pin_all(ctx.fields(a["grid"] if "grid" in a else a["rois"]), "says where to sample")
    passing = []
    for f in ctx.fields(a["input"]):
        if f.dims == {1}:
            passing.append(f)
        else:
            ctx.pin(f.labels, "is an axis of positions that is resampled")
    for result in out if isinstance(out, tuple) else (out,):
        ctx.put(result, [Field(f.labels, f.zero and result.is_floating_point()) for f in passing])


@_upsampling("pixel_shuffle", shape=shapes_of_movements.pixel_shuffle_shape)
def pixel_shuffle(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Tie the r*r channels that become one: (c*r*r, h, w) -> (c, h*r, w*r)."""
    block = a["upscale_factor"] ** 2
    _channels_in_blocks(ctx, a["self"], out, a["self"].dim() - 3, block)


@_upsampling("pixel_unshuffle", shape=shapes_of_movements.pixel_shuffle_shape)
@moves("im2col", shape=shapes.im2col_shape)
def pixel_unshuffle(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Repeat the label of each channel, which becomes a block of consecutive channels."""
    x = a["self"]
    channel = x.dim() - 3
    times = out.shape[channel] // x.shape[channel]
    passing = []
    for f in ctx.fields(x):
        if any(d > channel for d in f.dims):
            ctx.pin(f.labels, "is an axis of positions that is resampled")
            continue
        labels = np.repeat(f.labels, times, axis=channel) if channel in f.dims else f.labels
        passing.append(Field(labels.reshape(labels.shape[: out.dim()]), f.zero))
    ctx.put(out, passing)


@moves("col2im", shape=shapes.col2im_shape)
def col2im(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Tie each block of kernel positions, which are summed into one channel."""
    kernel = a["kernel_size"]
    _channels_in_blocks(ctx, a["self"], out, a["self"].dim() - 2, int(np.prod(kernel)))


def _channels_in_blocks(ctx: Context, x: Tensor, out: Tensor, channel: int, block: int) -> None:
    """Set the fields of a result in which each block of channels becomes one channel."""
    passing = []
    for f in ctx.fields(x):
        if any(d > channel for d in f.dims):
            ctx.pin(f.labels, "is an axis of positions that is resampled")
            continue
        labels = f.labels
        if channel in f.dims:
            split = labels.reshape(*labels.shape[:channel], -1, block)
            labels = ctx.tie(split, [split.ndim - 1])
        shape = [*labels.shape[: channel + 1], *[1] * (out.dim() - channel - 1)]
        passing.append(Field(labels.reshape(shape), f.zero))
    ctx.put(out, passing)
