"""How important a unit is: one score per unit, the larger the more important.

A criterion is a pure function from a group's units (:class:`UnitView`) to scores of shape
(units,), or an object with ``scores(coupling, model)``, which gives an array of shape (labels,),
``coupling.context.units.count`` numbers: a group's units are the labels ``group.units``. The named
ones:

======== ==========================================
cpmc     :class:`CPMC`, the default
l1, l2   :func:`l1`, :func:`l2`
bn_scale :func:`bn_scale`
lamp     :func:`lamp`
fpgm     :func:`fpgm`
random   :class:`Random`
======== ==========================================

Those that read data have no name, because they need a loader: :class:`Taylor`, :class:`Fisher`,
:class:`Activation`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.common.arrays import Floats
from fxprune.common.numbers import whole
from fxprune.common.public import calling, public, shown
from fxprune.coupling import Coupling, Group, check_coupling
from fxprune.criteria.cpmc import CPMC
from fxprune.criteria.data import Activation, Fisher, Taylor
from fxprune.criteria.views import UnitView, Views
from fxprune.criteria.weights import bn_scale, fpgm, l1, l2, lamp
from fxprune.errors import ArgumentError, FxpruneError, ModelError

__all__ = [
    "CPMC",
    "CRITERIA",
    "Activation",
    "Criterion",
    "Fisher",
    "Random",
    "Ranking",
    "Scorer",
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


@public
@dataclass(frozen=True)
class Random:
    """Uniform scores in [0, 1): the baseline that every criterion has to beat. Equal for equal
    seeds.

    >>> import fxprune
    >>> net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    >>> coupling = fxprune.analyze(net, torch.zeros(1, 2))
    >>> once, again, other = (Random(seed).scores(coupling, net).tolist() for seed in (1, 1, 2))
    >>> once == again, once == other
    (True, False)
    """

    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", whole("seed", self.seed, 0))

    @public
    def scores(self, coupling: Coupling, model: nn.Module) -> Floats:
        """Shape (labels,)."""
        check_coupling(coupling, model)
        return np.random.default_rng(self.seed).random(coupling.context.units.count)


class Scorer(Protocol):
    """A criterion that looks at the whole model, and may read data."""

    def scores(self, coupling: Coupling, model: nn.Module) -> Floats:
        """Shape (labels,)."""
        ...


Criterion: TypeAlias = str | Callable[[UnitView], Tensor] | Scorer
"""A name, a function of a group's units, or an object with ``scores``."""

CRITERIA: Mapping[str, Criterion] = {
    "cpmc": CPMC(),
    "l1": l1,
    "l2": l2,
    "bn_scale": bn_scale,
    "lamp": lamp,
    "fpgm": fpgm,
    "random": Random(),
}

# Criteria whose scores of different groups do not compare: divided by their group's mean, as
# torch-pruning does.
_PER_GROUP = (l1, l2, fpgm)
_PER_GROUP_KINDS = (Taylor, Fisher, Activation)


@public
@dataclass(frozen=True, eq=False)
class Ranking:
    """What the selection ranks by: ``value`` (by label, the larger the more important) and, in
    CPMC, the two costs.

    A unit's rank is ``alpha * value + beta * (1 - C') + gamma * (1 - P')``; see :class:`CPMC`.
    """

    value: Floats
    alpha: float = 1.0
    beta: float = 0.0
    gamma: float = 0.0


