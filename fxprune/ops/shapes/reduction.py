"""Shapes of reductions, sorts and searches for positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxprune.ops.shapes.common import empty_like, given_arguments, with_positions


def reduction_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of a sum, mean, extreme or norm of floating-point values."""
    return _without_dims(func, args, kwargs) if args[0].is_floating_point() else None


def _without_dims(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape without the named dimensions, or with size 1 there."""
    given = given_arguments(func, args, kwargs)
    x, dims, keep = given["self"], given.get("dim"), given.get("keepdim", False)
    if not (x.is_meta and x.dim() and x.numel()) or given.get("dtype") is not None:
        return None
    dims = [dims] if isinstance(dims, int) else dims or range(x.dim())
    reduced = {dim % x.dim() for dim in dims if -x.dim() <= dim < x.dim()}
    if len(reduced) != len(dims):
        return None
    kept = [dim for dim in range(x.dim()) if keep or dim not in reduced]
    return x.new_empty([1 if dim in reduced else x.shape[dim] for dim in kept])


def two_reductions_shape(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Return the shapes of ``std_mean``, ``var_mean`` or ``aminmax``."""
    out = reduction_shape(func, args, kwargs)
    return None if out is None else (out, empty_like(out))


def position_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``argmax`` or ``argmin``."""
    out = reduction_shape(func, args, kwargs)
    return None if out is None else empty_like(out, torch.int64)


def truth_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``any`` or ``all``."""
    # the result of uint8 stays uint8
    out = _some_reduced(func, args, kwargs) if args[0].dtype is not torch.uint8 else None
    return None if out is None else empty_like(out, torch.bool)


def _some_reduced(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of an op for which an empty list of dimensions does not mean all."""
    is_empty = given_arguments(func, args, kwargs).get("dim") == []
    return None if is_empty else _without_dims(func, args, kwargs)


def logsumexp_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``logsumexp``."""
    return _some_reduced(func, args, kwargs) if args[0].is_floating_point() else None


def sort_shape(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Return the shapes of ``sort``."""
    given = given_arguments(func, args, kwargs)
    x, dim = given["self"], given.get("dim", -1)
    return with_positions(empty_like(x)) if x.is_meta and -x.dim() <= dim < x.dim() else None


def topk_shape(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Return the shapes of ``topk``."""
    given = given_arguments(func, args, kwargs)
    x, dim, count = given["self"], given.get("dim", -1), given["k"]
    if not x.is_meta or not -x.dim() <= dim < x.dim() or not 0 <= count <= x.shape[dim]:
        return None
    dim %= x.dim()
    return with_positions(x.new_empty([*x.shape[:dim], count, *x.shape[dim + 1 :]]))
