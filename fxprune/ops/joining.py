"""Concatenation and stacking of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fxprune.labels import Field, compact
from fxprune.ops.context import Context
from fxprune.ops.shapes import movement as shapes
from fxprune.ops.table import Axes, moves


@moves("cat", axes=Axes.JOINED, in_order=True, shape=shapes.cat_shape)
@moves("concat", "concatenate", axes=Axes.JOINED, in_order=True)
def cat(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Concatenate labels along the dimension; labels on the other dimensions meet."""
    tensors, dim = [t for t in a["tensors"] if not (t.dim() == 1 and t.shape[0] == 0)], a["dim"]
    dim %= out.dim()
    _join(ctx, tensors, [ctx.fields(t) for t in tensors], dim, out)


def _join(
    ctx: Context, tensors: Sequence[Tensor], fields: list[list[Field]], dim: int, out: Tensor
) -> None:
    """Set the fields of a concatenation of tensors with these fields."""
    rank = out.dim()
    # along the other dimensions, the tensors meet as operands
    across = [[f for f in own if dim not in f.dims] for own in fields]
    if any(across):
        operands = []
        for t, own in zip(tensors, across, strict=True):
            operand = ctx.operand(t, range(rank), rank, as_labelled=True)
            operand.fields, operand.sized = own, operand.sized - {dim}
            operands.append(operand)
        met = ctx.merge(operands, rank)
        result = [
            Field(m.labels, len(m.zero) == len(tensors) and all(m.zero.values())) for m in met
        ]
    else:
        result = []
    # along the dimension, the k-th fields of all tensors are concatenated
    along = [[f for f in own if dim in f.dims] for own in fields]
    for k in range(max(len(own) for own in along)):
        parts = [
            own[k].labels if k < len(own) else np.zeros([1] * rank, dtype=np.int64)
            for own in along
        ]
        form = [max(p.shape[d] for p in parts) for d in range(rank)]
        laid = []
        for t, p in zip(tensors, parts, strict=True):
            form[dim] = t.shape[dim]
            laid.append(np.broadcast_to(p, form))
        zero = all(own[k].zero for own in along if k < len(own))
        result.append(Field(compact(np.concatenate(laid, axis=dim)), zero))
    ctx.put(out, result)


@moves("stack", axes=Axes.STACKED, in_order=True, shape=shapes.stack_shape)
def stack(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Merge the operands on all dimensions but the new one."""
    tensors = a["tensors"]
    dim = a["dim"] % out.dim()
    dims = [d for d in range(out.dim()) if d != dim]
    operands = [ctx.operand(t, dims, out.dim()) for t in tensors]
    met = ctx.merge(operands, out.dim())
    ctx.put(
        out, [Field(m.labels, len(m.zero) == len(tensors) and all(m.zero.values())) for m in met]
    )
