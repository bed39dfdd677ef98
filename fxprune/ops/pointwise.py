"""Pointwise ops: labels that meet element by element, with broadcasting, are united."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.common.dispatch import tensors_in
from fxprune.labels import Field
from fxprune.ops.context import Context
from fxprune.ops.records import Met
from fxprune.ops.shapes import elementwise as shapes
from fxprune.ops.shapes.common import like_first_shape
from fxprune.ops.table import Axes, Trait, computes, name_of_op, row


@computes("pointwise")
def pointwise(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Merge the operands element by element, with broadcasting.

    This rule holds for every op that PyTorch tags as pointwise.
    """
    # a mutable op without out= writes into its first argument, which is an operand like the others
    operands = {name: v for name, v in a.items() if isinstance(v, Tensor) and name != "out"}
    for given in tensors_in((out,), {}):  # frexp returns two
        elementwise(ctx, func, a, operands, given)


def elementwise(
    ctx: Context, func: Any, a: dict[str, Any], operands: dict[str, Tensor], out: Tensor
) -> None:
    """Merge operands element by element and set the fields of the result.

    Parameters
    ----------
    ctx:
        The context.
    func, a:
        The op and its arguments by name.
    operands:
        The tensors that meet, by name.
    out:
        The result.
    """
    rank = out.dim()
    names = list(operands)
    if len(names) == 1 and operands[names[0]].dim() == rank:
        x = operands[names[0]]
        before = ctx.fields(x)
        keeps = all(not f.zero for f in before) or keeps_zero(
            func, a, frozenset(names), frozenset(names)
        )
        fields = [Field(f.labels, f.zero and keeps) for f in before]
    else:
        laid = [ctx.operand(x, range(rank - x.dim(), rank), rank) for x in operands.values()]
        met = ctx.merge(laid, rank)
        fields = [Field(m.labels, _zero(func, a, names, m)) for m in met]
    if out is operands.get(names[0]) and func._schema.is_mutable:
        ctx.overwrite(out, fields)
    else:
        ctx.put(out, fields)


def _zero(func: Any, a: dict[str, Any], names: list[str], met: Met) -> bool:
    """Tell whether the result is zero at removed elements of a merged field."""
    zeros = frozenset(names[i] for i, zero in met.zero.items() if zero)
    return bool(zeros) and keeps_zero(func, a, zeros, frozenset(names))


# The result of such an op is zero if all operands of one of its sets are zero, whatever the values
# of the others.
_ABSORBS: dict[str, tuple[frozenset[str], ...]] = {
    "mul": (frozenset({"self"}), frozenset({"other"})),
    "div": (frozenset({"self"}),),
    "true_divide": (frozenset({"self"}),),
    "masked_fill": (),
    "where": (frozenset({"self", "other"}),),
    "addcmul": (frozenset({"self", "tensor1"}), frozenset({"self", "tensor2"})),
    "addcdiv": (frozenset({"self", "tensor1"}),),
    "copy_": (frozenset({"src"}),),
    "lerp": (frozenset({"self", "end"}),),
}


def keeps_zero(
    func: Any, a: dict[str, Any], zeros: frozenset[str], operands: frozenset[str]
) -> bool:
    """Tell whether the result is exactly 0 where some operands are 0.

    If all operands are 0, the op is executed on zeros. Otherwise only ops that are known to absorb
    a zero count.

    Parameters
    ----------
    func, a:
        The op and its arguments by name.
    zeros:
        Names of the operands that are 0.
    operands:
        Names of all operands.
    """
    name = name_of_op(func)
    plain = name.removesuffix("_")
    for absorbing in _ABSORBS.get(name, _ABSORBS.get(plain, ())):
        if absorbing <= zeros:
            return True
    if plain == "masked_fill" and "self" in zeros and not isinstance(a.get("value"), Tensor):
        return a["value"] == 0
    if zeros != operands:
        return False
    scalars = tuple((k, v) for k, v in a.items() if k not in operands)
    try:
        return _zero_at_zero(func, operands, scalars)
    except TypeError:  # an argument that cannot be hashed
        return False


@functools.lru_cache(maxsize=4096)
def _zero_at_zero(
    func: Any, operands: frozenset[str], scalars: tuple[tuple[str, Any], ...]
) -> bool:
    """Execute an op on zeros and tell whether its result is zero."""
    values = dict(scalars)
    positional, keyword = [], {}
    for argument in func._schema.arguments:
        name = argument.name
        value = torch.zeros(1) if name in operands else values.get(name)
        if not argument.kwarg_only:
            positional.append(value)
        elif value is not None:
            keyword[name] = value
    try:
        out = func(*positional, **keyword)
    except Exception:
        # the op rejects such operands (an integer op on floats), so nothing is known
        return False
    return isinstance(out, Tensor) and bool((out == 0).all())


