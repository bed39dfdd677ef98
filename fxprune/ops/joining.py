"""Concatenation and stacking of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fxprune.labels import Field, compact
from fxprune.ops.context import Context
from fxprune.ops.records import Met
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
    across = [[f for f in of_tensor if dim not in f.dims] for of_tensor in fields]
    along = [[f for f in of_tensor if dim in f.dims] for of_tensor in fields]
    result = _merged_across(ctx, tensors, across, dim) if any(across) else []
    sizes = [t.shape[dim] for t in tensors]
    for k in range(max(map(len, along))):
        parts = [of_tensor[k] if k < len(of_tensor) else None for of_tensor in along]
        result.append(_concatenated(parts, sizes, dim, out.dim()))
    ctx.put(out, result)


def _merged_across(
    ctx: Context, tensors: Sequence[Tensor], fields: list[list[Field]], dim: int
) -> list[Field]:
    """Merge the fields of tensors that are joined along ``dim``, on which no field varies."""
    rank = tensors[0].dim()
    operands = []
    for t, of_tensor in zip(tensors, fields, strict=True):
        operand = ctx.operand(t, range(rank), rank, as_labelled=True)
        operand.fields, operand.sized = of_tensor, operand.sized - {dim}
        operands.append(operand)
    return _zero_in_all(ctx.merge(operands, rank), len(tensors))


def _zero_in_all(met: Sequence[Met], count: int) -> list[Field]:
    """Return merged fields, which are zero where all ``count`` operands are zero."""
    return [Field(m.labels, len(m.zero) == count and all(m.zero.values())) for m in met]


def _concatenated(
    parts: Sequence[Field | None], sizes: Sequence[int], dim: int, rank: int
) -> Field:
    """Concatenate one field of each tensor along ``dim``; ``None`` if a tensor has none.

    ``sizes`` are the sizes of the tensors along ``dim``.
    """
    known = [f for f in parts if f is not None]
    form = [max(f.labels.shape[d] for f in known) for d in range(rank)]
    laid = []
    for f, size in zip(parts, sizes, strict=True):
        form[dim] = size
        labels = np.zeros([1] * rank, dtype=np.int64) if f is None else f.labels
        laid.append(np.broadcast_to(labels, form))
    return Field(compact(np.concatenate(laid, axis=dim)), all(f.zero for f in known))


@moves("stack", axes=Axes.STACKED, in_order=True, shape=shapes.stack_shape)
def stack(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Merge the operands on all dimensions but the new one."""
    tensors = a["tensors"]
    dim = a["dim"] % out.dim()
    dims = [d for d in range(out.dim()) if d != dim]
    operands = [ctx.operand(t, dims, out.dim()) for t in tensors]
    ctx.put(out, _zero_in_all(ctx.merge(operands, out.dim()), len(tensors)))
