"""Criteria that read data: a loader of batches, a loss, and the gradients or activations they give.

The model is not touched: it runs in evaluation mode through :func:`torch.func.functional_call` on copies of its parameters, its own
gradients and statistics stay as they are. In a process group (``torchrun``) every process reads its own batches and the sums are
reduced over all of them, so the scores are those of one process that reads everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from fxprune.coupling import Coupling
from fxprune.criteria.views import Views
from fxprune.errors import ArgumentError
from fxprune.trace import execute

__all__ = ["Activation", "Fisher", "Taylor"]

Floats = npt.NDArray[np.float64]
Loader = Iterable[Any]
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Taylor:
    r""":math:`\left| \sum w \cdot \partial L / \partial w \right|` over a unit's elements: the first-order change of the loss.

    Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, eq. 8, taken over the coupled elements.

    Parameters
    ----------
    loader:
        Batches ``(inputs, *targets)``; ``inputs`` a tensor, a tuple or a dict of the model's arguments.
    loss:
        ``loss(output, *targets)``, a mean over the batch.
    """

    loader: Loader
    loss: Loss

    def scores(self, coupling: Coupling, model: nn.Module) -> Floats:
        """Shape (labels,)."""
        weights, count = dict(model.named_parameters()), 0
        total: dict[str, Tensor] = {}
        for gradients, size in _gradients(model, self.loader, self.loss):
            for name, gradient in gradients.items():
                total[name] = total[name] + gradient * size if name in total else gradient * size
            count += size
        count = int(_reduced(np.array([count], dtype=np.float64))[0])
        products = {name: weights[name].detach().to(gradient.dtype) * gradient for name, gradient in total.items()}
        return np.abs(_reduced(Views(coupling, products).totals(_same))) / max(count, 1)


@dataclass(frozen=True)
class Fisher:
    r""":math:`\frac{1}{B} \sum_b \left( \sum w \cdot \partial L_b / \partial w \right)^2`: the diagonal Fisher information of a
    unit's mask.

    Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018; Liu et al., "Group Fisher Pruning for
    Practical Network Compression", ICML 2021, with minibatches b in the place of samples.

    Parameters
    ----------
    loader, loss:
        As for :class:`Taylor`. The smaller the batches, the nearer to the per-sample information.
    """

    loader: Loader
    loss: Loss

    def scores(self, coupling: Coupling, model: nn.Module) -> Floats:
        """Shape (labels,)."""
        weights, total, count = dict(model.named_parameters()), np.zeros(coupling.context.units.count), 0
        for gradients, _ in _gradients(model, self.loader, self.loss):
            products = {name: weights[name].detach() * gradient for name, gradient in gradients.items()}
            total += Views(coupling, products).totals(_same) ** 2
            count += 1
        count = int(_reduced(np.array([count], dtype=np.float64))[0])
        return _reduced(total) / max(count, 1)


@dataclass(frozen=True)
class Activation:
    r"""Mean :math:`|a|` of a unit's activations where a next layer reads them, over the data and the positions.

    Polyak and Wolf, "Channel-level acceleration of deep face representations", IEEE Access 2015 (inbound pruning).

    Parameters
    ----------
    loader:
        Batches ``(inputs, ...)``, as for :class:`Taylor`; targets are not read.
    """

    loader: Loader

    def scores(self, coupling: Coupling, model: nn.Module) -> Floats:
        """Shape (labels,); a unit that several layers read has the mean over them."""
        units = coupling.context.units.count
        total, times = np.zeros(units), np.zeros(units)
        trace = coupling.traces[0]
        read = {
            operand
            for node in trace.graph.nodes
            if any(ran.node == node.name for ran in coupling.contractions)
            for operand in node.all_input_nodes
        }

        with _evaluated(model), torch.no_grad(), trace.twin.holding(trace.twin.real) as twin:
            twin.eval()
            for batch in self.loader:
                args, kwargs, _ = _call(batch)
                inputs, values = iter([*args, *kwargs.values()]), {}
                for node in trace.graph.nodes:
                    if node.op == "output":
                        break
                    if node.op == "placeholder":
                        values[node] = next(inputs)
                    elif node.op == "get_attr" and node.target in trace.constants:
                        values[node] = trace.constants[node.target]
                    else:
                        values[node] = execute(twin, node, *fx.node.map_arg((node.args, node.kwargs), values.__getitem__))
                    if node in read and isinstance(values[node], Tensor) and node.op != "get_attr":
                        for labels in coupling.labels(node.meta["val"]):
                            kept = [d for d, extent in enumerate(labels.shape) if extent > 1]
                            size = values[node].abs().double()
                            means = size.mean([d for d in range(size.dim()) if d not in kept], keepdim=True)
                            total += np.bincount(labels.ravel(), means.expand(labels.shape).cpu().numpy().ravel(), units)
                            times += np.bincount(labels.ravel(), minlength=units)
        total, times = _reduced(total), _reduced(times)
        total[0] = 0
        return total / np.maximum(times, 1)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _gradients(model: nn.Module, loader: Loader, loss: Loss) -> Iterator[tuple[dict[str, Tensor], int]]:
    """(gradients of the parameters by name, number of samples), batch by batch."""
    held = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.is_floating_point()}
    with _evaluated(model):
        for batch in loader:
            args, kwargs, targets = _call(batch)
            with torch.enable_grad():
                output = torch.func.functional_call(model, held, args, kwargs)
                value = loss(output, *targets)
                found = torch.autograd.grad(value, list(held.values()), allow_unused=True)
            leaf = next(iter([*args, *kwargs.values()]))
            yield {name: g for name, g in zip(held, found, strict=True) if g is not None}, len(leaf)


def _call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]]:
    """A loader's batch as the model's arguments, and the loss's."""
    if not isinstance(batch, (tuple, list)) or not batch:
        raise ArgumentError(
            f"the loader gave a {type(batch).__name__}: batches must be tuples (inputs, *targets), as a DataLoader gives them."
        )
    inputs, *targets = batch
    if isinstance(inputs, Mapping):
        return (), dict(inputs), tuple(targets)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}, tuple(targets)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module is in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _reduced(values: Floats) -> Floats:
    """The sum over all processes of the process group, if there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    tensor = torch.from_numpy(values.copy()).to(device)
    torch.distributed.all_reduce(tensor)
    return tensor.cpu().numpy()
