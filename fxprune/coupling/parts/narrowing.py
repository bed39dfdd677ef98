"""Tests whether a call does the right thing on fewer channels, by making the call.

It does if its result on fewer channels is what remains of its result on all of them.
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

__all__ = ["commutes_with_removal", "is_of_one_size"]

Labels = Callable[[Tensor], list[Array]]
"""A function that returns the live labels of a tensor, one array per field."""


def commutes_with_removal(func: Any, args: Any, kwargs: Any, out: Any, labels: Labels) -> bool:
    """Tell whether a call with unchanged numbers commutes with the removal of labelled positions.

    The call is made on random values, on all positions and on some of them. That is enough for
    operations that move values, because what they do does not depend on the values.

    Parameters
    ----------
    func:
        The function that is called.
    args, kwargs:
        Its arguments.
    out:
        Its result.
    labels:
        Returns the live labels of a tensor, one array per field.
    """
    given = IdentityMap((tensor, labels(tensor)) for tensor in tensors_in(args, kwargs))
    results = [labels(leaf) if isinstance(leaf, Tensor) else [] for leaf in tree_leaves(out)]
    fields = [array for arrays in (*given.values(), *results) for array in arrays]
    followed = [t for t, arrays in given.items() if arrays and t.is_floating_point()]
    filled = IdentityMap((tensor, _random_like(tensor)) for tensor in followed)
    whole = _call_leaves(func, args, kwargs, filled)
    if whole is None:
        return False
    tried = not fields
    for gone in _removals(fields):
        small = IdentityMap((t, _remaining(v, given[t], gone)) for t, v in filled.items())
        if any(value is None for value in small.values()):
            continue
        tried, found = True, _call_leaves(func, args, kwargs, small)
        if found is None or len(found) != len(whole):
            return False
        for result, value, arrays in zip(found, whole, results, strict=True):
            if isinstance(value, Tensor):
                wanted = _remaining(value, arrays, gone)
                if not _same_result(result, wanted):
                    return False
    return tried


def is_of_one_size(name: str, bound: Mapping[str, Any], out: Any, labels: Labels) -> bool:
    """Tell whether an operation is right on fewer channels for one resolution only.

    That is so if it counts positions on an axis that combines channels and a resolution. For
    example, ``x.flatten(1)[:, ::3]`` takes the same positions of every channel only if each has a
    multiple of three. The same holds for ``x.flatten(1).view(len(x), -1, 3)``.

    Parameters
    ----------
    name:
        Name of the operation, which moves values.
    bound:
        Its arguments, by name.
    out:
        Its result.
    labels:
        Returns the live labels of a tensor, one array per field.
    """
    tensor = bound.get("self")
    if not isinstance(tensor, Tensor) or not isinstance(out, Tensor):
        return False
    if name == "slice":
        dim = bound["dim"] % tensor.dim()
        return bound["step"] != 1 and any(dim in _shared(array) for array in labels(tensor))
    if tensor.numel() != out.numel():
        return False
    inner = {dim for _, outs in reshape_blocks(tensor.shape, out.shape) for dim in outs[:-1]}
    return any(not inner.isdisjoint(_shared(array)) for array in labels(out))


def _shared(array: Array) -> list[int]:
    """Return the dimensions along which some label lies on several positions."""
    return [dim for dim in varied(array) if _has_repeats(array, dim)]


def _has_repeats(array: Array, dim: int) -> bool:
    """Tell whether some label lies on several positions along a dimension."""
    rows = array.swapaxes(dim, -1).reshape(-1, array.shape[dim])
    return any(len(np.unique(row[row > 0])) < np.count_nonzero(row) for row in rows)


def _removals(fields: list[Array]) -> Iterator[Array]:
    """Yield sets of labels to remove on trial.

    They are the second half of every field, its first half, and every other label. If a field
    varies along several dimensions, they are its last and its first positions along each of them.
    """
    several = [array for array in fields if len(varied(array)) > 1]
    if several:  # remove whole rows, so that a rectangle remains
        for dim in varied(several[0]):
            yield np.unique(several[0].take([-1], axis=dim))
            yield np.unique(several[0].take([0], axis=dim))
        return
    units = [labels[labels > 0] for labels in map(np.unique, fields)]
    if units:
        yield np.concatenate([labels[len(labels) // 2 :] for labels in units])
        yield np.concatenate([labels[: len(labels) // 2] for labels in units])
        yield np.concatenate([labels[::2] for labels in units])


def _remaining(value: Tensor, fields: list[Array], gone: Array) -> Tensor | None:
    """Return a tensor without the positions of the labels ``gone``.

    Return None if nothing remains, or if what remains is no rectangle.
    """
    for array in fields:
        alive = ~np.isin(array, gone)
        product = np.ones((), dtype=bool)
        for dim in varied(alive):
            kept = alive.any(axis=tuple(d for d in range(alive.ndim) if d != dim), keepdims=True)
            product = product & kept
            if array.shape[dim] == value.shape[dim]:
                index = torch.from_numpy(np.flatnonzero(kept)).to(value.device)
                value = value.index_select(dim, index)
        if not value.numel() or not np.array_equal(np.broadcast_to(product, alive.shape), alive):
            return None
    return value


def _call_leaves(
    func: Any, args: Any, kwargs: Any, values: IdentityMap[Tensor, Any]
) -> list[Any] | None:
    """Return the leaves of the call's result on other values of its tensors; None if it fails."""
    new_args, new_kwargs = tree_map(
        lambda leaf: values.get(leaf, leaf.clone()) if isinstance(leaf, Tensor) else leaf,
        (args, kwargs),
    )
    try:
        return tree_leaves(func(*new_args, **new_kwargs))
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
        return None


def _random_like(tensor: Tensor) -> Tensor:
    """Return random values between 0.5 and 1.5, the same ones for tensors of the same shape."""
    # a CPU generator, because not every device has one
    generator = torch.Generator().manual_seed(tensor.numel())
    drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
    return torch.empty_like(tensor).copy_(drawn.to(tensor.dtype).to(tensor.device))


def _same_result(found: Any, wanted: Tensor | None) -> bool:
    """Tell whether a result is the wanted one, up to rounding."""
    if wanted is None or not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    if not found.is_floating_point():
        return torch.equal(found, wanted)
    return torch.allclose(found.double(), wanted.double(), rtol=1e-5)
