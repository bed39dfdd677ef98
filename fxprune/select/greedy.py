"""Greedy descent to a budget.

One greedy pass goes over the whole network. In each step, the pool whose least important unit
ranks lowest loses it. Costs are recomputed as widths shrink, until every budget holds.

The last removals may have saved more than was asked for. So what still fits is given back, the
most important units first. Afterwards no pool can be wider within the budgets.

If there are several scopes, the scope that has lost the smallest share of its units loses the next
one, and the scope that has lost the largest share gets the next one back. So at any time the
shares differ by one removal at most, as far as starting widths and lower limits allow. Ranks count
within a scope only. A unit that fits stays lost if its scope is not next.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from fxprune.common.arrays import Floats
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
    """Remove the ``count`` units that go next, at the current costs.

    The next unit is the one of the lowest rank in the scope that has lost the smallest share.

    Returns
    -------
    list of (int, int)
        Each pool that lost units and its new width, in the order of removal.
    """
    offset = widths.offsets()
    queues = _queues(widths, offset)
    lost, totals = widths.lost_units(), widths.totals
    turns = [(lost[scope] / totals[scope], scope) for scope in queues]
    heapq.heapify(turns)
    removals: list[tuple[int, int]] = []
    while turns and len(removals) < count:
        _, scope = heapq.heappop(turns)
        _, pool = heapq.heappop(queues[scope])
        before, widths.now[pool] = widths.now[pool], widths.next_width(pool)
        removals.append((pool, widths.now[pool]))
        lost[scope] += (before - widths.now[pool]) * int(widths.blocks[pool])
        if widths.now[pool] > widths.floor[pool]:
            heapq.heappush(queues[scope], (widths.rank_of_next(pool, offset), pool))
        if queues[scope]:
            heapq.heappush(turns, (lost[scope] / totals[scope], scope))
    return removals


def _queues(widths: Widths, offset: Floats) -> dict[int, list[tuple[float, int]]]:
    """Return for each scope a heap of the pools that can shrink, the lowest rank first."""
    queues: dict[int, list[tuple[float, int]]] = {}
    for pool, floor in enumerate(widths.floor):
        if widths.now[pool] > floor:
            rank = widths.rank_of_next(pool, offset)
            heapq.heappush(queues.setdefault(widths.scope[pool], []), (rank, pool))
    return queues


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

    Afterwards no pool of the scope that has lost the largest share could be wider by its step
    within the budgets. The widths are changed in place.
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
    """Return the pools each of which alone could grow within the budgets.

    Of several scopes, those that have lost the largest share are next; the others wait.
    """
    growth = [widths.growth(pool) for pool in range(len(widths.pools))]
    lost = widths.lost_units()
    shares = [lost[scope] / max(widths.totals[scope], 1) for scope in widths.scope]
    grow = [pool for pool, more in enumerate(growth) if more > 0]
    largest = max((shares[pool] for pool in grow), default=0.0)
    counts = widths.counts()
    grown = widths.counts([w + more for w, more in zip(widths.now, growth, strict=True)])
    fits = (np.array(growth, dtype=np.int64) > 0) & (np.array(shares) >= largest)
    for _, cost, limit in widths.limits:
        fits &= cost.at(counts) - cost.saved(counts, counts - grown) <= limit
    return [int(pool) for pool in np.flatnonzero(fits)]
