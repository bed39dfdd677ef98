"""Gates: a learned factor for each unit, which multiplies the weights that make the unit."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.common.arrays import Floats
from fxprune.common.public import public
from fxprune.coupling import Coupling, check_coupling
from fxprune.errors import ArgumentError
from fxprune.training.gating import GatedWeights
from fxprune.training.penalty import Penalty
from fxprune.training.schedules import Schedule

__all__ = ["Gates", "HardConcreteGates"]


@public
class Gates(Penalty):
    r"""One differentiable gate per unit, and the L1 penalty :math:`\sum_u |g_u|` on the gates.

    The gate of a unit multiplies the unit's own filters and biases and the scales and shifts of
    its normalisations. A gate of 1 leaves the unit as it is. A gate of 0 also closes the weights
    that read the unit, and gives exactly the model with the unit masked. The
    model's code is not changed: the factors are parametrisations of the
    parameters (``torch.nn.utils.parametrize``), so that every forward reads gated weights.

    Train gates and weights together. ``model.parameters()`` includes the gates from now on. Then
    :meth:`remove` writes the gated weights into the parameters, which leaves the function as it
    is, and this object is a criterion that ranks units by the size of their gates. As a context
    manager it calls :meth:`remove` at the end.

    Parameters
    ----------
    model:
        The model that is trained. Until :meth:`remove`, it cannot be analysed or pruned.
    coupling:
        Its analysis, from :func:`fxprune.analyze`.
    strength:
        The factor of the penalty: a number, or a schedule that :meth:`step` advances.

    Attributes
    ----------
    values:
        The gates, a parameter of shape (units,), in the order of ``coupling.units``; 1 at first.

    Raises
    ------
    ModelError, ArgumentError
        If ``coupling`` is not an analysis of ``model``; if a module keeps a parameter where gates
        do not reach it, as recurrent layers do; if a normalisation without a scale keeps running
        statistics of a unit, which a gate cannot mask. Analyse the model with these in ``keep``.

    Notes
    -----
    Scaling factors with an L1 penalty are those of Huang and Wang, "Data-Driven Sparse Structure
    Selection for Deep Neural Networks", ECCV 2018; one gate for all coupled layers is that of You
    et al., "Gate Decorator: Global Filter Pruning Method for Accelerating Deep Convolutional
    Neural Networks", NeurIPS 2019. They multiply what a layer gives, and here the weights that
    make it are multiplied. If a unit passes several layers (a convolution and its normalisation, a
    residual stream), each of them is gated, so that a gate between 0 and 1 acts more than once.

    Normalisations that take statistics over channels (``layer_norm``, ``group_norm``) count a
    closed unit as a zero, until it is pruned.

    Examples
    --------
    >>> import fxprune
    >>> net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.ones(5, 3)
    >>> with Gates(net, fxprune.analyze(net, x), strength=1e-3) as gates:
    ...     optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    ...     (net(x).square().mean() + gates()).backward()
    ...     optimiser.step()
    >>> pruned = fxprune.prune(net, x, channels=0.5, criterion=gates)
    """

    _START = 1.0

    def __init__(
        self, model: nn.Module, coupling: Coupling, *, strength: float | Schedule = 1.0
    ) -> None:
        super().__init__(strength)
        check_coupling(coupling, model)
        first = next(model.parameters(), torch.zeros(()))
        dtype = torch.promote_types(first.dtype, torch.float32)
        count = len(coupling.units)
        start = torch.full((count,), self._START, dtype=dtype, device=first.device)
        self.values = nn.Parameter(start)
        self._groups = {
            group.name: np.searchsorted(coupling.units, group.units) for group in coupling.groups
        }
        self._source = self._made_source()
        self._weights = GatedWeights(model, coupling, self._source)

    def _made_source(self) -> nn.Module:
        """Return the module that gives the gates whenever a weight is read."""
        return _Values(self.values)

    @public
    def remove(self) -> None:
        """Write the gated weights into the parameters, and take the gates away.

        The parameters are the same objects as before, with the values that forward read. A second
        call does nothing.
        """
        self._weights.fold()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _value(self) -> Tensor:
        """Return the sum of the absolute gates."""
        return self.values.abs().sum()

    def _importance(self) -> Tensor:
        """Return the importance of each unit, (units,)."""
        return self.values.abs()

    @public
    def scores(self, coupling: Coupling, model: nn.Module) -> Floats:
        """Return the importance of each unit, as a criterion does.

        Parameters
        ----------
        coupling:
            An analysis of the same architecture. Groups may be missing, as with ``keep``.
        model:
            The model to be pruned.

        Returns
        -------
        Floats
            Scores of shape (labels,), 0 for labels of no unit.

        Raises
        ------
        ModelError, ArgumentError
            If ``coupling`` is not an analysis of ``model``, or has a group without gates.
        """
        check_coupling(coupling, model)
        values = self._importance().detach().to("cpu", torch.float64).numpy()
        scores = np.zeros(coupling.context.units.count)
        for group in coupling.groups:
            places = self._groups.get(group.name)
            if places is None or len(places) != group.size:
                raise ArgumentError(
                    f"group {group.name!r} of {group.size} units has no gates: they were made for "
                    "another analysis. Analyse with the same keep= and units= both times."
                )
            scores[group.units] = values[places]
        return scores


class _Values(nn.Module):
    """Gives the gates: the parameter itself."""

    def __init__(self, values: nn.Parameter) -> None:
        super().__init__()
        self.values = values

    def forward(self) -> Tensor:
        """Return the gates."""
        return self.values


@public
class HardConcreteGates(Gates):
    r"""Gates that are open or closed by chance while training, and the L0 penalty on them.

    The penalty is the expected number of open gates, :math:`\sum_u P(g_u \ne 0)`. Training closes
    gates for good, and a unit with a closed gate is removed at no cost. In evaluation mode the
    gates are not drawn, and most are exactly 0 or exactly 1. All else is as for :class:`Gates`.

    Parameters
    ----------
    model, coupling, strength:
        As for :class:`Gates`. Each call of ``model`` in training mode draws the gates anew, once
        for all weights.

    Attributes
    ----------
    values:
        The parameter :math:`\log \alpha` of each gate, shape (units,); 3 at first, so that all
        gates are 1 in evaluation mode.

    Raises
    ------
    ModelError, ArgumentError
        As for :class:`Gates`.

    Notes
    -----
    Louizos et al., "Learning Sparse Neural Networks through L0 Regularization", ICLR 2018, eqs. 10
    to 13, with their :math:`\beta = 2/3`, :math:`\gamma = -0.1`, :math:`\zeta = 1.1`:

    .. math:: g = \min(1, \max(0, s (\zeta - \gamma) + \gamma)), \quad
        s = \sigma((\log u - \log(1 - u) + \log \alpha) / \beta), \quad u \sim U(0, 1)

    and :math:`s = \sigma(\log \alpha)` in evaluation mode. A batch shares its draw, as in the
    paper.

    Examples
    --------
    >>> import fxprune
    >>> net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.ones(5, 3)
    >>> with HardConcreteGates(net, fxprune.analyze(net, x), strength=1e-3) as gates:
    ...     optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    ...     (net(x).square().mean() + gates()).backward()
    ...     optimiser.step()
    >>> pruned = fxprune.prune(net, x, channels=0.5, criterion=gates)
    """

    _START = 3.0

    def __init__(
        self, model: nn.Module, coupling: Coupling, *, strength: float | Schedule = 1.0
    ) -> None:
        super().__init__(model, coupling, strength=strength)
        self._handle = model.register_forward_pre_hook(self._source.draw)

    def _made_source(self) -> _HardConcrete:
        """Return the module that gives the gates whenever a weight is read."""
        return _HardConcrete(self.values)

    @public
    def remove(self) -> None:
        """Write the weights of evaluation mode into the parameters, and take the gates away.

        The parameters are the same objects as before. A second call does nothing.
        """
        self._handle.remove()
        self._source.noise = None
        super().remove()

    def _importance(self) -> Tensor:
        """Return the probability that each gate is open."""
        return torch.sigmoid(self.values - _BETA * math.log(-_GAMMA / _ZETA))

    def _value(self) -> Tensor:
        """Return the expected number of open gates."""
        return self._importance().sum()


_BETA, _GAMMA, _ZETA = 2 / 3, -0.1, 1.1


class _HardConcrete(nn.Module):
    """Gives gates of the hard concrete distribution, or their value in evaluation mode.

    Attributes
    ----------
    noise:
        :math:`\\log u - \\log(1 - u)` for each gate; None in evaluation mode.
    """

    def __init__(self, values: nn.Parameter) -> None:
        super().__init__()
        self.values = values
        self.noise: Tensor | None = None

    def draw(self, model: nn.Module, given: object) -> None:
        """Draw the noise of the next call of a model: the hook before each call."""
        self.noise = None
        if model.training:
            share = torch.empty_like(self.values).uniform_(_LEAST_SHARE, 1 - _LEAST_SHARE).detach()
            self.noise = share.log() - (-share).log1p()

    def forward(self) -> Tensor:
        """Return the gates."""
        if self.noise is None:
            concrete = torch.sigmoid(self.values)
        else:
            concrete = torch.sigmoid((self.values + self.noise) / _BETA)
        return (concrete * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)


_LEAST_SHARE = 1e-6
"""How far a uniform number stays from 0 and 1, whose logarithms are infinite."""
