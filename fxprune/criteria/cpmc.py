"""CPMC: weight value, computational cost and parameter quantity together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.criteria.views import ROLES, UnitView

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

    Calling it gives :math:`V'`; the selection adds the costs, which change as widths shrink.

    Parameters
    ----------
    alpha, beta, gamma:
        Weights of value, computation and parameters.
    roles:
        Which elements count for the value; ``("own", "scale")`` leaves out the dependent weights of the next layers.
    """

    alpha: float = 1.0
    beta: float = 0.25
    gamma: float = 0.25
    roles: tuple[str, ...] = ROLES

    def __call__(self, view: UnitView) -> Tensor:
        value = view.sum(torch.abs, self.roles)
        return value / value.max().clamp_min(torch.finfo(value.dtype).tiny)
