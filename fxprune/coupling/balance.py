"""Balance: every block of a split channel axis must lose equally many units.

Otherwise the tensor in which the axis is split would not stay rectangular.

A *rectangle* is a field that varies along several dimensions of some tensor. Along one of these
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
from fxprune.ops import Context, Rectangle

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
    """Return the balance constraints that follow from all rectangles of a run.

    Units are united and pinned in ``context`` until every split can be satisfied.
    """
    while True:
        version = context.units.version
        block = np.full(context.units.count, -1, dtype=np.int64)
        blocks = 0
        splits: list[Array] = []
        seen: set[bytes] = set()
        for rectangle in context.rectangles:
            with context.at(rectangle.node):
                rows = _rows(context, rectangle, block)
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
        balance = _balance_of(context, splits, block)
        if balance is not None:
            return balance


def _rows(context: Context, rectangle: Rectangle, block: Array) -> Array | None:
    """Return the units of each row along the shrinking dimension, sorted.

    Return None if nothing is split here, or nothing any more, because units were tied or pinned.
    """
    labels = compact(context.units.live(rectangle.labels))
    dims = varied(labels)
    if not labels.any():
        return None
    free = [d for d in dims if d not in rectangle.fixed]
    if len(dims) <= 1 or not free:
        _pin_unsplit(context, rectangle, labels)
        return None
    shrink = _choose(labels, free, block)
    if _keep_order(context, rectangle, labels, shrink):
        return None
    rows = np.moveaxis(labels, shrink, -1).reshape(-1, labels.shape[shrink])
    rows = np.sort(rows, axis=1)
    pinned = (rows == 0).sum(axis=1)
    if (pinned != pinned[0]).any():
        context.pin(labels, "lies in blocks of which some are partly pinned")
        return None
    units = _disjoint_rows(rows[:, pinned[0] :])
    if units is None or _disagree(block[units]):
        context.tie(labels, [d for d in dims if d != shrink])
        return None
    return units


def _pin_unsplit(context: Context, rectangle: Rectangle, labels: Array) -> None:
    """Pin labels that are not split (any more) if they lie on fixed dimensions, or are one."""
    if labels.size == 1:
        context.pin(labels, "its removal would empty a tensor")
    elif len(varied(labels)) > 1:
        context.pin(labels, "lies on axes of fixed size only")
    elif varied(labels)[0] in rectangle.fixed:
        context.pin(labels, "would remove whole blocks of an axis that is split")


def _keep_order(context: Context, rectangle: Rectangle, labels: Array, shrink: int) -> bool:
    """Tie labels whose survivors would change order, and tell whether there are any.

    A reshape lays merged dimensions out one after the other. If an outer one shrinks, survivors
    come in another order than in the original. So the smaller side is tied.
    """
    if shrink not in rectangle.merged:
        return False
    inner = [d for d in rectangle.merged if d in varied(labels) and d > shrink]
    if not inner:
        return False
    inner_size = int(np.prod([labels.shape[d] for d in inner]))
    is_outer_tied = inner_size > labels.shape[shrink] and not set(inner) & rectangle.fixed
    context.tie(labels, [shrink] if is_outer_tied else inner)
    return True


def _disjoint_rows(rows: Array) -> Array | None:
    """Return the distinct units of each row, and each row once; None if rows are irregular.

    In regular rows every label lies on equally many positions, and no two rows share a label.
    ``rows`` is sorted and has no zeros.
    """
    counts = (rows == rows[:, :1]).sum(axis=1)
    count = int(counts[0])
    if (
        (counts != count).any()
        or rows.shape[1] % count
        or not (rows.reshape(len(rows), -1, count) == rows[:, ::count, None]).all()
    ):
        return None
    rows = np.unique(rows[:, ::count], axis=0)
    if (np.diff(rows, axis=1) == 0).any() or len(np.unique(rows)) != rows.size:
        return None
    return rows


def _disagree(blocks: Array) -> bool:
    """Tell whether some row lies in several blocks of an earlier split."""
    return bool((blocks >= 0).any() and (blocks != blocks[:, :1]).any())


def _choose(labels: Array, free: list[int], block: Array) -> int:
    """Return the dimension that shrinks: one whose rows are known blocks if any, else the last."""
    known = [d for d in free if _constant_blocks(labels, d, block)]
    if known:
        return known[-1]
    return free[-1]


def _constant_blocks(labels: Array, dim: int, block: Array) -> bool:
    """Tell whether every live label lies in a known block, the same one along ``dim``."""
    blocks = np.where(labels > 0, block[labels], -2)
    if (blocks == -1).any():
        return False
    largest = np.iinfo(np.int64).max
    low = np.where(blocks == -2, largest, blocks).min(axis=dim)
    high = np.maximum(blocks.max(axis=dim), -2)
    return bool((high == np.where(low == largest, -2, low)).all())


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


def _balance_of(context: Context, splits: list[Array], block: Array) -> Balance | None:
    """Refine all splits into cells and return the resulting constraints.

    If two splits cannot be satisfied together, tie the rows of one and return None.
    """
    cell, kinds = _cells_of(context.units.count, splits)
    sizes = np.bincount(cell[cell >= 0], minlength=len(kinds))
    cells_of = [_distinct(cell[split]) for split in splits]
    _merge_kinds(kinds, sizes, cells_of)
    for split, cells in zip(splits, cells_of, strict=True):
        if not _is_satisfied(cells, kinds, sizes):
            context.unite(split, split[:1])
            return None
    _, kind = np.unique(kinds, return_inverse=True)
    return Balance(block, cell, kind)


def _cells_of(count: int, splits: list[Array]) -> tuple[Array, npt.NDArray[np.uint64]]:
    """Return the cell of each label, -1 for none, and for each cell a number for its splits.

    A set of blocks or of splits is named by the sum of random numbers: equal sets have equal sums.
    """
    rng = np.random.default_rng(0)
    cell_key = np.zeros(count, dtype=np.uint64)
    kind_key = np.zeros(count, dtype=np.uint64)
    for split in splits:
        split_name = rng.integers(1, 2**63, dtype=np.uint64)
        row_names = rng.integers(1, 2**63, size=len(split), dtype=np.uint64)
        for name, row in zip(row_names, split, strict=True):
            cell_key[row] += name
            kind_key[row] += split_name
    units = np.flatnonzero(cell_key)
    _, cell_of_unit = np.unique(cell_key[units], return_inverse=True)
    cell = np.full(count, -1, dtype=np.int64)
    cell[units] = cell_of_unit
    cells = int(cell_of_unit.max()) + 1 if units.size else 0
    kinds: npt.NDArray[np.uint64] = np.zeros(cells, dtype=np.uint64)
    kinds[cell_of_unit] = kind_key[units]
    return cell, kinds


def _merge_kinds(kinds: npt.NDArray[np.uint64], sizes: Array, cells_of: list[list[Array]]) -> None:
    """Give one kind to all cells of a split whose blocks are alike.

    They are if every block consists of equally many cells, and all of these have one size.

    Parameters
    ----------
    kinds:
        The kind of each cell; it is changed.
    sizes:
        The number of units of each cell.
    cells_of:
        For each split the cells of its blocks.
    """
    alike: list[Array] = []
    for cells in cells_of:
        if len({len(inside) for inside in cells}) == 1:
            members = np.unique(np.concatenate(cells))
            if len(np.unique(sizes[members])) == 1:
                alike.append(members)
    merged = True
    while merged:
        merged = False
        for members in alike:
            found = np.unique(kinds[members])
            if len(found) > 1:
                kinds[np.isin(kinds, found)] = found[0]
                merged = True


def _is_satisfied(cells: list[Array], kinds: npt.NDArray[np.uint64], sizes: Array) -> bool:
    """Tell whether all blocks of a split consist of cells of the same kinds and sizes."""
    content = []
    for inside in cells:
        content.append(sorted(zip(kinds[inside].tolist(), sizes[inside].tolist(), strict=True)))
    return all(each == content[0] for each in content)


def _distinct(rows: Array) -> list[Array]:
    """Return the distinct numbers of each row; usually a row holds a single one."""
    first = rows[:, :1]
    return list(first) if (rows == first).all() else [np.unique(row) for row in rows]
