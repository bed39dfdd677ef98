"""Criteria: functions that give each unit a score, the larger the more important.

A criterion is one of two things. It is a pure function that takes a group's units
(:class:`UnitView`) and returns scores of shape (units,). Or it is an object with a method
``scores(coupling, model)`` that returns an array of shape (labels,), with
``coupling.context.units.count`` entries. The scores of a group's units are the entries at
``group.units``.

These criteria have a name:

========= ==========================================
cpmc      :class:`CPMC`, the default
cpmc_flow :class:`FlowCPMC`
l1, l2    :func:`l1`, :func:`l2`
bn_scale  :func:`bn_scale`
lamp      :func:`lamp`
fpgm      :func:`fpgm`
random    :class:`Random`
========= ==========================================

These have no name, because they need a loader of data, or a training loop:

=========================== ==========================================================
:class:`Taylor`             first-order change of the loss
:class:`Fisher`             Fisher information of a mask on a unit
:class:`HessianDiagonal`    second-order change of the loss, element by element (OBD)
:class:`OBDC`               second-order change of the loss, unit by unit
:class:`Activation`         mean of a unit's activations
:class:`ActivationVariance` variance of a unit's activations (VBP)
:class:`Wanda`              weights times the norms of what they multiply
:class:`SurgeonOrder`       error of the next layers after a refit, unit after unit
:class:`Movement`           movement of the weights during training
=========================== ==========================================================

:class:`HessianDiagonal` and :class:`OBDC` need no labels if they get no loss.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.common.arrays import Floats
from fxprune.common.numbers import check_integer
from fxprune.common.public import calling_user_code, public, short_repr
from fxprune.coupling import Coupling, check_coupling
from fxprune.criteria.costs import AddedCosts, CostTerms, DividingCosts
from fxprune.criteria.cpmc import CPMC
from fxprune.criteria.data import Activation, Fisher, Taylor
from fxprune.criteria.flow_cpmc import FlowCPMC
from fxprune.criteria.hessian import OBDC, HessianDiagonal
from fxprune.criteria.movement import Movement
from fxprune.criteria.surgeon import SurgeonOrder
from fxprune.criteria.variance import ActivationVariance
from fxprune.criteria.views import UnitView, Views, check_values, score_by_views
from fxprune.criteria.wanda import Wanda
from fxprune.criteria.weights import bn_scale, fpgm, l1, l2, lamp
from fxprune.errors import ArgumentError

__all__ = [
    "CPMC",
    "CRITERIA",
    "OBDC",
    "Activation",
    "ActivationVariance",
    "AddedCosts",
    "CostTerms",
    "Criterion",
    "DividingCosts",
    "Fisher",
    "FlowCPMC",
    "HessianDiagonal",
    "Movement",
    "Random",
    "Ranking",
    "Scorer",
    "SurgeonOrder",
    "Taylor",
    "UnitView",
    "Views",
    "Wanda",
    "bn_scale",
    "fpgm",
    "given_data",
    "l1",
    "l2",
    "lamp",
    "rank",
]


@public
@dataclass(frozen=True)
class Random:
    """Uniform random scores in [0, 1): the baseline that every criterion has to beat.

    Parameters
    ----------
    seed:
        Seed of the random numbers, at least 0. Equal seeds give equal scores.

    Raises
    ------
    ArgumentError
        If ``seed`` is not a whole number of at least 0.

    Examples
    --------
    >>> import fxprune
    >>> net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    >>> coupling = fxprune.analyze(net, torch.zeros(1, 2))
    >>> once, again, other = (Random(seed).scores(coupling, net).tolist() for seed in (1, 1, 2))
    >>> once == again, once == other
    (True, False)
    """

    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", check_integer("seed", self.seed, 0))

    @public
    def scores(self, coupling: Coupling, model: nn.Module) -> Floats:
        """Draw a score for every label.

        Returns
        -------
        Floats
            Scores of shape (labels,).

        Raises
        ------
        ModelError, ArgumentError
            If ``coupling`` is not an analysis of ``model``.
        """
        check_coupling(coupling, model)
        return np.random.default_rng(self.seed).random(coupling.context.units.count)


class Scorer(Protocol):
    """A criterion that sees the whole model and may read data."""

    def scores(self, coupling: Coupling, model: nn.Module) -> Floats:
        """Return scores of shape (labels,), the larger the more important."""
        ...


Criterion: TypeAlias = str | Callable[[UnitView], Tensor] | Scorer
"""A name, a function that takes a :class:`UnitView`, or an object with ``scores``."""

CRITERIA: Mapping[str, Criterion] = {
    "cpmc": CPMC(),
    "cpmc_flow": FlowCPMC(),
    "l1": l1,
    "l2": l2,
    "bn_scale": bn_scale,
    "lamp": lamp,
    "fpgm": fpgm,
    "random": Random(),
}

# The scores of these criteria are not comparable between groups. `rank` divides them by the mean
# of their group, as torch-pruning does.
_PER_GROUP = (l1, l2, fpgm)
_PER_GROUP_KINDS = (Taylor, Fisher, Activation, Wanda)


@public
@dataclass(frozen=True, eq=False)
class Ranking:
    """The scores by which units are selected, and how costs enter their ranks.

    Units of the lowest rank are removed first.

    Attributes
    ----------
    value:
        Score of each label, shape (labels,); the larger the more important.
    costs:
        How the costs of a unit change its rank; by default they do not matter.
    """

    value: Floats
    costs: CostTerms = field(default_factory=AddedCosts)


def given_data(criterion: Criterion, data: Iterable[object]) -> Criterion:
    """Return the criterion, with a loader of unlabelled data if it has a use for it.

    Raises
    ------
    ArgumentError
        If the criterion is unknown.
    """
    chosen: Any = _as_criterion(criterion)
    return chosen.with_data(data) if hasattr(chosen, "with_data") else criterion


@public
def rank(criterion: Criterion, coupling: Coupling, model: nn.Module) -> Ranking:
    """Score all units of a model.

    Scores that are not comparable between groups (:func:`l1`, :func:`l2`, :func:`fpgm`,
    :class:`Taylor`, :class:`Fisher`, :class:`Activation`, :class:`Wanda`) are divided by the mean
    of their group.

    Parameters
    ----------
    criterion:
        A name of :data:`CRITERIA`, one of the criteria here, any object with ``scores(coupling,
        model)``, or any callable from a :class:`UnitView` to a tensor of shape (units,).
    coupling:
        The analysis of ``model``.
    model:
        The model whose weights are scored.

    Returns
    -------
    Ranking
        The score of each label, and the weights of the costs.

    Raises
    ------
    ArgumentError
        If the criterion is unknown, or its scores have a wrong shape or are not finite.
    ModelError
        If a parameter holds infinity or NaN, so that its units cannot be ranked.

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
    chosen: Any = _as_criterion(criterion)
    if hasattr(chosen, "scores"):
        value = _scores_of_labels(chosen, coupling, model)
    else:
        value = _scores_of_views(chosen, coupling, model)
    per_group = any(chosen is one for one in _PER_GROUP) or isinstance(chosen, _PER_GROUP_KINDS)
    for group in coupling.groups:
        scores = value[group.units]
        if not np.isfinite(scores).all():
            check_values(coupling, model)  # it blames the weights; otherwise it is the criterion
            raise ArgumentError(
                f"the criterion gives scores that are not finite for group {group.name!r}. Scores "
                "must be numbers; weights so large that their squares overflow have none."
            )
        if per_group:
            value[group.units] = scores / max(scores.mean(), np.finfo(np.float64).tiny)
    return Ranking(value, getattr(chosen, "costs", AddedCosts()))


