"""Reshapes, expansions and repetitions.

The order of positions in split and merged dimensions constrains what may be removed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fxprune.common.reshape import reshape_blocks
from fxprune.labels import Array, Field, compact
from fxprune.ops import literals
from fxprune.ops.context import Context
from fxprune.ops.shapes import movement as shapes
from fxprune.ops.table import Axes, Trait, moves, row


@moves(
    "view", "reshape", axes=Axes.RESHAPED, traits=Trait.BY_LAYOUT, corrects=literals.sizes_literals
)
@moves("_unsafe_view", axes=Axes.RESHAPED, corrects=literals.sizes_literals)
@moves("flatten", axes=Axes.RESHAPED, traits=Trait.BY_LAYOUT)
@moves(
    "unflatten", axes=Axes.RESHAPED, traits=Trait.BY_LAYOUT, corrects=literals.unflatten_literals
)
@moves("_reshape_alias")
@moves("view_as", "reshape_as", traits=Trait.BY_LAYOUT)
def reshaped(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Split and merge dimensions; labels change only in blocks of dimensions where they vary."""
    x = a["self"]
    if func._overloadname == "dtype":
        ctx.pin_all(ctx.fields(x), "is reinterpreted as another dtype")
        return
    ctx.put(out, reshape(ctx, ctx.fields(x), x.shape, out.shape), base=x)
    if isinstance(a.get("other"), Tensor):
        _sized_like(ctx, out, out, a["other"], x)


def _sized_like(ctx: Context, out: Tensor, x: Tensor, other: Tensor, base: Tensor) -> None:
    """Merge the labels of a result with those of the tensor whose sizes it takes."""
    rank = out.dim()
    last_axes = range(rank - x.dim(), rank)
    operands = [ctx.operand(x, last_axes, rank), ctx.operand(other, range(rank), rank)]
    met = ctx.merge(operands, rank)
    ctx.put(out, [Field(m.labels, m.zero.get(0, False)) for m in met], base=base)


def reshape(
    ctx: Context, fields: Sequence[Field], old: Sequence[int], new: Sequence[int]
) -> list[Field]:
    """Return the fields of a reshaped tensor, and note which dimensions were split or merged.

    Parameters
    ----------
    ctx:
        The context.
    fields:
        The fields of the original tensor.
    old, new:
        The shapes of the original and of the reshaped tensor.
    """
    if not fields:
        return []
    blocks = reshape_blocks(tuple(old), tuple(new))
    return [_reshape_field(ctx, f, blocks, old, new) for f in fields]


def _reshape_field(
    ctx: Context,
    f: Field,
    blocks: Sequence[tuple[list[int], list[int]]],
    old: Sequence[int],
    new: Sequence[int],
) -> Field:
    """Reshape one field; ``blocks`` are the dimensions that a reshape splits or merges."""
    form_old, form_new = [1] * len(old), [1] * len(new)
    touched = [(ins, outs) for ins, outs in blocks if not f.dims.isdisjoint(ins)]
    for ins, outs in touched:
        _note_merged(ctx, f.labels, ins)
        for d in ins:
            form_old[d] = old[d]
        for d in outs:
            form_new[d] = new[d]
    labels = compact(np.broadcast_to(f.labels, form_old).reshape(form_new))
    for _, outs in touched:
        _note_merged(ctx, labels, outs)
    return Field(labels, f.zero)


def _note_merged(ctx: Context, labels: Array, dims: Sequence[int]) -> None:
    """Note dimensions that a reshape merges or splits, if labels vary on several of them."""
    varying = tuple(d for d in dims if labels.shape[d] > 1)
    if len(varying) > 1:
        ctx.require_rectangle(labels, merged=varying)


def _with_leading(labels: Array, count: int) -> Array:
    """Return labels with leading dimensions of size 1."""
    return labels.reshape([1] * count + list(labels.shape))


_growing = functools.partial(moves, axes=Axes.EXPANDED, traits=Trait.GROWS)


@_growing("expand", corrects=literals.sizes_literals)
@_growing("broadcast_to", axes=None, corrects=literals.sizes_literals)
@_growing("expand_copy", axes=None)
@moves("expand_as", axes=Axes.SAME)
def expand(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Give dimensions expanded from size 1 new labels, so they shrink with what they meet."""
    x = a["self"]
    if isinstance(a.get("other"), Tensor):
        return _sized_like(ctx, out, x, a["other"], x)
    lead = out.dim() - x.dim()
    fields = [Field(_with_leading(f.labels, lead), f.zero) for f in ctx.fields(x)]
    old = [1] * lead + list(x.shape)
    made = [d for d, size in enumerate(old) if d < lead or (size == 1 and out.shape[d] > 1)]
    return ctx.put(out, [*fields, *ctx.new_fields(out.shape, made, zero=False)], base=x)


@_growing(
    "repeat", axes=Axes.REPEATED, shape=shapes.repeat_shape, corrects=literals.repeat_literals
)
@_growing("tile", axes=Axes.REPEATED, corrects=literals.repeat_literals)
def repeat(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Repeat the labels of a dimension for each copy; size 1 expands as in ``expand``."""
    x = a["self"]
    lead = out.dim() - x.dim()
    old = [1] * lead + list(x.shape)
    times = [size // before for size, before in zip(out.shape, old, strict=True)]
    fields = []
    for f in ctx.fields(x):
        labels = _with_leading(f.labels, lead)
        copies = [t if size > 1 else 1 for t, size in zip(times, labels.shape, strict=True)]
        fields.append(Field(np.tile(labels, copies), f.zero))
    made = [d for d, size in enumerate(old) if times[d] > 1 and size == 1]
    ctx.put(out, [*fields, *ctx.new_fields(out.shape, made, zero=False)])


@_growing("repeat_interleave", axes=None, corrects=literals.repeat_interleave_literals)
def repeat_interleave(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Repeat each label for adjacent copies; size 1 expands as in ``expand``."""
    x, dim, times = a.get("self"), a.get("dim"), a.get("repeats")
    if isinstance(x, Tensor) and x.dim() == 1:
        dim = 0
    if not isinstance(x, Tensor) or dim is None or not isinstance(times, int):
        for v in a.values():
            ctx.pin_all(ctx.fields(v), "is repeated by a tensor of counts")
        return
    dim %= x.dim()
    fields = []
    for f in ctx.fields(x):
        labels = np.repeat(f.labels, times, axis=dim) if dim in f.dims else f.labels
        fields.append(Field(labels, f.zero))
    made = [dim] if x.shape[dim] == 1 else []
    ctx.put(out, [*fields, *ctx.new_fields(out.shape, made, zero=False)])


row("ravel", traits=Trait.BY_LAYOUT)
