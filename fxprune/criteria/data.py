"""Criteria that read data: a loader of batches, a loss, and the gradients or activations they
give.

The model is not touched: it runs in evaluation mode on copies of its parameters and buffers
(:class:`Taylor`, :class:`Fisher`), or as the graph that the analysis traced (:class:`Activation`),
so its modes, gradients and statistics stay as they are. Batches are taken to the model's device.
In a process group (``torchrun``) every process reads its own batches and the sums are reduced over
all of them, so the scores are those of one process that reads everything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.calibration import (
    Loader,
    batches_of,
    called,
    check_finite,
    check_loader,
    check_read,
    evaluated,
)
from fxprune.common.arrays import Floats
from fxprune.common.identity import IdentityMap
from fxprune.common.public import calling, public
from fxprune.coupling import Coupling, check_coupling
from fxprune.criteria.meter import Meter, RunningSum, placeholder_values, unchanged, watch_parts
from fxprune.criteria.views import Views, in_single_at_least
from fxprune.errors import ArgumentError
from fxprune.inputs import Call
from fxprune.trace.aliasing import Undone

__all__ = ["Activation", "Fisher", "Loss", "Taylor"]


if torch.distributed.is_available():
    # Its functions take the process group of the moment in which they are imported as their
    # default, and keep it for ever. PyTorch imports it at its first tracing: in a process group,
    # that group would outlive destroy_process_group, its threads the interpreter, and now and then
    # a process would be aborted at its end. So it is imported before any group is there.
    import torch.distributed.nn


Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class _Reader:
    """Has a loader that can be read again: scores are taken anew when a model is analysed anew,
    and at every pruning step.
    """

    loader: Loader

    def __post_init__(self) -> None:
        check_loader(self.loader)
        if isinstance(self.loader, Iterator):
            raise ArgumentError(
                f"the loader is a {type(self.loader).__name__}, which can be read only once. "
                "Pass one that can be read again: a DataLoader, or list(...) of it."
            )


@dataclass(frozen=True)
class _LossReader(_Reader):
    """Has a loss as well."""

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
    r""":math:`\left| \sum w \cdot \partial L / \partial w \right|` over a unit's elements: the
    first-order change of the loss.

    L is the mean loss over all samples; how they are split into batches makes no difference.
    Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019: the root of
    their criterion for a channel's gate, over the coupled elements.

    Parameters
    ----------
    loader:
        Batches ``(inputs, *targets)``; ``inputs`` a tensor, a tuple or list of the model's
        arguments, or a dict of them by name. The first tensor's first dimension counts the
        samples. Anything that can be read again: a DataLoader, a list.
    loss:
        ``loss(output, *targets)``, a mean over the batch.

    Raises
    ------
    ArgumentError
        If the loader is an iterator; when scoring, if it gives no batch, or something else than
        such batches, or the loss is no number with a gradient.

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
        """Shape (labels,)."""
        check_coupling(coupling, model)
        summed, samples = RunningSum(), 0

        def visit(gradients: dict[str, Tensor], size: int) -> None:
            nonlocal samples
            summed.add(gradients, size)
            samples += size

        _each_gradient(model, self.loader, coupling.example, self.loss, visit)
        return np.abs(_mean(_products(coupling, model, summed.tensors), samples))


