"""Convolutions: sums of products over input channels, group by group.

Positions of the kernel and of the image are never removed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fxprune.labels import Array, Field, compact
from fxprune.ops import literals, macs
from fxprune.ops.context import Context
from fxprune.ops.records import Operand, Record, place
from fxprune.ops.shapes import contraction as shapes
from fxprune.ops.table import Axes, computes, exact_row, row

# Virtual dimensions: the group, and the input and output channels of a group.
GROUP, INPUT, OUTPUT = 0, 1, 2

KERNEL = "is a kernel axis"
"""The reason why a kernel's height and width stay."""


def is_convolution(func: Any) -> bool:
    """Tell whether an ATen overload is a convolution.

    The first two axes of a convolution's weight are channels, the others belong to the kernel.
    """
    found = exact_row(func)
    return found is not None and found.rule is convolution


def _groups_in_order(ctx: Context, a: Mapping[str, Any]) -> bool:
    """Tell whether a convolution commutes with removal: it has one group or is depthwise.

    Otherwise the position of a channel decides its group.
    """
    return bool(a["groups"] == 1 or a["groups"] == a["weight"].shape[0] == a["input"].shape[1])


_sliding = functools.partial(
    computes,
    axes=Axes.CONVOLVED,
    in_order=_groups_in_order,
    corrects=literals.convolution_literals,
)


