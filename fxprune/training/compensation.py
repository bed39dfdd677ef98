"""Compensation: the effect of removed channels, put into the weights that stay.

When a channel is masked, the next layers lose what it added to them. One part of this is constant,
and a bias can replace it. Another part follows from the remaining channels, and their weights can
replace it. Both parts are measured on calibration data, layer by layer, before any fine-tuning.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.calibration import (
    LoaderBatch,
    batches_of,
    call_model,
    check_dimensions,
    check_finite,
    check_read,
)
from fxprune.common.contents import named_tensors
from fxprune.common.hooks import in_mode
from fxprune.common.public import public
from fxprune.coupling import Coupling
from fxprune.errors import ArgumentError
from fxprune.inputs import Call
from fxprune.rewrite import Survivors
from fxprune.trace.aliasing import UndoWrites
from fxprune.training.consumers import channel_dim, check_fits, consumers_of, follower_of

__all__ = ["Compensation", "fold_constants", "reconstruct"]


@public
@dataclass(frozen=True)
class Compensation:
    """The modules that compensate for removed channels, and those that cannot.

    Attributes
    ----------
    changed:
        Names of the modules whose weights, bias or following normalisation were changed.
    left:
        Names of the modules that read removed channels but were left as they were.
    """

    changed: tuple[str, ...]
    left: tuple[str, ...]


def fold_constants(
    coupling: Coupling,
    survivors: Survivors,
    model: nn.Module,
    pruned: nn.Module,
    loader: Iterable[Any],
) -> Compensation:
    r"""Add to each consumer's bias the mean contribution of its removed inputs.

    .. math:: b' = b + \sum_u W_{:,u} \, \mathrm{E}[x_u]

    The mean goes over samples and positions. The border of a convolution, where the padding's
    zeros replace some inputs, is treated like its inside. A consumer without a bias changes the
    running mean of the batch normalisation that is the only reader of its output (:math:`\mu' =
    \mu - \Delta`). A consumer with neither is left as it is.

    Parameters
    ----------
    coupling:
        The analysis of ``model``.
    survivors:
        The units that survive in ``pruned``.
    model:
        The original, on which the means are measured. It is left as it is.
    pruned:
        The emitted model, changed in place.
    loader:
        Batches ``(inputs, ...)``; targets are not read.

    Returns
    -------
    Compensation
        The modules that were changed, and those that could not be.

    Raises
    ------
    ArgumentError
        If ``pruned`` is not the model of this plan, or the loader gives no batch or values that
        are not finite.
    """
    consumers = consumers_of(coupling, survivors)
    check_fits(coupling, survivors, pruned, consumers)
    means = _mean_inputs(model, consumers, loader, coupling.example)
    changed, left = [], []
    for name, node in consumers.items():
        target = _constant_target(name, node, coupling)
        if name not in means or target is None:
            left.append(name)
            continue
        shift = _removed_constant(survivors, model.get_submodule(name), node, means[name])
        owner, attribute, sign = target
        values: Tensor = getattr(pruned.get_submodule(owner), attribute)
        with torch.no_grad():
            kept = survivors.take(coupling.parameters[f"{owner}.{attribute}"], shift)
            values += sign * kept.to(values.dtype)
        changed.append(name)
    return Compensation(tuple(changed), tuple(left))


def _constant_target(name: str, node: fx.Node, coupling: Coupling) -> tuple[str, str, int] | None:
    """Return where a constant goes that a consumer lost: module, attribute and sign.

    The result is None if the consumer has no bias and no batch normalisation reads its output.
    """
    if f"{name}.bias" in coupling.parameters:
        return name, "bias", 1
    follower = follower_of(name, node, coupling)
    return None if follower is None else (follower, "running_mean", -1)


def _removed_constant(
    survivors: Survivors, module: nn.Module, node: fx.Node, mean: Tensor
) -> Tensor:
    """Return what a module's removed inputs add to each of its outputs on average.

    Parameters
    ----------
    survivors:
        The units that survive.
    module:
        The linear layer or convolution of the original.
    node:
        Its call in the trace.
    mean:
        The mean of its input, shape (input channels,).

    Returns
    -------
    Tensor
        The constant of each output channel of the original, shape (output channels,).
    """
    x = node.args[0].meta["val"]
    rows = survivors.rows(x, channel_dim(module, x))
    assert rows is not None
    weight = module.get_parameter("weight").detach().double()
    flat = weight.flatten(2).sum(-1) if weight.dim() > 2 else weight
    constant = mean * torch.from_numpy(~rows.all(axis=0)).to(mean.device)
    groups = getattr(module, "groups", 1)
    weights, inputs = flat.reshape(groups, -1, flat.shape[1]), constant.reshape(groups, -1)
    return torch.einsum("goi,gi->go", weights, inputs).reshape(-1)


def reconstruct(
    coupling: Coupling,
    survivors: Survivors,
    model: nn.Module,
    pruned: nn.Module,
    loader: Iterable[Any],
    *,
    ridge: float = 1e-4,
) -> Compensation:
    r"""Refit each consumer on its remaining inputs by least squares.

    .. math:: \min_W \sum \lVert y - W x' \rVert^2 + \lambda \lVert W - W_0 \rVert^2

    ``y`` is the original's output, and ``x'`` is the pruned model's input at the same layer.
    Layers are refitted in the order in which they run, so each gets the inputs that the refitted
    layers before it give. :math:`W_0` are the current weights, bias included. :math:`\lambda` is
    ``ridge`` times the mean square of an input, so weights stay as they are in directions that the
    data does not cover. Convolutions with one or three dimensions or with groups are left as they
    are.

    Parameters
    ----------
    coupling, survivors, model, pruned, loader:
        As for :func:`fold_constants`. All batches are held in memory. After an error, the
        parameters of ``pruned`` are what they were.
    ridge:
        Weight of the penalty, as a share of the inputs' mean square; at least 0.

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
    changed, left = [], []
    consumers = consumers_of(coupling, survivors)
    check_fits(coupling, survivors, pruned, consumers)
    for name, node in consumers.items():
        layer = pruned.get_submodule(name)
        sums = None
        if _can_be_refitted(layer):
            sums = _second_moments(survivors, model, pruned, name, node, batches)
        if sums is None:
            left.append(name)
            continue
        _solve(name, layer, *sums, ridge)
        changed.append(name)
    return Compensation(tuple(changed), tuple(left))


