"""Reductions: sums, means and variances over removed zeros are exact; others pin their labels."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor

from fxprune import moments
from fxprune.labels import Field
from fxprune.ops.context import Context
from fxprune.ops.dims import correction_of, reduced_dims
from fxprune.ops.pointwise import elementwise
from fxprune.ops.shapes import normalisation as shapes_of_norms
from fxprune.ops.shapes import reduction as shapes
from fxprune.ops.table import Axes, Trait, computes, has_trait, name_of_op, row

_statistic = functools.partial(computes, traits=Trait.STATISTIC)


def _put_reduced(
    ctx: Context, out: Any, x: Tensor, fields: list[Field], reduced: set[int], keepdim: bool
) -> None:
    """Set the fields of each result of a reduction, without the reduced dimensions."""
    for result in out if isinstance(out, (tuple, list)) else (out,):
        if not isinstance(result, Tensor):
            continue
        kept = [d for d in range(x.dim()) if keepdim or d not in reduced]
        if len(kept) != result.dim():
            ctx.pin_all(fields, "is reduced to an unexpected rank")
            continue
        reshaped = []
        for f in fields:
            labels = f.labels.reshape([f.labels.shape[d] for d in kept])
            reshaped.append(Field(labels, f.zero))
        ctx.put(result, reshaped)


def _whole_rows(ctx: Context, f: Field, reduced: set[int]) -> Field | None:
    """Tie a field along the reduced dimensions; return None if it then has a single label."""
    labels = ctx.tie(f.labels, f.dims & reduced)
    return Field(labels, f.zero) if labels.size > 1 else None


def _sum_like(
    ctx: Context,
    func: Any,
    a: dict[str, Any],
    out: Any,
    *,
    verb: str = "is summed",
    counts: bool = False,
) -> None:
    """Apply the rule of a sum.

    ``counts`` says that the number of elements counts as a divisor; ``verb`` names the reduction
    in the reason of a pin.
    """
    x = a["self"] if "self" in a else a["x"]
    reduced, keepdim = reduced_dims(a, x)
    passing = []
    for f in ctx.fields(x):
        if not f.dims & reduced:
            passing.append(f)
        elif max(f.dims) not in reduced:
            # The inner dimension of the split is not reduced, so positions of the outer one go
            # together, as in x.view(n, groups, c).sum(1).
            tied = _whole_rows(ctx, f, reduced)
            passing += [] if tied is None else [tied]
        else:
            _reduce(ctx, f, reduced, verb, counts)
    _put_reduced(ctx, out, x, passing, reduced, keepdim)


def _reduce(ctx: Context, f: Field, reduced: set[int], verb: str, counts: bool) -> None:
    """Reduce a field whose last dimension is reduced; pin it if its zeros do not allow that."""
    if not f.zero:
        ctx.pin(f.labels, f"{verb} although removed elements are not zero")
    elif counts and not _is_one_statistic(ctx.target):
        ctx.pin(f.labels, f"{verb} inside a larger operation, whose divisor cannot be kept")
    else:
        if f.dims - reduced:
            ctx.require_rectangle(f.labels, fixed=f.dims - reduced)
        if counts:
            ctx.found.rescaled.setdefault(ctx.node, []).append(f.labels)


def _is_one_statistic(target: Any) -> bool:
    """Tell whether a graph's target is a statistic by itself, not a larger operation.

    Only then can the emitted graph count the removed elements.
    """
    if isinstance(target, torch._ops.OpOverload):
        target = name_of_op(target)
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return has_trait(name, Trait.STATISTIC)


@computes("sum", "norm", axes=Axes.REDUCED, shape=shapes.reduction_shape)
@computes("linalg_vector_norm", shape=shapes.reduction_shape)
@computes("frobenius_norm", "nansum", "count_nonzero")
def total(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Sum: exact where removed elements are zero, pinned where they are not."""
    order = a.get("ord", a.get("p", 2))
    if isinstance(order, (int, float)) and order <= 0:
        return anything_else(ctx, func, a, out)
    return _sum_like(ctx, func, a, out)


