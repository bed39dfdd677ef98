"""CPMC: a criterion of weight value, computational cost and parameter count."""

from __future__ import annotations

import warnings
from dataclasses import InitVar, dataclass

import torch
from torch import Tensor

from fxprune.common.numbers import check_bool
from fxprune.common.public import public
from fxprune.criteria.costs import AddedCosts, check_weights
from fxprune.criteria.views import ROLES, UnitView, check_roles, check_view

__all__ = ["CPMC", "share_left"]


@public
@dataclass(frozen=True)
class CPMC:
    r"""Importance by three criteria: weight value, computational cost and parameter count.

    .. math::

       I(u) = \alpha \frac{\bar V_g}{\bar V} V'(u) + \beta (1 - C'(u)) + \gamma (1 - P'(u)), \qquad
       V'(u) = \frac{V(u)}{\bar V_g} \Big/ \frac{r(u)}{n}, \qquad V(u) = \sum_{w \in W(u)} w^2

    :math:`W(u)` is the set of all weights that vanish with a unit: its own filters, and the slices
    of every next layer that read it. :math:`C` and :math:`P` are the multiply-accumulates and the
    parameters that vanish with it, at the current widths. :math:`C' = \log_2 (1 + C) / \max \log_2
    (1 + C)` over the network, and :math:`P'` likewise.

    :math:`V'` is normalised within the group. It is divided by the mean over the group's n units,
    :math:`\bar V_g`, and by :math:`r(u) / n`. That is the share of the unit's block that is left
    when all smaller units are gone, the unit itself included. This share matters most: trained
    units of a group differ by only 10 to 20 %, so without it a group whose units are slightly
    smaller than another's would lose all of them first. With it, groups shrink together and none
    is emptied.

    :math:`\bar V_g / \bar V` compares groups globally, where :math:`\bar V` is the mean over all
    units of the network. Each group keeps a share of its units in proportion to their mean value
    (D'Hondt's method of highest averages). Training makes the units of residual streams and of
    early layers large, so these groups keep more.

    Calling the object returns :math:`V' \bar V_g / \bar V`. The selection adds the costs, because
    they change as widths shrink.

    Parameters
    ----------
    alpha, beta, gamma:
        Weights of value, computation and parameters; none negative, not all 0.
    roles:
        Which elements count for the value. ``("own", "scale")`` leaves out the dependent weights
        of the next layers.
    weigh_groups:
        Whether groups count by their mean magnitude. If False, the value is :math:`V'` alone,
        which does not change when all of a group's weights are scaled. Choose it for networks
        whose layers were scaled by hand.
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

    Notes
    -----
    The three aspects and the weight dependency :math:`W(u)` are from Yan et al., "Channel Pruning
    via Multi-Criteria based on Weight Dependency", IJCNN 2021. The normalisation of the costs is
    from COP (Wang et al., IJCAI 2019). The squared magnitude, the normalisation of the value and
    the default weights are fxprune's own; ``benchmarks/accuracy.py --ablation`` measures the
    effect of each of these choices.

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
        check_weights(self, ("alpha", "beta", "gamma"), all_zero=False)
        object.__setattr__(self, "roles", check_roles(self.roles))
        object.__setattr__(self, "weigh_groups", check_bool("weigh_groups", chosen))

    @property
    def costs(self) -> AddedCosts:
        """The cost terms, which the selection adds to the value."""
        return AddedCosts(self.alpha, self.beta, self.gamma)

    @public
    def __call__(self, view: UnitView) -> Tensor:
        """Return the value term of each unit; none is negative.

        Parameters
        ----------
        view:
            The units of one group.

        Returns
        -------
        Tensor
            Values of shape (units,), float64.

        Raises
        ------
        ArgumentError
            If ``view`` is not a :class:`UnitView`.
        """
        check_view(view)
        value = view.sum(torch.square, self.roles)
        if self.weigh_groups:
            mean = view.network_mean(torch.square, self.roles)
        else:
            mean = float(value.mean())
        return value / max(mean, torch.finfo(value.dtype).tiny) / share_left(value, view.blocks)


def share_left(values: Tensor, blocks: Tensor) -> Tensor:
    """Return for each unit the share of its block that is left when all smaller units are gone.

    The share includes the unit itself. Of equal units, the last one is removed first.

    Parameters
    ----------
    values:
        Value of each unit, shape (units,).
    blocks:
        Block of each unit, shape (units,).

    Returns
    -------
    Tensor
        Shares in (0, 1], shape (units,), of the dtype of ``values``.

    Examples
    --------
    >>> share_left(torch.tensor([5.0, 7.0, 7.0, 1.0]), torch.tensor([0, 0, 0, 0])).tolist()
    [0.75, 0.25, 0.5, 1.0]
    >>> share_left(torch.tensor([5.0, 7.0, 7.0, 1.0]), torch.tensor([0, 0, 1, 1])).tolist()
    [1.0, 0.5, 0.5, 1.0]
    """
    shares = torch.empty_like(values)
    for block in blocks.unique():
        members = (blocks == block).nonzero().flatten()
        order = members[torch.argsort(values[members], descending=True, stable=True)]
        shares[order] = torch.arange(1, len(order) + 1, dtype=values.dtype) / len(order)
    return shares