@public
def rank(criterion: Criterion, coupling: Coupling, model: nn.Module) -> Ranking:
    """Score all units of a model.

    Parameters
    ----------
    criterion:
        A name of :data:`CRITERIA`, one of the criteria here, or any callable from a
        :class:`UnitView` to a tensor of shape (units,).

    Raises
    ------
    ArgumentError
        If there is no such criterion, or its scores have a wrong shape or are not finite.

    Examples
    --------
    >>> import fxprune
    >>> net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    >>> coupling = fxprune.analyze(net, torch.zeros(1, 2))
    >>> values = rank(lambda view: torch.arange(view.group.size), coupling, net).value
    >>> values[coupling.groups[0].units].tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    check_coupling(coupling, model)
    found: Any = _criterion_found(criterion)
    value = (
        _of_labels(found, coupling, model)
        if hasattr(found, "scores")
        else _of_views(found, coupling, model)
    )
    per_group = any(found is one for one in _PER_GROUP) or isinstance(found, _PER_GROUP_KINDS)
    for group in coupling.groups:
        own = value[group.units]
        if not np.isfinite(own).all():
            raise _not_finite(group, model)
        if per_group:
            value[group.units] = own / max(own.mean(), np.finfo(np.float64).tiny)
    if isinstance(found, CPMC):
        return Ranking(value, found.alpha, found.beta, found.gamma)
    return Ranking(value)


def _not_finite(group: Group, model: nn.Module) -> FxpruneError:
    """What is said of scores that cannot be ranked: it is the weights, or the criterion."""
    parameters = dict(model.named_parameters())
    for name in dict.fromkeys(axis.parameter for axis in group.axes):
        if name in parameters and not bool(parameters[name].isfinite().all()):
            return ModelError(
                f"parameter {name!r} holds infinity, so its units cannot be ranked: load or "
                "initialise the weights anew."
            )
    return ArgumentError(
        f"the criterion gives scores that are not finite for group {group.name!r}. Scores must "
        "be numbers; weights so large that their squares overflow have none."
    )


def _criterion_found(criterion: Any) -> Any:
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            near = difflib.get_close_matches(criterion, CRITERIA, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(
                f"criterion {shown(criterion)} is unknown: choose from {', '.join(CRITERIA)}, or "
                f"pass a callable.{hint}"
            )
        return CRITERIA[criterion]
    if isinstance(criterion, type):
        raise ArgumentError(
            f"criterion is the class {criterion.__name__}: pass an object of it, "
            f"{criterion.__name__}(...)."
        )
    if not hasattr(criterion, "scores") and not callable(criterion):
        kind = "None" if criterion is None else f"a {type(criterion).__name__}"
        raise ArgumentError(
            f"criterion is {kind}: pass a name, or a callable from a UnitView to scores."
        )
    return criterion


def _running_criterion(criterion: Any, what: str) -> AbstractContextManager[None]:
    """Tells errors of a criterion of the caller's own apart from those of one of these."""
    kind = criterion if hasattr(criterion, "__qualname__") else type(criterion)
    ours = str(getattr(kind, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]
    return nullcontext() if ours else calling(what)


def _of_labels(criterion: Any, coupling: Coupling, model: nn.Module) -> Floats:
    with _running_criterion(
        criterion, f"scores(coupling, model) of the criterion {type(criterion).__name__}"
    ):
        given = criterion.scores(coupling, model)
    found = _of_tensor(given) if isinstance(given, Tensor) else given
    try:
        value = np.array(found, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            "the criterion's scores(coupling, model) gave no array of numbers, but a "
            f"{type(given).__name__}."
        ) from error
    if value.shape != (coupling.context.units.count,):
        raise ArgumentError(
            f"the criterion's scores(coupling, model) gave shape {value.shape}: it must give one "
            f"number per label, shape ({coupling.context.units.count},)."
        )
    return value


def _of_views(
    criterion: Callable[[UnitView], Tensor], coupling: Coupling, model: nn.Module
) -> Floats:
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    value = np.zeros(coupling.context.units.count)
    for view in Views(coupling, parameters):
        with _running_criterion(
            criterion,
            f"the criterion {getattr(criterion, '__name__', type(criterion).__name__)}, given a "
            "UnitView,",
        ):
            scores = criterion(view)
        if not isinstance(scores, Tensor) or tuple(scores.shape) != (view.group.size,):
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ArgumentError(
                f"the criterion gave {found} for group {view.group.name!r}: it must give one "
                f"score per unit, a tensor of shape ({view.group.size},)."
            )
        value[view.group.units] = _of_tensor(scores)
    return value


def _of_tensor(scores: Tensor) -> Floats:
    """Scores that a criterion gave as a tensor of whatever kind.

    Raises
    ------
    ArgumentError
        If the tensor has no real numbers in it.
    """
    if scores.is_meta or scores.is_complex() or scores.is_quantized:
        kind = "on the meta device" if scores.is_meta else f"of type {scores.dtype}"
        raise ArgumentError(
            f"the criterion gave scores {kind}, which are no numbers to rank by: give real ones."
        )
    dense = scores.detach() if scores.layout is torch.strided else scores.detach().to_dense()
    return dense.to("cpu", torch.float64).numpy()
