"""CPMC: weight value, computational cost and parameter quantity together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.criteria.views import ROLES, UnitView, check_roles
from fxprune.errors import ArgumentError

__all__ = ["CPMC"]


@dataclass(frozen=True)
class CPMC:
    r"""Multi-criteria importance based on weight dependency.

    .. math::

       I(u) = \alpha V'(u) + \beta (1 - C'(u)) + \gamma (1 - P'(u)), \qquad
       V'(u) = \frac{V(u)}{\frac{1}{n} \sum_v V(v)}, \qquad V(u) = \sqrt{\sum_{w \in W(u)} w^2}

    The three aspects and the weight dependency are the paper's (Yan et al., "Channel Pruning via Multi-Criteria based on Weight
    Dependency", IJCNN 2021): :math:`W(u)` are all weights that vanish with a unit, its own filters and the slices of every next
    layer that read it; :math:`C` and :math:`P` are the multiply-accumulates and the parameters that vanish with it, at the current
    widths. :math:`C' = \log_2 (1 + C) / \max \log_2 (1 + C)` over the network, :math:`P'` alike, is how COP normalises costs (Wang
    et al., IJCAI 2019).

    The magnitude, the normaliser of the value and the weights are ours. Dividing by the mean over the group's n units makes groups
    compare, whatever their widths and scales: an average unit counts 1 in each of them. Within a group values differ by tenths, and
    the costs of a network's units differ by tenths of their largest. Weighed as much as the value, costs therefore decide alone,
    and empty the layers that cost most, residual streams first; weighed this little, they decide between units of about equal
    value. ``benchmarks/accuracy.py --ablation`` shows what each of these choices is worth.

    Calling it gives :math:`V'`, shape (units,), float64, values in [0, n], of mean 1; the selection adds the costs, which change as
    widths shrink.

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
    >>> CPMC()(view)  # V is 5, 3, 2
    tensor([1.5000, 0.9000, 0.6000], dtype=torch.float64)
    >>> CPMC(roles=("own", "scale"))(view)  # of its own filters alone V is 4, 3, 0
    tensor([1.7143, 1.2857, 0.0000], dtype=torch.float64)
    """

    alpha: float = 1.0
    beta: float = 0.01
    gamma: float = 0.05
    roles: tuple[str, ...] = ROLES

    def __post_init__(self) -> None:
        check_roles(self.roles)
        weights = (self.alpha, self.beta, self.gamma)
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise ArgumentError(
                f"CPMC: alpha, beta and gamma are {', '.join(map(str, weights))}: give numbers of at least 0, not all of them 0."
            )

    def __call__(self, view: UnitView) -> Tensor:
        value = view.sum(torch.square, self.roles).sqrt()
        return value / value.mean().clamp_min(torch.finfo(value.dtype).tiny)
