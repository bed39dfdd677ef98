"""Sums of products: matrix products, linear layers, einsum and attention.

Their operands meet element by element in virtual dimensions, some of which are then summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxprune.labels import Field
from fxprune.ops import literals, macs
from fxprune.ops.context import Context
from fxprune.ops.records import Operand
from fxprune.ops.shapes import contraction as shapes
from fxprune.ops.table import Axes, computes, name_of_op, row


def _finish(
    ctx: Context,
    out: Tensor,
    fields: list[Field],
    dims: Sequence[int],
    extra: Tensor | None = None,
) -> None:
    """Set the fields of a result, to which ``extra`` is added, if given.

    ``dims`` has the virtual dimension of each dimension of the result.
    """
    ctx.give(out, fields, dims)
    if extra is not None:
        rank = out.dim()
        met = ctx.merge(
            [
                ctx.operand(out, range(rank), rank),
                ctx.operand(extra, range(rank - extra.dim(), rank), rank),
            ],
            rank,
        )
        ctx.put(out, [Field(m.labels, m.zero.get(0, False) and m.zero.get(1, False)) for m in met])


@computes("linear", axes=Axes.LAYER, macs=macs.per_output_macs, shape=shapes.linear_shape)
def linear(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Sum over i: x (..., i), w (o, i) -> (..., o)."""
    x, w, rank = a["input"], a["weight"], a["input"].dim()
    if w.dim() == 1:
        fields = ctx.contract(
            [ctx.operand(x, range(rank), rank), ctx.operand(w, (rank - 1,), rank)],
            rank,
            {rank - 1},
        )
        return _finish(ctx, out, fields, range(rank - 1), a["bias"])
    operands = [ctx.operand(x, range(rank), rank + 1), ctx.operand(w, (rank, rank - 1), rank + 1)]
    fields = ctx.contract(operands, rank + 1, {rank - 1})
    bias = a["bias"]
    along = [f for f in fields if rank in f.dims]
    if (
        bias is not None
        and len(along) == 1 == len(fields)
        and ctx.meet_vector(along[0].labels.reshape(-1), bias)
    ):
        bias = None
    return _finish(ctx, out, fields, [*range(rank - 1), rank], bias)


