"""Look-ups: the indexed dimension is pinned, because indices name positions; the others pass."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from fxprune.labels import Field
from fxprune.rules.context import Context
from fxprune.rules.registry import rule


@rule("embedding")
def embedding(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """table (v, e), indices (...) -> (..., e): v is pinned."""
    table = a["weight"]
    ctx.pin_all(ctx.fields(a["indices"]), "is a tensor of indices")
    record = ctx.record(table)
    if record is not None and 0 in record.unborn:
        ctx.adopt_nothing(record, 0, "is the vocabulary of an embedding")
    passing = []
    for f in ctx.fields(table):
        if 0 in f.dims:
            ctx.pin(f.labels, "is the vocabulary of an embedding")
        else:
            passing.append(Field(f.labels.reshape([1] * (out.dim() - 1) + [-1]), f.zero))
    ctx.put(out, passing)


@rule("index")
def index(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """x[i, :, j]: indexed dimensions are pinned; the result lies as in NumPy."""
    x, indices = a["self"], [*a["indices"], *[None] * (a["self"].dim() - len(a["indices"]))]
    for i in indices:
        if i is not None:
            ctx.pin_all(ctx.fields(i), "is a tensor of indices")
    if any(i is not None and i.dtype.is_floating_point is False and str(i.dtype) in ("torch.bool", "torch.uint8") for i in indices):
        ctx.pin_all(ctx.fields(x), "is read by a mask")
        return
    indexed = [d for d, i in enumerate(indices) if i is not None]
    shape = np.broadcast_shapes(*(tuple(i.shape) for i in indices if i is not None))
    consecutive = indexed == list(range(indexed[0], indexed[-1] + 1))
    where = indexed[0] if consecutive else 0
    kept = [d for d in range(x.dim()) if d not in indexed]
    passing = []
    for f in ctx.fields(x):
        if f.dims & set(indexed):
            ctx.pin(f.labels, "is read by indices")
            continue
        sizes = [f.labels.shape[d] for d in kept]
        passing.append(Field(f.labels.reshape([*sizes[:where], *[1] * len(shape), *sizes[where:]]), f.zero))
    ctx.put(out, passing)


@rule("index_select")
def index_select(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """One dimension is read by indices and pinned; the others pass."""
    x = a["self"]
    dim = a["dim"] % x.dim()
    passing = []
    for f in ctx.fields(x):
        if dim in f.dims:
            ctx.pin(f.labels, "is read by indices")
        else:
            passing.append(f)
    ctx.put(out, passing)


@rule("gather", "take_along_dim")
def gather(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Reads by an index tensor as large as the result: everything that meets it is pinned."""
    for value in (a["self"], a.get("index", a.get("indices"))):
        if isinstance(value, Tensor):
            ctx.pin_all(ctx.fields(value), "is read by indices")
