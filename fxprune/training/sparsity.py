"""Sparsity: penalties that pull whole units, or their scales, towards zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.common.arrays import Floats
from fxprune.common.public import public
from fxprune.coupling import Coupling
from fxprune.errors import ArgumentError
from fxprune.rewrite.survivors import Mask
from fxprune.training.penalty import Penalty, checked_unit_strengths, weighted_sum
from fxprune.training.schedules import Schedule
from fxprune.training.units import UnitSums

__all__ = ["BNScaleSparsity", "GroupSparsity"]


@public
class GroupSparsity(Penalty):
    r"""Group lasso over units: :math:`\sum_u \alpha_u \sqrt{\sum_{w \in u} w^2}`.

    Add the penalty to the loss in a training loop. Own and dependent weights of a unit shrink
    together, and removing a unit whose weights have become small costs little accuracy.

    Parameters
    ----------
    model:
        The model that is trained. Its parameters are read at each call.
    coupling:
        Its analysis, from :func:`fxprune.analyze`.
    unit_strengths:
        The factor :math:`\alpha_u` of each unit, shape (units,), in the order of
        ``coupling.units``; by default 1.
    strength:
        The factor of the whole penalty: a number, or a schedule that :meth:`step` advances.

    Raises
    ------
    ModelError, ArgumentError
        If ``coupling`` is not an analysis of ``model``, or a strength is no number of at least 0.

    Notes
    -----
    This is eq. 1 of Wen et al., "Learning Structured Sparsity in Deep Neural Networks", NeurIPS
    2016. A group is all coupled weights of a unit, as in Fang et al., "DepGraph: Towards Any
    Structural Pruning", CVPR 2023.

    Examples
    --------
    >>> import fxprune
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> penalty = GroupSparsity(net, fxprune.analyze(net, torch.zeros(1, 3)))
    >>> (net(torch.ones(5, 3)).square().mean() + 1e-3 * penalty()).backward()
    """

    def __init__(
        self,
        model: nn.Module,
        coupling: Coupling,
        *,
        unit_strengths: Tensor | Floats | Sequence[float] | None = None,
        strength: float | Schedule = 1.0,
    ) -> None:
        super().__init__(strength)
        self._sums = UnitSums(model, coupling)
        self._factors = checked_unit_strengths(unit_strengths, self._sums.count)

    def _value(self) -> Tensor:
        """Return the weighted sum of the units' norms."""
        squares = self._sums(torch.square)
        # The root has an infinite gradient at zero, so clamp units that are zero already.
        norms = squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
        return weighted_sum(norms, self._factors)


@public
class BNScaleSparsity(Penalty):
    r"""L1 penalty on scales: :math:`\sum_u \alpha_u \sum_{\gamma \in u} |\gamma|`.

    The scales are the weights that normalisations of the graph multiply by, whatever module holds
    them. Rank the units by ``criterion="bn_scale"`` afterwards.

    Parameters
    ----------
    model, coupling, unit_strengths, strength:
        As for :class:`GroupSparsity`.

    Attributes
    ----------
    without_scale:
        Name of a group -> indices of its units that pass no normalisation with a scale. The
        penalty does not reach them.

    Raises
    ------
    ModelError, ArgumentError
        As for :class:`GroupSparsity`, or if no unit has a scale.

    Notes
    -----
    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017,
    eq. 1, with the L1 norm. There a channel has one scale; here a unit counts all scales that it
    passes.

    Examples
    --------
    >>> import fxprune
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 4), nn.Linear(4, 1))
    >>> penalty = BNScaleSparsity(net, fxprune.analyze(net, torch.zeros(2, 2)), strength=0.1)
    >>> penalty(), penalty.without_scale
    (tensor(0.3000, grad_fn=<MulBackward0>), {'2.weight:0': (0, 1, 2, 3)})
    """

    def __init__(
        self,
        model: nn.Module,
        coupling: Coupling,
        *,
        unit_strengths: Tensor | Floats | Sequence[float] | None = None,
        strength: float | Schedule = 1.0,
    ) -> None:
        super().__init__(strength)
        self._sums = UnitSums(model, coupling, roles=("scale",))
        self._factors = checked_unit_strengths(unit_strengths, self._sums.count)
        if not self._sums.reached.any():
            raise ArgumentError(
                "no unit of this coupling passes a normalisation with a scale, so there is "
                "nothing to penalise: choose GroupSparsity."
            )
        self.without_scale: Mapping[str, tuple[int, ...]] = _missing(coupling, self._sums.reached)

    def _value(self) -> Tensor:
        """Return the weighted sum of the absolute scales."""
        return weighted_sum(self._sums(torch.abs), self._factors)


def _missing(coupling: Coupling, reached: Mask) -> dict[str, tuple[int, ...]]:
    """Return the indices of the units of each group that are not reached, (units,)."""
    found = {}
    for group in coupling.groups:
        there = reached[np.searchsorted(coupling.units, group.units)]
        if not there.all():
            found[group.name] = tuple(np.flatnonzero(~there).tolist())
    return found
