"""How important a unit is: one score per unit, the larger the more important.

A criterion is a pure function from a group's units (:class:`UnitView`) to scores, or an object with ``scores(coupling, model)``,
for those that read data. The named ones:

======== ==========================================
cpmc     :class:`CPMC`, the default
l1, l2   :func:`l1`, :func:`l2`
bn_scale :func:`bn_scale`
lamp     :func:`lamp`
fpgm     :func:`fpgm`
random   :class:`Random`
======== ==========================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fxprune.coupling import Coupling
from fxprune.criteria.cpmc import CPMC
from fxprune.criteria.data import Activation, Fisher, Taylor
from fxprune.criteria.views import UnitView, Views
from fxprune.criteria.weights import bn_scale, fpgm, l1, l2, lamp
from fxprune.errors import ArgumentError

__all__ = [
    "CPMC",
    "CRITERIA",
    "Activation",
    "Fisher",
    "Random",
    "Ranking",
    "Taylor",
    "UnitView",
    "Views",
    "bn_scale",
    "fpgm",
    "l1",
    "l2",
    "lamp",
    "rank",
]


@dataclass(frozen=True)
class Random:
    """Uniform scores in [0, 1): the baseline that every criterion has to beat. Equal for equal seeds."""

    seed: int = 0

    def scores(self, coupling: Coupling, model: nn.Module) -> npt.NDArray[np.float64]:
        """Shape (labels,)."""
        return np.random.default_rng(self.seed).random(coupling.context.units.count)


CRITERIA: Mapping[str, Any] = {
    "cpmc": CPMC(),
    "l1": l1,
    "l2": l2,
    "bn_scale": bn_scale,
    "lamp": lamp,
    "fpgm": fpgm,
    "random": Random(),
}

# Criteria whose scores of different groups do not compare: divided by their group's mean, as torch-pruning does.
_PER_GROUP = (l1, l2, fpgm, Taylor, Fisher, Activation)


@dataclass(frozen=True, eq=False)
class Ranking:
    """What the selection ranks by: ``value`` (by label, the larger the more important) and, in CPMC, the two costs.

    A unit's rank is ``alpha * value + beta * (1 - C') + gamma * (1 - P')``; see :class:`CPMC`.
    """

    value: npt.NDArray[np.float64]
    alpha: float = 1.0
    beta: float = 0.0
    gamma: float = 0.0


def rank(criterion: Any, coupling: Coupling, model: nn.Module) -> Ranking:
    """Score all units of a model.

    Parameters
    ----------
    criterion:
        A name of :data:`CRITERIA`, one of the criteria here, or any callable from a :class:`UnitView` to a tensor of shape
        (units,).

    Raises
    ------
    ArgumentError
        If there is no such criterion, or its scores have a wrong shape or are not finite.
    """
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise ArgumentError(f"criterion {criterion!r} is unknown: choose from {', '.join(CRITERIA)}, or pass a callable.")
        criterion = CRITERIA[criterion]
    if hasattr(criterion, "scores"):
        value = np.array(criterion.scores(coupling, model), dtype=np.float64)
    elif callable(criterion):
        value = _of_views(criterion, coupling, model)
    else:
        raise ArgumentError(f"criterion is a {type(criterion).__name__}: pass a name, or a callable from a UnitView to scores.")
    for group in coupling.groups:
        own = value[list(group.units)]
        if not np.isfinite(own).all():
            raise ArgumentError(f"the criterion gives scores that are not finite for group {group.name!r}.")
        if criterion in _PER_GROUP or isinstance(criterion, tuple(k for k in _PER_GROUP if isinstance(k, type))):
            value[list(group.units)] = own / max(own.mean(), np.finfo(np.float64).tiny)
    if isinstance(criterion, CPMC):
        return Ranking(value, criterion.alpha, criterion.beta, criterion.gamma)
    return Ranking(value)


def _of_views(criterion: Callable[[UnitView], Tensor], coupling: Coupling, model: nn.Module) -> npt.NDArray[np.float64]:
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    value = np.zeros(coupling.context.units.count)
    for view in Views(coupling, parameters):
        scores = criterion(view)
        if not isinstance(scores, Tensor) or tuple(scores.shape) != (view.group.size,):
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ArgumentError(
                f"the criterion gave {found} for group {view.group.name!r}: it must give one score per unit, a tensor of shape "
                f"({view.group.size},)."
            )
        value[list(view.group.units)] = scores.detach().to("cpu", torch.float64).numpy()
    return value
