"""Tensors created from sizes: their dimensions shrink with what they meet."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from fxprune.labels import Field
from fxprune.ops import literals
from fxprune.ops.context import Context
from fxprune.ops.shapes.elementwise import blank_shape
from fxprune.ops.table import Axes, Kind, Trait, name_of_op, op

_creation = functools.partial(op, kind=Kind.CREATES)


@_creation("zeros", "ones", "full", "empty", "rand", "randn", corrects=literals.sizes_literals)
@_creation(
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    traits=Trait.READS_SHAPE,
    corrects=literals.sizes_literals,
)
def constant_fill(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Give each dimension new labels that no parameter owns, so it shrinks with what it meets."""
    name = name_of_op(func).removeprefix("new_")
    value = {"zeros": 0, "full": a.get("fill_value", 1)}.get(name, 1)
    zero = not isinstance(value, Tensor) and value == 0
    ctx.put(out, ctx.new_fields(out.shape, range(out.dim()), zero))


@_creation("rand_like", "randn_like", axes=Axes.SAME, shape=blank_shape)
@_creation(
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    axes=Axes.SAME,
    traits=Trait.READS_SHAPE,
    shape=blank_shape,
)
def like(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Copy the labels of the argument, whose sizes the result has."""
    value = {"zeros_like": 0, "full_like": a.get("fill_value", 1)}.get(name_of_op(func), 1)
    ctx.put(out, [Field(f.labels, value == 0) for f in ctx.fields(a["self"])])
