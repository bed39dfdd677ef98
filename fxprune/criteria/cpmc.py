"""CPMC: weight value, computational cost and parameter quantity together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.criteria.views import ROLES, UnitView, check_roles
from fxprune.criteria.weights import share_of_the_rest
from fxprune.errors import ArgumentError

__all__ = ["CPMC"]


@dataclass(frozen=True)
class CPMC:
    r"""Multi-criteria importance based on weight dependency.

    .. math::

       I(u) = \alpha V'(u) + \beta (1 - C'(u)) + \gamma (1 - P'(u)), \qquad
       V'(u) = n \frac{V(u)}{\sum_{v : V(v) \ge V(u)} V(v)}, \qquad V(u) = \sum_{w \in W(u)} |w|

    The three aspects and the weight dependency are the paper's (Yan et al., "Channel Pruning via Multi-Criteria based on Weight
    Dependency", IJCNN 2021): :math:`W(u)` are all weights that vanish with a unit, its own filters and the slices of every next
    layer that read it; :math:`C` and :math:`P` are the multiply-accumulates and the parameters that vanish with it, at the current
    widths. :math:`C' = \log_2 (1 + C) / \max \log_2 (1 + C)` over the network, :math:`P'` alike, is how COP normalises costs (Wang
    et al., IJCAI 2019).

    The normaliser of the value is ours: its share of what is left of the group's n units when all smaller ones have gone, as LAMP
    normalises single weights (Lee et al., ICLR 2021), times n, so that groups of all sizes start around 1. It is the value at the
    current width, as the costs are: the fewer units a group has left, the more each is worth, and no group is emptied because its
    weights are small. Dividing by the group's largest value, which does not change as widths shrink, leaves bottlenecks. Magnitudes
    are added up, not their squares: a unit that many layers read through many small weights counts for all of them.
    ``benchmarks/accuracy.py --ablation`` shows what either choice is worth.

    Calling it gives :math:`V'`, shape (units,), float64, values in [0, n]; the selection adds the costs, which change as widths
    shrink.

    Parameters
    ----------
    alpha, beta, gamma:
        Weights of value, computation and parameters; none negative, not all 0.
    roles:
        Which elements count for the value; ``("own", "scale")`` leaves out the dependent weights of the next layers.

    Raises
    ------
    ArgumentError
        If a weight is negative or not finite, all are 0, or a role is unknown.

    Examples
    --------
    >>> import fxprune; from fxprune.criteria import Views
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> weights = {"0.weight": torch.tensor([[0., 4.], [0., 3.], [0., 0.]]), "2.weight": torch.tensor([[3., 0., 2.]])}
    >>> (view,) = Views(fxprune.analyze(net, torch.zeros(1, 2)), weights)
    >>> CPMC()(view)  # V is 7, 3, 2: 3 * 7 / 7, 3 * 3 / (3 + 7), 3 * 2 / (2 + 3 + 7)
    tensor([3.0000, 0.9000, 0.5000], dtype=torch.float64)
    >>> CPMC(roles=("own", "scale"))(view)  # of its own filters alone V is 4, 3, 0
    tensor([3.0000, 1.2857, 0.0000], dtype=torch.float64)
    """

    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0
    roles: tuple[str, ...] = ROLES

    def __post_init__(self) -> None:
        check_roles(self.roles)
        weights = (self.alpha, self.beta, self.gamma)
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise ArgumentError(
                f"CPMC: alpha, beta and gamma are {', '.join(map(str, weights))}: give numbers of at least 0, not all of them 0."
            )

    def __call__(self, view: UnitView) -> Tensor:
        return view.group.size * share_of_the_rest(view.sum(torch.abs, self.roles))
