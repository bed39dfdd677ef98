"""The variance of activations as a criterion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.calibration import batches_of, check_read
from fxprune.common.arrays import Floats
from fxprune.common.public import public
from fxprune.coupling import Coupling, check_coupling
from fxprune.criteria.meter import Watcher, watch_batch, watching
from fxprune.criteria.readers import Reader, summed_over_processes
from fxprune.criteria.views import at_least_float32
from fxprune.labels import Array

__all__ = ["ActivationVariance"]


@public
@dataclass(frozen=True)
class ActivationVariance(Reader):
    r"""Variance :math:`\mathrm{E}[a^2] - \mathrm{E}[a]^2` of each unit's activations.

    Activations are taken where a next layer reads them, as by :class:`Activation`. Mean and
    variance go over samples and positions, of evaluation mode. If a unit has several places on the
    axis that a layer reads (a flattened map, a whole head), each has a mean of its own, and the
    mean of their variances counts. A unit that several layers read gets the mean over them; a unit
    that none reads gets 0.

    A unit of variance 0 is a constant, which a bias can replace. So combine this criterion with
    ``prune(..., data=loader, compensate="constants")``, which moves the mean of what is removed
    into the next layers.

    Parameters
    ----------
    loader:
        Batches ``(inputs, ...)``, as for :class:`Activation`. Targets are not read.

    Raises
    ------
    ArgumentError
        As for :class:`Activation`.

    Notes
    -----
    Berisha et al., "Variance-Based Pruning for Accelerating and Compressing Trained Networks",
    ICCV 2025, arXiv 2507.12988. The paper ranks the hidden units of all MLPs together by this
    variance, and folds their means into the next bias. Here every unit is ranked, and the scores
    of groups are compared as they are, too; ``scopes=`` or ``keep=`` restrict that.

    Examples
    --------
    >>> import fxprune
    >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> weight, bias = torch.tensor([[1.], [0.]]), torch.tensor([0., 9.])
    >>> net[0].load_state_dict({"weight": weight, "bias": bias})
    <All keys matched successfully>
    >>> coupling = fxprune.analyze(net, torch.zeros(1, 1))
    >>> scores = ActivationVariance([(torch.tensor([[1.], [3.], [-4.]]),)]).scores(coupling, net)
    >>> # of 1, 3, 0 with the mean 4/3: (1 + 9 + 0) / 3 - 16 / 9; the other unit is always 9
    >>> scores[coupling.groups[0].units].round(4).tolist()
    [1.5556, 0.0]
    """

    @public
    def scores(self, coupling: Coupling, model: nn.Module) -> Floats:
        """Compute the score of each label.

        Returns
        -------
        Floats
            Scores of shape (labels,), 0 for labels of no unit.

        Raises
        ------
        ModelError, ArgumentError
            If ``coupling`` is not an analysis of ``model``, or the loader does not fit.
        """
        check_coupling(coupling, model)
        watcher = _MomentWatcher(coupling)
        with watching(coupling, model) as filled:
            for batch in batches_of(self.loader, model, coupling.example):
                watch_batch(watcher, coupling, filled, batch)
        check_read(summed_over_processes(np.array([float(watcher.samples)]))[0])
        total, readers = np.zeros((2, coupling.context.units.count))
        for moments in watcher.all_moments:
            units, variances = moments.variance_of_units()
            total[units] += variances
            readers[units] += 1
        return total / np.maximum(readers, 1)


@dataclass
class _Moments:
    """Sums of an operand's values and of their squares at each of its labels.

    Attributes
    ----------
    labels:
        The labels of the operand's elements; broadcastable to its shape.
    sums:
        The number of values, their sum and the sum of their squares, shape (3, \\*labels.shape).
    """

    labels: Array
    sums: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.sums = np.zeros((3, *self.labels.shape))

    def add(self, values: Tensor) -> None:
        """Add the values of one batch."""
        values = at_least_float32(values)
        shared = [d for d, extent in enumerate(self.labels.shape) if extent == 1]
        found = torch.zeros_like(values), values
        if shared:
            found = torch.var_mean(values, shared, correction=0, keepdim=True)
        # moments are combined in double precision, where squares of means do not cancel
        variance, mean = (each.cpu().double().numpy() for each in found)
        count = math.prod(values.shape[d] for d in shared)
        self.sums += count * np.stack(np.broadcast_arrays(1.0, mean, variance + mean**2))

    def variance_of_units(self) -> tuple[Array, Floats]:
        """Return the units that were seen, in any process, and the mean of their variances."""
        count, total, squares = summed_over_processes(self.sums)
        if not count.all():  # the node has not run
            return np.zeros(0, np.int64), np.zeros(0)
        variance = np.maximum(squares / count - (total / count) ** 2, 0)
        units, place = np.unique(self.labels.ravel(), return_inverse=True)
        means = np.bincount(place.ravel(), variance.ravel()) / np.bincount(place.ravel())
        live = units > 0
        return units[live], means[live]


class _MomentWatcher(Watcher):
    """Runs of traced graphs that collect the moments of what the nodes read.

    Attributes
    ----------
    moments:
        For each node the moments of the operands that it reads.
    """

    def __init__(self, coupling: Coupling) -> None:
        super().__init__(coupling)
        self.moments: dict[fx.Node, list[_Moments]] = {}
        for reads in self.reads.values():
            for node, operands in reads.items():
                self.moments[node] = [_Moments(labels) for _, labels in operands]

    @property
    def all_moments(self) -> list[_Moments]:
        """The moments of all operands, in an order that is the same in every process."""
        return [moments for of_node in self.moments.values() for moments in of_node]

    def before(self, node: fx.Node, read: Sequence[tuple[Tensor, Array]], size: int) -> None:
        """Add what a node reads to its moments."""
        for (values, _), moments in zip(read, self.moments.get(node, ()), strict=True):
            moments.add(values)