def _as_criterion(criterion: Any) -> Any:
    """Return the criterion of that name, or the criterion itself if it is one.

    Raises
    ------
    ArgumentError
        If there is no such name, or the value is no criterion.
    """
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            near = difflib.get_close_matches(criterion, CRITERIA, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(
                f"criterion {short_repr(criterion)} is unknown: choose from "
                f"{', '.join(CRITERIA)}, or pass a callable.{hint}"
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


def _call_of_criterion(criterion: Any, what: str) -> AbstractContextManager[None]:
    """Return a context in which errors of the caller's own criterion become a ``CallbackError``.

    Errors of a criterion of fxprune pass unchanged, because they are not the caller's fault.
    """
    kind = criterion if hasattr(criterion, "__qualname__") else type(criterion)
    ours = str(getattr(kind, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]
    return nullcontext() if ours else calling_user_code(what)


def _scores_of_labels(criterion: Any, coupling: Coupling, model: nn.Module) -> Floats:
    """Return the scores of a criterion with ``scores(coupling, model)``, shape (labels,).

    Raises
    ------
    ArgumentError
        If they are no array of numbers of that shape.
    """
    name = type(criterion).__name__
    with _call_of_criterion(criterion, f"scores(coupling, model) of the criterion {name}"):
        given = criterion.scores(coupling, model)
    found = _array_of(given) if isinstance(given, Tensor) else given
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


def _scores_of_views(
    criterion: Callable[[UnitView], Tensor], coupling: Coupling, model: nn.Module
) -> Floats:
    """Return the scores of a criterion that is called once per group, shape (labels,).

    Raises
    ------
    ArgumentError
        If they are not one tensor of shape (units,) for each group.
    """
    name = getattr(criterion, "__name__", type(criterion).__name__)

    def score(view: UnitView) -> Floats:
        with _call_of_criterion(criterion, f"the criterion {name}, given a UnitView,"):
            scores = criterion(view)
        if not isinstance(scores, Tensor) or tuple(scores.shape) != (view.group.size,):
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ArgumentError(
                f"the criterion gave {found} for group {view.group.name!r}: it must give one "
                f"score per unit, a tensor of shape ({view.group.size},)."
            )
        return _array_of(scores)

    return score_by_views(coupling, model, score)


def _array_of(scores: Tensor) -> Floats:
    """Return the scores in a tensor of any device, layout or real dtype as a float64 array.

    Raises
    ------
    ArgumentError
        If the tensor holds no real numbers.
    """
    if scores.is_meta or scores.is_complex() or scores.is_quantized:
        kind = "on the meta device" if scores.is_meta else f"of type {scores.dtype}"
        raise ArgumentError(
            f"the criterion gave scores {kind}, which are no numbers to rank by: give real ones."
        )
    dense = scores.detach() if scores.layout is torch.strided else scores.detach().to_dense()
    return dense.to("cpu", torch.float64).numpy()