def _can_be_refitted(layer: nn.Module) -> bool:
    """Tell whether a layer is linear or a two-dimensional convolution without groups."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def _solve(name: str, layer: nn.Module, moment: Tensor, product: Tensor, ridge: float) -> None:
    """Set a layer's weight and bias to the solution of the penalised least squares.

    Parameters
    ----------
    name:
        The layer's name, for the message.
    layer:
        The layer to refit, with the weights that the penalty pulls to.
    moment, product:
        The sums that :func:`_second_moments` returns.
    ridge:
        Weight of the penalty, as a share of the inputs' mean square.

    Raises
    ------
    ArgumentError
        If the equations are singular.
    """
    weight: Tensor = layer.weight
    bias: Tensor | None = layer.bias
    start = weight.detach().double().flatten(1)
    if bias is None:
        moment, product = moment[:-1, :-1], product[:-1]
    else:
        start = torch.cat([start, bias.detach().double()[:, None]], dim=1)
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    damping = ridge * moment.diagonal().mean() * identity
    try:
        solved = torch.linalg.solve(moment + damping, product + damping @ start.T).T
    except torch.linalg.LinAlgError as error:
        raise ArgumentError(
            f"ridge={ridge}: the data does not determine the weights of {name!r}. Give ridge=1e-4."
        ) from error
    with torch.no_grad():
        weight.copy_(solved[:, : weight[0].numel()].reshape(weight.shape))
        if bias is not None:
            bias.copy_(solved[:, -1])


def _second_moments(
    survivors: Survivors,
    model: nn.Module,
    pruned: nn.Module,
    name: str,
    node: fx.Node,
    batches: Sequence[LoaderBatch],
) -> tuple[Tensor, Tensor] | None:
    """Return the sums of x x' and x y' over all samples and positions, where x ends with a 1.

    The result is None if the model does not call the module.
    """
    moment: Tensor | None = None
    product: Tensor | None = None
    module, layer = model.get_submodule(name), pruned.get_submodule(name)
    for batch in batches:
        original, smaller = _call_of(model, module, batch), _call_of(pruned, layer, batch)
        if original is None or smaller is None:
            return None
        check_dimensions(f"what {name!r} gives", original[1], node.meta["val"])
        x = _columns(layer, smaller[0])
        y = survivors.take(node.meta["val"], original[1]).double()
        y = y.movedim(channel_dim(layer, y), -1)
        y = y.reshape(-1, y.shape[-1])
        moment = x.T @ x if moment is None else moment + x.T @ x
        product = x.T @ y if product is None else product + x.T @ y
    check_finite((moment, product), f"what {name!r} reads or gives")
    return None if moment is None or product is None else (moment, product)


def _columns(module: nn.Module, x: Tensor) -> Tensor:
    """Return the inputs of which each output position is a linear function.

    The shape is (samples x positions, inputs x kernel + 1), and the last column is 1.
    """
    x = x.double()
    if isinstance(module, nn.Conv2d):
        padding = module.padding if not isinstance(module.padding, str) else None
        if padding is None or module.padding_mode != "zeros":
            x = F.pad(
                x,
                module._reversed_padding_repeated_twice,
                mode=module.padding_mode.replace("zeros", "constant"),
            )
            padding = (0, 0)
        unfolded = F.unfold(x, module.kernel_size, module.dilation, padding, module.stride)
        rows = unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1])
    else:
        rows = x.reshape(-1, x.shape[-1])
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


class _InputSums:
    """Sums of what modules read, by the module's name, per channel over samples and positions."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Add the inputs of one call of a module."""
        x = inputs[0]
        dim = channel_dim(module, x)
        total = x.detach().double().sum([d for d in range(x.dim()) if d != dim])
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts.get(name, 0) + x.numel() // x.shape[dim]

    def means(self) -> dict[str, Tensor]:
        """Return the mean input per channel of each module."""
        check_finite(self.sums.values(), "the mean of what a layer reads")
        return {name: total / self.counts[name] for name, total in self.sums.items()}


