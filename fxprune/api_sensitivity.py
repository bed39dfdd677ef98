"""What a user calls to see how narrow each group alone may be."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from torch import nn

from fxprune.common.compiled import uncompiled
from fxprune.common.models import check_model
from fxprune.common.numbers import as_path, check_share
from fxprune.common.public import iterate_user_input, public, short_repr
from fxprune.coupling import Coupling, Terms
from fxprune.coupling.analysis import Clock
from fxprune.criteria import Criterion, rank
from fxprune.errors import ArgumentError
from fxprune.evaluation import Score, Sensitivity
from fxprune.evaluation.cache import ScoreCache
from fxprune.evaluation.points import sensitivity_of
from fxprune.evaluation.scoring import check_score
from fxprune.inputs import ExampleInputs, read
from fxprune.options import Kept, analysis_terms
from fxprune.pipeline import with_analysis

__all__ = ["sensitivity"]


@public
def sensitivity(
    model: nn.Module,
    example_inputs: ExampleInputs,
    score: Score,
    *,
    removed: Iterable[float] = (0.1, 0.25, 0.5, 0.75, 0.9),
    criterion: Criterion = "cpmc_flow",
    keep: Kept = (),
    units: str | Mapping[str, str] = "dims",
    cache: str | os.PathLike[str] | None = None,
) -> Sensitivity:
    """Measure how the score of a model falls as each group alone gets narrower.

    Each point is the score of a model from which one share of one group was removed, without any
    training: the model that :func:`prune` gives if ``layers`` names that group alone. It is
    emitted, not masked, so it is exact even where normalisations take their statistics over the
    surviving channels. With G groups and S shares, ``score`` is called at most G S + 1 times.

    Parameters
    ----------
    model, example_inputs:
        As for :func:`prune`. The model is not changed.
    score:
        A function that takes a model and returns a number, the higher the better: the accuracy on
        a validation part, for example. Its argument is a new model each time, with the modes
        (training or evaluation) of ``model``.
    removed:
        The shares of a group's units to remove, in (0, 1).
    criterion:
        Which units of a group go, as for :func:`prune`.
    keep, units:
        What is not pruned, and what a unit of an attention layer is, as for :func:`prune`.
    cache:
        A JSON file that holds the scores. It is written after each one. A later call with the same
        model and the same score reads it and computes only what is missing, and the score of the
        model with all its units, to see that it is still the same.

    Returns
    -------
    Sensitivity
        The score of the model with all its units, and one row for each group and share. ``print``
        shows a table, :meth:`~Sensitivity.plot` draws it.

    Raises
    ------
    ArgumentError
        If an argument is not valid, a score is no finite number, or the cache belongs to another
        model or score.
    CallbackError
        If the score function, or a criterion of your own, raises an error.
    InputError, ModelError, TraceError, RewriteError
        As for :func:`prune`.

    Notes
    -----
    Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, section 3.2. They prune each
    layer by itself; here, coupled layers lose the same channels together.

    A sensitive group keeps more: ``prune(..., layers={"conv1": 0.9})``. Groups depend on each
    other, so the scores of single groups do not add up. :class:`Search` scores whole models.

    Examples
    --------
    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 1, bias=False))
    >>> with torch.no_grad():  # the units give 1, 2, 3 and 4
    ...     _ = net[0].weight.fill_(0.5), net[1].weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    >>> x = torch.ones(1, 2)
    >>> print(sensitivity(net, x, lambda model: model(x).item(), removed=(0.25, 0.5)))
    score with a share of one group's units removed; 10 with none
    group       units  25 %  50 %
    0.weight:0      4     9     7
    """
    check_score(score)
    shares = _checked_shares(removed)
    path = None if cache is None else as_path("cache", cache)
    model = uncompiled(model)
    check_model(model)
    example = read(example_inputs)
    scores = ScoreCache(path, model, score)

    def measured(coupling: Coupling, terms: Terms) -> Sensitivity:
        """Return the scores for one analysis; the cache knows those of an earlier one."""
        ranking = rank(criterion, coupling, model)
        return sensitivity_of(model, coupling, ranking, terms, shares, score, scores)

    return with_analysis(model, example, analysis_terms(model, keep, units), Clock(), measured)


def _checked_shares(removed: object) -> tuple[float, ...]:
    """Return the argument ``removed`` as shares in (0, 1), each one once, in ascending order."""
    if not isinstance(removed, Iterable) or isinstance(removed, (str, Mapping)):
        raise ArgumentError(
            f"removed={short_repr(removed)} is no list of shares: give, e.g., removed=(0.25, 0.5)."
        )
    given = list(iterate_user_input(removed, "removed"))
    shares = [check_share("removed", one, "a share of a group's units to remove") for one in given]
    if not shares or max(shares) >= 1:
        raise ArgumentError(
            f"removed={short_repr(given)}: give shares below 1, because no group can lose all of "
            "its units."
        )
    return tuple(sorted(set(shares)))
