"""One option from every class, worth the most, within a capacity: the multiple-choice knapsack
problem.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["best_options"]

_BINS = 4000  # of the capacity; costs are rounded up to them, so that what is chosen fits


def best_options(
    worth: Sequence[Sequence[float]], cost: Sequence[Sequence[float]], capacity: float
) -> list[int] | None:
    """Choose one option of each class so that the sum of worths is the largest whose sum of costs
    is within the capacity.

    By dynamic programming over the costs, which are rounded up to 1/4000 of what there is to share
    out beyond the cheapest options (Kellerer, Pferschy, Pisinger, "Knapsack Problems", 2004,
    chapter 11).

    Returns
    -------
    The index of the option for each class; None where even the cheapest do not fit.

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
    taken = []
    for worths, costs in zip(worth, cost, strict=True):
        least = min(costs)
        bins = [
            math.ceil(_BINS * (own - least) / spare) if own - least <= spare and own > least else 0
            for own in costs
        ]
        fits = [own - least <= spare for own in costs]
        tried = np.full((len(worths), _BINS + 1), -np.inf)
        for option, (value, used) in enumerate(zip(worths, bins, strict=True)):
            if fits[option]:
                tried[option, used:] = best[: _BINS + 1 - used] + value
        taken.append((tried.argmax(axis=0), bins))
        best = tried.max(axis=0)
    chosen, left = [], int(best.argmax())
    for options, bins in reversed(taken):
        chosen.append(int(options[left]))
        left -= bins[chosen[-1]]
    return chosen[::-1]
