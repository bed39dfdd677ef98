"""Pure data movement: the op is executed on the labels."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fxprune.labels import Array, Field
from fxprune.ops import literals
from fxprune.ops.context import Context
from fxprune.ops.records import as_torch, from_torch
from fxprune.ops.reshaping import reshape
from fxprune.ops.shapes import movement as shapes
from fxprune.ops.table import Axes, Trait, moves, name_of_op, row

_permuting = functools.partial(moves, axes=Axes.PERMUTED, in_order=True)


def _squeezes_in_order(ctx: Context, a: Mapping[str, Any]) -> bool:
    """Tell whether a ``squeeze`` commutes with removal: no squeezed dimension has labels.

    A channel axis with one survivor would be squeezed away.
    """
    rank, dims = a["self"].dim(), a.get("dim")
    labelled = {dim for f in ctx.fields(a["self"]) for dim in f.dims}
    if dims is None:
        return not labelled
    return not labelled & {d % rank for d in ([dims] if isinstance(dims, int) else dims)}


@_permuting(
    "permute",
    "transpose",
    "t",
    "numpy_T",
    "mT",
    "movedim",
    "moveaxis",
    "swapaxes",
    "swapdims",
)
@moves("transpose_", "t_", "matrix_H", "unsqueeze_", "squeeze_", "fliplr", "flipud", "rot90")
@moves("flip", axes=Axes.SAME, shape=shapes.reordered_shape)
@moves("unsqueeze", axes=Axes.RESHAPED, in_order=True)
@moves("squeeze", axes=Axes.RESHAPED, in_order=_squeezes_in_order)
def move(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Execute the op on the labels."""
    x = a["self"]
    if out is x:
        _in_place(ctx, name_of_op(func), a, x)
        return
    rest = {k: v for k, v in a.items() if k not in ("self", "memory_format")}
    moved = []
    for f in ctx.fields(x):
        labels = from_torch(func(as_torch(f.labels, x.shape), *rest.values()))
        if labels.size == 1:
            ctx.pin(labels, "its removal would empty a tensor")
        else:
            moved.append(Field(labels, f.zero))
    ctx.put(out, moved, base=x if out._is_view() or _is_alias(func) else None)


def _in_place(ctx: Context, name: str, a: dict[str, Any], x: Tensor) -> None:
    """Move the labels of a tensor for an in-place op such as ``x.transpose_(0, 1)``.

    The tensor already has its new shape, while its labels have the old one.
    """
    # numpy_T and similar ops may return their argument unchanged
    if not name.endswith("_") or (record := ctx.record(x)) is None:
        return
    ranks = {f.labels.ndim for f in ctx.fields(x)}
    if name == "squeeze_" and a.get("dim") is None and ranks - {x.dim()}:
        ctx.pin_all(record.fields, "is squeezed in place over dimensions that are not named")
        record.fields = []
        return
    moved = []
    for f in record.fields:
        labels = _moved_in_place(ctx, name, a, f.labels, x.dim())
        if labels is not None:
            moved.append(Field(labels, f.zero))
    record.fields = moved


def _moved_in_place(
    ctx: Context, name: str, a: dict[str, Any], labels: Array, rank: int
) -> Array | None:
    """Return the labels of a tensor after an in-place op, or pin them and return None."""
    if name == "unsqueeze_":
        return np.expand_dims(labels, a["dim"] % rank)
    if name == "squeeze_" and labels.ndim != rank:
        dims = [a["dim"]] if isinstance(a["dim"], int) else a["dim"]
        squeezed = {d % labels.ndim for d in dims}
        kept = [d for d in range(labels.ndim) if d not in squeezed]
        if len(kept) != rank:
            ctx.pin(labels, "is squeezed in place over dimensions that are not all of size 1")
            return None
        return labels.reshape([labels.shape[d] for d in kept])
    if name == "t_":
        return labels.T
    if name == "transpose_":
        return labels.swapaxes(a["dim0"], a["dim1"])
    return labels


def _is_alias(func: Any) -> bool:
    """Tell whether an op's schema says that its result is a view."""
    returns = func._schema.returns
    return bool(returns) and returns[0].alias_info is not None


@moves("alias", "detach", axes=Axes.SAME, in_order=True)
@moves("contiguous", axes=Axes.SAME, in_order=True, traits=Trait.BY_LAYOUT)
@moves("lift_fresh", "_conj", "conj", "resolve_conj", "resolve_neg")
def unmoved(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Keep the labels: the result is the tensor itself or a copy."""
    if out is not a["self"]:
        ctx.put(out, ctx.fields(a["self"]), base=a["self"])


@moves("clone", axes=Axes.SAME, in_order=True)
def cloned(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Keep the labels: the result is a copy of the tensor."""
    ctx.put(out, ctx.fields(a["self"]))


@moves(
    "channel_shuffle",
    shape=shapes.channel_shuffle_shape,
    corrects=literals.channel_shuffle_literals,
)
@moves("native_channel_shuffle", corrects=literals.channel_shuffle_literals)
def channel_shuffle(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Reshape the channels to (groups, c), swap the two dimensions, and merge them again."""
    x = a["self"]
    middle = [x.shape[0], a["groups"], x.shape[1] // a["groups"], *x.shape[2:]]
    fields = reshape(ctx, ctx.fields(x), x.shape, middle)
    fields = [Field(f.labels.swapaxes(1, 2), f.zero) for f in fields]
    ctx.put(out, reshape(ctx, fields, [middle[0], middle[2], middle[1], *middle[3:]], x.shape))


@moves("diagonal")
def diagonal(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Pin the two dimensions of the diagonal, which becomes the last dimension of the result."""
    x = a["self"]
    both = {a["dim1"] % x.dim(), a["dim2"] % x.dim()}
    passing = []
    for f in ctx.spared(x, both, "is read along a diagonal"):
        sizes = [size for d, size in enumerate(f.labels.shape) if d not in both]
        passing.append(Field(f.labels.reshape([*sizes, 1]), f.zero))
    ctx.put(out, passing, base=x)


row("dim", "is_complex", "is_floating_point", "get_device", traits=Trait.READS_KIND)
row(
    "size",
    "numel",
    "stride",
    "storage_offset",
    "is_contiguous",
    "is_strides_like_format",
    "is_non_overlapping_and_dense",
    "sym_size",
    "sym_numel",
    "sym_stride",
    "sym_storage_offset",
    "sym_is_contiguous",
    traits=Trait.READS_SIZES,
)
row("allclose", "equal", "is_nonzero", "item", traits=Trait.READS_VALUES)
row("adjoint", axes=Axes.PERMUTED)
# These return their argument or a part of it in some cases.
row(
    "atleast_1d",
    "atleast_2d",
    "atleast_3d",
    "conj_physical",
    "data",
    "dequantize",
    "lift",
    "set",
    "to_dense",
    "to_dense_backward",
    "to_mkldnn_backward",
    traits=Trait.MAY_RETURN_ARGUMENT,
)
