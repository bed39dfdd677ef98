"""The caller's own score of a model, and how often a search may call it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from fxprune.common.numbers import as_number, check_integer
from fxprune.common.public import calling_user_code, public, short_repr
from fxprune.errors import ArgumentError

__all__ = ["Score", "Search", "check_score", "score_of"]

Score: TypeAlias = Callable[[nn.Module], float]
"""A function that takes a model and returns a number, the higher the better."""


@public
@dataclass(frozen=True)
class Search:
    """Choose widths by a score of the pruned models, for ``prune(..., search=...)``.

    The first candidate is the model that :func:`prune` returns without a search. Each further
    candidate gives the groups other widths, and meets the same budget. Which units of a group go
    is decided by the criterion, as always. The candidate of the highest score is the result, so
    the search is never worse than the ranking by this score.

    Parameters
    ----------
    score:
        A function that takes a pruned model and returns a number, the higher the better: the
        accuracy on a validation part, for example. It may change the model that it is given, which
        is a copy. Do not score by the data that will judge the result: the more candidates there
        are, the better the best one fits these data by chance.
    evaluations:
        The search calls ``score`` at most this many times. A candidate that was scored before is
        not scored again.
    seed:
        Seed of the candidates, at least 0. Equal seeds give equal candidates if the score gives
        equal numbers.

    Raises
    ------
    ArgumentError
        If ``score`` cannot be called, or a number is not a whole number or is too small.

    Notes
    -----
    EagleEye (Li et al., "EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning",
    ECCV 2020) draws widths at random, corrects the statistics of each candidate on data and keeps
    the candidates of the highest scores. With ``prune(..., data=...)`` the weights of each
    candidate are corrected, too, before it is scored. The candidates here are not independent:
    each is drawn near the best one so far (see :mod:`fxprune.evaluation.candidates`).

    Examples
    --------
    >>> import fxprune, torch
    >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(),
    ...     nn.Linear(16, 2))
    >>> x = torch.randn(64, 4)
    >>> wanted = net(x).detach()
    >>> search = Search(lambda model: -(model(x) - wanted).square().mean().item(), evaluations=8)
    >>> found = fxprune.prune(net, x, macs=0.5, search=search).report.search
    >>> found.evaluations <= 8, found.after >= found.before
    (True, True)
    """

    score: Score
    evaluations: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        check_score(self.score)
        evaluations = check_integer("evaluations", self.evaluations)
        object.__setattr__(self, "evaluations", evaluations)
        object.__setattr__(self, "seed", check_integer("seed", self.seed, 0))


def check_score(score: Any) -> None:
    """Raise an ArgumentError if ``score`` is not a function."""
    if not callable(score) or isinstance(score, (type, nn.Module)):
        raise ArgumentError(
            f"score={short_repr(score)} is no function: give one that takes a model and returns a "
            "number, the higher the better."
        )


def score_of(score: Score, model: nn.Module, what: str) -> float:
    """Return the score of a model.

    Parameters
    ----------
    score:
        The caller's function.
    model:
        The model, of which the caller's function may do what it likes.
    what:
        What the model is, for error messages.

    Raises
    ------
    CallbackError
        If the function raises an error.
    ArgumentError
        If it returns no number, or NaN or infinity.
    """
    with calling_user_code(f"the score of {what}"):
        given = score(model)
    found = as_number(given)
    if found is None or not math.isfinite(found):
        raise ArgumentError(
            f"the score of {what} is {short_repr(given)}: it must be a finite number, the higher "
            "the better. Return a low number for a model that fails."
        )
    return float(found) + 0.0  # -0.0 is 0.0