@_sliding("convolution", macs=macs.convolution_macs, shape=shapes.convolution_either_way_shape)
@_sliding("conv1d", "conv2d", "conv3d", macs=macs.per_output_macs, shape=shapes.convolution_shape)
@_sliding("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", macs=macs.per_input_macs)
def convolution(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Sum over i in each group: x (n, g*i, ...), w (g*o, i, ...) -> (n, g*o, ...).

    A transposed convolution has w (g*i, o, ...).
    """
    x, w, groups = a["input"], a["weight"], a["groups"]
    transposed = a.get("transposed", "transpose" in func._schema.name)
    channel = x.dim() - w.dim() + 1  # 0 for an unbatched image
    incoming = _incoming_fields(ctx, x, channel)
    inputs = w.shape[0] // groups if transposed else w.shape[1]  # input channels per group
    if groups > 1 and inputs > 1:
        ctx.found.summed_groups.add(ctx.node)
    elif groups > 1 and ctx.node in ctx.found.summed_groups:
        # A smaller model whose groups keep one input channel each: still a sum over inputs,
        # not a depthwise convolution.
        incoming = []
    if inputs > 1:
        ctx.note_read_axes([(x, ()), (w, [0 if transposed else 1])])
    record = ctx.record(w)
    if record is not None and not transposed and _is_untouched(record):
        labels = _first_use(ctx, record, x, incoming, groups)
    else:
        labels = _general(ctx, x, w, incoming, groups, transposed)
    if ctx.is_from_weights(w):
        ctx.note_kept_axes(w, [1 if transposed else 0])
    fields = [Field(place(array, (channel,), out.dim()), zero) for array, zero in labels]
    if a["bias"] is not None:
        fields = add_channel_bias(ctx, out, fields, a["bias"], channel)
    ctx.put(out, fields)


def _incoming_fields(ctx: Context, x: Tensor, channel: int) -> list[Field]:
    """Return the 1-D fields of a convolution's input channels; pin its positions."""
    why = "is an axis of positions that a convolution slides over"
    return channel_fields(ctx, x, channel, why)


def _is_untouched(record: Record) -> bool:
    """Tell whether no op has met a weight, and it is zero at removed elements."""
    return bool(record.unlabelled) and not record.fields and not record.overwritten


def channel_fields(ctx: Context, x: Tensor, channel: int, why: str) -> list[Field]:
    """Return the fields along the channel dimension as 1-D fields.

    Labels that vary elsewhere as well are tied to one label per channel. Fields that vary only
    elsewhere are pinned.

    Parameters
    ----------
    ctx:
        The context.
    x:
        The tensor.
    channel:
        Its channel dimension.
    why:
        The reason to pin other fields.
    """
    out = []
    for f in ctx.fields(x):
        if channel not in f.dims:
            ctx.pin(f.labels, why)
            continue
        labels = ctx.tie(f.labels, f.dims - {channel}) if len(f.dims) > 1 else f.labels
        if labels.size > 1:
            out.append(Field(labels.reshape(-1), f.zero))
        else:
            ctx.pin(labels, "its removal would empty a tensor")
    return out


def add_channel_bias(
    ctx: Context, out: Tensor, fields: list[Field], bias: Tensor, channel: int
) -> list[Field]:
    """Merge a result's fields with a bias along the channel dimension; return the new fields."""
    if (
        len(fields) == 1
        and fields[0].dims == {channel}
        and ctx.meet_vector(fields[0].labels.reshape(-1), bias)
    ):
        return fields
    ctx.put(out, fields)
    rank = out.dim()
    met = ctx.merge(
        [ctx.operand(out, range(rank), rank), ctx.operand(bias, (channel,), rank)], rank
    )
    return [Field(m.labels, m.zero.get(0, False) and m.zero.get(1, False)) for m in met]


def _first_use(
    ctx: Context, record: Record, x: Tensor, incoming: list[Field], groups: int
) -> list[tuple[Array, bool]]:
    """Label a weight that no op has met, and return the labels of the output channels.

    Its input axis gets the labels of the incoming channels, its output axis gets new labels.

    Each item of the result is a pair of 1-D labels and whether the output is zero where they are
    removed.
    """
    w = record.tensor
    outputs, inputs = w.shape[0] // groups, w.shape[1]
    for axis in record.unlabelled - {0, 1}:
        ctx.fix_axis(record, axis, KERNEL)
    if inputs > 1:
        for f in incoming:
            _label_input_axis(ctx, record, f.labels, groups)
        if not incoming:
            ctx.fix_axis_met_by(record, 1, [x])
    record.version = -1
    if 0 not in record.unlabelled:
        return []
    if inputs == 1 and groups > 1:
        return _label_depthwise(ctx, record, x, incoming)
    fresh = ctx.label_anew(record, 0).labels.reshape(-1)
    if groups > 1:
        ctx.require_rectangle(fresh.reshape(groups, outputs), fixed={0})
    return [(fresh, True)]


def _label_input_axis(ctx: Context, record: Record, labels: Array, groups: int) -> None:
    """Give the input axis of a weight the labels of the incoming channels.

    With groups, the axis gets the labels of each group's block, so groups may keep different
    input channels.
    """
    outputs, inputs, *kernel = record.tensor.shape
    tail = [1] * len(kernel)
    if groups > 1:
        blocks = labels.reshape(groups, 1, inputs)
        rows = np.broadcast_to(blocks, (groups, outputs // groups, inputs))
        rows = rows.reshape(outputs, inputs)
        ctx.require_rectangle(labels.reshape(groups, inputs), fixed={0})
    else:
        rows = labels.reshape(1, inputs)
    ctx.label_axis(record, 1, np.ascontiguousarray(rows).reshape(*rows.shape, *tail))


def _label_depthwise(
    ctx: Context, record: Record, x: Tensor, incoming: list[Field]
) -> list[tuple[Array, bool]]:
    """Give the output axis of a depthwise weight the labels of its input channels.

    Each input channel goes with its outputs.
    """
    w = record.tensor
    if not incoming:
        ctx.fix_axis_met_by(record, 0, [x])
    labels = [np.repeat(f.labels, w.shape[0] // f.labels.size) for f in incoming]
    for array in labels:
        ctx.label_axis(record, 0, array.reshape(-1, *[1] * (w.dim() - 1)))
    return [(array, True) for array in labels]


def _general(
    ctx: Context, x: Tensor, w: Tensor, incoming: list[Field], groups: int, transposed: bool
) -> list[tuple[Array, bool]]:
    """Contract input (group, input) with weight (group, output, input).

    Each item of the result is a pair of 1-D labels of the output channels and whether the output
    is zero where they are removed.
    """
    inputs, outputs = w.shape[1], w.shape[0] // groups
    if transposed:
        inputs, outputs = w.shape[0] // groups, w.shape[1]
    sizes = {GROUP: groups, INPUT: inputs, OUTPUT: outputs}
    sized = {d for d in sizes if sizes[d] > 1}
    laid = [Field(compact(f.labels.reshape(groups, inputs, 1)), f.zero) for f in incoming]
    left = Operand(laid, sized - {OUTPUT}, {}, carrier=x)
    right = Operand(_weight_fields(ctx, w, groups, transposed), sized, {}, carrier=w)
    # contract() notes the fields that vary over groups and inputs; those over groups and outputs
    # are noted here.
    result = []
    for f in ctx.contract([left, right], 3, {INPUT}):
        rows = np.broadcast_to(f.labels, (groups, 1, outputs)).reshape(groups, outputs)
        if groups > 1 and {GROUP, OUTPUT} <= f.dims:
            ctx.require_rectangle(rows, fixed={0} if inputs > 1 else ())
        result.append((np.ascontiguousarray(rows).reshape(-1), f.zero))
    return result


def _weight_fields(ctx: Context, w: Tensor, groups: int, transposed: bool) -> list[Field]:
    """Return the fields of a weight over the virtual dimensions; pin its kernel axes."""
    laid = []
    for f in ctx.fields(w):
        if f.dims - {0, 1}:
            ctx.pin(f.labels, KERNEL)
            continue
        first, second = f.labels.shape[:2]
        split = (groups, -1) if first > 1 else (1, 1)
        labels = f.labels.reshape(*split, second)  # (g, o, i); transposed: (g, i, o)
        laid.append(Field(compact(labels if transposed else labels.transpose(0, 2, 1)), f.zero))
    return laid


# Kernels that versions of torch run for these ops.
row(
    "_convolution_mode",
    "thnn_conv2d",
    "_slow_conv2d_forward",
    "slow_conv3d",
    "slow_conv3d_forward",
    "slow_conv_dilated2d",
    "slow_conv_dilated3d",
    "_conv_depthwise2d",
    "conv_depthwise3d",
    "_nnpack_spatial_convolution",
    "cudnn_convolution",
    "cudnn_convolution_relu",
    "cudnn_convolution_add_relu",
    "mkldnn_convolution",
    "miopen_convolution",
    "miopen_convolution_relu",
    "miopen_convolution_add_relu",
    "miopen_depthwise_convolution",
    macs=macs.per_output_macs,
)
row(
    "cudnn_convolution_transpose",
    "miopen_convolution_transpose",
    "slow_conv_transpose2d",
    "slow_conv_transpose3d",
    macs=macs.per_input_macs,
)
row("_convolution", "convolution_overrideable", macs=macs.convolution_macs)
row("conv_tbc", macs=macs.conv_tbc_macs)
