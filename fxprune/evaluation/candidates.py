"""Candidates of a search: widths near the best ones so far, scaled until the budget holds.

A candidate is a change z of the logarithm of each group's width. Its widths are those of the first
candidate times exp(z), times one factor that is common to all groups, which the budget decides. So
whatever z is, the candidate meets the budget, and z = 0 gives the first candidate again.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from fxprune.common.arrays import Floats
from fxprune.coupling import Coupling
from fxprune.criteria import Ranking
from fxprune.criteria.cpmc import share_left

__all__ = ["Evolution", "ranking_of_widths"]

_SPREAD = 0.3  # the first changes: widths differ by about 30 %
_MOST_SPREAD = 1.0  # wider changes only empty groups
_WIDER, _NARROWER = 1.5, 0.9  # what a success and a failure do to the spread


class Evolution:
    """An evolution strategy that keeps the best change and draws the next one near it.

    The spread of the draws grows with every success and shrinks with every failure, so that about
    one draw in five succeeds.

    Parameters
    ----------
    size:
        How many numbers a change has.
    seed:
        Seed of the draws.

    Notes
    -----
    This is the (1+1)-ES of Rechenberg, "Evolutionsstrategie", 1973, with the step size of Kern et
    al., "Learning probability distributions in continuous evolutionary algorithms", Natural
    Computing 3, 2004.

    Examples
    --------
    >>> evolution = Evolution(2, seed=0)
    >>> best, score = np.zeros(2), -2.0
    >>> for _ in range(100):  # the best change is (1, 1)
    ...     change = evolution.draw()
    ...     found = -float(np.square(change - 1).sum())
    ...     evolution.learn(change, found > score)
    ...     score = max(score, found)
    >>> score > -0.01
    True
    """

    def __init__(self, size: int, seed: int) -> None:
        self._draws = np.random.default_rng(seed)
        self._best = np.zeros(size)
        self._spread = _SPREAD

    def draw(self) -> Floats:
        """Return the next change, shape (size,)."""
        return self._best + self._draws.normal(0.0, self._spread, len(self._best))

    def learn(self, change: Floats, better: bool) -> None:
        """Take note of whether a change was better than all before."""
        if better:
            self._best = change
        self._spread = min(self._spread * (_WIDER if better else _NARROWER), _MOST_SPREAD)

    def widen(self) -> None:
        """Take note that a change leads to widths that are known."""
        self._spread = min(self._spread / _NARROWER, _MOST_SPREAD)


def ranking_of_widths(
    coupling: Coupling,
    ranking: Ranking,
    kept: Mapping[str, tuple[int, ...]],
    change: Floats,
) -> Ranking:
    """Return a ranking that makes each group's width a multiple of what it is in a choice.

    The score of a unit is the wanted share of its group, divided by the share of its block that is
    left when all less important units are gone. So a budget keeps units down to one common score,
    and each group in proportion to its wanted share (D'Hondt's highest averages).

    Parameters
    ----------
    coupling:
        The analysis.
    ranking:
        The scores of the criterion, which order the units of each group.
    kept:
        The choice: name of a group -> indices of its surviving units.
    change:
        The logarithm of the multiple, shape (groups,).

    Returns
    -------
    Ranking
        The new scores. Costs do not enter them: the choice has taken account of them.
    """
    value = np.zeros_like(ranking.value)
    for group, factor in zip(coupling.groups, np.exp(change), strict=True):
        own = torch.from_numpy(ranking.value[group.units])
        left = share_left(own, coupling.blocks(group)).numpy()
        value[group.units] = factor * len(kept[group.name]) / group.size / left
    return Ranking(value)
