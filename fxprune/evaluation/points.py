"""The points of a sensitivity analysis: models in which one group alone is narrower."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

from torch import nn

from fxprune.coupling import Coupling, Group, Terms
from fxprune.coupling.analysis import Clock
from fxprune.criteria import Ranking
from fxprune.emission import emit_pruned
from fxprune.evaluation.cache import ScoreCache
from fxprune.evaluation.scoring import Score, score_of
from fxprune.evaluation.sensitivity import Sensitivity, SensitivityPoint
from fxprune.select.budget import Budget
from fxprune.select.selection import select

__all__ = ["sensitivity_of"]


def sensitivity_of(
    model: nn.Module,
    coupling: Coupling,
    ranking: Ranking,
    terms: Terms,
    removed: Sequence[float],
    score: Score,
    cache: ScoreCache,
) -> Sensitivity:
    """Score the model with each share of each group removed, one group at a time.

    Every point is the score of an emitted model, which is exact even where normalisations take
    their statistics over the survivors. A mask on the dense model would not be.

    Parameters
    ----------
    model:
        The dense model.
    coupling:
        Its analysis.
    ranking:
        The scores of its units.
    terms:
        The options of the analysis.
    removed:
        The shares.
    score:
        The caller's function.
    cache:
        The scores that are known.

    Raises
    ------
    RewriteError
        If a smaller model cannot be written.
    """
    whole = {group.name: tuple(range(group.size)) for group in coupling.groups}

    def scored(what: str, narrower: dict[str, tuple[int, ...]]) -> float:
        """Return the score of the model in which these groups keep only these units."""
        emitted = emit_pruned(model, coupling, {**whole, **narrower}, terms, Clock())
        return score_of(score, emitted.model, what)

    dense = cache.dense_score(lambda: scored("the model with all its units", {}))
    kept = {share: select(coupling, ranking, Budget(channels=1 - share)) for share in removed}
    points = []
    for group in coupling.groups:
        for share in removed:
            units = kept[share][group.name]
            what = f"the model with {len(units)} of {group.size} units of {group.name}"
            found = dense
            if len(units) < group.size:
                compute = functools.partial(scored, what, {group.name: units})
                found = cache.score(_key(group, units), compute)
            points.append(SensitivityPoint(group.name, share, len(units), group.size, found))
    return Sensitivity(dense, tuple(points))


def _key(group: Group, units: tuple[int, ...]) -> str:
    """Return what identifies a model in which a group keeps only these units.

    The axes of the group are part of it: with other options of the analysis, a group of the same
    name may have others.
    """
    axes = " ".join(map(str, group.axes))
    digest = hashlib.sha256(f"{axes} {units}".encode()).hexdigest()[:16]
    return f"{group.name}: {len(units)} of {group.size} ({digest})"
