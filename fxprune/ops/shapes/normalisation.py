"""Shapes of normalisations and softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxprune.common.dispatch import META, aten, tensors_in
from fxprune.ops.shapes.common import empty, empty_like, given_arguments, laid_anew_shape


def channel_norm_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``batch_norm`` or ``instance_norm``; all parameters are per channel."""
    x = args[0]
    vectors = [t for t in tensors_in(args, kwargs) if t is not x]
    fits = x.dim() > 1 and all(t.shape == x.shape[1:2] for t in vectors)
    return laid_anew_shape(x, func.overloadpacket is not aten.instance_norm) if fits else None


def group_norm_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``group_norm``."""
    x, groups = args[:2]
    fits = x.dim() > 1 and x.shape[1] % groups == 0
    return channel_norm_shape(func, args, kwargs) if fits else None


def last_norm_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``layer_norm`` or ``rms_norm``."""
    x, shape = args[0], tuple(args[1])
    fits = all(t.shape == shape for t in tensors_in(args[2:], kwargs))
    if not fits or not shape or x.shape[-len(shape) :] != shape:
        return None
    return laid_anew_shape(x, func.overloadpacket is aten.rms_norm)


def softmax_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of a softmax or a cumulative op that keeps its argument's dtype."""
    dim = args[1] if len(args) > 1 else kwargs["dim"]
    if not -args[0].dim() <= dim < args[0].dim():
        return None
    third = args[2] if len(args) > 2 and isinstance(args[2], torch.dtype) else None
    return laid_anew_shape(args[0]) if kwargs.get("dtype", third) is None else None


def weight_norm_shape(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Return the results of weight normalisation: a weight, and its norm along one dimension."""
    given = given_arguments(func, args, kwargs)
    v, g, dim = given["v"], given["g"], given.get("dim", 0)
    norm = [size if at == dim else 1 for at, size in enumerate(v.shape)]
    if not v.is_meta or not v.is_floating_point() or v.dtype is torch.bfloat16:
        return None
    if v.dtype != g.dtype or list(g.shape) != norm or not 0 <= dim < v.dim():
        return None
    return empty_like(v), empty(norm, dtype=v.dtype, device=META)
