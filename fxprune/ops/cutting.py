"""Parts of a tensor, and positions that are moved or added.

A literal decides which positions are read, so the rules constrain what may be removed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from torch import Tensor

from fxprune.labels import Array, Field, compact, varied
from fxprune.ops import literals
from fxprune.ops.context import Context
from fxprune.ops.dims import padded_dims, split_dim
from fxprune.ops.shapes import movement as shapes
from fxprune.ops.table import Axes, Trait, moves, name_of_op


@moves("select", axes=Axes.SELECTED, corrects=literals.select_literals)
def selected(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Read one position of a dimension; the position is pinned where the dimension can shrink."""
    x = a["self"]
    dim = a["dim"] % x.dim()
    ctx.put(out, _select_position(ctx, ctx.fields(x), dim, a["index"] % x.shape[dim]), base=x)


def _select_position(ctx: Context, fields: Sequence[Field], dim: int, index: int) -> list[Field]:
    """Return the fields at one position of a dimension, which is dropped."""
    out = []
    for f in fields:
        picked = cast(Array, f.labels.take(index if dim in f.dims else 0, axis=dim))
        if f.dims == {dim}:
            ctx.pin(picked, "is read by its position")
            continue
        if dim in f.dims:
            ctx.require_rectangle(f.labels, fixed={dim})
            picked = compact(picked)
        out.append(Field(picked, f.zero))
    return out