def _mean_inputs(
    model: nn.Module, consumers: Mapping[str, fx.Node], loader: Iterable[Any], example: Call
) -> dict[str, Tensor]:
    """Return the mean input per channel of each module, over samples and positions."""
    sums, read = _InputSums(), 0
    with _untouched(model), torch.no_grad(), ExitStack() as stack:
        for name in consumers:
            hook = functools.partial(sums.add, name)
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook).remove)
        for batch in batches_of(loader, model, example):
            read += 1
            call_model(model, batch)
    if consumers:
        check_read(read)
    return sums.means()


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode inside the context, and restore it afterwards.

    Every module then has its former mode, and every tensor its former values.
    """
    with UndoWrites(named_tensors(model)).undoing(), in_mode(model, False):
        yield


class _SeenEnough(BaseException):
    """Signal that ends a forward pass once it has called the module in question.

    It is no ``Exception``, so the model does not handle it as an error.
    """


def _call_of(
    model: nn.Module, module: nn.Module, batch: LoaderBatch
) -> tuple[Tensor, Tensor] | None:
    """Return the first input and the output of one module when the model runs on a batch.

    The result is None if the model does not call the module.
    """
    found: list[tuple[Tensor, Tensor]] = []

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Record the call, and end the forward pass."""
        found.append((inputs[0], output))
        raise _SeenEnough

    handle = module.register_forward_hook(record)
    try:
        with _untouched(model), torch.no_grad():
            call_model(model, batch)
    except _SeenEnough:
        pass
    finally:
        handle.remove()
    return found[0] if found else None
