"""Dimensions that the arguments of an op name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["correction_of", "padded_dims", "reduced_dims", "split_dim"]


def reduced_dims(a: Mapping[str, Any], x: Tensor) -> tuple[set[int], bool]:
    """Return the dimensions that a reduction removes.

    Parameters
    ----------
    a:
        The arguments of the reduction, by name.
    x:
        The reduced tensor.

    Returns
    -------
    tuple of set and bool
        The dimensions, and whether they stay with size 1.
    """
    dims = a.get("dim")
    if dims is None or dims == []:
        return set(range(x.dim())), bool(a.get("keepdim", False))
    dims = [dims] if isinstance(dims, int) else dims
    return {d % max(x.dim(), 1) for d in dims}, bool(a.get("keepdim", False))


def correction_of(a: Mapping[str, Any]) -> float:
    """Return the number that a variance subtracts from the number of elements."""
    correction = a.get("correction", bool(a.get("unbiased", True)))
    return 1 if correction is None else correction + 0


def split_dim(name: str, a: Mapping[str, Any]) -> int:
    """Return the dimension that ``split`` or a similar op cuts."""
    rank = a["self"].dim()
    dim: int = {"hsplit": 1 if rank > 1 else 0, "vsplit": 0, "dsplit": 2}.get(
        name, a.get("dim", 0)
    )
    return dim % rank


def padded_dims(x: Tensor, amounts: Sequence[int]) -> set[int]:
    """Return the padded dimensions; amounts come in pairs, for the last dimension first."""
    return {x.dim() - 1 - i // 2 for i, amount in enumerate(amounts) if amount}
