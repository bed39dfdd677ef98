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

    .. math:: I(u) = \alpha V'(u) + \beta (1 - C'(u)) + \gamma (1 - P'(u))

    The three aspects and the weight dependency are the paper's (Yan et al., "Channel Pruning via Multi-Criteria based on Weight
    Dependency", IJCNN 2021): :math:`V` is the magnitude of all weights that vanish with a unit, its own filters and the slices of
    every next layer that read it; :math:`C` and :math:`P` are the multiply-accumulates and the parameters that vanish with it, at
    the current widths. The normalisers are ours: :math:`V' = V / \max_g V` within the group; :math:`C' = \log_2 (1 + C) / \max
    \log_2 (1 + C)` over the network, :math:`P'` alike, as COP does (Wang et al., IJCAI 2019).

    Calling it gives :math:`V'`, shape (units,), float64, values in [0, 1]; the selection adds the costs, which change as widths
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
    >>> weights = {"0.weight": torch.tensor([[1., -2.], [0., 3.], [4., 1.]]), "2.weight": torch.tensor([[1., -1., 3.]])}
    >>> (view,) = Views(fxprune.analyze(net, torch.zeros(1, 2)), weights)
    >>> CPMC()(view), CPMC(roles=("own", "scale"))(view)
    (tensor([0.5000, 0.5000, 1.0000], dtype=torch.float64), tensor([0.6000, 0.6000, 1.0000], dtype=torch.float64))
    """

    alpha: float = 1.0
    beta: float = 0.25
    gamma: float = 0.25
    roles: tuple[str, ...] = ROLES

    def __post_init__(self) -> None:
        check_roles(self.roles)
        weights = (self.alpha, self.beta, self.gamma)
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise ArgumentError(
                f"CPMC: alpha, beta and gamma are {', '.join(map(str, weights))}: give numbers of at least 0, not all of them 0."
            )

    def __call__(self, view: UnitView) -> Tensor:
        value = view.sum(torch.abs, self.roles)
        return value / value.max().clamp_min(torch.finfo(value.dtype).tiny)
