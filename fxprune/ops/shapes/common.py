"""Helpers that shape functions share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune.common.dispatch import META

__all__ = [
    "as_many",
    "broadcast",
    "empty",
    "empty_like",
    "given_arguments",
    "laid_anew_shape",
    "like_first_shape",
    "spatial_rank",
    "with_positions",
]

# bound here, because tracing replaces torch.empty and torch.empty_strided
empty, _empty_strided = torch.empty, torch.empty_strided


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty tensor like a meta tensor.

    ``torch.empty_like`` is not used because it is a slow Python program for meta tensors.
    """
    if x.is_contiguous() or 0 in x.stride():
        return empty(x.shape, dtype=dtype or x.dtype, device=META)
    return _empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device=META)


def broadcast(shapes: set[torch.Size]) -> torch.Size | None:
    """Return the shape to which all shapes broadcast, or None.

    ``torch.broadcast_shapes`` is not used because it imports sympy.
    """
    if len(shapes) == 1:
        return next(iter(shapes))
    out = [1] * max(map(len, shapes), default=0)
    for shape in shapes:
        for dim, size in enumerate(reversed(shape), start=1):
            if size != 1:
                if out[-dim] not in (1, size):
                    return None
                out[-dim] = size
    return torch.Size(out)


def given_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the given arguments of a call by name, without defaults."""
    return {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}


def as_many(value: int | Sequence[int], count: int) -> Sequence[int]:
    """Return a value per dimension; a single number counts for all ``count`` dimensions."""
    sizes = [value] if isinstance(value, int) else list(value)
    return sizes * count if len(sizes) == 1 else sizes


def spatial_rank(func: Any) -> int:
    """Return the number of spatial dimensions, the first digit in an op's name."""
    return int(next(letter for letter in func._schema.name if letter.isdigit()))


def like_first_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return a result like the first argument."""
    x = args[0]
    return empty_like(x) if x.is_meta and x.is_floating_point() else None


def laid_anew_shape(x: Tensor, keep_format: bool = False) -> Tensor | None:
    """Return a contiguous result of the shape of ``x``.

    With ``keep_format``, the result of a channels-last tensor is channels-last.
    """
    if not x.is_meta or not x.is_floating_point():
        return None
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if keep_format and last is not None and x.is_contiguous(memory_format=last):
        return empty_like(x)
    return empty(x.shape, dtype=x.dtype, device=META)


def with_positions(out: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Return values together with a tensor for their positions."""
    return None if out is None else (out, empty_like(out, torch.int64))
