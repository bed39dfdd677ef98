"""Greedy descent to a budget.

One greedy pass goes over the whole network. In each step, the pool whose least important unit
ranks lowest loses it. Costs are recomputed as widths shrink, until every budget holds.

The last removals may have saved more than was asked for. So what still fits is given back, the
most important units first. Afterwards no pool can be wider within the budgets.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from fxprune.select.widths import Widths

__all__ = ["descend", "give_back"]


_REFRESHES = 512  # upper limit on how often costs are recomputed during one descent


def descend(widths: Widths) -> None:
    """Remove units until every budget holds; the widths are changed in place.

    Raises
    ------
    BudgetError
        If even the smallest model is above a budget.
    """
    # Test this first: by a measured time, the smallest model can be slower than this one.
    if widths.are_within_limits():
        return
    widths.check_reachable()
    widths.align()
    removals = 0
    for width, floor, step in zip(widths.now, widths.floor, widths.steps, strict=True):
        removals += (width - floor) // step
    batch = max(1, removals // _REFRESHES)
    while not widths.are_within_limits():
        before = list(widths.now)
        removed = _remove_batch(widths, batch)
        if widths.are_within_limits():
            _repeat_until_within_limits(widths, before, removed)


def _remove_batch(widths: Widths, count: int) -> list[tuple[int, int]]:
    """Remove the ``count`` units of the lowest ranks, at the current costs.

    Returns
    -------
    list of (int, int)
        Each pool that lost units and its new width, in the order of removal.
    """
    offset = widths.offsets()
    shrinkable = [p for p, floor in enumerate(widths.floor) if widths.now[p] > floor]
    heap = [(widths.rank_of_next(pool, offset), pool) for pool in shrinkable]
    heapq.heapify(heap)
    removals: list[tuple[int, int]] = []
    while heap and len(removals) < count:
        _, pool = heapq.heappop(heap)
        widths.now[pool] = widths.next_width(pool)
        removals.append((pool, widths.now[pool]))
        if widths.now[pool] > widths.floor[pool]:
            heapq.heappush(heap, (widths.rank_of_next(pool, offset), pool))
    return removals


def _repeat_until_within_limits(
    widths: Widths, before: list[int], removed: Sequence[tuple[int, int]]
) -> None:
    """Repeat a batch of removals one by one, and stop where the budgets hold.

    Parameters
    ----------
    widths:
        The widths after the batch.
    before:
        The widths before the batch.
    removed:
        The removals, as :func:`_remove_batch` returns them.
    """
    widths.now = before
    for pool, width in removed:
        widths.now[pool] = width
        if widths.are_within_limits():
            break


def give_back(widths: Widths) -> None:
    """Give units back to the pools while the budgets hold, the most important ones first.

    Afterwards no pool could be wider by its step within the budgets. The widths are changed in
    place.
    """
    while True:
        offset = widths.offsets()
        ranks = {}
        for pool in _pools_that_may_grow(widths):
            ranks[pool] = widths.rank_of_last(pool, offset)
        # a forecast of time is not exact, so what it allows is tried
        if not any(_grows(widths, pool) for pool in sorted(ranks, key=lambda p: (-ranks[p], p))):
            return


def _grows(widths: Widths, pool: int) -> bool:
    """Make a pool wider by its step if the budgets allow it, and tell whether they do."""
    before = widths.now[pool]
    widths.now[pool] += widths.growth(pool)
    if widths.are_within_limits():
        return True
    widths.now[pool] = before
    return False


def _pools_that_may_grow(widths: Widths) -> list[int]:
    """Return the pools each of which alone could grow within the budgets."""
    growth = [widths.growth(pool) for pool in range(len(widths.pools))]
    counts = widths.counts()
    grown = widths.counts([w + more for w, more in zip(widths.now, growth, strict=True)])
    fits = np.array(growth, dtype=np.int64) > 0
    for _, cost, limit in widths.limits:
        fits &= cost.at(counts) - cost.saved(counts, counts - grown) <= limit
    return [int(pool) for pool in np.flatnonzero(fits)]
