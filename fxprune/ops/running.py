"""Runs ATen ops on tensors without data: a shape, a dtype, nothing else.

The analysis runs models on ``meta`` tensors, which hold no data, so its cost does not depend on
the resolution. PyTorch's own meta kernels are exact but some are Python programs of a millisecond
each; the ops that make up most of a network (pointwise ops, normalisations, poolings) have a shape
that is plain to see: the table has it. An op that is made of others is run as these. Every other
op goes to PyTorch, many of whose kernels import sympy and the compiler at their first call.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fxprune.common.dispatch import META, DispatchMode, aten, is_composite, tensors_in
from fxprune.ops.shapes.common import empty_like
from fxprune.ops.shapes.elementwise import first_argument_shape, pointwise_shape
from fxprune.ops.table import Shape, own_row

__all__ = ["ShapeMode", "has_shape", "run"]


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Execute an ATen overload on meta tensors.

    Tensors with data (integer tables, masks) may stand among the arguments. If all of them hold
    data the op is executed for real, which is how constants fold; otherwise they are taken to the
    meta device first.

    Raises whatever the op raises on a wrong shape.
    """
    tensors = tensors_in(args, kwargs)
    if not any(t.is_meta for t in tensors):
        if func.overloadpacket is aten.arange and kwargs.get("device") == META:
            return empty_like(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)
    quick = _shape_of(func)
    if quick is not None:
        out = quick(func, args, kwargs)
        if out is not None:
            return out
    if "device" in kwargs or not all(t.is_meta for t in tensors):
        args, kwargs = tree_map(_as_meta, (args, kwargs))
    if is_composite(func):
        with ShapeMode():
            return func.decompose(*args, **kwargs)
    return func(*args, **kwargs)


def has_shape(func: Any) -> bool:
    """Whether the shape of an op's result is known here, op by op."""
    row = own_row(func)
    return row is not None and row.shape is not None


@functools.cache
def _shape_of(func: Any) -> Shape | None:
    row = own_row(func)
    if row is not None and row.shape is not None:
        return row.shape
    if func._schema.name.endswith("_") and torch.Tag.inplace_view not in func.tags:
        return first_argument_shape
    return pointwise_shape if torch.Tag.pointwise in func.tags else None


def _as_meta(value: Any) -> Any:
    if isinstance(value, Tensor) and not value.is_meta and value.dim() > 0:
        return value.to(META)
    if isinstance(value, torch.device):
        return META
    return value


class ShapeMode(DispatchMode):
    """Run Python code on meta tensors through :func:`run`; enter it together with
    ``torch.inference_mode()``.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})
