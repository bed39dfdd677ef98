"""Least squares: consumers of removed channels, refitted on the channels that stay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.calibration import (
    LoaderBatch,
    batches_of,
    call_model,
    check_dimensions,
    check_finite,
    check_read,
)
from fxprune.coupling import Coupling
from fxprune.errors import ArgumentError
from fxprune.ops.convolution import is_convolution
from fxprune.rewrite import Survivors
from fxprune.training.compensation import Compensation
from fxprune.training.consumers import (
    Consumer,
    check_fits,
    consumers_of,
    untouched,
    watching_consumers,
)

__all__ = ["reconstruct"]


_SAMPLES = 50
"""With this many samples, the penalty weighs as much as the mean square of an input.

On pretrained networks and inputs from other sources than those of the fit, a share between a tenth
and one keeps most, with 200 samples; a share of 1e-4 fits the sources
(``benchmarks/pretrained.py``).
"""


def reconstruct(
    coupling: Coupling,
    survivors: Survivors,
    model: nn.Module,
    pruned: nn.Module,
    loader: Iterable[Any],
    *,
    ridge: float | None = None,
) -> Compensation:
    r"""Refit each consumer on its remaining inputs by least squares.

    .. math:: \min_W \sum \lVert y - W x' \rVert^2 + \lambda \lVert W - W_0 \rVert^2

    ``y`` is the original's output, and ``x'`` is the pruned model's input at the same layer.
    Layers are refitted in the order in which they run, so each gets the inputs that the refitted
    layers before it give. :math:`W_0` are the current weights, bias included. :math:`\lambda` is
    ``ridge`` times the mean square of an input, so weights stay as they are in directions that the
    data does not cover. A consumer is found in the graph, whatever module holds it. Transposed
    convolutions are left as they are.

    Parameters
    ----------
    coupling, survivors, model, pruned, loader:
        As for :func:`fold_constants`. All batches are held in memory. After an error, the
        parameters of ``pruned`` are what they were.
    ridge:
        Weight of the penalty, as a share of the inputs' mean square; at least 0. By default 50
        over the number of samples: the fewer there are, the less they say about other data.

    Returns
    -------
    Compensation
        The modules that were refitted, and those that could not be.

    Raises
    ------
    ArgumentError
        If the model was traced in parts; if ``pruned`` is not the model of this plan; if the
        loader gives no batch or values that are not finite; if ``ridge`` is too small for the
        data.

    Notes
    -----
    He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, eq. 4, with
    the selection given.
    """
    if coupling.parts:
        raise ArgumentError(
            "this model was not traced whole: its Python may hand other things to the pruned "
            "layers than to the original's, which "
            'least squares would compare. Take method="constants".'
        )
    batches = list(batches_of(loader, model, coupling.example))
    check_read(len(batches))
    if ridge is None:
        ridge = _SAMPLES / sum(batch.size for batch in batches)
    with _as_before(pruned):
        return _refit(coupling, survivors, model, pruned, batches, ridge)


@contextmanager
def _as_before(pruned: nn.Module) -> Iterator[None]:
    """Restore the parameters of a model if an error occurs inside the context."""
    before = [(parameter, parameter.detach().clone()) for parameter in pruned.parameters()]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, values in before:
                parameter.copy_(values)
        raise


def _refit(
    coupling: Coupling,
    survivors: Survivors,
    model: nn.Module,
    pruned: nn.Module,
    batches: Sequence[LoaderBatch],
    ridge: float,
) -> Compensation:
    """Refit the consumers one after the other."""
    consumers = consumers_of(coupling, survivors)
    changed, uncorrected = [], list(consumers.others)
    check_fits(coupling, survivors, pruned, consumers)
    parameters = dict(pruned.named_parameters())
    for name, consumer in consumers.items():
        sums = None
        if _can_be_refitted(consumer, parameters[name]):
            sums = _second_moments(survivors, model, pruned, consumer, batches)
        if sums is None:
            uncorrected.append(consumer.name)
            continue
        constant = consumer.constant
        bias = parameters[constant[0]] if consumer.bias and constant is not None else None
        _solve(consumer, parameters[name], bias, *sums, ridge)
        changed.append(consumer.name)
    return Compensation(tuple(changed), tuple(uncorrected))


def _can_be_refitted(consumer: Consumer, weight: Tensor) -> bool:
    """Tell whether each output is a linear function of one row of inputs."""
    if is_convolution(consumer.ran.func):
        return consumer.form.summed == 1  # a transposed one adds up overlapping results
    return weight.dim() == 2


def _solve(
    consumer: Consumer,
    weight: Tensor,
    bias: Tensor | None,
    moment: Tensor,
    product: Tensor,
    ridge: float,
) -> None:
    """Set a weight and a bias to the solution of the penalised least squares.

    Parameters
    ----------
    consumer:
        Where they are read.
    weight, bias:
        The parameters to set, with the values that the penalty pulls to.
    moment, product:
        The sums that :func:`_second_moments` returns.
    ridge:
        Weight of the penalty, as a share of the inputs' mean square.

    Raises
    ------
    ArgumentError
        If the equations are singular.
    """
    groups = len(moment)
    rows = weight if consumer.form.summed == 1 else weight.T  # (outputs, inputs, ...)
    start = rows.detach().double().reshape(groups, len(rows) // groups, -1)
    if bias is None:
        moment, product = moment[:, :-1, :-1], product[:, :-1]
    else:
        constants = bias.detach().double().reshape(groups, -1, 1)
        start = torch.cat([start, constants], dim=2)
    identity = torch.eye(moment.shape[1], dtype=moment.dtype, device=moment.device)
    damping = ridge * moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * identity
    try:
        solved = torch.linalg.solve(moment + damping, product + damping @ start.mT).mT
    except torch.linalg.LinAlgError as error:
        raise ArgumentError(
            f"ridge={ridge}: the data does not determine the weights of {consumer.name!r}. Give "
            "a larger one, or none."
        ) from error
    with torch.no_grad():
        rows.copy_(solved[:, :, : rows[0].numel()].reshape(rows.shape))
        if bias is not None:
            bias.copy_(solved[:, :, -1].reshape(-1))


def _second_moments(
    survivors: Survivors,
    model: nn.Module,
    pruned: nn.Module,
    consumer: Consumer,
    batches: Sequence[LoaderBatch],
) -> tuple[Tensor, Tensor] | None:
    """Return the sums of x x' and x y' over all samples and positions, where x ends with a 1.

    Their shapes are (groups, inputs + 1, inputs + 1) and (groups, inputs + 1, outputs). The result
    is None if a model does not make the call.
    """
    moment: Tensor | None = None
    product: Tensor | None = None
    for batch in batches:
        original, smaller = (_call_of(each, consumer, batch) for each in (model, pruned))
        if original is None or smaller is None:
            return None
        labelled = consumer.ran.out
        check_dimensions(f"what {consumer.name!r} gives", original[1], labelled)
        x = _columns(consumer, smaller[0])
        y = survivors.take(labelled, original[1]).double().movedim(consumer.form.channel, -1)
        y = y.reshape(x.shape[1], len(x), -1).transpose(0, 1)
        moment = x.mT @ x if moment is None else moment + x.mT @ x
        product = x.mT @ y if product is None else product + x.mT @ y
    check_finite((moment, product), f"what {consumer.name!r} reads or gives")
    return None if moment is None or product is None else (moment, product)


def _columns(consumer: Consumer, given: dict[str, Any]) -> Tensor:
    """Return the inputs of which each output position is a linear function.

    Parameters
    ----------
    consumer:
        The contraction.
    given:
        Its arguments on data, by name.

    Returns
    -------
    Tensor
        Shape (groups, samples x positions, inputs x kernel + 1); the last column is 1.
    """
    x: Tensor = given[consumer.form.data].double()
    if is_convolution(consumer.ran.func):
        rows = _patches(x, given[consumer.form.weight].shape[2:], given)
        rows = rows.unflatten(1, (given["groups"], -1)).transpose(0, 1).flatten(2)
    else:
        x = x.movedim(consumer.form.read, -1)
        rows = x.reshape(1, -1, x.shape[-1])
    return torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2)


def _patches(x: Tensor, kernel: Sequence[int], given: dict[str, Any]) -> Tensor:
    """Return what a convolution reads for each output position.

    Parameters
    ----------
    x:
        The input, shape (samples, channels, ...), or without samples.
    kernel:
        The size of the kernel.
    given:
        The arguments of the convolution, by name.

    Returns
    -------
    Tensor
        Shape (samples x positions, channels, kernel elements).
    """
    dims = len(kernel)
    stride, dilation = (_per_dim(given[name], dims) for name in ("stride", "dilation"))
    if x.dim() == dims + 1:
        x = x[None]
    reach = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    if given["padding"] == "same":
        pads = [(far // 2, far - far // 2) for far in reach]
    elif given["padding"] == "valid":
        pads = [(0, 0)] * dims
    else:
        pads = [(size, size) for size in _per_dim(given["padding"], dims)]
    x = F.pad(x, [side for pair in reversed(pads) for side in pair])
    for dim, far in enumerate(reach):
        x = x.unfold(2 + dim, far + 1, stride[dim])[..., :: dilation[dim]]
    # (samples, channels, positions ..., kernel ...)
    x = x.movedim(1, 1 + dims)
    return x.reshape(-1, x.shape[1 + dims], math.prod(kernel))


def _per_dim(value: Any, dims: int) -> list[int]:
    """Return one number for each dimension; a single number counts for all."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * dims if len(numbers) == 1 else numbers


class _SeenEnough(BaseException):
    """Signal that ends a forward pass once it has made the call in question.

    It is no ``Exception``, so the model does not handle it as an error.
    """


def _call_of(
    model: nn.Module, consumer: Consumer, batch: LoaderBatch
) -> tuple[dict[str, Any], Tensor] | None:
    """Return the arguments by name and the result of a consumer when the model runs on a batch.

    The result is None if the model does not make the call.
    """
    found: list[tuple[dict[str, Any], Tensor]] = []

    def record(_: Consumer, given: dict[str, Any], out: Tensor) -> None:
        """Record the call, and end the forward pass."""
        found.append((given, out))
        raise _SeenEnough

    try:
        with untouched(model), watching_consumers(model, [consumer], record):
            call_model(model, batch)
    except _SeenEnough:
        pass
    return found[0] if found else None
