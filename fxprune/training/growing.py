"""Growing regularisation: a penalty that empties the units of a plan before they are removed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.common.public import public
from fxprune.coupling import Coupling
from fxprune.errors import ArgumentError
from fxprune.result.plan import Plan
from fxprune.training.penalty import Penalty
from fxprune.training.schedules import Growing
from fxprune.training.units import UnitSums

__all__ = ["GrowingRegularisation"]


@public
class GrowingRegularisation(Penalty):
    r"""L2 penalty on the units that will go, growing: :math:`\lambda_t / 2 \sum_{w \in R} w^2`.

    R holds all weights that vanish with a unit that the plan removes. The factor
    :math:`\lambda_t` follows :class:`Growing`: it starts at ``delta`` and grows by ``delta`` every
    ``every`` steps until it is ``ceiling``. The network learns to do without these units, and
    :func:`fxprune.apply` then removes them at little cost.

    Parameters
    ----------
    model:
        The model that is trained. Its parameters are read at each call.
    coupling:
        Its analysis, from :func:`fxprune.analyze`, with the same ``keep`` and ``units`` as for the
        plan.
    plan:
        The units that stay: the ``plan`` of ``fxprune.prune(model, ...)``, with any criterion and
        budget.
    delta, every, ceiling:
        How the factor grows, see :class:`Growing`.

    Raises
    ------
    ModelError, ArgumentError
        If ``coupling`` is not an analysis of ``model``, if the plan has other groups or removes
        nothing, or if a number is not in its range.

    Notes
    -----
    GReg-1 of Wang et al., "Neural Pruning via Growing Regularization", ICLR 2021, algorithm 1.
    There R holds the filters; here it also holds the biases, scales and next layers' weights that
    are removed with them.

    Examples
    --------
    >>> import fxprune
    >>> net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(1, 3)
    >>> plan = fxprune.prune(net, x, channels=0.5, criterion="l1").plan
    >>> penalty = GrowingRegularisation(net, fxprune.analyze(net, x), plan, delta=0.1, every=1)
    >>> penalty.step()
    >>> penalty.strength
    0.2
    """

    def __init__(
        self,
        model: nn.Module,
        coupling: Coupling,
        plan: Plan,
        *,
        delta: float = 1e-4,
        every: int = 10,
        ceiling: float = 1.0,
    ) -> None:
        growing = Growing(delta, every, ceiling)
        super().__init__(growing)
        self.ceiling = growing.ceiling
        self._sums = UnitSums(model, coupling)
        self._removed = torch.from_numpy(_places_removed(coupling, plan))

    @property
    def done(self) -> bool:
        """Whether the factor has reached its ceiling."""
        return self.strength >= self.ceiling

    def _value(self) -> Tensor:
        """Return half the sum of the squares of the weights that will be removed."""
        squares = self._sums(torch.square)
        return squares[self._removed.to(squares.device)].sum() / 2


def _places_removed(coupling: Coupling, plan: Plan) -> np.ndarray:
    """Return the places in ``coupling.units`` of the units that a plan removes.

    Raises
    ------
    ArgumentError
        If the plan is none, has other groups than the coupling, or removes nothing.
    """
    if not isinstance(plan, Plan):
        raise ArgumentError(
            f"plan is a {type(plan).__name__}: give the plan of fxprune.prune(model, ...)."
        )
    planned = {group.name: group.size for group in plan.groups}
    if planned != {group.name: group.size for group in coupling.groups}:
        raise ArgumentError(
            "the plan has other groups than the coupling: analyse the model with the same keep= "
            "and units= as those with which it was pruned."
        )
    kept = {group.name: list(group.kept) for group in plan.groups}
    gone = [np.delete(group.units, kept[group.name]) for group in coupling.groups]
    units = np.concatenate([np.zeros(0, dtype=np.int64), *gone])
    if not units.size:
        raise ArgumentError("the plan removes no unit, so there is nothing to penalise.")
    return np.searchsorted(coupling.units, units)