@computes("mv", "dot", macs=macs.element_macs(0), shape=shapes.vector_product_shape)
@computes(
    "mm",
    "bmm",
    axes=Axes.MULTIPLIED,
    macs=macs.matrices_macs(0),
    shape=shapes.product_shape,
)
@computes("matmul", axes=Axes.MULTIPLIED, macs=macs.matmul_macs, shape=shapes.matmul_shape)
def matmul(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Sum over k: (..., n, k) @ (..., k, m) -> (..., n, m). Leading dimensions broadcast."""
    x, y = a["self"], next(a[name] for name in ("other", "mat2", "vec", "tensor") if name in a)
    batch = max(x.dim() - 2, y.dim() - 2, 0)
    n, k, m = batch, batch + 1, batch + 2
    x_dims = [*range(batch - (x.dim() - 2), batch), n, k] if x.dim() > 1 else [k]
    y_dims = [*range(batch - (y.dim() - 2), batch), k, m] if y.dim() > 1 else [k]
    fields = ctx.contract(
        [ctx.operand(x, x_dims, batch + 3), ctx.operand(y, y_dims, batch + 3)], batch + 3, {k}
    )
    out_dims = [*range(batch), *([n] if x.dim() > 1 else []), *([m] if y.dim() > 1 else [])]
    _finish(ctx, out, fields, out_dims)


@computes(
    "addmm",
    "baddbmm",
    macs=macs.matrices_macs(1),
    shape=shapes.sum_of_product_shape,
)
@computes("addbmm", macs=macs.matrices_macs(1))  # it sums over the batch too
@computes("addmv", macs=macs.element_macs(1))
def addmm(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Add a matrix product to a tensor that broadcasts to it."""
    name = name_of_op(func)
    if name == "addmv":
        operands = [ctx.operand(a["mat"], [0, 1], 2), ctx.operand(a["vec"], [1], 2)]
        return _finish(ctx, out, ctx.contract(operands, 2, {1}), [0], a["self"])
    x, y = (a["mat1"], a["mat2"]) if name == "addmm" else (a["batch1"], a["batch2"])
    batch = x.dim() - 2
    n, k, m = batch, batch + 1, batch + 2
    operands = [
        ctx.operand(x, [*range(batch), n, k], batch + 3),
        ctx.operand(y, [*range(batch), k, m], batch + 3),
    ]
    summed = {0, k} if name == "addbmm" else {k}
    out_dims = [n, m] if name == "addbmm" else [*range(batch), n, m]
    return _finish(ctx, out, ctx.contract(operands, batch + 3, summed), out_dims, a["self"])


@computes("einsum", macs=macs.einsum_macs)
def einsum(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Sum over the letters that are not in the result. Each letter is a virtual dimension."""
    equation, tensors = a["equation"].replace(" ", ""), list(a["tensors"])
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    repeated = any(len(set(t.replace(".", ""))) != len(t.replace(".", "")) for t in terms)
    if not arrow or repeated:
        letters = [c for c in left if c.isalpha()]
        if repeated or "." in left:
            for t in tensors:
                ctx.pin_all(ctx.fields(t), f"einsum {equation!r} repeats or hides a dimension")
            return
        right = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    ellipsis = max(
        (
            t.dim() - len(term.replace("...", ""))
            for t, term in zip(tensors, terms, strict=True)
            if "..." in term
        ),
        default=0,
    )
    names: dict[str, int] = {f"...{i}": i for i in range(ellipsis)}

    def dims_of(term: str, rank: int) -> list[int]:
        """Return the virtual dimensions of a term for a tensor of this rank."""
        head, dots, tail = term.partition("...")
        middle = (
            [f"...{i}" for i in range(ellipsis - (rank - len(head) - len(tail)), ellipsis)]
            if dots
            else []
        )
        return [names.setdefault(letter, len(names)) for letter in [*head, *middle, *tail]]

    laid = [dims_of(term, t.dim()) for t, term in zip(tensors, terms, strict=True)]
    out_dims = dims_of(right, out.dim())
    rank = len(names)
    operands = [ctx.operand(t, dims, rank) for t, dims in zip(tensors, laid, strict=True)]
    _finish(ctx, out, ctx.contract(operands, rank, set(range(rank)) - set(out_dims)), out_dims)


@computes(
    "scaled_dot_product_attention",
    axes=Axes.ATTENDED,
    macs=macs.attention_macs,
    shape=shapes.attention_shape,
    corrects=literals.attention_literals,
)
def attention(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Sum q (..., L, E) * k (..., S, E) over E, then weights (..., L, S) * v (..., S, F) over S.

    The token axes L and S are pinned.
    """
    q, k, v, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    if not q.dim() == k.dim() == v.dim() or (mask is not None and not 0 < mask.dim() <= q.dim()):
        for t in (q, k, v, mask):
            ctx.pin_all(ctx.fields(t), "attention whose operands differ in rank")
        return
    batch = q.dim() - 2
    length, source, width = batch, batch + 1, batch + 2
    lead, rank = [*range(batch)], batch + 3

    def of_source(t: Tensor) -> Operand:
        """Lay out the key or value; with grouped queries its heads are repeated."""
        operand = ctx.operand(t, [*lead, source, width], rank)
        if a.get("enable_gqa") and t.shape[-3] > 1:
            times, heads = q.shape[-3] // t.shape[-3], batch - 1
            operand.fields = [
                Field(f.labels.repeat(times if heads in f.dims else 1, heads), f.zero)
                for f in operand.fields
            ]
        return operand

    scores = ctx.contract(
        [ctx.operand(q, [*lead, length, width], rank), of_source(k)], rank, {width}
    )
    for f in scores:
        if f.dims & {length, source}:
            ctx.pin(f.labels, "is a token axis of attention")
    # The weights come from a softmax over the source: they have the full size on all their
    # dimensions and are zero nowhere.
    weights = ctx.operand(q, [*lead, length, width], rank)
    weights.fields = [Field(f.labels, False) for f in scores if not f.dims & {length, source}]
    weights.sized = (weights.sized - {width}) | {length, source}
    weights.unlabelled, weights.record = {}, None
    if mask is not None:  # a mask may have a dimension of heads
        mask_dims = [*lead, length, source][-mask.dim() :]
        for f in ctx.fields(mask):
            if {mask_dims[d] for d in f.dims} & {length, source}:
                ctx.pin(f.labels, "is a token axis of attention")
        met = ctx.merge([weights, ctx.operand(mask, mask_dims, rank)], rank)
        weights.fields = [Field(m.labels, False) for m in met]
    fields = ctx.contract([weights, of_source(v)], rank, {source})
    _finish(ctx, out, fields, [*lead, length, width])


# Kernels that versions of torch run for these ops, and products without a rule.
row("_scaled_mm", "_scaled_mm_v2", "_int_mm", macs=macs.matrices_macs(0))
row("_addmm_activation", macs=macs.matrices_macs(1))
row("_grouped_mm", "_scaled_grouped_mm", "_scaled_grouped_mm_v2", macs=macs.grouped_matrices_macs)
row("mkldnn_linear", "_weight_int8pack_mm", macs=macs.per_output_macs)
row("vdot", macs=macs.element_macs(0))
row("_trilinear", macs=macs.trilinear_macs)
row(
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_triton_scaled_dot_attention",
    macs=macs.attention_macs,
)
row("_flash_attention_forward", "_efficient_attention_forward", macs=macs.attention_by_token_macs)
row(
    "_native_multi_head_attention",
    "_triton_multi_head_attention",
    macs=macs.attention_module_macs,
)
row("_transformer_encoder_layer_fwd", macs=macs.encoder_layer_macs)
