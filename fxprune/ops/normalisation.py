"""Normalisations: per-channel scale and shift, and statistics over the surviving channels."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from fxprune.labels import Field, varied
from fxprune.ops import literals, survivors
from fxprune.ops.context import Context
from fxprune.ops.convolution import channel_fields
from fxprune.ops.records import place
from fxprune.ops.shapes import normalisation as shapes
from fxprune.ops.table import Axes, Trait, computes

_norm = functools.partial(computes, axes=Axes.SAME)
_last_norm = functools.partial(
    _norm,
    in_order=False,
    traits=Trait.FROM_THE_END,
    shape=shapes.last_norm_shape,
    corrects=literals.last_norm_literals,
)


def _scale_and_shift(
    ctx: Context, x: Tensor, fields: list[Field], parameters: list[Tensor | None], channel: int
) -> list[Field]:
    """Merge the 1-D fields of the channel axis with every per-channel parameter.

    The first two parameters are scale and shift. Return the fields of the result, whose shape is
    that of ``x``.
    """
    scale, rank = parameters[0], x.dim()
    ctx.note_scale(scale)
    given = [p for p in parameters if p is not None]
    laid = [Field(place(f.labels, (channel,), rank), f.zero) for f in fields]
    if len(fields) == 1 and all(ctx.meet_vector(fields[0].labels, p) for p in given):
        return [Field(laid[0].labels, scale is not None or fields[0].zero)]
    stand_in = x.new_empty(x.shape)
    ctx.put(stand_in, laid)
    operands = [ctx.operand(stand_in, range(rank), rank)]
    operands += [ctx.operand(p, (channel,), rank) for p in given]
    needed = [0]  # the operands that must be zero for a zero result
    if scale is not None:
        affine = parameters[:2]
        needed = [i for i, p in enumerate(given, start=1) if any(p is q for q in affine)]
    met = ctx.merge(operands, rank)
    return [Field(m.labels, all(m.zero.get(i, False) for i in needed)) for m in met]


@_norm(
    "batch_norm", shape=shapes.channel_norm_shape, survivors=survivors.batch_norm_over_survivors
)
def batch_norm(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Merge the channels (dimension 1) with scale, shift and running statistics."""
    x = a["input"]
    others = [f for f in ctx.fields(x) if 1 not in f.dims]
    # Statistics run over the other dimensions. If these have labels, only survivors count, as in a
    # weight that batch_norm standardises.
    ctx.statistic([f.labels for f in others], taken=a["training"])
    rest = [Field(f.labels, False) for f in others]  # the shift makes removed elements non-zero
    channels = [f for f in ctx.fields(x) if 1 in f.dims]
    tied = []
    for f in channels:
        labels = ctx.tie(f.labels, f.dims - {1})
        if labels.size > 1:
            tied.append(Field(labels.reshape(-1), f.zero))
    parameters = [a["weight"], a["bias"], a["running_mean"], a["running_var"]]
    ctx.put(out, [*_scale_and_shift(ctx, x, tied, parameters, 1), *rest])


@_norm("instance_norm", shape=shapes.channel_norm_shape)
def instance_norm(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Merge the channels (dimension 1) with scale and shift; statistics run over positions."""
    x = a["input"]
    fields = channel_fields(ctx, x, 1, "is an axis of positions that a statistic is taken over")
    parameters = [a["weight"], a["bias"], a["running_mean"], a["running_var"]]
    ctx.put(out, _scale_and_shift(ctx, x, fields, parameters, 1))


@_norm(
    "group_norm",
    in_order=False,
    shape=shapes.group_norm_shape,
    corrects=literals.group_norm_literals,
    survivors=survivors.group_norm_over_survivors,
)
def group_norm(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Take statistics over each group's surviving channels; each group loses the same number.

    Each group keeps two channels if there are no positions.
    """
    x, groups = a["input"], a["num_groups"]
    fields = channel_fields(ctx, x, 1, "is an axis of positions that a statistic is taken over")
    shared = groups < x.shape[1]
    ctx.statistic([place(f.labels, (1,), x.dim()) for f in fields] if shared else [])
    if shared:
        # F.group_norm rejects a batch of one if a group has a single value
        if x.shape[2:].numel() == 1:
            ctx.found.keep_two += [f.labels for f in fields]
        for f in fields:
            if groups > 1:
                ctx.require_rectangle(f.labels.reshape(groups, -1), fixed={0})
        fields = [Field(f.labels, False) for f in fields]
    ctx.put(out, _scale_and_shift(ctx, x, fields, [a["weight"], a["bias"]], 1))


@_last_norm("layer_norm", survivors=survivors.layer_norm_over_survivors)
@_last_norm("rms_norm", survivors=survivors.rms_norm_over_survivors)
def layer_norm(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Take statistics over the survivors of the last dimensions, which meet scale and shift."""
    x, rank = a["input"], a["input"].dim()
    dims = range(rank - len(a["normalized_shape"]), rank)
    inside = set(dims)
    fields = ctx.fields(x)
    ctx.statistic([f.labels for f in fields if f.dims & inside])
    for f in fields:
        if f.dims & inside and f.dims - inside:
            ctx.require_rectangle(f.labels, fixed=f.dims - inside)
    ctx.note_scale(a["weight"])
    given = [p for p in (a["weight"], a.get("bias")) if p is not None]
    operands = [ctx.operand(x, range(rank), rank), *(ctx.operand(p, dims, rank) for p in given)]
    normalised = []
    for m in ctx.merge(operands, rank):
        if inside.intersection(varied(m.labels)):
            zero = bool(given) and all(m.zero.get(i, False) for i in range(1, len(given) + 1))
        else:
            zero = m.zero.get(0, False) and a.get("bias") is None
        normalised.append(Field(m.labels, zero))
    ctx.put(out, normalised)


@computes("_weight_norm")
@computes("_weight_norm_interface", shape=shapes.weight_norm_shape)
def weight_norm(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Merge v and g: v * (g / norm of v over all dimensions but one).

    Removed elements of v are zero, so they do not count in the norm.
    """
    v, g = a["v"], a["g"]
    rank, dim = v.dim(), a["dim"]  # -1: the norm is over all dimensions
    operands = [ctx.operand(v, range(rank), rank), ctx.operand(g, range(rank), rank)]
    fields = []
    for m in ctx.merge(operands, rank):
        f = Field(m.labels, m.zero.get(0, False))
        if f.dims - {dim} and not f.zero:
            ctx.pin(f.labels, "is summed although removed elements are not zero")
            continue
        if len(f.dims) > 1 and dim in f.dims:
            ctx.require_rectangle(f.labels, fixed={dim})
        fields.append(f)
    weight, norm = out if isinstance(out, tuple) else (out, None)
    ctx.put(weight, fields)
    ctx.put(norm, [f for f in fields if f.dims == {dim}])
