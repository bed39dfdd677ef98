"""Criteria that read data: they use the gradients or activations of a loader's batches.

The model is not changed. :class:`Taylor` and :class:`Fisher` run it in evaluation mode on copies
of its parameters and buffers. :class:`Activation` runs the graph that the analysis traced. So the
model's modes, gradients and statistics stay as they are. Batches are copied to the model's device.
In a process group (``torchrun``) every process reads its own batches, and the sums are reduced
over all processes. The scores then equal those of one process that reads everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from fxprune.calibration import batches_of, check_read
from fxprune.common.arrays import Floats
from fxprune.common.public import public
from fxprune.coupling import Coupling, check_coupling
from fxprune.criteria.meter import Meter, RunningSum, watch_batch, watching
from fxprune.criteria.readers import (
    LossReader,
    Reader,
    each_gradient,
    mean_over_samples,
    summed_over_processes,
    unit_products,
)

__all__ = ["Activation", "Fisher", "Taylor"]


@public
@dataclass(frozen=True)
class Taylor(LossReader):
    r"""First-order change of the loss when a unit is removed.

    .. math:: \left| \sum w \cdot \partial L / \partial w \right|

    The sum goes over a unit's elements. L is the mean loss over all samples; the split into
    batches makes no difference.

    Parameters
    ----------
    loader:
        Batches ``(inputs, *targets)``, where ``inputs`` is a tensor, a tuple or list of the
        model's arguments, or a dict of them by name. The first dimension of the first tensor
        counts the samples. The loader must allow repeated reading: a DataLoader or a list, not a
        generator.
    loss:
        ``loss(output, *targets)``, a mean over the batch.

    Raises
    ------
    ArgumentError
        If the loader is an iterator or the loss is not a function. When scoring: if the loader
        gives no batch or something other than such batches, or the loss is not one number with a
        gradient.

    Notes
    -----
    This is the square root of the criterion for a channel's gate in Molchanov et al., "Importance
    Estimation for Neural Network Pruning", CVPR 2019, summed over the coupled elements.

    Examples
    --------
    >>> import fxprune, torch
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> weights = torch.tensor([[1.], [2.]]), torch.tensor([[1., 3.]])
    >>> net.load_state_dict({"0.weight": weights[0], "1.weight": weights[1]})
    <All keys matched successfully>
    >>> coupling = fxprune.analyze(net, torch.zeros(1, 1))
    >>> scores = Taylor([(torch.tensor([[1.], [5.]]),)],
    ...     lambda output: output.mean()).scores(coupling, net)
    >>> # the mean output is 3 (1 * 1 + 2 * 3); either factor of a product counts
    >>> scores[coupling.groups[0].units].tolist()
    [6.0, 36.0]
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
            If ``coupling`` is not an analysis of ``model``, or the loader or the loss does not
            fit.
        """
        check_coupling(coupling, model)
        summed, samples = RunningSum(), 0

        def visit(gradients: dict[str, Tensor], size: int) -> None:
            """Add the gradients of one batch to the sums."""
            nonlocal samples
            summed.add(gradients, size)
            samples += size

        each_gradient(model, self.loader, coupling.example, self.loss, visit)
        return np.abs(mean_over_samples(unit_products(coupling, model, summed.tensors), samples))


@public
@dataclass(frozen=True)
class Fisher(LossReader):
    r"""Diagonal Fisher information of a mask on each unit.

    .. math:: \frac{1}{N} \sum_b \left( n_b \sum w \cdot \partial L_b / \partial w \right)^2

    :math:`L_b` is the mean loss over batch b of :math:`n_b` samples; N is the number of all
    samples. With batches of one sample this is the empirical Fisher information. Larger batches
    estimate it, on the assumption that the gradients of their samples are uncorrelated.

    Parameters
    ----------
    loader, loss:
        As for :class:`Taylor`.

    Raises
    ------
    ArgumentError
        As for :class:`Taylor`.

    Notes
    -----
    Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018, use it for
    single channels; Liu et al., "Group Fisher Pruning for Practical Network Compression", ICML
    2021, use it for coupled ones.

    Examples
    --------
    >>> import fxprune, torch
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> weights = torch.tensor([[1.], [2.]]), torch.tensor([[1., 3.]])
    >>> net.load_state_dict({"0.weight": weights[0], "1.weight": weights[1]})
    <All keys matched successfully>
    >>> coupling = fxprune.analyze(net, torch.zeros(1, 1))
    >>> scores = Fisher([(torch.tensor([[1.]]),), (torch.tensor([[2.]]),)],
    ...     lambda output: output.mean()).scores(coupling, net)
    >>> # (2 ** 2 + 4 ** 2) / 2 and (12 ** 2 + 24 ** 2) / 2
    >>> scores[coupling.groups[0].units].tolist()
    [10.0, 360.0]
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
            If ``coupling`` is not an analysis of ``model``, or the loader or the loss does not
            fit.
        """
        check_coupling(coupling, model)
        total, samples = np.zeros(coupling.context.units.count), 0

        def visit(gradients: dict[str, Tensor], size: int) -> None:
            """Add the squared products of one batch to the total."""
            nonlocal total, samples
            total += (size * unit_products(coupling, model, gradients)) ** 2
            samples += size

        each_gradient(model, self.loader, coupling.example, self.loss, visit)
        return mean_over_samples(total, samples)


@public
@dataclass(frozen=True)
class Activation(Reader):
    """Mean :math:`|a|` of each unit's activations where a next layer reads them.

    The mean goes over samples and positions. A layer reads a unit if it is a contraction
    (convolution, including depthwise, matrix product, attention) or any other operation that sums
    channels up. A unit that several layers read gets the mean over them; a unit that none reads
    gets 0.

    Parameters
    ----------
    loader:
        Batches ``(inputs, ...)``, as for :class:`Taylor`, with the arguments and sizes of the
        analysis' example, but any number of samples. Targets are not read.

    Raises
    ------
    ArgumentError
        If the loader is an iterator. When scoring: if it gives no batch, or something other than
        such batches.

    Notes
    -----
    Polyak and Wolf, "Channel-level acceleration of deep face representations", IEEE Access 2015,
    call this inbound pruning.

    Examples
    --------
    >>> import fxprune, torch
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
    >>> net[0].load_state_dict({"weight": torch.tensor([[1.], [-4.]])})
    <All keys matched successfully>
    >>> coupling = fxprune.analyze(net, torch.zeros(1, 1))
    >>> scores = Activation([(torch.tensor([[1.], [2.], [-1.]]),)]).scores(coupling, net)
    >>> scores[coupling.groups[0].units].round(4).tolist()  # (1 + 2 + 0) / 3 and (0 + 0 + 4) / 3
    [1.0, 1.3333]
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
        meter = Meter(coupling)
        with watching(coupling, model) as filled:
            for batch in batches_of(self.loader, model, coupling.example):
                watch_batch(meter, coupling, filled, batch)
        units = coupling.context.units.count
        sums = summed_over_processes(np.concatenate([meter.total, meter.times, [meter.samples]]))
        check_read(sums[-1])
        return sums[:units] / np.maximum(sums[units:-1], 1)
