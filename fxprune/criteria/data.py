"""Criteria that read data: they use the gradients or activations of a loader's batches.

The model is not changed. :class:`Taylor` and :class:`Fisher` run it in evaluation mode on copies
of its parameters and buffers. :class:`Activation` runs the graph that the analysis traced. So the
model's modes, gradients and statistics stay as they are. Batches are copied to the model's device.
In a process group (``torchrun``) every process reads its own batches, and the sums are reduced
over all processes. The scores then equal those of one process that reads everything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.calibration import (
    Loader,
    batches_of,
    call_model,
    check_finite,
    check_read,
    check_repeatable,
)
from fxprune.common.arrays import Floats
from fxprune.common.hooks import in_mode
from fxprune.common.public import calling_user_code, public
from fxprune.coupling import Coupling, check_coupling
from fxprune.criteria.meter import Meter, RunningSum, unchanged, watch_batch, watching
from fxprune.criteria.views import Views, at_least_float32
from fxprune.errors import ArgumentError
from fxprune.inputs import Call

__all__ = ["Activation", "Fisher", "Loss", "Taylor"]


if torch.distributed.is_available():
    # The default arguments of this module's functions hold the process group that exists when it
    # is imported, and never release it. PyTorch imports the module when it traces for the first
    # time. If a process group existed by then, it would outlive destroy_process_group, its threads
    # would outlive the interpreter, and some processes would abort at exit. So import it here,
    # before there is any group.
    import torch.distributed.nn


Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class _Reader:
    """A criterion with a loader that can be read repeatedly.

    Scores are computed again whenever a model is analysed again, and at every pruning step.
    """

    loader: Loader

    def __post_init__(self) -> None:
        check_repeatable(self.loader)


@dataclass(frozen=True)
class _LossReader(_Reader):
    """A criterion with a loader and a loss."""

    loss: Loss

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.loss, type) or not callable(self.loss):
            what = (
                f"the class {self.loss.__name__}"
                if isinstance(self.loss, type)
                else f"a {type(self.loss).__name__}"
            )
            raise ArgumentError(
                f"the loss is {what}: give a function loss(output, *targets), as "
                "torch.nn.functional.cross_entropy."
            )


@public
@dataclass(frozen=True)
class Taylor(_LossReader):
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
    >>> import fxprune
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

        _each_gradient(model, self.loader, coupling.example, self.loss, visit)
        return np.abs(_mean(_products(coupling, model, summed.tensors), samples))


@public
@dataclass(frozen=True)
class Fisher(_LossReader):
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
    >>> import fxprune
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
            total += (size * _products(coupling, model, gradients)) ** 2
            samples += size

        _each_gradient(model, self.loader, coupling.example, self.loss, visit)
        return _mean(total, samples)


@public
@dataclass(frozen=True)
class Activation(_Reader):
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
    >>> import fxprune
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
        sums = _summed_over_processes(np.concatenate([meter.total, meter.times, [meter.samples]]))
        check_read(sums[-1])
        return sums[:units] / np.maximum(sums[units:-1], 1)


def _products(coupling: Coupling, model: nn.Module, gradients: Mapping[str, Tensor]) -> Floats:
    """Return the sum of weight times gradient over each unit's elements, shape (labels,).

    This is the derivative of the loss with respect to a mask on all of the unit's elements.
    """
    weights = dict(model.named_parameters())
    products = {name: weights[name].detach() * gradient for name, gradient in gradients.items()}
    return Views(coupling, products).totals(unchanged)


def _each_gradient(
    model: nn.Module,
    loader: Loader,
    example: Call,
    loss: Loss,
    visit: Callable[[dict[str, Tensor], int], None],
) -> None:
    """Call ``visit(gradients, samples)`` for each batch.

    ``gradients`` maps the name of each parameter to its gradient, in float32 or float64;
    ``samples`` is the number of samples in the batch.
    """
    with in_mode(model, False), torch.inference_mode(False), torch.enable_grad():
        weights = {}
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                weights[name] = parameter.detach().clone().requires_grad_()
        buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        run = functools.partial(torch.func.functional_call, model, {**weights, **buffers})
        for batch in batches_of(loader, model, example):
            output = call_model(run, batch, packed=True)
            with calling_user_code(
                f"the loss, given the model's output and {len(batch.targets)} targets,"
            ):
                value = loss(output, *batch.targets)
            _check_loss(value)
            visit(_gradients_of_loss(value, weights), batch.size)


def _check_loss(value: Any) -> None:
    """Refuse a loss that is not one finite number with a gradient.

    Raises
    ------
    ArgumentError
        If it is something else.
    """
    if (
        not isinstance(value, Tensor)
        or value.numel() != 1
        or not value.requires_grad
        or value.is_complex()
    ):
        if isinstance(value, Tensor):
            given = f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
        else:
            given = f"a {type(value).__name__}"
        raise ArgumentError(
            f"the loss gave {given}: it must give the mean loss over the batch, one number that "
            "depends on the output through differentiable operations."
        )
    check_finite([value], "the loss of a batch")


def _gradients_of_loss(loss: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient by each weight that the loss depends on, in float32 at least.

    Raises
    ------
    ArgumentError
        If the loss depends on no weight.
    """
    with calling_user_code("the gradient of the loss"):
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    found = {}
    for name, gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            found[name] = at_least_float32(gradient)
    if not found:
        raise ArgumentError(
            "the loss depends on no parameter of the model: compute it from the output that it "
            "is given."
        )
    return found


def _mean(total: Floats, samples: int) -> Floats:
    """Return the sums over all processes, divided by the number of samples."""
    sums = _summed_over_processes(np.append(total, samples))
    check_read(sums[-1])
    return sums[:-1] / sums[-1]


def _summed_over_processes(values: Floats) -> Floats:
    """Return the sum over all processes of the process group, or ``values`` if there is none."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    tensor = torch.from_numpy(values.copy()).to(device)
    torch.distributed.all_reduce(tensor)
    return tensor.cpu().numpy()
