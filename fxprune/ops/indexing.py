"""Look-ups: indexed dimensions are pinned, because indices name positions; others keep labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.labels import Field, varied
from fxprune.ops.context import Context
from fxprune.ops.records import take
from fxprune.ops.shapes import movement as shapes
from fxprune.ops.table import Axes, Trait, op, row


@op("embedding", axes=Axes.LAYER, shape=shapes.embedding_shape)
def embedding(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Pin the vocabulary v: table (v, e), indices (...) -> (..., e)."""
    table = a["weight"]
    ctx.pin_all(ctx.fields(a["indices"]), "is a tensor of indices")
    record = ctx.record(table)
    if record is not None and 0 in record.unlabelled:
        ctx.fix_axis(record, 0, "is the vocabulary of an embedding")
    passing = ctx.spared(table, {0}, "is the vocabulary of an embedding")
    form = [1] * (out.dim() - 1) + [-1]
    ctx.put(out, [Field(f.labels.reshape(form), f.zero) for f in passing])


@op("index", traits=Trait.SELECTS_BY_INDEX, shape=shapes.index_shape)
def index(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Pin the indexed dimensions of ``x[i, :, j]``; the other dimensions keep their labels."""
    x = a["self"]
    layout = _dims_of_index(ctx, x, a["indices"])
    if layout is None:
        ctx.pin_all(ctx.fields(x), "is read by a mask")
        return
    passing = []
    for f in ctx.fields(x):
        if f.dims <= set(layout):
            labels = f.labels.reshape(*f.labels.shape, *[1] * len(layout))
            passing.append(Field(take(labels, layout), f.zero))
        else:
            ctx.pin(f.labels, "is read by indices")
    ctx.put(out, passing)


@op("index_put", shape=shapes.index_put_shape)
@op("index_put_")
def index_put(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Pin the indexed dimensions of ``x[i, :, j] = v``; x and v meet on the others."""
    x, values = a["self"], a["values"]
    layout = _dims_of_index(ctx, x, a["indices"])
    if layout is None:
        ctx.pin_all([*ctx.fields(x), *ctx.fields(values)], "is written by a mask")
        return
    rank, own_dims = x.dim() + len(layout), range(x.dim())
    value_dims = layout[len(layout) - values.dim() :]
    operands = [ctx.operand(x, own_dims, rank), ctx.operand(values, value_dims, rank)]
    fields = []
    for m in ctx.merge(operands, rank):
        if set(varied(m.labels)) <= set(layout) & set(own_dims):
            zero = m.zero.get(0, False) and m.zero.get(1, False)
            fields.append(Field(take(m.labels, own_dims), zero))
        else:
            ctx.pin(m.labels, "is written by indices")
    if out is x:
        ctx.overwrite(out, fields)
    else:
        ctx.put(out, fields)


def _dims_of_index(ctx: Context, x: Tensor, given: Sequence[Tensor | None]) -> list[int] | None:
    """Return the dimension of ``x`` for each dimension of ``x[given]``, in NumPy's order.

    The dimensions of the indices have numbers from ``x.dim()`` on. Return None if an index is a
    mask.
    """
    indices = [*given, *[None] * (x.dim() - len(given))]
    for i in indices:
        if i is not None:
            ctx.pin_all(ctx.fields(i), "is a tensor of indices")
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        return None
    indexed = [d for d, i in enumerate(indices) if i is not None]
    shape = np.broadcast_shapes(*(tuple(i.shape) for i in indices if i is not None))
    where = indexed[0] if indexed == list(range(indexed[0], indexed[-1] + 1)) else 0
    kept = [d for d in range(x.dim()) if d not in indexed]
    return [*kept[:where], *range(x.dim(), x.dim() + len(shape)), *kept[where:]]


@op("index_select")
def index_select(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Pin the indexed dimension; the other dimensions keep their labels."""
    x = a["self"]
    dim = a["dim"] % x.dim()
    ctx.put(out, ctx.spared(x, {dim}, "is read by indices"))


@op("gather", shape=shapes.gather_shape)
@op("take_along_dim")
def gather(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Pin everything that meets the index tensor, which is as large as the result."""
    for value in (a["self"], a.get("index", a.get("indices"))):
        if isinstance(value, Tensor):
            ctx.pin_all(ctx.fields(value), "is read by indices")


row("nonzero", "nonzero_numpy", "argwhere", traits=Trait.SELECTS_BY_MASK)
row("masked_select", traits=Trait.SELECTS_BY_INDEX)
