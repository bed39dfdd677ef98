"""Consumers: the contractions that read channels which are removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxprune.calibration import LoaderBatch
from fxprune.common.contents import named_tensors
from fxprune.common.dispatch import tensors_in
from fxprune.common.hooks import in_mode
from fxprune.common.identity import IdentityMap
from fxprune.coupling import Coupling
from fxprune.criteria.contractions import (
    ContractionWatcher,
    RanContraction,
    WeightForm,
    WholeOpsMode,
    weight_form,
)
from fxprune.criteria.meter import watch_batch, watching
from fxprune.errors import ArgumentError
from fxprune.labels import Array
from fxprune.ops import Contraction, bind
from fxprune.rewrite import Survivors
from fxprune.trace.aliasing import UndoWrites

__all__ = [
    "Consumer",
    "Readers",
    "check_fits",
    "consumers_of",
    "lost_mask",
    "untouched",
    "watching_original",
    "watching_pruned",
]


@dataclass(frozen=True)
class Consumer:
    """A contraction of a weight with activations that lose channels.

    It is found in the graph, so that it does not matter what module makes the call.

    Attributes
    ----------
    name:
        The name of the module that holds the weight.
    weight:
        The name of the weight, a parameter that one node reads.
    constant:
        Name and sign of the tensor to which a constant of the outputs can be added: the bias, or
        minus the running mean of the batch normalisation that alone reads the result. None if
        there is neither.
    bias:
        The name of the argument that is the bias; empty if there is none.
    form:
        How the contraction reads its weight.
    ran:
        The contraction in the labelled run.
    lost:
        Whether each channel of the activations is removed, shape (channels,).
    """

    name: str
    weight: str
    constant: tuple[str, int] | None
    bias: str
    form: WeightForm
    ran: Contraction
    lost: Array


class Readers(dict[str, Consumer]):
    """The consumers by the name of their weight, and the others.

    Attributes
    ----------
    others:
        Names of nodes that contract removed channels in another way: with a weight that forward
        computes, or one that several nodes read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.others: list[str] = []


def consumers_of(coupling: Coupling, survivors: Survivors) -> Readers:
    """Return the contractions that read a tensor which loses channels, in their order.

    Parameters
    ----------
    coupling:
        The analysis.
    survivors:
        The units that survive.
    """
    names = IdentityMap((tensor, name) for name, tensor in coupling.parameters.items())
    nodes: dict[str, tuple[str, fx.Node]] = {}
    for trace in coupling.traces:
        if not trace.training:
            nodes |= {trace.prefix + node.name: (trace.path, node) for node in trace.graph.nodes}
    readers: dict[str, set[str]] = {}  # a part may run repeatedly, and then its nodes do
    for ran in coupling.contractions:
        for tensor in ran.read:
            if tensor in names:
                readers.setdefault(names[tensor], set()).add(ran.node)
    found = Readers()
    for ran in coupling.contractions:
        form = weight_form(coupling, ran)
        if form is None:
            continue
        given = bind(ran.func, ran.args, ran.kwargs)
        lost = _lost_channels(survivors, given, form)
        if lost is None:
            continue
        name = names.get(given[form.weight])
        if name in found:  # a part that runs repeatedly
            continue
        if name is None or len(readers[name]) > 1:
            found.others.append(ran.node)
            continue
        bias = _bias_of(given, names)
        path, node = nodes[ran.node]
        constant = (names[given[bias]], 1) if bias else None
        follower = _follower_of(path, node, coupling)
        if constant is None and follower is not None:
            constant = f"{follower}.running_mean", -1
        owner = name.rpartition(".")[0]
        found[name] = Consumer(owner, name, constant, bias, form, ran, lost)
    return found


def _lost_channels(
    survivors: Survivors, given: Mapping[str, Any], form: WeightForm
) -> Array | None:
    """Return which channels that a contraction sums up are removed; None if there are none."""
    x = given[form.data]
    rows = survivors.rows(x, x.dim() + form.read)
    # depthwise layers sum up no channels: what they lose, their result loses, too
    if rows is None or given.get("groups", 1) == rows.shape[1] > 1:
        return None
    lost: Array = ~rows.all(axis=0)
    return lost


def _bias_of(given: Mapping[str, Any], names: IdentityMap[Tensor, str]) -> str:
    """Return the name of the argument that is a parameter with one number per output."""
    for argument in ("bias", "self", "input"):
        value = given.get(argument)
        if isinstance(value, Tensor) and value.dim() == 1 and value in names:
            return argument
    return ""


