"""Shapes of pointwise ops, and of ops that create tensors like others."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fxprune.common.dispatch import META, tensors_in
from fxprune.ops.shapes.common import broadcast, empty, empty_like, given_arguments


def pointwise_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the result of a pointwise op: the broadcast shape and the promoted dtype."""
    if func._schema.is_mutable or len(func._schema.returns) != 1 or kwargs.get("out") is not None:
        return None
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    shape = broadcast({t.shape for t in tensors})
    if shape is None:
        return None
    dtype = _pointwise_dtype(func, *_kinds(args, kwargs))
    if dtype is None:
        return None
    for t in tensors:
        if t.is_meta and t.shape == shape:
            return empty_like(t, dtype)
    return empty(shape, dtype=dtype, device=META)


def first_argument_shape(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """Return the first argument of an op that writes into it."""
    returns = func._schema.returns
    written = (
        len(returns) == 1
        and returns[0].alias_info is not None
        and isinstance(args[0], Tensor)
        and args[0].is_meta
    )
    if not written:
        return None
    if torch.Tag.pointwise in func.tags:
        tensors = tensors_in(args, kwargs)
        if broadcast({t.shape for t in tensors}) != args[0].shape:
            return None  # PyTorch reports the error
        # raises an error if the argument cannot hold the result's dtype
        _pointwise_dtype(func, *_kinds(args, kwargs))
    return args[0]


def _kinds(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]:
    """Return the kinds of the arguments, on which the dtype of a pointwise result depends."""
    return tuple(map(_hashable, args)), tuple(sorted((k, _hashable(v)) for k, v in kwargs.items()))


def _hashable(value: Any) -> Any:
    """Return the kind of an argument: dtype and whether it has dimensions, a value, or a type."""
    if isinstance(value, Tensor):
        return (value.dtype, value.dim() > 0)
    if isinstance(value, bool | str | torch.dtype) or value is None:
        return value
    return type(value)


@functools.cache
def _pointwise_dtype(
    func: Any, key: tuple[Any, ...], kwkey: tuple[tuple[str, Any], ...]
) -> torch.dtype | None:
    """Return the dtype of an op's result for these kinds of arguments, or None if unknown.

    PyTorch is asked once, with one-element tensors.
    """

    kinds = (*key, *(kind for _, kind in kwkey))
    if any(isinstance(kind, type) and kind not in (int, float, complex) for kind in kinds):
        return None
    out = func(*map(_sample, key), **{name: _sample(kind) for name, kind in kwkey})
    return out.dtype if isinstance(out, Tensor) else None


def _sample(kind: Any) -> Any:
    """Return a small argument of this kind."""
    if isinstance(kind, tuple):
        return torch.ones((1,) if kind[1] else (), dtype=kind[0])
    return kind(1) if isinstance(kind, type) else kind


def glu_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``glu``, which halves a dimension."""
    x, dim = args[0], args[1] if len(args) > 1 else -1
    if not x.is_floating_point() or not -x.dim() <= dim < x.dim() or x.shape[dim] % 2:
        return None
    dim %= x.dim()
    return x.new_empty([*x.shape[:dim], x.shape[dim] // 2, *x.shape[dim + 1 :]])


def blank_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the result of ``empty_like``, ``zeros_like`` and similar ops."""
    given = given_arguments(func, args, kwargs)
    x, dtype = given["self"], given.get("dtype")
    is_plain = given.get("device") in (None, META) and given.get("memory_format") is None
    return empty_like(x, dtype) if x.is_meta and is_plain else None


def triangle_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``tril`` or ``triu``."""
    x = args[0]
    return empty_like(x) if x.is_meta and x.dim() >= 2 else None
