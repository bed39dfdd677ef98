"""Exchanges of units between groups under a latency budget.

They improve the greedy choice. Each round is a knapsack problem.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fxprune.select.costs import WidthCost
from fxprune.select.knapsack import best_options
from fxprune.select.widths import Widths

__all__ = ["exchange"]


_EXCHANGES = 8  # upper limit on the rounds of exchanges, and on the attempts in one round
_STRIDE = 0.05  # share of a pool's width by which one round changes it, once or twice
_REACH = 0.25  # share of the greedy choice's width that exchanges may change it by in total


def exchange(widths: Widths) -> None:
    """Exchange units between pools while the survivors get more important within the budgets.

    Each round is a knapsack problem (Shen et al., "Structural Pruning via Latency-Saliency
    Knapsack", NeurIPS 2022). Every pool may get slightly wider or narrower, at the cost that this
    change alone has. The true cost of all changes together is computed afterwards. If it is above
    the budget, the round is repeated with less spare time. Exchanges stay near the greedy choice.
    Further away, cheap units would always win against expensive ones, until layers are empty.

    The widths are changed in place.
    """
    bounds = _exchange_bounds(widths)
    for _ in range(_EXCHANGES):
        before = list(widths.now)
        _choose_widths(
            widths, [_widths_near(widths, pool, *within) for pool, within in enumerate(bounds)]
        )
        improved = _total_worth(widths, widths.now) > _total_worth(widths, before)
        if not widths.are_within_limits() or not improved:
            widths.now = before
            break


def _exchange_bounds(widths: Widths) -> list[tuple[int, int]]:
    """Return the smallest and the largest width that exchanges may give each pool."""
    bounds = []
    for number, (pool, width) in enumerate(zip(widths.pools, widths.now, strict=True)):
        if widths.fixed[number]:
            bounds.append((width, width))
        else:
            low = max(widths.floor[number], math.ceil(width * (1 - _REACH)))
            bounds.append((low, min(pool.width, int(width * (1 + _REACH)))))
    return bounds


def _choose_widths(widths: Widths, options: Sequence[Sequence[int]]) -> None:
    """Set the widths to the options of the largest worth that are within the budgets.

    If there are none, the widths may be above the budgets afterwards.

    Parameters
    ----------
    widths:
        The widths before the round.
    options:
        The widths that each pool may get.
    """
    time, limit = next((cost, most) for name, cost, most in widths.limits if name == "latency")
    worth = [[widths.worth(pool, w) for w in choices] for pool, choices in enumerate(options)]
    changes = _changes(widths, time, options)
    spare = float(limit - time.at(widths.counts()))
    for _ in range(_EXCHANGES):
        chosen = best_options(worth, changes, spare)
        if chosen is None:
            return
        widths.now = [choices[k] for choices, k in zip(options, chosen, strict=True)]
        if widths.are_within_limits():
            return
        spare -= 1.1 * max(time.at(widths.counts()) - limit, abs(limit) / 1000)


def _changes(
    widths: Widths, cost: WidthCost, options: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Return by how much the cost rises if one pool alone gets each of its options."""
    counts = widths.counts()
    changes: list[list[float]] = [[] for _ in options]
    for place in range(max(map(len, options), default=0)):
        at = [choices[min(place, len(choices) - 1)] for choices in options]
        rise = (-cost.saved(counts, counts - widths.counts(at))).tolist()
        for pool, choices in enumerate(options):
            if place < len(choices):
                changes[pool].append(rise[pool])
    return changes


def _widths_near(widths: Widths, pool: int, low: int, high: int) -> list[int]:
    """Return the width of a pool and the nearby widths that are in bounds and on its steps."""
    width, step = widths.now[pool], widths.steps[pool]
    stride = max(round(width * _STRIDE / step), 1) * step
    near = {(width + k * stride) // step * step for k in (-2, -1, 1, 2)}
    near.add(widths.pools[pool].width)
    return sorted({width, *(other for other in near if low <= other <= high)})


def _total_worth(widths: Widths, at: Sequence[int]) -> float:
    """Return the value of the survivors of all pools at these widths."""
    return sum(widths.worth(pool, width) for pool, width in enumerate(at))