@moves("unbind", axes=Axes.CUT, in_order=True)
def unbind(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Read each position of a dimension as ``select`` does."""
    x = a["self"]
    dim = a["dim"] % x.dim()
    fields = ctx.fields(x)
    for i, part in enumerate(out):
        ctx.put(part, _select_position(ctx, fields, dim, i), base=x)


def _slices(
    ctx: Context, x: Tensor, dim: int, bounds: Sequence[tuple[int, int]], outs: Sequence[Tensor]
) -> None:
    """Set the fields of ranges of positions of a dimension."""
    fields = ctx.fields(x)
    for (start, stop), out in zip(bounds, outs, strict=True):
        cut = []
        for f in fields:
            cut += _cut(ctx, f, dim, start, stop) if dim in f.dims else [f]
        ctx.put(out, cut, base=x)


def _cut(ctx: Context, f: Field, dim: int, start: int, stop: int) -> list[Field]:
    """Return the field of a range of positions, if anything of it is left."""
    before, labels, behind = np.split(f.labels, [start, stop], axis=dim)
    if len(f.dims) > 1:
        # every row must lose the same number before, inside and behind the range
        for part in (before, behind):
            if part.size and len(varied(part)) > 1:
                ctx.require_rectangle(part)
    return _unless_single(ctx, compact(labels), f.zero) if labels.size else []


def _unless_single(ctx: Context, labels: Array, zero: bool) -> list[Field]:
    """Return a field with these labels, or pin them if they are a single label."""
    if labels.size == 1:
        ctx.pin(labels, "its removal would empty a tensor")
        return []
    return [Field(labels, zero)]


@moves("slice", corrects=literals.slices_literals)
@moves("narrow", axes=Axes.NARROWED, corrects=literals.narrow_literals)
def slices(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Read a range of positions; with a step, the positions within one step go together."""
    x, dim = a["self"], a["dim"] % a["self"].dim()
    size, step = x.shape[dim], a.get("step") or 1
    if "length" in a:
        start = int(a["start"])
        start += size if start < 0 else 0  # narrow counts from the end, as slices do
        stop = start + a["length"]
    else:
        start, stop, _ = slice(a["start"], a["end"], None).indices(size)
    if step == 1:
        return _slices(ctx, x, dim, [(start, max(start, stop))], [out])
    read = []
    for f in ctx.fields(x):
        if dim not in f.dims:
            read.append(f)
        elif size % step or stop != size or start >= step:
            ctx.pin(f.labels, "is read with a step that does not divide it")
        else:
            read += _unless_single(ctx, _every(ctx, f.labels, dim, step), f.zero)
    ctx.put(out, read, base=x)
    return None


def _every(ctx: Context, labels: Array, dim: int, step: int) -> Array:
    """Return every ``step``-th label along a dimension; labels within a step are united."""
    moved = np.moveaxis(labels, dim, -1)
    rows = (*moved.shape[:-1], moved.shape[-1] // step)
    tied = ctx.tie(moved.reshape(*rows, step), [moved.ndim])
    picked = np.broadcast_to(tied, (*rows, 1)) if tied.size > 1 else tied
    return compact(np.moveaxis(picked[..., 0], -1, dim))


_split = functools.partial(moves, axes=Axes.CUT, corrects=literals.split_literals)


@_split("split", "split_with_sizes", "chunk", "tensor_split", "hsplit", "vsplit", "dsplit")
@_split(
    "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", traits=Trait.MAY_RETURN_ARGUMENT
)
def split(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Divide the labels into consecutive ranges."""
    x = a["self"]
    dim = split_dim(name_of_op(func), a)
    ends = np.cumsum([part.shape[dim] for part in out]).tolist()
    _slices(ctx, x, dim, list(zip([0, *ends[:-1]], ends, strict=True)), out)


@moves("roll", axes=Axes.SAME, shape=shapes.reordered_shape, corrects=literals.roll_literals)
def roll(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Rotate positions; the shift is corrected to the number of survivors that wrap around."""
    x, shifts, dims = a["self"], a["shifts"], a["dims"]
    if not dims:
        ctx.pin_all(ctx.fields(x), "is rolled over all its dimensions at once")
        return
    moved = []
    for f in ctx.fields(x):
        labels = f.labels
        for shift, d in zip(shifts, dims, strict=True):
            d %= x.dim()
            if d in f.dims:
                labels = np.roll(labels, shift, axis=d)
                if len(f.dims) > 1:
                    ctx.require_rectangle(f.labels, fixed={d})
        moved.append(Field(labels, f.zero))
    ctx.put(out, moved)


def _pads_in_order(ctx: Context, a: Mapping[str, Any]) -> bool:
    """Tell whether a padding commutes with removal: no padded dimension has labels."""
    labelled = {dim for f in ctx.fields(a["self"]) for dim in f.dims}
    return not labelled & padded_dims(a["self"], a["pad"])


_padding = functools.partial(moves, in_order=_pads_in_order, corrects=literals.pad_literals)


@_padding("constant_pad_nd", shape=shapes.constant_pad_shape)
@_padding("pad", axes=Axes.PADDED)
def pad(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Give new positions of a labelled dimension new labels; other padding changes no labels."""
    x, amounts = a["self"], a["pad"]
    value = a.get("value") or 0
    if a.get("mode", "constant") != "constant":
        padded = padded_dims(x, amounts)
        ctx.put(out, ctx.spared(x, padded, "is padded from its own content"))
        return
    fields = []
    for f in ctx.fields(x):
        labels = _padded_labels(ctx, f, amounts)
        if labels.any():
            fields.append(Field(labels, f.zero and value == 0))
    ctx.put(out, fields)


def _padded_labels(ctx: Context, f: Field, amounts: Sequence[int]) -> Array:
    """Return a field's labels with new ones at padded positions; 0 if they must be pinned."""
    labels = f.labels
    for i in range(len(amounts) // 2):
        d, before, after = labels.ndim - 1 - i, amounts[2 * i], amounts[2 * i + 1]
        if d not in f.dims or not (before or after):
            continue
        if before < 0 or after < 0 or len(f.dims) > 1:
            why = "is cropped by a padding, or padded while split over several dimensions"
            ctx.pin(labels, why)
            return np.zeros_like(labels[(slice(0, 1),) * labels.ndim])
        form = [1] * labels.ndim
        form[d] = -1
        parts = [labels]
        if before:
            parts.insert(0, ctx.units.fresh(before, -1).reshape(form))
        if after:
            parts.append(ctx.units.fresh(after, -1).reshape(form))
        labels = np.concatenate(parts, axis=d)
    return labels


@moves("unfold")
def unfold(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Pin the dimension over which windows slide; the window is a new last dimension."""
    x = a["self"]
    dim = a["dimension"] % x.dim()
    passing = ctx.spared(x, {dim}, "is an axis of positions that a window slides over")
    ctx.put(out, [Field(f.labels[..., np.newaxis], f.zero) for f in passing])
