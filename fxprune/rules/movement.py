"""Pure data movement: the op itself, executed on the labels.

Only where a literal decides which positions are read (``selected``, ``slice``, ``roll``) or how
positions are laid out one after the other (``reshape``) does a rule add what must hold for the
smaller tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from torch import Tensor

from fxprune.labels import Array, Field, compact, varied
from fxprune.rules.context import Context, as_torch, from_torch
from fxprune.rules.registry import rule
from fxprune.shapes import reshape_blocks


@rule(
    *(
        "permute",
        "transpose",
        "transpose_",
        "t",
        "t_",
        "numpy_T",
        "matrix_H",
        "mT",
        "movedim",
        "moveaxis",
        "swapaxes",
        "swapdims",
    ),
    *("unsqueeze", "unsqueeze_", "squeeze", "squeeze_", "flip", "fliplr", "flipud", "rot90"),
    *(
        "alias",
        "detach",
        "lift_fresh",
        "clone",
        "contiguous",
        "_conj",
        "conj",
        "resolve_conj",
        "resolve_neg",
    ),
    *("channel_shuffle", "native_channel_shuffle"),
)
def move(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Execute the op on the labels."""
    x = a["self"]
    name = func._schema.name.removeprefix("aten::")
    if out is x:
        _in_place(ctx, name, a, x)
        return
    if name in (
        "alias",
        "detach",
        "lift_fresh",
        "clone",
        "contiguous",
        "_conj",
        "conj",
        "resolve_conj",
        "resolve_neg",
    ):
        ctx.put(out, ctx.fields(x), base=None if name == "clone" else x)
        return
    fields = ctx.fields(x)
    if name in ("channel_shuffle", "native_channel_shuffle"):
        # (groups, c) -> (c, groups): the two dimensions swap their order, see reshape.
        middle = [x.shape[0], a["groups"], x.shape[1] // a["groups"], *x.shape[2:]]
        fields = reshape(ctx, fields, x.shape, middle)
        fields = [Field(f.labels.swapaxes(1, 2), f.zero) for f in fields]
        ctx.put(out, reshape(ctx, fields, [middle[0], middle[2], middle[1], *middle[3:]], x.shape))
        return
    rest = {k: v for k, v in a.items() if k not in ("self", "memory_format")}
    moved = []
    for f in fields:
        labels = from_torch(func(as_torch(f.labels, x.shape), *rest.values()))
        if labels.size == 1:
            ctx.pin(labels, "its removal would empty a tensor")
        else:
            moved.append(Field(labels, f.zero))
    ctx.put(out, moved, base=x if out._is_view() or _is_alias(func) else None)


def _in_place(ctx: Context, name: str, a: dict[str, Any], x: Tensor) -> None:
    """``x.transpose_(0, 1)``: the tensor has its new shape already, its labels lie in the old
    one.
    """
    # contiguous, resolve_conj and such returned their argument
    if not name.endswith("_") or (record := ctx.record(x)) is None:
        return
    ranks = {f.labels.ndim for f in ctx.fields(x)}
    if name == "squeeze_" and a.get("dim") is None and ranks - {x.dim()}:
        ctx.pin_all(record.fields, "is squeezed in place over dimensions that are not named")
        record.fields = []
        return
    moved = []
    for f in record.fields:
        labels = f.labels
        if name == "unsqueeze_":
            labels = np.expand_dims(labels, a["dim"] % x.dim())
        elif name == "squeeze_" and labels.ndim != x.dim():
            dims = [a["dim"]] if isinstance(a["dim"], int) else a["dim"]
            gone = {d % labels.ndim for d in dims}
            kept = [d for d in range(labels.ndim) if d not in gone]
            if len(kept) != x.dim():
                ctx.pin(labels, "is squeezed in place over dimensions that are not all of size 1")
                continue
            labels = labels.reshape([labels.shape[d] for d in kept])
        elif name == "t_":
            labels = labels.T
        elif name == "transpose_":
            labels = labels.swapaxes(a["dim0"], a["dim1"])
        moved.append(Field(labels, f.zero))
    record.fields = moved


def _is_alias(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and returns[0].alias_info is not None


@rule("diagonal")
def diagonal(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Position i of two dimensions at once: both are pinned, others pass and the diagonal lies
    behind them.
    """
    x = a["self"]
    both = {a["dim1"] % x.dim(), a["dim2"] % x.dim()}
    passing = []
    for f in ctx.fields(x):
        if f.dims & both:
            ctx.pin(f.labels, "is read along a diagonal")
        else:
            sizes = [size for d, size in enumerate(f.labels.shape) if d not in both]
            passing.append(Field(f.labels.reshape([*sizes, 1]), f.zero))
    ctx.put(out, passing, base=x)


@rule(
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "_reshape_alias",
    "view_as",
    "reshape_as",
)
def reshaped(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Split and merge dimensions; only blocks of dimensions on which labels vary are touched."""
    x = a["self"]
    if func._overloadname == "dtype":
        ctx.pin_all(ctx.fields(x), "is reinterpreted as another dtype")
        return
    ctx.put(out, reshape(ctx, ctx.fields(x), x.shape, out.shape), base=x)
    if isinstance(a.get("other"), Tensor):
        _sized_like(ctx, out, out, a["other"], x)


def _sized_like(ctx: Context, out: Tensor, x: Tensor, other: Tensor, base: Tensor) -> None:
    """The result holds ``x`` at the sizes of another tensor, so their labels meet."""
    rank = out.dim()
    met = ctx.merge(
        [ctx.operand(x, range(rank - x.dim(), rank), rank), ctx.operand(other, range(rank), rank)],
        rank,
    )
    ctx.put(out, [Field(m.labels, m.zero.get(0, False)) for m in met], base=base)


def reshape(
    ctx: Context, fields: Sequence[Field], old: Sequence[int], new: Sequence[int]
) -> list[Field]:
    """The labels of a reshaped tensor; notes which dimensions were laid out one after the
    other.
    """
    if not fields:
        return []
    blocks = reshape_blocks(tuple(old), tuple(new))
    out = []
    for f in fields:
        dims = f.dims
        form_old, form_new = [1] * len(old), [1] * len(new)
        splits = []
        for ins, outs in blocks:
            touched = [d for d in ins if d in dims]
            if not touched:
                continue
            for d in ins:
                form_old[d] = old[d]
            for d in outs:
                form_new[d] = new[d]
            if len(touched) > 1:
                ctx.sight(f.labels, merged=tuple(touched))
            if len(outs) > 1:
                splits.append(tuple(outs))
        labels = compact(np.broadcast_to(f.labels, form_old).reshape(form_new))
        for parts in splits:
            inner = tuple(d for d in parts if labels.shape[d] > 1)
            if len(inner) > 1:
                ctx.sight(labels, merged=inner)
        out.append(Field(labels, f.zero))
    return out


@rule("expand", "expand_as", "broadcast_to", "expand_copy")
def expand(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Dimensions made from size 1 shrink with what they meet."""
    x = a["self"]
    if isinstance(a.get("other"), Tensor):
        return _sized_like(ctx, out, x, a["other"], x)
    lead = out.dim() - x.dim()
    fields = [
        Field(f.labels.reshape([1] * lead + list(f.labels.shape)), f.zero) for f in ctx.fields(x)
    ]
    made = [
        d for d in range(out.dim()) if d < lead or (x.shape[d - lead] == 1 and out.shape[d] > 1)
    ]
    return ctx.put(out, [*fields, *ctx.virtual(out.shape, made, zero=False)], base=x)


@rule("repeat", "tile")
def repeat(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Copies one after the other carry the same labels; copies of a dimension of size 1 are as in
    expand.
    """
    x = a["self"]
    lead = out.dim() - x.dim()
    times = [out.shape[d] // (x.shape[d - lead] if d >= lead else 1) for d in range(out.dim())]
    fields = []
    for f in ctx.fields(x):
        labels = f.labels.reshape([1] * lead + list(f.labels.shape))
        fields.append(
            Field(
                np.tile(
                    labels, [t if s > 1 else 1 for t, s in zip(times, labels.shape, strict=True)]
                ),
                f.zero,
            )
        )
    made = [d for d in range(out.dim()) if times[d] > 1 and (d < lead or x.shape[d - lead] == 1)]
    ctx.put(out, [*fields, *ctx.virtual(out.shape, made, zero=False)])


@rule("repeat_interleave")
def repeat_interleave(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Each position several times: the copies carry the same label; those of a dimension of size 1
    are as in expand.
    """
    x, dim, times = a.get("self"), a.get("dim"), a.get("repeats")
    if isinstance(x, Tensor) and x.dim() == 1:
        dim = 0
    if not isinstance(x, Tensor) or dim is None or not isinstance(times, int):
        for v in a.values():
            ctx.pin_all(ctx.fields(v), "is repeated by a tensor of counts")
        return
    dim %= x.dim()
    fields = [
        Field(np.repeat(f.labels, times, axis=dim) if dim in f.dims else f.labels, f.zero)
        for f in ctx.fields(x)
    ]
    ctx.put(
        out, [*fields, *ctx.virtual(out.shape, [dim] if x.shape[dim] == 1 else [], zero=False)]
    )


@rule("cat", "concat", "concatenate")
def cat(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Labels lie one after the other along the dimension; along the others they meet."""
    tensors, dim = [t for t in a["tensors"] if not (t.dim() == 1 and t.shape[0] == 0)], a["dim"]
    dim %= out.dim()
    _join(ctx, tensors, [ctx.fields(t) for t in tensors], dim, out)


def _join(
    ctx: Context, tensors: Sequence[Tensor], fields: list[list[Field]], dim: int, out: Tensor
) -> None:
    rank = out.dim()
    # Along the other dimensions: as operands that meet.
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
    # Along the dimension: the k-th field of each, one after the other.
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


@rule("stack")
def stack(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """A new dimension; along all others the operands meet."""
    tensors = a["tensors"]
    dim = a["dim"] % out.dim()
    dims = [d for d in range(out.dim()) if d != dim]
    operands = [ctx.operand(t, dims, out.dim()) for t in tensors]
    met = ctx.merge(operands, out.dim())
    ctx.put(
        out, [Field(m.labels, len(m.zero) == len(tensors) and all(m.zero.values())) for m in met]
    )


@rule("select")
def selected(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """One position of a dimension: it has to stay where the dimension itself can shrink."""
    x = a["self"]
    dim = a["dim"] % x.dim()
    ctx.put(out, _select_position(ctx, ctx.fields(x), dim, a["index"] % x.shape[dim]), base=x)


def _select_position(ctx: Context, fields: Sequence[Field], dim: int, index: int) -> list[Field]:
    out = []
    for f in fields:
        picked = cast(Array, f.labels.take(index if dim in f.dims else 0, axis=dim))
        if f.dims == {dim}:
            ctx.pin(picked, "is read by its position")
            continue
        if dim in f.dims:
            ctx.sight(f.labels, fixed={dim})
            picked = compact(picked)
        out.append(Field(picked, f.zero))
    return out


@rule("unbind")
def unbind(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Every position of a dimension, each a tensor of its own."""
    x = a["self"]
    dim = a["dim"] % x.dim()
    fields = ctx.fields(x)
    for i, part in enumerate(out):
        ctx.put(part, _select_position(ctx, fields, dim, i), base=x)


def _slices(
    ctx: Context, x: Tensor, dim: int, bounds: Sequence[tuple[int, int]], outs: Sequence[Tensor]
) -> None:
    fields = ctx.fields(x)
    for (start, stop), out in zip(bounds, outs, strict=True):
        own = []
        for f in fields:
            if dim not in f.dims:
                own.append(f)
                continue
            pick = (slice(None),) * dim
            # every row must lose equally many before, inside and behind the slice
            if len(f.dims) > 1:
                for part in (
                    f.labels[(*pick, slice(0, start))],
                    f.labels[(*pick, slice(stop, None))],
                ):
                    if part.size and len(varied(part)) > 1:
                        ctx.sight(part)
            labels = f.labels[(*pick, slice(start, stop))]
            if labels.size == 0:
                continue
            labels = compact(labels)
            if labels.size == 1:
                ctx.pin(labels, "its removal would empty a tensor")
            else:
                own.append(Field(labels, f.zero))
        ctx.put(out, own, base=x)


@rule("slice", "narrow")
def slices(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """A range of positions; with a step, the positions of one stride go together."""
    x, dim = a["self"], a["dim"] % a["self"].dim()
    size, step = x.shape[dim], a.get("step") or 1
    if "length" in a:
        start = int(a["start"])
        stop = start + a["length"]
    else:
        start, stop, _ = slice(a["start"], a["end"], None).indices(size)
    if step == 1:
        return _slices(ctx, x, dim, [(start, max(start, stop))], [out])
    own = []
    for f in ctx.fields(x):
        if dim not in f.dims:
            own.append(f)
            continue
        labels = np.moveaxis(f.labels, dim, -1)
        if size % step or stop != size or start >= step:
            ctx.pin(labels, "is read with a step that does not divide it")
            continue
        tied = ctx.tie(labels.reshape(*labels.shape[:-1], size // step, step), [labels.ndim])
        full = (
            np.broadcast_to(tied, (*labels.shape[:-1], size // step, 1))[..., 0]
            if tied.size > 1
            else tied[..., 0]
        )
        picked = compact(np.moveaxis(full, -1, dim))
        if picked.size == 1:
            ctx.pin(picked, "its removal would empty a tensor")
        else:
            own.append(Field(picked, f.zero))
    ctx.put(out, own, base=x)
    return None


@rule(
    "split",
    "split_with_sizes",
    "chunk",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "unsafe_chunk",
    "tensor_split",
    "hsplit",
    "vsplit",
    "dsplit",
)
def split(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Consecutive ranges of positions."""
    x = a["self"]
    dim = split_dim(func._schema.name.removeprefix("aten::"), a)
    ends = np.cumsum([part.shape[dim] for part in out]).tolist()
    _slices(ctx, x, dim, list(zip([0, *ends[:-1]], ends, strict=True)), out)


def split_dim(name: str, a: Mapping[str, Any]) -> int:
    """The dimension that an op of the family of ``split`` cuts."""
    rank = a["self"].dim()
    dim: int = {"hsplit": 1 if rank > 1 else 0, "vsplit": 0, "dsplit": 2}.get(
        name, a.get("dim", 0)
    )
    return dim % rank


@rule("roll")
def roll(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """A rotation; the literal shift is corrected to the survivors that wrap around."""
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
                    ctx.sight(f.labels, fixed={d})
        moved.append(Field(labels, f.zero))
    ctx.put(out, moved)


@rule("constant_pad_nd", "pad")
def pad(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """New positions of a labelled dimension get labels of their own; elsewhere the channel's label
    covers its padding.
    """
    x, amounts = a["self"], a["pad"]
    value = a.get("value") or 0
    if a.get("mode", "constant") != "constant":
        padded = {x.dim() - 1 - i // 2 for i, n in enumerate(amounts) if n}
        passing = []
        for f in ctx.fields(x):
            if f.dims & padded:
                ctx.pin(f.labels, "is padded from its own content")
            else:
                passing.append(f)
        ctx.put(out, passing)
        return
    fields = []
    for f in ctx.fields(x):
        labels = f.labels
        for i in range(len(amounts) // 2):
            d, before, after = x.dim() - 1 - i, amounts[2 * i], amounts[2 * i + 1]
            if d not in f.dims or not (before or after):
                continue
            if before < 0 or after < 0 or len(f.dims) > 1:
                ctx.pin(
                    labels,
                    "is cropped by a padding, or padded while split over several dimensions",
                )
                labels = np.zeros_like(labels[(slice(0, 1),) * labels.ndim])
                break
            form = [1] * labels.ndim
            parts = [labels]
            if before:
                form[d] = before
                parts.insert(0, ctx.units.fresh(before, -1).reshape(form))
            if after:
                form[d] = after
                parts.append(ctx.units.fresh(after, -1).reshape(form))
            labels = np.concatenate(parts, axis=d)
        if labels.any():
            fields.append(Field(labels, f.zero and value == 0))
    ctx.put(out, fields)


@rule("unfold")
def unfold(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Sliding windows over one dimension, which is pinned; the window is a new last dimension."""
    x = a["self"]
    dim = a["dimension"] % x.dim()
    passing = []
    for f in ctx.fields(x):
        if dim in f.dims:
            ctx.pin(f.labels, "is an axis of positions that a window slides over")
        else:
            passing.append(Field(f.labels[..., np.newaxis], f.zero))
    ctx.put(out, passing)