@computes("hardswish", "hardsigmoid", "relu6", axes=Axes.SAME, shape=like_first_shape)
@computes(
    "hardswish_",
    "hardsigmoid_",
    "relu6_",
    "silu_",
    "hardtanh_",
    "leaky_relu",
    "leaky_relu_",
    "elu_",
    "celu",
    "celu_",
    "selu",
    "selu_",
    "mish_",
    "rrelu_with_noise",
    "clip",
    "clip_",
    "float_power",
    "square",
    "square_",
    "threshold",
    "threshold_",
    "masked_fill",
    "masked_fill_",
)
def untagged(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Merge the operands as pointwise ops do; PyTorch does not tag every overload of these."""
    first = out[0] if isinstance(out, tuple) else out
    tensors = {name: value for name, value in a.items() if isinstance(value, Tensor)}
    operands = {n: t for n, t in tensors.items() if n not in ("out", "p", "generator")}
    elementwise(ctx, func, a, operands, first)


@computes("bernoulli")
def bernoulli(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Draw with the probabilities in the argument, or with one given probability for all."""
    untagged(ctx, func, a, out)
    if a.get("p") is not None:
        ctx.put(out, [Field(f.labels, False) for f in ctx.fields(out)])


@computes("dropout", axes=Axes.SAME, traits=Trait.MAY_RETURN_ARGUMENT, shape=like_first_shape)
@computes("native_dropout", "rrelu")
def dropped(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Multiply by random factors; zeros stay zero."""
    _randomised(ctx, a, out, keeps_zeros=True)


@computes("alpha_dropout", axes=Axes.SAME, traits=Trait.MAY_RETURN_ARGUMENT)
def shifted(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Multiply by random factors and shift; zeros do not stay zero."""
    _randomised(ctx, a, out, keeps_zeros=False)


def _randomised(ctx: Context, a: dict[str, Any], out: Any, keeps_zeros: bool) -> None:
    """Copy the labels of the argument to the result."""
    fields = ctx.fields(a["input" if "input" in a else "self"])
    first = out[0] if isinstance(out, tuple) else out
    ctx.put(first, [Field(f.labels, f.zero and keeps_zeros) for f in fields])


@computes("zero_")
def emptied(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Keep the labels; the written values are zero."""
    _overwritten(ctx, a, out, zero=True)


@computes("fill", "fill_")
def fill(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Keep the labels; one value is written everywhere."""
    value = a.get("value")
    _overwritten(ctx, a, out, zero=not isinstance(value, Tensor) and value == 0)


@computes("normal_", "uniform_", "bernoulli_", "exponential_", "log_normal_")
def redrawn(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Keep the labels; random numbers are written."""
    _overwritten(ctx, a, out, zero=False)


def _overwritten(ctx: Context, a: dict[str, Any], out: Tensor, zero: bool) -> None:
    """Keep the labels of a tensor whose values are replaced; ``zero``: by zeros."""
    fields = [Field(f.labels, zero) for f in ctx.fields(a["self"])]
    if out is a["self"]:
        ctx.overwrite(out, fields)
    else:
        ctx.put(out, fields)


@computes("to", axes=Axes.SAME, traits=Trait.READS_DTYPE | Trait.BY_LAYOUT)
@computes("type_as", axes=Axes.SAME, traits=Trait.READS_DTYPE | Trait.MAY_RETURN_ARGUMENT)
@computes("_to_copy", axes=Axes.SAME)
def cast(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Keep the labels: the values are the same in another dtype or on another device."""
    if out is not a["self"]:
        ctx.put(out, ctx.fields(a["self"]))


@computes("copy_")
def copy(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Merge the source with the destination element by element."""
    elementwise(ctx, func, a, {"self": a["self"], "src": a["src"]}, out)


@computes("prelu", axes=Axes.SAME)
def prelu(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Merge the channels (dimension 1) with their slopes, or with one slope for all."""
    x, weight = a["self"], a["weight"]
    rank = x.dim()
    channel = 1 if rank > 1 else 0
    operands = [ctx.operand(x, range(rank), rank), ctx.operand(weight, (channel,), rank)]
    met = ctx.merge(operands, rank)
    ctx.put(out, [Field(m.labels, m.zero.get(0, False)) for m in met])


@computes("glu", in_order=False, shape=shapes.glu_shape)
def glu(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Unite the two halves a and b of a dimension: a * sigmoid(b)."""
    x, dim = a["self"], a["dim"] % a["self"].dim()
    half = x.shape[dim] // 2
    fields = []
    for f in ctx.fields(x):
        if f.labels.shape[dim] == 1:
            fields.append(f)
            continue
        first, second = np.split(f.labels, [half], axis=dim)
        ctx.unite(first, second)
        if len(f.dims) > 1:
            ctx.require_rectangle(first)
        fields.append(Field(first, f.zero))
    ctx.put(out, fields)


row("_prelu_kernel", shape=shapes.pointwise_shape)
row("tril", "triu", shape=shapes.triangle_shape)
row("feature_dropout", axes=Axes.SAME, traits=Trait.MAY_RETURN_ARGUMENT)
row("feature_alpha_dropout", traits=Trait.MAY_RETURN_ARGUMENT)
row("where", traits=Trait.SELECTS_BY_MASK)  # with one argument
