"""Whether a call gives on fewer channels what is left of its result on all of them: found out by
trying.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fxprune.common.dispatch import tensors_in
from fxprune.common.identity import IdentityMap
from fxprune.common.reshape import reshape_blocks
from fxprune.labels import Array, varied

__all__ = ["narrows", "of_one_size"]

Labels = Callable[[Tensor], list[Array]]


def narrows(func: Any, args: Any, kwargs: Any, out: Any, labels: Labels) -> bool:
    """Whether the call, its numbers as they are, commutes with the removal of labelled positions.

    The call is made on random values, on all positions and on some that are left. That is enough
    for operations that move values: what they do does not depend on the values.

    Parameters
    ----------
    out:
        What the call gave.
    labels:
        The live labels of a tensor, one array for each field.
    """
    given = IdentityMap((tensor, labels(tensor)) for tensor in tensors_in(args, kwargs))
    results = [labels(leaf) if isinstance(leaf, Tensor) else [] for leaf in tree_leaves(out)]
    fields = [array for arrays in (*given.values(), *results) for array in arrays]
    filled = IdentityMap(
        (tensor, _random_like(tensor))
        for tensor, arrays in given.items()
        if arrays and tensor.is_floating_point()
    )
    whole = _call_leaves(func, args, kwargs, filled)
    if whole is None:
        return False
    tried = not fields
    for gone in _removals(fields):
        small = IdentityMap(
            (tensor, _left(value, given[tensor], gone)) for tensor, value in filled.items()
        )
        if any(value is None for value in small.values()):
            continue
        tried, found = True, _call_leaves(func, args, kwargs, small)
        if found is None or len(found) != len(whole):
            return False
        for own, value, arrays in zip(found, whole, results, strict=True):
            if isinstance(value, Tensor) and not _same_result(own, _left(value, arrays, gone)):
                return False
    return tried


def of_one_size(name: str, bound: Mapping[str, Any], out: Any, labels: Labels) -> bool:
    """Whether a movement counts positions on an axis that channels share with a resolution: for
    another one it counts others.

    ``x.flatten(1)[:, ::3]`` takes the same positions of every channel as long as each has a
    multiple of three, and so does ``x.flatten(1).view(len(x), -1, 3)``.

    Parameters
    ----------
    name, bound:
        The operation, and its arguments by name.
    """
    tensor = bound.get("self")
    if not isinstance(tensor, Tensor) or not isinstance(out, Tensor):
        return False
    if name == "slice":
        return bound["step"] != 1 and any(
            bound["dim"] % tensor.dim() in _shared(array) for array in labels(tensor)
        )
    if tensor.numel() != out.numel():
        return False
    inner = {dim for _, outs in reshape_blocks(tensor.shape, out.shape) for dim in outs[:-1]}
    return any(not inner.isdisjoint(_shared(array)) for array in labels(out))


def _shared(array: Array) -> list[int]:
    """The dimensions along which one label lies on several positions."""
    found = []
    for dim in varied(array):
        rows = array.swapaxes(dim, -1).reshape(-1, array.shape[dim])
        found += (
            [dim]
            if any(len(np.unique(row[row > 0])) < np.count_nonzero(row) for row in rows)
            else []
        )
    return found


def _removals(fields: list[Array]) -> Iterator[Array]:
    """Labels to remove: of every field the last positions, then the first, and every other one."""
    several = [array for array in fields if len(varied(array)) > 1]
    if several:  # what is left of a rectangle is a rectangle
        for dim in varied(several[0]):
            yield np.unique(several[0].take([-1], axis=dim))
            yield np.unique(several[0].take([0], axis=dim))
        return
    units = [own[own > 0] for own in map(np.unique, fields)]
    for part in (
        lambda own: own[len(own) // 2 :],
        lambda own: own[: len(own) // 2],
        lambda own: own[::2],
    ):
        if units:
            yield np.concatenate([part(own) for own in units])


def _left(value: Tensor, fields: list[Array], gone: Array) -> Tensor | None:
    """A tensor without the positions of some labels; None where what is left is no rectangle, or
    nothing.
    """
    for array in fields:
        alive = ~np.isin(array, gone)
        product = np.ones((), dtype=bool)
        for dim in varied(alive):
            kept = alive.any(axis=tuple(d for d in range(alive.ndim) if d != dim), keepdims=True)
            product = product & kept
            if array.shape[dim] == value.shape[dim]:
                value = value.index_select(
                    dim, torch.from_numpy(np.flatnonzero(kept)).to(value.device)
                )
        if not value.numel() or not np.array_equal(np.broadcast_to(product, alive.shape), alive):
            return None
    return value


def _call_leaves(
    func: Any, args: Any, kwargs: Any, values: IdentityMap[Tensor, Any]
) -> list[Any] | None:
    """The leaves of what the call gives on these values; None if it fails."""
    own, named = tree_map(
        lambda leaf: values.get(leaf, leaf.clone()) if isinstance(leaf, Tensor) else leaf,
        (args, kwargs),
    )
    try:
        return tree_leaves(func(*own, **named))
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
        return None


def _random_like(tensor: Tensor) -> Tensor:
    # of the CPU: not every device has one
    generator = torch.Generator().manual_seed(tensor.numel())
    drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
    return torch.empty_like(tensor).copy_(drawn.to(tensor.dtype).to(tensor.device))


def _same_result(found: Any, wanted: Tensor | None) -> bool:
    if wanted is None or not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    if not found.is_floating_point():
        return torch.equal(found, wanted)
    return torch.allclose(found.double(), wanted.double(), rtol=1e-5)
