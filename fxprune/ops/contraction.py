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
    terms, result = _einsum_terms(equation)
    if result is None:
        for t in tensors:
            ctx.pin_all(ctx.fields(t), f"einsum {equation!r} repeats or hides a dimension")
        return
    letters = _EinsumDims(terms, tensors)
    laid = [letters.dims_of(term, t.dim()) for t, term in zip(tensors, terms, strict=True)]
    out_dims = letters.dims_of(result, out.dim())
    rank = len(letters.numbers)
    operands = [ctx.operand(t, dims, rank) for t, dims in zip(tensors, laid, strict=True)]
    _finish(ctx, out, ctx.contract(operands, rank, set(range(rank)) - set(out_dims)), out_dims)


def _einsum_terms(equation: str) -> tuple[list[str], str | None]:
    """Return the terms of the operands and of the result.

    The result is None if a term repeats a letter, or if an ellipsis stands in an equation without
    an explicit result.
    """
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    names = [term.replace(".", "") for term in terms]
    if any(len(set(name)) != len(name) for name in names) or (not arrow and "." in left):
        return terms, None
    if not arrow:
        letters = [c for c in left if c.isalpha()]
        right = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    return terms, right


class _EinsumDims:
    """The virtual dimensions of an einsum: one for each letter and each axis of an ellipsis.

    Attributes
    ----------
    numbers:
        Letter, or ``...0``, ``...1``, and so on for the axes of the ellipsis -> virtual dimension.
    """

    def __init__(self, terms: Sequence[str], tensors: Sequence[Tensor]) -> None:
        self._ellipsis = 0  # number of its axes
        for term, tensor in zip(terms, tensors, strict=True):
            if "..." in term:
                count = tensor.dim() - len(term.replace("...", ""))
                self._ellipsis = max(self._ellipsis, count)
        self.numbers = {f"...{i}": i for i in range(self._ellipsis)}

    def dims_of(self, term: str, rank: int) -> list[int]:
        """Return the virtual dimensions of a term for a tensor of this rank."""
        head, dots, tail = term.partition("...")
        first = self._ellipsis - (rank - len(head) - len(tail))
        middle = [f"...{i}" for i in range(first, self._ellipsis)] if dots else []
        names = [*head, *middle, *tail]
        return [self.numbers.setdefault(name, len(self.numbers)) for name in names]


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
    dims = _AttentionDims(q.dim() - 2)
    query = ctx.operand(q, dims.of_query, dims.rank)
    scores = ctx.contract([query, _of_source(ctx, a, k, dims)], dims.rank, {dims.width})
    weights = _attention_weights(ctx, q, scores, dims)
    if mask is not None:  # a mask may have a dimension of heads
        _merge_mask(ctx, weights, mask, dims)
    fields = ctx.contract([weights, _of_source(ctx, a, v, dims)], dims.rank, {dims.source})
    _finish(ctx, out, fields, dims.of_query)


class _AttentionDims:
    """The virtual dimensions of attention.

    Attributes
    ----------
    lead:
        The batch, and the heads as its last dimension.
    length, source, width:
        The query's tokens L, the tokens S of key and value, and the channels.
    tokens:
        ``length`` and ``source``.
    """

    def __init__(self, batch: int) -> None:
        self.lead = list(range(batch))
        self.length, self.source, self.width = batch, batch + 1, batch + 2
        self.rank = batch + 3
        self.tokens = {self.length, self.source}
        self.of_query = [*self.lead, self.length, self.width]
        self.of_source = [*self.lead, self.source, self.width]
        self.of_weights = [*self.lead, self.length, self.source]


def _of_source(ctx: Context, a: dict[str, Any], t: Tensor, dims: _AttentionDims) -> Operand:
    """Lay out the key or value; with grouped queries its heads are repeated."""
    operand = ctx.operand(t, dims.of_source, dims.rank)
    if a.get("enable_gqa") and t.shape[-3] > 1:
        times, heads = a["query"].shape[-3] // t.shape[-3], dims.lead[-1]
        repeated = []
        for f in operand.fields:
            labels = f.labels.repeat(times if heads in f.dims else 1, heads)
            repeated.append(Field(labels, f.zero))
        operand.fields = repeated
    return operand


def _attention_weights(
    ctx: Context, q: Tensor, scores: list[Field], dims: _AttentionDims
) -> Operand:
    """Return the attention weights as an operand, and pin token axes of the scores.

    The weights come from a softmax over the source: they have the full size on all their
    dimensions and are zero nowhere.
    """
    fields = []
    for f in scores:
        if f.dims & dims.tokens:
            ctx.pin(f.labels, "is a token axis of attention")
        else:
            fields.append(Field(f.labels, False))
    weights = ctx.operand(q, dims.of_query, dims.rank)
    weights.fields = fields
    weights.sized = (weights.sized - {dims.width}) | dims.tokens
    weights.unlabelled, weights.record = {}, None
    return weights


def _merge_mask(ctx: Context, weights: Operand, mask: Tensor, dims: _AttentionDims) -> None:
    """Merge the attention weights with a mask whose token axes are pinned."""
    mask_dims = dims.of_weights[-mask.dim() :]
    for f in ctx.fields(mask):
        if {mask_dims[d] for d in f.dims} & dims.tokens:
            ctx.pin(f.labels, "is a token axis of attention")
    met = ctx.merge([weights, ctx.operand(mask, mask_dims, dims.rank)], dims.rank)
    weights.fields = [Field(m.labels, False) for m in met]


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
