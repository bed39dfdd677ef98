"""Which elements of a tensor survive, and how to select them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxprune.common.identity import IdentityMap
from fxprune.coupling import Coupling
from fxprune.errors import RewriteError
from fxprune.labels import Array, alive_mask, varied

__all__ = ["Mask", "Survivors"]

Mask: TypeAlias = npt.NDArray[np.bool_]


class Survivors:
    """The surviving elements of the tensors of a labelled run, for a choice of surviving units.

    Parameters
    ----------
    coupling:
        The analysis.
    kept:
        Name of a group -> indices of its surviving units.
    """

    def __init__(self, coupling: Coupling, kept: dict[str, tuple[int, ...]]) -> None:
        self.coupling = coupling
        self._masks: IdentityMap[Array, Mask | None] = IdentityMap()  # None: all survive
        # ids of a tensor's label arrays -> {dimension: its smaller size}
        self._sizes: dict[tuple[int, ...], dict[int, int]] = {}
        self.alive = np.ones(coupling.context.units.count, dtype=bool)
        self.alive[coupling.units] = False
        for group in coupling.groups:
            self.alive[group.units[list(kept[group.name])]] = True

    def fields(self, tensor: Any) -> list[tuple[Array, int, Mask]]:
        """Return the fields of a tensor of the labelled run that lose elements.

        Each is given as its labels, the dimension that shrinks, and the mask of survivors (of the
        labels' shape).
        """
        out = []
        for labels in self.coupling.labels(tensor):
            if labels not in self._masks:
                mask = self.alive[labels]
                self._masks[labels] = None if mask.all() else mask
            known_mask = self._masks[labels]
            if known_mask is not None:
                out.append((labels, self.coupling.shrinking_dim(labels), known_mask))
        return out

    def mask(self, arrays: Sequence[Array]) -> Mask:
        """Return the mask of elements that survive in all of these label arrays of one tensor.

        The mask broadcasts to the shape of the tensor.
        """
        return alive_mask((self.coupling.context.units.live(a) for a in arrays), self.alive)

    def rows(self, tensor: Any, dim: int) -> Mask | None:
        """Return the mask of survivors along one dimension.

        Returns
        -------
        Shape (blocks, size): one row for each combination of positions on the other dimensions
        along which the mask varies. None if the dimension loses nothing.
        """
        masks = [mask for _, shrink, mask in self.fields(tensor) if shrink == dim]
        if not masks:
            return None
        mask = masks[0]
        for other in masks[1:]:
            mask = mask & other
        size = mask.shape[dim]
        return (
            mask.reshape(1, size)
            if mask.size == size
            else np.moveaxis(mask, dim, -1).reshape(-1, size)
        )

    def count(self, tensor: Any, dim: int, start: int, stop: int) -> int | None:
        """Return how many positions in ``start:stop`` of a dimension survive.

        None if the dimension loses nothing.

        Raises
        ------
        RewriteError
            If blocks of the dimension keep different numbers of positions.
        """
        rows = self.rows(tensor, dim)
        if rows is None:
            return None
        if len(rows) == 1:
            return int(np.count_nonzero(rows[0, start:stop]))
        counts = rows[:, start:stop].sum(axis=1)
        if (counts != counts[0]).any():
            raise RewriteError(
                f"blocks of a dimension keep different numbers of positions in {start}:{stop}"
            )
        return int(counts[0])

    def shape(self, tensor: Tensor) -> list[int]:
        """Return the shape of a tensor in the smaller model.

        Raises
        ------
        RewriteError
            If a dimension loses all of its positions, or blocks of it different numbers.
        """
        size, labels = list(tensor.shape), self.coupling.labels(tensor)
        if not labels:
            return size
        key = tuple(map(id, labels))
        if key not in self._sizes:
            dims = {shrink for _, shrink, _ in self.fields(tensor)}
            self._sizes[key] = {dim: self.count(tensor, dim, 0, size[dim]) or 0 for dim in dims}
        for dim, count in self._sizes[key].items():
            if not count:
                raise RewriteError(
                    f"nothing would be left of dimension {dim} of a tensor of shape "
                    f"{tuple(tensor.shape)}"
                )
            size[dim] = count
        return size

    def take(self, tensor: Any, values: Tensor) -> Tensor:
        """Return ``values`` without the removed elements.

        This is ``values[mask].reshape(new_shape)``, computed one dimension after the other where
        the mask is a product.

        Parameters
        ----------
        tensor:
            A tensor of the labelled run, whose labels say what is removed.
        values:
            Values for its elements; must broadcast to its shape.

        Raises
        ------
        RewriteError
            If two fields cut the same dimension, or blocks keep different numbers of positions.
        """
        fields = self.fields(tensor)
        whole: dict[int, Mask] = {}  # dimension -> mask of the fields that vary along it alone
        for labels, shrink, mask in fields:
            if labels.size > labels.shape[shrink]:
                values = _take_rows(values, mask, shrink, tensor.shape)
        for labels, shrink, mask in fields:
            if labels.size == labels.shape[shrink]:
                row = mask.reshape(-1)
                whole[shrink] = whole[shrink] & row if shrink in whole else row
        for dim, mask in whole.items():
            if values.shape[dim] == len(mask):
                kept = torch.from_numpy(np.flatnonzero(mask)).to(values.device)
                values = values.index_select(dim, kept)
            elif values.shape[dim] != 1:
                raise RewriteError("a dimension is cut by two fields at once")
        return values

    def take_array(self, tensor: Any, values: Array) -> Array:
        """Return an array of values, such as labels, without the removed elements.

        This is :meth:`take` for an array.
        """
        taken: Array = self.take(tensor, torch.from_numpy(np.ascontiguousarray(values))).numpy()
        return taken


def _take_rows(values: Tensor, mask: Mask, shrink: int, shape: Sequence[int]) -> Tensor:
    """Drop positions along one dimension, different ones for each block.

    ``mask`` holds the survivors. It varies along the dimension ``shrink`` and along others, whose
    positions are the blocks. ``shape`` is the tensor's, to which ``values`` broadcasts.
    """
    dims = (
        [*(d for d in varied(mask) if d != shrink), shrink]
        if mask.shape[shrink] > 1
        else list(varied(mask))
    )
    if all(values.shape[d] == 1 for d in dims):
        return values
    form = list(values.shape)
    for d in dims:
        form[d] = shape[d]
    rest = [d for d in range(values.dim()) if d not in dims]
    order = [*rest, *dims]
    moved = values.expand(form).permute(order)
    moved_mask = _moved_mask(mask, dims)
    rows = moved_mask.reshape(-1, moved_mask.shape[-1])
    kept = int(rows[0].sum())
    if int(rows.sum()) != kept * len(rows):
        raise RewriteError("blocks of a parameter keep different numbers of positions")
    # by positions, since a mask on the meta device does not say how many it keeps
    index = [positions.to(values.device) for positions in moved_mask.nonzero(as_tuple=True)]
    taken = moved[(..., *index)]
    taken = taken.reshape([*(form[d] for d in order[:-1]), kept])
    return taken.permute([order.index(d) for d in range(values.dim())])


def _moved_mask(mask: Mask, dims: Sequence[int]) -> Tensor:
    """Return a mask with these dimensions alone, in this order."""
    others = tuple(d for d in range(mask.ndim) if d not in dims)
    order = np.argsort(np.argsort(dims))
    return torch.from_numpy(np.ascontiguousarray(mask.squeeze(others).transpose(order)))