@computes("mean", axes=Axes.REDUCED, traits=Trait.STATISTIC, shape=shapes.reduction_shape)
def mean(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Sum and divide by the original's number of elements."""
    _sum_like(ctx, func, a, out, verb="is averaged", counts=True)


@_statistic("var", axes=Axes.REDUCED, shape=shapes.reduction_shape, counting=moments.var)
@_statistic("std", axes=Axes.REDUCED, shape=shapes.reduction_shape, counting=moments.std)
@_statistic("var_mean", shape=shapes.two_reductions_shape, counting=moments.var_mean)
@_statistic("std_mean", shape=shapes.two_reductions_shape, counting=moments.std_mean)
def spread(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Take a variance in which removed elements count as zeros, as in a mean."""
    if a["self"].is_complex() or correction_of(a) > 1:
        return anything_else(ctx, func, a, out)
    return _sum_like(ctx, func, a, out, verb="has its variance taken", counts=True)


@computes("amax", "amin", axes=Axes.REDUCED, shape=shapes.reduction_shape)
@computes("prod", shape=shapes.reduction_shape)
@computes("aminmax", shape=shapes.two_reductions_shape)
@computes("any", "all", shape=shapes.truth_shape)
@computes("max", "min")
@computes("argmax", "argmin", traits=Trait.COUNTS_ALL, shape=shapes.position_shape)
@computes("logsumexp", axes=Axes.REDUCED, traits=Trait.COUNTS_ALL, shape=shapes.logsumexp_shape)
@computes("median", "mode", "kthvalue", traits=Trait.COUNTS_ALL)
def anything_else(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Pin the labels of a reduced dimension, or tie them if they vary elsewhere too.

    A removed element would count in such a reduction.
    """
    x = a["self"]
    if isinstance(a.get("other"), Tensor):  # max(a, b) is pointwise
        return elementwise(ctx, func, a, {"self": x, "other": a["other"]}, out)
    reduced, keepdim = reduced_dims(a, x)
    counts_all = has_trait(name_of_op(func), Trait.COUNTS_ALL)
    passing = []
    for f in ctx.fields(x):
        if f.dims <= reduced:
            ctx.pin(f.labels, f"is reduced by {func._schema.name.removeprefix('aten::')}")
            continue
        tied = _whole_rows(ctx, f, reduced)
        if tied is not None:  # neither log(n) nor the position of a maximum is zero
            passing.append(Field(tied.labels, tied.zero and not counts_all))
    return _put_reduced(ctx, out, x, passing, reduced, keepdim)


@computes("softmax", "log_softmax", axes=Axes.SAME, shape=shapes_of_norms.softmax_shape)
@computes("_softmax", "_log_softmax", "logcumsumexp", "argsort", "cummax", "cummin")
@computes("cumsum", axes=Axes.SAME, shape=shapes_of_norms.softmax_shape)
@computes("cumprod", shape=shapes_of_norms.softmax_shape)
@computes("sort", shape=shapes.sort_shape)
@computes("topk", shape=shapes.topk_shape)
def along(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Pin the labels of the dimension that is mixed, or tie them if they vary elsewhere too."""
    x = a["self"]
    dim = operator.index(a.get("dim", -1)) % x.dim()
    keeps_zeros = func._schema.name in ("aten::cumsum", "aten::cumprod")
    passing = []
    for f in ctx.fields(x):
        if f.dims == {dim}:
            ctx.pin(f.labels, f"is mixed by {func._schema.name.removeprefix('aten::')}")
            continue
        tied = _whole_rows(ctx, f, {dim})
        if tied is not None:
            passing.append(Field(tied.labels, tied.zero and keeps_zeros))
    for result in out if isinstance(out, (tuple, list)) else (out,):
        ctx.put(result, passing)


row("_safe_softmax", shape=shapes_of_norms.softmax_shape)
