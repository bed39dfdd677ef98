"""What criteria that read data share: loaders, losses and gradients, sums over processes."""

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
    LoaderBatch,
    batches_of,
    call_model,
    check_finite,
    check_read,
    check_repeatable,
)
from fxprune.common.arrays import Floats
from fxprune.common.hooks import in_mode
from fxprune.common.public import calling_user_code
from fxprune.coupling import Coupling
from fxprune.criteria.meter import unchanged
from fxprune.criteria.views import Views, at_least_float32
from fxprune.errors import ArgumentError
from fxprune.inputs import Call

__all__ = [
    "Loss",
    "LossReader",
    "Reader",
    "check_loss",
    "each_gradient",
    "each_output",
    "gradients_of",
    "loss_of",
    "mean_over_samples",
    "process_number",
    "summed_over_processes",
    "unit_products",
]


if torch.distributed.is_available():
    # The default arguments of this module's functions hold the process group that exists when it
    # is imported, and never release it. PyTorch imports the module when it traces for the first
    # time. If a process group existed by then, it would outlive destroy_process_group, its threads
    # would outlive the interpreter, and some processes would abort at exit. So import it here,
    # before there is any group.
    import torch.distributed.nn


Loss = Callable[..., Tensor]

VisitOutput = Callable[[Any, LoaderBatch, dict[str, Tensor]], None]
"""Called with the model's output, the batch, and the weights that the output was computed with."""


@dataclass(frozen=True)
class Reader:
    """A criterion with a loader that can be read repeatedly.

    Scores are computed again whenever a model is analysed again, and at every pruning step.
    """

    loader: Loader

    def __post_init__(self) -> None:
        check_repeatable(self.loader)


@dataclass(frozen=True)
class LossReader(Reader):
    """A criterion with a loader and a loss."""

    loss: Loss

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.loss)


def check_loss(loss: Any) -> None:
    """Refuse a value that is no function.

    Raises
    ------
    ArgumentError
        If it is a class, or cannot be called.
    """
    if isinstance(loss, type) or not callable(loss):
        what = (
            f"the class {loss.__name__}" if isinstance(loss, type) else f"a {type(loss).__name__}"
        )
        raise ArgumentError(
            f"the loss is {what}: give a function loss(output, *targets), as "
            "torch.nn.functional.cross_entropy."
        )


def unit_products(coupling: Coupling, model: nn.Module, gradients: Mapping[str, Tensor]) -> Floats:
    """Return the sum of weight times gradient over each unit's elements, shape (labels,).

    This is the derivative of the loss with respect to a mask on all of the unit's elements.
    """
    weights = dict(model.named_parameters())
    products = {name: weights[name].detach() * gradient for name, gradient in gradients.items()}
    return Views(coupling, products).totals(unchanged)


def each_output(model: nn.Module, loader: Loader, example: Call, visit: VisitOutput) -> None:
    """Call ``visit(output, batch, weights)`` for each batch, with gradients enabled.

    The model runs in evaluation mode on copies of its parameters and buffers. ``weights`` are the
    copies of the floating-point parameters, by name; they require gradients.
    """
    with in_mode(model, False), torch.inference_mode(False), torch.enable_grad():
        weights = {}
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                weights[name] = parameter.detach().clone().requires_grad_()
        buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        run = functools.partial(torch.func.functional_call, model, {**weights, **buffers})
        for batch in batches_of(loader, model, example):
            visit(call_model(run, batch, packed=True), batch, weights)


def each_gradient(
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

    def of_output(output: Any, batch: LoaderBatch, weights: dict[str, Tensor]) -> None:
        """Visit the gradients of one batch."""
        visit(gradients_of(loss_of(loss, output, batch), weights), batch.size)

    each_output(model, loader, example, of_output)


def loss_of(loss: Loss, output: Any, batch: LoaderBatch) -> Tensor:
    """Return the loss of a batch.

    Raises
    ------
    ArgumentError
        If it is not one finite number with a gradient.
    """
    with calling_user_code(
        f"the loss, given the model's output and {len(batch.targets)} targets,"
    ):
        value = loss(output, *batch.targets)
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
    return value


def gradients_of(
    loss: Tensor,
    weights: Mapping[str, Tensor],
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> dict[str, Tensor]:
    """Return the gradient by each weight that the loss depends on, in float32 at least.

    Parameters
    ----------
    loss:
        The loss of a batch, one number.
    weights:
        The weights, by name.
    retain_graph, create_graph:
        Whether the loss, or the gradients, can be differentiated again.

    Raises
    ------
    ArgumentError
        If the loss depends on no weight.
    """
    with calling_user_code("the gradient of the loss"):
        gradients = torch.autograd.grad(
            loss,
            list(weights.values()),
            allow_unused=True,
            retain_graph=retain_graph or create_graph,
            create_graph=create_graph,
        )
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


def mean_over_samples(total: Floats, samples: int) -> Floats:
    """Return the sums over all processes, divided by the number of samples."""
    sums = summed_over_processes(np.append(total, samples))
    check_read(sums[-1])
    return sums[:-1] / sums[-1]


def process_number() -> int:
    """Return the number of this process in its process group; 0 if there is none."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0
    return int(torch.distributed.get_rank())


def summed_over_processes(values: Floats) -> Floats:
    """Return the sum over all processes of the process group, or ``values`` if there is none."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    tensor = torch.from_numpy(values.copy()).to(device)
    torch.distributed.all_reduce(tensor)
    return tensor.cpu().numpy()