@public
@dataclass(frozen=True)
class Fisher(_LossReader):
    r""":math:`\frac{1}{N} \sum_b \left( n_b \sum w \cdot \partial L_b / \partial w \right)^2`: the
    diagonal Fisher information of a unit's mask.

    :math:`L_b` is the mean loss over batch b of :math:`n_b` samples, N samples in all. With
    batches of one sample this is the empirical Fisher information, as in Theis et al., "Faster
    gaze prediction with dense networks and Fisher pruning", 2018, and over coupled elements in Liu
    et al., "Group Fisher Pruning for Practical Network Compression", ICML 2021. Larger batches
    estimate it: the gradients of their samples are taken for uncorrelated.

    Parameters
    ----------
    loader, loss:
        As for :class:`Taylor`.

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
        """Shape (labels,)."""
        check_coupling(coupling, model)
        total, samples = np.zeros(coupling.context.units.count), 0

        def visit(gradients: dict[str, Tensor], size: int) -> None:
            nonlocal total, samples
            total += (size * _products(coupling, model, gradients)) ** 2
            samples += size

        _each_gradient(model, self.loader, coupling.example, self.loss, visit)
        return _mean(total, samples)


@public
@dataclass(frozen=True)
class Activation(_Reader):
    r"""Mean :math:`|a|` of a unit's activations where a next layer reads them, over samples and
    positions.

    Polyak and Wolf, "Channel-level acceleration of deep face representations", IEEE Access 2015
    (inbound pruning). What reads is a contraction (convolution, depthwise too, matrix product,
    attention), or whatever else sums channels up. A unit that several read has the mean over them,
    one that nothing reads has 0.

    Parameters
    ----------
    loader:
        Batches ``(inputs, ...)``, as for :class:`Taylor`, with the arguments and the sizes of the
        analysis' example, but any number of samples; targets are not read.

    Raises
    ------
    ArgumentError
        If the loader is an iterator; when scoring, if it gives no batch, or something else than
        such batches.

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
        """Shape (labels,)."""
        check_coupling(coupling, model)
        meter = Meter(coupling)
        # Buffers are copied, should a module write to its own.
        real = IdentityMap(
            (key, t if isinstance(t, nn.Parameter) else t.clone())
            for key, t in coupling.meta_copy.real.items()
        )
        undone = Undone(dict(model.named_parameters()))
        with (
            undone.afterwards(),
            torch.no_grad(),
            coupling.meta_copy.holding(real) as meta_copy,
            evaluated(meta_copy),
        ):
            for batch in batches_of(self.loader, model, coupling.example):
                if coupling.parts:
                    watch_parts(meter, coupling, meta_copy, batch)
                else:
                    meter.watch(
                        "", meta_copy, placeholder_values(coupling.traces[0], batch), batch.size
                    )
                meter.samples += batch.size
        units = coupling.context.units.count
        both = _summed_over_processes(np.concatenate([meter.total, meter.times, [meter.samples]]))
        check_read(both[-1])
        return both[:units] / np.maximum(both[units:-1], 1)


def _products(coupling: Coupling, model: nn.Module, gradients: Mapping[str, Tensor]) -> Floats:
    """For each unit the sum of weight times gradient over its elements: the derivative by a mask
    on all of them.
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
    """Call ``visit(gradients by parameter's name, number of samples)`` batch by batch; gradients
    are in float32 at least.
    """
    with evaluated(model), torch.inference_mode(False), torch.enable_grad():
        held = {
            name: p.detach().clone().requires_grad_()
            for name, p in model.named_parameters()
            if p.is_floating_point()
        }
        buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        for batch in batches_of(loader, model, example):
            output = called(
                functools.partial(torch.func.functional_call, model, {**held, **buffers}),
                batch,
                apart=True,
            )
            with calling(f"the loss, given the model's output and {len(batch.targets)} targets,"):
                value = loss(output, *batch.targets)
            if (
                not isinstance(value, Tensor)
                or value.numel() != 1
                or not value.requires_grad
                or value.is_complex()
            ):
                tensor = isinstance(value, Tensor)
                given = (
                    f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
                    if tensor
                    else f"a {type(value).__name__}"
                )
                raise ArgumentError(
                    f"the loss gave {given}: it must give the mean loss over the batch, one "
                    "number that depends on the output through differentiable operations."
                )
            check_finite([value], "the loss of a batch")
            with calling("the gradient of the loss"):
                found = torch.autograd.grad(value, list(held.values()), allow_unused=True)
            if all(gradient is None for gradient in found):
                raise ArgumentError(
                    "the loss depends on no parameter of the model: compute it from the output "
                    "that it is given."
                )
            visit(
                {
                    name: in_single_at_least(g)
                    for name, g in zip(held, found, strict=True)
                    if g is not None
                },
                batch.size,
            )


def _mean(total: Floats, samples: int) -> Floats:
    """The sums of all processes, by sample."""
    both = _summed_over_processes(np.append(total, samples))
    check_read(both[-1])
    return both[:-1] / both[-1]


def _summed_over_processes(values: Floats) -> Floats:
    """The sum over all processes of the process group, if there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    tensor = torch.from_numpy(values.copy()).to(device)
    torch.distributed.all_reduce(tensor)
    return tensor.cpu().numpy()
