"""Execution of ATen ops on tensors without data.

The analysis runs models on ``meta`` tensors, which hold no data, so its cost does not depend on
the resolution. PyTorch's own meta kernels are exact, but some are Python programs that take a
millisecond each. Most ops of a network (pointwise ops, normalisations, poolings) have a simple
shape function in the table. A composite op is run as the ops that define it. Every other op goes
to PyTorch, where many kernels import sympy and the compiler at their first call.
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
from fxprune.ops.table import Shape, exact_row

__all__ = ["ShapeMode", "has_shape", "run"]


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Execute an ATen overload on meta tensors.

    Arguments may include tensors with data, such as integer tables and masks. If all tensors have
    data, the op is executed on them, so that constants fold; otherwise tensors with data are moved
    to the meta device first. An op raises its usual errors on wrong shapes.

    Parameters
    ----------
    func:
        The overload.
    args, kwargs:
        Its arguments.

    Returns
    -------
    Any
        The op's result.
    """
    tensors = tensors_in(args, kwargs)
    if not any(t.is_meta for t in tensors):
        if func.overloadpacket is aten.arange and kwargs.get("device") == META:
            return empty_like(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)
    shape_function = _shape_of(func)
    if shape_function is not None:
        out = shape_function(func, args, kwargs)
        if out is not None:
            return out
    if "device" in kwargs or not all(t.is_meta for t in tensors):
        args, kwargs = tree_map(_as_meta, (args, kwargs))
    if is_composite(func):
        with ShapeMode():
            return func.decompose(*args, **kwargs)
    return func(*args, **kwargs)


def has_shape(func: Any) -> bool:
    """Tell whether an op's row has a shape function."""
    row = exact_row(func)
    return row is not None and row.shape is not None


@functools.cache
def _shape_of(func: Any) -> Shape | None:
    """Return the function that computes an op's result on meta tensors, or None."""
    row = exact_row(func)
    if row is not None and row.shape is not None:
        return row.shape
    if func._schema.name.endswith("_") and torch.Tag.inplace_view not in func.tags:
        return first_argument_shape
    return pointwise_shape if torch.Tag.pointwise in func.tags else None


def _as_meta(value: Any) -> Any:
    """Move a tensor or a device argument to the meta device; scalar tensors stay."""
    if isinstance(value, Tensor) and not value.is_meta and value.dim() > 0:
        return value.to(META)
    if isinstance(value, torch.device):
        return META
    return value


class ShapeMode(DispatchMode):
    """A mode that runs every ATen op through :func:`run`.

    Enter it together with ``torch.inference_mode()``.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})
