"""The search for the widths of the best score."""

from __future__ import annotations

from collections.abc import Callable

from fxprune.coupling import Coupling
from fxprune.criteria import Ranking
from fxprune.errors import RewriteError
from fxprune.evaluation.candidates import Evolution, ranking_of_widths
from fxprune.evaluation.scoring import Search
from fxprune.latency_budget import KeptUnits
from fxprune.result.report import CandidateRow, SearchRow

__all__ = ["WidthSearch"]

_MOST_REPEATS = 64  # the search ends after this many draws in a row that give known widths


class WidthSearch:
    """A search for widths within a budget, by the caller's score.

    Parameters
    ----------
    search:
        The score, and how often it may be called.
    coupling:
        The analysis.
    ranking:
        The scores of its units.
    scored:
        Returns the score of the model that keeps these units.
    """

    def __init__(
        self,
        search: Search,
        coupling: Coupling,
        ranking: Ranking,
        scored: Callable[[KeptUnits], float],
    ) -> None:
        self._search, self._coupling, self._ranking = search, coupling, ranking
        self._scored = scored
        self._candidates: list[tuple[KeptUnits, float]] = []

    def better(self, first: KeptUnits, choose: Callable[[Ranking], KeptUnits]) -> list[KeptUnits]:
        """Score candidates, and return those that are better than the first one.

        Parameters
        ----------
        first:
            The first candidate: the choice by the ranking alone.
        choose:
            Returns the choice by another ranking, within the budget.

        Returns
        -------
        list
            The better candidates, the best one first.

        Raises
        ------
        RewriteError
            If the first candidate cannot be emitted.
        """
        before = best = self._score(first)
        drawn, repeats = [first], 0
        evolution = Evolution(len(self._coupling.groups), self._search.seed)
        while len(self._candidates) < self._search.evaluations and repeats < _MOST_REPEATS:
            change = evolution.draw()
            kept = choose(ranking_of_widths(self._coupling, self._ranking, first, change))
            if kept in drawn:
                repeats += 1
                evolution.widen()
                continue
            drawn.append(kept)
            repeats = 0
            try:
                score = self._score(kept)
            except RewriteError:  # these widths are not possible, others are
                continue
            evolution.learn(change, score > best)
            best = max(best, score)
        found = [candidate for candidate in self._candidates if candidate[1] > before]
        return [kept for kept, _ in sorted(found, key=lambda candidate: -candidate[1])]

    def row(self, chosen: KeptUnits) -> SearchRow:
        """Return what the report says, given the candidate that became the result."""
        names = [group.name for group in self._coupling.groups]
        rows = []
        for kept, score in self._candidates:
            rows.append(CandidateRow(score, tuple(len(kept[name]) for name in names)))
        return SearchRow(tuple(rows), [kept for kept, _ in self._candidates].index(chosen))

    def _score(self, kept: KeptUnits) -> float:
        """Return the score of a candidate, and take note of both."""
        score = self._scored(kept)
        self._candidates.append((kept, score))
        return score
