"""Balance: every block of a split channel axis must lose equally many units.

Otherwise the tensor in which the axis is split would not stay rectangular.

A *sighting* is a field that varies along several dimensions of some tensor. Along one of these
dimensions, the *shrinking* one, every row must keep the same number of positions. This module
decides which dimension shrinks and collects the rows into blocks. Sometimes rows cannot be pruned
independently: their survivors would change order, or two splits disagree. Then it ties the rows,
so that every block loses the same positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxprune.labels import Array, compact, varied
from fxprune.ops import Context, Sighting

__all__ = ["Balance", "resolve", "shrinking_dim"]


@dataclass(frozen=True, eq=False)
class Balance:
    """The balance constraints of all units.

    Attributes
    ----------
    block:
        For each label, the number of the block in which it lies, -1 if in none. Only the entries
        of representatives are valid.
    cell:
        For each label, the number of its cell, -1 if it has none. Units of one cell lie in the
        same block of every split. Only the entries of representatives are valid.
    kind:
        For each cell, the number of its kind. All cells of one kind keep equally many units.
    """

    block: Array
    cell: Array
    kind: Array


def resolve(context: Context) -> Balance:
    """Return the balance constraints that follow from all sightings of a run.

    Units are united and pinned in ``context`` until every split can be satisfied.
    """
    while True:
        version = context.units.version
        block = np.full(context.units.count, -1, dtype=np.int64)
        blocks = 0
        splits: list[Array] = []
        seen: set[bytes] = set()
        for sighting in context.sightings:
            with context.at(sighting.node):
                rows = _rows(context, sighting, block)
            if rows is None:
                continue
            key = np.sort(rows.ravel()).tobytes() + rows.shape[0].to_bytes(8, "little")
            fresh = key not in seen
            seen.add(key)
            for row in rows[(block[rows] < 0).all(axis=1)]:
                block[row], blocks = blocks, blocks + 1
            if fresh:
                splits.append(rows)
        if context.units.version != version:
            continue
        balance = _cells(context, splits, block)
        if balance is not None:
            return balance


def _rows(context: Context, sighting: Sighting, block: Array) -> Array | None:
    """Return the units of each row along the shrinking dimension, sorted.

    Return None if nothing is split here, or nothing any more, because units were tied or pinned.
    """
    labels = compact(context.units.live(sighting.labels))
    dims = varied(labels)
    if not labels.any():
        return None
    if len(dims) <= 1:
        if labels.size == 1:
            context.pin(labels, "its removal would empty a tensor")
        elif dims[0] in sighting.fixed:
            context.pin(labels, "would remove whole blocks of an axis that is split")
        return None
    free = [d for d in dims if d not in sighting.fixed]
    if not free:
        context.pin(labels, "lies on axes of fixed size only")
        return None
    shrink = _choose(labels, free, block, sighting)
    others = [d for d in dims if d != shrink]
    inner = (
        [d for d in sighting.merged if d in dims and d > shrink]
        if shrink in sighting.merged
        else []
    )
    if inner:
        # The reshape lays these dimensions out one after the other. Survivors would then come in
        # another order than in the original, so tie the smaller side.
        inner_size = int(np.prod([labels.shape[d] for d in inner]))
        flip = inner_size > labels.shape[shrink] and not set(inner) & sighting.fixed
        context.tie(labels, [shrink] if flip else inner)
        return None
    rows = np.moveaxis(labels, shrink, -1).reshape(-1, labels.shape[shrink])
    rows = np.sort(rows, axis=1)
    pinned = (rows == 0).sum(axis=1)
    if (pinned != pinned[0]).any():
        context.pin(labels, "lies in blocks of which some are partly pinned")
        return None
    rows = rows[:, pinned[0] :]
    times = (rows == rows[:, :1]).sum(axis=1)
    step = int(times[0])
    if (
        (times != step).any()
        or rows.shape[1] % step
        or not (rows.reshape(len(rows), -1, step) == rows[:, ::step, None]).all()
    ):
        context.tie(labels, others)
        return None
    rows = np.unique(rows[:, ::step], axis=0)
    if (np.diff(rows, axis=1) == 0).any() or len(np.unique(rows)) != rows.size:
        context.tie(labels, others)  # rows overlap
        return None
    old = block[rows]
    if (old >= 0).any() and (old != old[:, :1]).any():
        context.tie(labels, others)  # disagrees with an earlier split
        return None
    return rows


def _choose(labels: Array, free: list[int], block: Array, sighting: Sighting) -> int:
    """Return the dimension that shrinks: one whose rows are known blocks if any, else the last."""
    known = [d for d in free if _constant_blocks(labels, d, block)]
    if known:
        return known[-1]
    return free[-1]


def _constant_blocks(labels: Array, dim: int, block: Array) -> bool:
    """Tell whether every live label lies in a known block, the same one along ``dim``."""
    own = np.where(labels > 0, block[labels], -2)
    if (own == -1).any():
        return False
    low = np.where(own == -2, np.iinfo(np.int64).max, own).min(axis=dim)
    return bool(
        (
            np.maximum(own.max(axis=dim), -2) == np.where(low == np.iinfo(np.int64).max, -2, low)
        ).all()
    )


def shrinking_dim(labels: Array, block: Array) -> int:
    """Return the dimension along which a tensor with these labels gets smaller.

    A mask of the survivors does not tell: ``[[1, 0], [0, 1]]`` leaves 2 x 1 or 1 x 2.

    Parameters
    ----------
    labels:
        The live labels of one field, which vary along at least one dimension.
    block:
        :attr:`Balance.block`.
    """
    dims = varied(labels)
    if len(dims) == 1:
        return dims[0]
    known = [d for d in dims if _constant_blocks(labels, d, block)]
    return known[-1] if known else dims[-1]


def _cells(context: Context, splits: list[Array], block: Array) -> Balance | None:
    """Refine all splits into cells and return the resulting constraints.

    If two splits cannot be satisfied together, tie the rows of one and return None.
    """
    count = context.units.count
    rng = np.random.default_rng(0)  # random numbers name sets: equal sets have equal sums
    cell_key = np.zeros(count, dtype=np.uint64)
    kind_key = np.zeros(count, dtype=np.uint64)
    for split in splits:
        own = rng.integers(1, 2**63, dtype=np.uint64)
        names = rng.integers(1, 2**63, size=len(split), dtype=np.uint64)
        for name, row in zip(names, split, strict=True):
            cell_key[row] += name
            kind_key[row] += own
    units = np.flatnonzero(cell_key)
    _, cell_of = np.unique(cell_key[units], return_inverse=True)
    cell = np.full(count, -1, dtype=np.int64)
    cell[units] = cell_of
    kinds: npt.NDArray[np.uint64] = np.zeros(
        int(cell_of.max()) + 1 if units.size else 0, dtype=np.uint64
    )
    kinds[cell_of] = kind_key[units]
    sizes = (
        np.bincount(cell_of, minlength=len(kinds)) if units.size else np.zeros(0, dtype=np.int64)
    )
    # If every block of a split consists of equally many cells, and all of these have one size,
    # the cells are of one kind.
    inside_of = [_distinct(cell[split]) for split in splits]
    alike = [
        np.unique(np.concatenate(rows)) for rows in inside_of if len({len(r) for r in rows}) == 1
    ]
    alike = [members for members in alike if len(np.unique(sizes[members])) == 1]
    merged = True
    while merged:
        merged = False
        for members in alike:
            found = np.unique(kinds[members])
            if len(found) > 1:
                kinds[np.isin(kinds, found)] = found[0]
                merged = True
    # A split is satisfied if its blocks consist of cells of the same kinds and sizes.
    for split, cells in zip(splits, inside_of, strict=True):
        content = []
        for inside in cells:
            content.append(
                sorted(zip(kinds[inside].tolist(), sizes[inside].tolist(), strict=True))
            )
        if any(c != content[0] for c in content):
            context.unite(split, split[:1])
            return None
    _, kind = (
        np.unique(kinds, return_inverse=True)
        if units.size
        else (None, np.zeros(0, dtype=np.int64))
    )
    return Balance(block, cell, kind)


def _distinct(rows: Array) -> list[Array]:
    """Return the distinct numbers of each row; usually a row holds a single one."""
    first = rows[:, :1]
    return list(first) if (rows == first).all() else [np.unique(row) for row in rows]