def _follower_of(path: str, node: fx.Node, coupling: Coupling) -> str | None:
    """Return the name of the batch normalisation that alone reads a node's result.

    The result is None if there is none, or if it keeps no statistics or is called several times.
    """
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module":
        return None
    target = str(users[0].target)
    name = f"{path}.{target}" if path else target
    module = coupling.meta_copy.model.get_submodule(name)
    if not isinstance(module, _BatchNorm) or f"{name}.running_mean" not in coupling.parameters:
        return None
    called = [str(other.target) for other in node.graph.nodes if other.op == "call_module"]
    return name if called.count(target) == 1 else None


def check_fits(
    coupling: Coupling, survivors: Survivors, pruned: nn.Module, weights: Iterable[str]
) -> None:
    """Refuse a pruned model that is not the one of the plan.

    Raises
    ------
    ArgumentError
        If a weight is missing or has another shape.
    """
    present = dict(pruned.named_parameters())
    for weight in weights:
        analysed = coupling.parameters[weight]
        if weight not in present or list(present[weight].shape) != list(survivors.shape(analysed)):
            raise ArgumentError(
                f"pruned.model has no {weight!r} as its plan left it: give what prune gave, with "
                "its own model."
            )


Visit = Callable[[Consumer, dict[str, Any], Tensor], None]
"""Called with a consumer, its arguments by name, and its result."""


@contextmanager
def watching_original(
    coupling: Coupling, model: nn.Module, consumers: Iterable[Consumer], visit: Visit
) -> Iterator[Callable[[LoaderBatch], None]]:
    """Give a function that runs the original on a batch, and calls ``visit`` for each consumer.

    The graphs of the analysis run, not the model's own code: that can make other calls than the
    pruned model, as attention does on its fast path.

    Parameters
    ----------
    coupling:
        The analysis.
    model:
        The original. It is left as it is.
    consumers:
        The consumers.
    visit:
        What to do with a call.
    """
    watcher = _OriginalWatcher(coupling, consumers, visit)
    with watching(coupling, model) as filled:

        def run(batch: LoaderBatch) -> None:
            """Run the graphs on a batch, and undo what they write."""
            with untouched(filled):
                watch_batch(watcher, coupling, filled, batch)

        yield run


class _OriginalWatcher(ContractionWatcher):
    """Runs of the original's graphs that visit the consumers."""

    def __init__(self, coupling: Coupling, consumers: Iterable[Consumer], visit: Visit) -> None:
        super().__init__(coupling)
        self.visit = visit
        self.by_contraction = IdentityMap((one.ran, one) for one in consumers)

    def after(self, node: fx.Node, ran: Sequence[RanContraction], size: int) -> None:
        """Visit the consumers that a node has run."""
        for each in ran:
            consumer = self.by_contraction.get(each.labelled)
            if consumer is not None:
                self.visit(consumer, each.given, each.out)


@contextmanager
def watching_pruned(
    pruned: nn.Module, consumers: Iterable[Consumer], visit: Visit
) -> Iterator[None]:
    """Call ``visit`` whenever the pruned model runs one of the consumers inside the context.

    Gradients are off. Consumers are known by their weights.

    Parameters
    ----------
    pruned:
        The pruned model.
    consumers:
        The consumers.
    visit:
        What to do with a call.
    """
    parameters = dict(pruned.named_parameters())
    by_weight = IdentityMap((parameters[one.weight], one) for one in consumers)
    mode = _ConsumerMode(by_weight, visit)
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), mode:
        yield


class _ConsumerMode(WholeOpsMode):
    """A mode that recognises consumers by their weights."""

    def __init__(self, by_weight: IdentityMap[Tensor, Consumer], visit: Visit) -> None:
        super().__init__()
        self.by_weight, self.visit = by_weight, visit

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, and visit it if it reads the weight of a consumer."""
        out = super().run(func, args, kwargs)
        for tensor in tensors_in(args, kwargs):
            consumer = self.by_weight.get(tensor)
            if consumer is not None and consumer.ran.func is func:
                self.visit(consumer, bind(func, args, kwargs), out)
        return out


def lost_mask(consumer: Consumer, x: Tensor) -> Tensor:
    """Return 1 for removed channels and 0 for others, broadcastable to the activations."""
    form = [1] * x.dim()
    form[consumer.form.read] = -1
    return torch.from_numpy(consumer.lost.astype(np.float64)).to(x.device, x.dtype).reshape(form)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode inside the context, and restore it afterwards.

    Every module then has its former mode, and every tensor its former values.
    """
    with UndoWrites(named_tensors(model)).undoing(), in_mode(model, False):
        yield
