"""The multiple-choice knapsack problem: choose one option of each class within a capacity."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["best_options"]

_BINS = 4000  # parts of the spare capacity; costs are rounded up to them, so the choice fits


def best_options(
    worth: Sequence[Sequence[float]], cost: Sequence[Sequence[float]], capacity: float
) -> list[int] | None:
    """Choose one option of each class: the largest sum of worths with costs within the capacity.

    The solution is by dynamic programming over the costs (Kellerer, Pferschy, Pisinger, "Knapsack
    Problems", 2004, chapter 11). Costs are rounded up to 1/4000 of the spare capacity, which is
    what the cheapest options leave. So the choice always fits, and the worth can be slightly below
    the best.

    Parameters
    ----------
    worth:
        Worth of each option, one sequence per class.
    cost:
        Cost of each option, of the same lengths; costs may be negative.
    capacity:
        The largest sum of costs.

    Returns
    -------
    list of int or None
        The index of the chosen option for each class; None if even the cheapest options do not
        fit.

    Examples
    --------
    >>> best_options([[0, 5, 6], [0, 4]], [[0, 10, 30], [0, 10]], capacity=20)
    [1, 1]
    >>> best_options([[0, 5, 6], [0, 4]], [[0, 10, 30], [0, 10]], capacity=30)
    [1, 1]
    >>> best_options([[0, 5, 6], [0, 4]], [[0, 10, 30], [0, 10]], capacity=40)
    [2, 1]
    """
    spare = capacity - sum(map(min, cost))
    if spare < 0:
        return None
    best = np.zeros(_BINS + 1)
    choices = []  # for each class: the best option at each number of bins, and the options' bins
    for worths, costs in zip(worth, cost, strict=True):
        least = min(costs)
        extra = [price - least for price in costs]
        bins = [_bins(price, spare) for price in extra]
        tried = np.full((len(worths), _BINS + 1), -np.inf)
        for option, (value, used) in enumerate(zip(worths, bins, strict=True)):
            if extra[option] <= spare:
                tried[option, used:] = best[: _BINS + 1 - used] + value
        choices.append((tried.argmax(axis=0), bins))
        best = tried.max(axis=0)
    chosen, bins_left = [], int(best.argmax())
    for options, bins in reversed(choices):
        chosen.append(int(options[bins_left]))
        bins_left -= bins[chosen[-1]]
    return chosen[::-1]


def _bins(extra: float, spare: float) -> int:
    """Return how many bins of the spare capacity a cost takes, rounded up; 0 if it exceeds it."""
    return math.ceil(_BINS * extra / spare) if 0 < extra <= spare else 0
