"""Tensors made from sizes: their dimensions shrink with whatever they meet."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxprune.labels import Field
from fxprune.rules.context import Context
from fxprune.rules.registry import rule


@rule(
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "rand",
    "randn",
)
def constant_fill(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Constant fill of a given size: each dimension gets labels of its own, owned by no
    parameter.
    """
    name = func._schema.name.removeprefix("aten::").removeprefix("new_")
    value = {"zeros": 0, "full": a.get("fill_value", 1)}.get(name, 1)
    ctx.put(
        out,
        ctx.virtual(
            out.shape, range(out.dim()), zero=not isinstance(value, Tensor) and value == 0
        ),
    )


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
def like(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Sized like its argument, hence labelled like it."""
    value = {"zeros_like": 0, "full_like": a.get("fill_value", 1)}.get(
        func._schema.name.removeprefix("aten::"), 1
    )
    ctx.put(out, [Field(f.labels, value == 0) for f in ctx.fields(a["self"])])
