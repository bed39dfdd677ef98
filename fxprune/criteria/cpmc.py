"""CPMC: weight value, computational cost and parameter quantity together."""

from __future__ import annotations

import math
import warnings
from dataclasses import InitVar, dataclass

import torch
from torch import Tensor

from fxprune.common.numbers import number, switch
from fxprune.common.public import public, shown
from fxprune.criteria.views import ROLES, UnitView, check_roles, check_view
from fxprune.errors import ArgumentError

__all__ = ["CPMC", "share_left"]


@public
@dataclass(frozen=True)
class CPMC:
    r"""Multi-criteria importance based on weight dependency.

    .. math::

       I(u) = \alpha \frac{\bar V_g}{\bar V} V'(u) + \beta (1 - C'(u)) + \gamma (1 - P'(u)), \qquad
       V'(u) = \frac{V(u)}{\bar V_g} \Big/ \frac{r(u)}{n}, \qquad V(u) = \sum_{w \in W(u)} w^2

    The three aspects and the weight dependency are the paper's (Yan et al., "Channel Pruning via
    Multi-Criteria based on Weight Dependency", IJCNN 2021): :math:`W(u)` are all weights that
    vanish with a unit, its own filters and the slices of every next layer that read it; :math:`C`
    and :math:`P` are the multiply-accumulates and the parameters that vanish with it, at the
    current widths. :math:`C' = \log_2 (1 + C) / \max \log_2 (1 + C)` over the network, :math:`P'`
    alike, is how COP normalises costs (Wang et al., IJCAI 2019).

    The magnitude, the normalisers and the weights are ours. :math:`V'` is normalised within the
    group: by the mean over its n units, :math:`\bar V_g`, and by the share of the unit's block
    that is left when all smaller units have gone, :math:`r(u) / n`, the unit itself included. That
    share matters most: trained units of a group differ by a tenth or two, and without it a group
    whose units are a little smaller than another's would lose them all first. With it groups
    shrink together, none is emptied. :math:`\bar V_g / \bar V`, the mean over all units of the
    network, is what makes groups compare globally: each keeps a share of its units in proportion
    to what they weigh (D'Hondt's highest averages), and training makes the units of residual
    streams and of early layers heavy.
    ``benchmarks/accuracy.py --ablation`` shows what each of these choices is worth.

    Calling it gives :math:`V' \bar V_g / \bar V`, shape (units,), float64, none negative; the
    selection adds the costs, which change as widths shrink.

    Parameters
    ----------
    alpha, beta, gamma:
        Weights of value, computation and parameters; none negative, not all 0.
    roles:
        Which elements count for the value; ``("own", "scale")`` leaves out the dependent weights
        of the next layers.
    weigh_groups:
        Whether groups count by their mean magnitude. False: :math:`V'` alone, which does not
        change when all of a group's weights are scaled; for networks whose layers were scaled by
        hand.
    standing:
        The old name of ``weigh_groups``.

    Warns
    -----
    DeprecationWarning
        If ``standing`` is given.

    Raises
    ------
    ArgumentError
        If a weight is negative or not finite, all are 0, or a role is unknown.

    Examples
    --------
    >>> import fxprune; from fxprune.criteria import Views
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.ReLU(),
    ...     torch.nn.Linear(3, 1))
    >>> weights = {"0.weight": torch.tensor([[0., 4.], [0., 3.], [0., 0.]]),
    ...     "2.weight": torch.tensor([[3., 0., 2.]])}
    >>> (view,) = Views(fxprune.analyze(net, torch.zeros(1, 2)), weights)
    >>> # V is 25, 9, 4: over their mean 1.97, 0.71, 0.32; a third, two thirds and all are left
    >>> CPMC()(view)
    tensor([5.9211, 1.0658, 0.3158], dtype=torch.float64)
    >>> CPMC(roles=("own", "scale"))(view)  # of its own filters alone V is 16, 9, 0
    tensor([5.7600, 1.6200, 0.0000], dtype=torch.float64)
    """

    alpha: float = 1.0
    beta: float = 0.2
    gamma: float = 0.2
    roles: tuple[str, ...] = ROLES
    weigh_groups: bool = True
    standing: InitVar[bool | None] = None

    def __post_init__(self, standing: bool | None) -> None:
        if standing is not None:
            warnings.warn(
                "CPMC: standing is called weigh_groups now.", DeprecationWarning, stacklevel=4
            )
        chosen = self.weigh_groups if standing is None else standing
        weights = {name: number(getattr(self, name)) for name in ("alpha", "beta", "gamma")}
        if not all(
            w is not None and math.isfinite(w) and w >= 0 for w in weights.values()
        ) or not any(weights.values()):
            given = ", ".join(f"{shown(getattr(self, name))}" for name in weights)
            raise ArgumentError(
                f"CPMC: alpha, beta and gamma are {given}: give numbers of at least 0, not all "
                "of them 0."
            )
        checked = {
            **weights,
            "roles": check_roles(self.roles),
            "weigh_groups": switch("weigh_groups", chosen),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @public
    def __call__(self, view: UnitView) -> Tensor:
        """Shape (units,)."""
        check_view(view)
        value = view.sum(torch.square, self.roles)
        whole = (
            view.network_mean(torch.square, self.roles)
            if self.weigh_groups
            else float(value.mean())
        )
        return value / max(whole, torch.finfo(value.dtype).tiny) / share_left(value, view.blocks)


def share_left(values: Tensor, blocks: Tensor) -> Tensor:
    """What share of its block is left when all smaller units have gone, the unit itself included;
    of equals, the last goes first.

    >>> share_left(torch.tensor([5.0, 7.0, 7.0, 1.0]), torch.tensor([0, 0, 0, 0])).tolist()
    [0.75, 0.25, 0.5, 1.0]
    >>> share_left(torch.tensor([5.0, 7.0, 7.0, 1.0]), torch.tensor([0, 0, 1, 1])).tolist()
    [1.0, 0.5, 0.5, 1.0]
    """
    left = torch.empty_like(values)
    for block in blocks.unique():
        members = (blocks == block).nonzero().flatten()
        order = members[torch.argsort(values[members], descending=True, stable=True)]
        left[order] = torch.arange(1, len(order) + 1, dtype=values.dtype) / len(order)
    return left
