"""Kinds of units: the variables that the cost of a model depends on.

Every multiply-accumulate count and every parameter count is a polynomial in dimensions. Every
dimension that can shrink is a polynomial in the numbers of surviving units of each kind. So the
cost of a whole model is a polynomial in these numbers. It is derived from the analysis once. Then
it gives the cost of a model of any widths, and the cost of one more unit, without such a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fxprune.common.identity import IdentitySet
from fxprune.coupling import Coupling
from fxprune.labels import Array

__all__ = ["Kinds", "Pool", "kinds_of", "labels_along_dims", "pools_of"]


@dataclass(frozen=True, eq=False)
class Pool:
    """Units of one group that compete with each other.

    They lie in blocks that all keep the same number of units.

    Attributes
    ----------
    group:
        The group's position in ``coupling.groups``.
    units:
        Indices into the group's units, shape (blocks, width): one row per block, and a single row
        if the group is not split.
    labels:
        The labels of these units, shape (blocks, width).
    """

    group: int
    units: npt.NDArray[np.int64]
    labels: Array

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.units.shape[0]

    @property
    def width(self) -> int:
        """Units per block. Removal takes one unit from each block at a time; one stays."""
        return self.units.shape[1]


def pools_of(coupling: Coupling) -> tuple[Pool, ...]:
    """Return the pools of all groups, in the order of the groups.

    Every unit of a group lies in exactly one pool.
    """
    out = []
    for index, group in enumerate(coupling.groups):
        cells = coupling.balance.cell[group.units]
        kinds = np.where(
            cells >= 0, coupling.balance.kind[cells] if len(coupling.balance.kind) else -1, -1
        )
        for kind in np.unique(kinds):
            members = np.flatnonzero(kinds == kind)
            if kind < 0:
                out.append(Pool(index, members[np.newaxis], group.units[members][np.newaxis]))
                continue
            # Each block of a split has the same number of cells of each size. So the cells of one
            # size can keep equally many units by themselves, and form a pool.
            rows = [members[cells[members] == cell] for cell in np.unique(cells[members])]
            for size in sorted({len(row) for row in rows}):
                units = np.stack([row for row in rows if len(row) == size])
                out.append(Pool(index, units, group.units[units]))
    return tuple(out)


@dataclass(frozen=True, eq=False)
class Kinds:
    """Units of one pool that have the same cost: they lie on as many positions of every tensor.

    A pool has one kind, unless an operation repeats or drops only some of its units (``cat([x,
    x[:, :2]])``).

    Attributes
    ----------
    of_unit:
        The kind of each unit (by its label), shape (labels,); -1 for labels of no group.
    pool:
        The pool of each kind, ascending, shape (kinds,).
    size:
        How many units of each kind there are, over all blocks, shape (kinds,).
    """

    of_unit: npt.NDArray[np.int64]
    pool: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]


def kinds_of(coupling: Coupling, pools: Sequence[Pool]) -> Kinds:
    """Divide the units of each pool into kinds of equal cost.

    Parameters
    ----------
    coupling:
        The analysis.
    pools:
        The pools of its groups, as :func:`pools_of` returns them.

    Returns
    -------
    Kinds
        The kind of each unit, and the pool and size of each kind.
    """
    pool_of = np.full(coupling.context.units.count, -1, dtype=np.int64)
    for number, pool in enumerate(pools):
        pool_of[pool.labels] = number
    # random weights turn a vector of counts into one number: equal vectors get equal numbers
    rng = np.random.default_rng(0)
    profile, overlaps = _profiles(coupling, rng)
    while True:
        kinds = _kinds_by_profile(pool_of, profile)
        irregular = [rows for rows in overlaps if not _is_regular(rows, kinds)]
        if not irregular:
            return kinds
        # which units meet depends on the units themselves, so make each of them a kind
        for rows in irregular:
            units = np.unique(rows[rows > 0])
            profile[units] = rng.integers(1, 2**63, size=len(units), dtype=np.uint64)
        overlaps = [rows for rows in overlaps if not any(rows is other for other in irregular)]


def _profiles(
    coupling: Coupling, rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint64], list[Array]]:
    """Count the positions of each label on all tensors.

    Returns
    -------
    tuple
        For each label one number that stands for its counts, shape (labels,); and for each
        dimension that several fields shrink the labels along it, as :func:`labels_along_dims`
        returns them.
    """
    profile = np.zeros(coupling.context.units.count, dtype=np.uint64)
    seen: IdentitySet[Array] = IdentitySet()
    overlaps = []
    for tensor in _counted_tensors(coupling):
        fields = coupling.labels(tensor)
        for labels in fields:
            if labels not in seen:
                seen.add(labels)
                positions = np.bincount(labels.ravel()).astype(np.uint64)
                profile[: len(positions)] += positions * rng.integers(1, 2**63, dtype=np.uint64)
        if len(fields) > 1:
            overlaps += [rows for _, rows in labels_along_dims(coupling, fields) if len(rows) > 1]
    return profile, overlaps


def _kinds_by_profile(pool_of: npt.NDArray[np.int64], profile: npt.NDArray[np.uint64]) -> Kinds:
    """Return the kinds of units that have the same pool and the same profile."""
    live = np.flatnonzero(pool_of >= 0)
    key = np.stack([pool_of[live].astype(np.uint64), profile[live]], axis=1)
    unique, inverse = np.unique(key, axis=0, return_inverse=True)
    of_unit = np.full(len(pool_of), -1, dtype=np.int64)
    of_unit[live] = inverse.reshape(-1)
    size = np.bincount(of_unit[live], minlength=len(unique))
    return Kinds(of_unit, unique[:, 0].astype(np.int64), size)


def _counted_tensors(coupling: Coupling) -> list[Tensor]:
    """Return every tensor whose shape affects the costs.

    These are the parameters, and the operands and results of contractions.
    """
    found = list(coupling.parameters.values())
    for ran in coupling.contractions:
        found += ran.tensors
    return list(IdentitySet(found))


def labels_along_dims(coupling: Coupling, fields: Sequence[Array]) -> list[tuple[int, Array]]:
    """Return the labels along each dimension that can shrink.

    Parameters
    ----------
    coupling:
        The analysis.
    fields:
        The live labels of one tensor, one array per field.

    Returns
    -------
    list of (int, Array)
        Each dimension with its labels, shape (fields, rows, positions).
    """
    by_dim: dict[int, list[Array]] = {}
    for labels in fields:
        by_dim.setdefault(coupling.shrinking_dim(labels), []).append(labels)
    out = []
    for dim, same_dim in by_dim.items():
        spread = np.broadcast_arrays(*same_dim)
        rows = [np.moveaxis(a, dim, -1).reshape(-1, a.shape[dim]) for a in spread]
        out.append((dim, np.stack(rows)))
    return out


def _is_regular(rows: Array, kinds: Kinds) -> bool:
    """Tell whether all combinations of units of the kinds that meet are equally frequent.

    Units meet where they lie on the same position. Only if all their combinations do so equally
    often does the number of positions follow from the numbers of units of each kind.
    """
    columns = rows.reshape(len(rows), -1)
    columns = columns[:, (columns > 0).sum(axis=0) > 1]
    if not columns.size:
        return True
    tuples, times = np.unique(columns, axis=1, return_counts=True)
    met, which = np.unique(
        np.where(tuples > 0, kinds.of_unit[tuples], -1), axis=1, return_inverse=True
    )
    which = which.reshape(-1)
    for number, column in enumerate(met.T):
        counts = times[which == number]
        expected = prod(int(kinds.size[k]) for k in column if k >= 0)
        if len(counts) != expected or (counts != counts[0]).any():
            return False
    return True
