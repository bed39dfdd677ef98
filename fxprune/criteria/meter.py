"""Measurement of a traced model's activations while it runs on data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from fxprune.calibration import LoaderBatch, call_model, check_dimensions
from fxprune.common.arrays import Floats
from fxprune.common.contents import tensors_of
from fxprune.common.dispatch import holds_tensors
from fxprune.common.hooks import in_mode
from fxprune.coupling import Coupling
from fxprune.coupling.parts import intercepted
from fxprune.criteria.views import at_least_float32
from fxprune.errors import ArgumentError, FxpruneError
from fxprune.labels import Array
from fxprune.trace import Trace, execute
from fxprune.trace.aliasing import UndoWrites

__all__ = [
    "Meter",
    "RunningSum",
    "Watcher",
    "labels_on",
    "unchanged",
    "unit_means",
    "watch_batch",
    "watching",
]


@contextmanager
def watching(coupling: Coupling, model: nn.Module) -> Iterator[nn.Module]:
    """Give a copy of a model that can be run in evaluation mode, without leaving a trace.

    The copy shares the model's parameters; what it writes into them is undone. It has its own
    buffers and attributes, which forward may change.

    Parameters
    ----------
    coupling:
        The analysis of the model.
    model:
        The model.
    """
    undone = UndoWrites(dict(model.named_parameters()))
    filled = coupling.meta_copy.instance()
    with undone.undoing(), torch.no_grad(), in_mode(filled, False):
        yield filled


def watch_batch(
    watcher: Watcher, coupling: Coupling, model: nn.Module, batch: LoaderBatch
) -> None:
    """Run a model on a batch under a watcher, in parts if it was traced in parts.

    Parameters
    ----------
    watcher:
        Looks at what nodes read.
    coupling:
        The analysis.
    model:
        The model to run, as :func:`watching` gives it.
    batch:
        The batch to run it on.
    """
    if coupling.parts:
        _watch_parts(watcher, coupling, model, batch)
    else:
        watcher.watch("", model, _placeholder_values(coupling.traces[0], batch), batch.size)
    watcher.samples += batch.size


def _watch_parts(
    watcher: Watcher, coupling: Coupling, model: nn.Module, batch: LoaderBatch
) -> None:
    """Run a model that was not traced whole, and watch each of its parts."""

    def watch(path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        """Run the graph of a part under the watcher, then make the intercepted call itself."""
        nodes = watcher.traces[path].graph.nodes
        names = [str(node.target) for node in nodes if node.op == "placeholder"]
        inputs = tree_map_only(Tensor, Tensor.clone, [*args, *kwargs.values()])
        arguments = dict(zip(names, inputs, strict=True))
        watcher.watch(path, model.get_submodule(path), arguments, batch.size)
        return call()

    with intercepted(model, coupling.parts, watch):
        call_model(model, batch)


class RunningSum:
    """Weighted sums of gradients.

    Attributes
    ----------
    tensors:
        The sum of each parameter's gradients, by the parameter's name.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def add(self, gradients: Mapping[str, Tensor], weight: float) -> None:
        """Add ``weight`` times each gradient."""
        for name, gradient in gradients.items():
            if name in self.tensors:
                self.tensors[name].add_(gradient, alpha=weight)
            else:
                self.tensors[name] = gradient * weight


def unchanged(tensor: Tensor) -> Tensor:
    """Return the tensor itself."""
    return tensor


class Watcher:
    """Runs of traced graphs, node by node, that look at what the nodes read.

    Parameters
    ----------
    coupling:
        The analysis. Its traces in evaluation mode are the graphs that run.

    Attributes
    ----------
    traces:
        The graphs, by the path of their part.
    reads:
        For each path, the operands that each node reads, with their labels.
    samples:
        Number of samples seen.
    """

    def __init__(self, coupling: Coupling) -> None:
        self.traces = {trace.path: trace for trace in coupling.traces if not trace.training}
        self.reads = {path: _reads(coupling, trace) for path, trace in self.traces.items()}
        self.samples = 0
        self._last: dict[fx.Node, list[fx.Node]] = {}
        for trace in self.traces.values():
            for node in trace.graph.nodes:
                if node.users:
                    self._last.setdefault(max(node.users), []).append(node)

    def watch(self, path: str, root: nn.Module, arguments: Mapping[str, Any], size: int) -> None:
        """Run a graph on a batch and look at what its nodes read.

        Parameters
        ----------
        path:
            The path of the part whose graph runs.
        root:
            The module that holds the graph's parameters and submodules.
        arguments:
            The inputs, by the names of the graph's placeholders.
        size:
            Number of samples in the batch.
        """
        trace = self.traces[path]
        values: dict[fx.Node, Any] = {}
        for node in trace.graph.nodes:
            if node.op == "output":
                break
            # Look at operands now: they may have changed in place since they were made.
            read = self.reads[path].get(node, ())
            self.before(node, [(values[operand], labels) for operand, labels in read], size)
            with self.around(trace, node, size):
                values[node] = _node_value(trace, root, node, arguments, values)
            for done in self._last.get(node, ()):
                del values[done]

    def before(self, node: fx.Node, read: Sequence[tuple[Tensor, Array]], size: int) -> None:
        """Look at what a node is about to read.

        Parameters
        ----------
        node:
            The node.
        read:
            The operands that hold units which the node reads, with the units' labels.
        size:
            Number of samples in the batch.
        """

    def around(self, trace: Trace, node: fx.Node, size: int) -> AbstractContextManager[Any]:
        """Return a context in which a node runs."""
        return nullcontext()


class Meter(Watcher):
    """Sums, by unit, of the activations that the layers of traced graphs read.

    Attributes
    ----------
    total:
        For each label, the sum over samples and readers of the mean activation; shape (labels,).
    times:
        For each label, the number of samples times the number of readers; shape (labels,).
    """

    def __init__(self, coupling: Coupling) -> None:
        super().__init__(coupling)
        self.total = np.zeros(coupling.context.units.count)
        self.times = np.zeros(coupling.context.units.count)

    def before(self, node: fx.Node, read: Sequence[tuple[Tensor, Array]], size: int) -> None:
        """Add the mean absolute value of each unit that a node reads."""
        for value, labels in read:
            units, means = unit_means(at_least_float32(value).abs(), labels)
            self.total[units] += size * means
            self.times[units] += size


def unit_means(values: Tensor, labels: Array) -> tuple[Array, Floats]:
    """Return the live units that lie on a tensor, and the mean of its values at each of them.

    Parameters
    ----------
    values:
        The tensor.
    labels:
        The labels of its elements; broadcastable to its shape.

    Returns
    -------
    units, means:
        The labels of the units, ascending, and their means; shape (units,) each.

    Raises
    ------
    ArgumentError
        If the labels do not fit, because an axis holds units and samples together.
    """
    sizes = zip(reversed(labels.shape), reversed(values.shape), strict=False)
    if any(there not in (1, size) for there, size in sizes):
        raise ArgumentError(
            f"an axis of a tensor of shape {tuple(values.shape)} holds channels and samples "
            "together: give batches of the example's size."
        )
    shared = [d for d, extent in enumerate(labels.shape) if extent == 1]
    if shared:
        values = values.mean(shared, keepdim=True)
    units, place = np.unique(labels.ravel(), return_inverse=True)
    summed = np.bincount(place, values.expand(labels.shape).cpu().numpy().ravel())
    live = units > 0
    return units[live], (summed / np.bincount(place))[live]


def _reads(coupling: Coupling, trace: Trace) -> dict[fx.Node, list[tuple[fx.Node, Array]]]:
    """Return, for each node that reads units, the operands it reads, with their labels.

    A node reads a field of an operand if it is a contraction, or if its results have none of the
    field's units and it tells no positions apart: then it sums them up. Operands that are computed
    from weights alone are no activations, so they do not count.
    """
    contracting = {ran.node for ran in coupling.contractions}
    of_weights: set[fx.Node] = set()  # weights, and what is computed from weights alone
    reads: dict[fx.Node, list[tuple[fx.Node, Array]]] = {}
    for node in trace.graph.nodes:
        inputs = node.all_input_nodes
        operands = [source for source in inputs if isinstance(source.meta["val"], Tensor)]
        if node.op == "get_attr" or (operands and of_weights.issuperset(operands)):
            of_weights.add(node)
        results = tensors_of(node.meta.get("val"))
        if not results:
            continue
        name = trace.prefix + node.name
        contracts, positional = name in contracting, name in coupling.context.found.positional
        kept = labels_on(coupling, results)
        for operand in [source for source in operands if source not in of_weights]:
            for labels in coupling.labels(operand.meta["val"]):
                summed_up = not positional and not np.isin(labels[labels > 0], kept).any()
                if contracts or summed_up:
                    reads.setdefault(node, []).append((operand, labels))
    return reads


def labels_on(coupling: Coupling, tensors: Iterable[Tensor]) -> Array:
    """Return all labels that lie on these tensors, as one row; 0, which is no unit, is one."""
    found = [np.zeros(1, np.int64)]
    for tensor in tensors:
        found += [labels.ravel() for labels in coupling.labels(tensor)]
    return np.concatenate(found)


def _node_value(
    trace: Trace,
    root: nn.Module,
    node: fx.Node,
    arguments: Mapping[str, Any],
    values: Mapping[fx.Node, Any],
) -> Any:
    """Return the value of one node, given the values of the nodes before it.

    Raises
    ------
    ArgumentError
        If the operation fails, because the batch does not fit the example.
    """
    if node.op == "placeholder":
        return arguments[str(node.target)]
    if node.op == "get_attr" and node.target in trace.constants:
        return trace.constants[str(node.target)]
    try:
        return execute(root, node, *fx.node.map_arg((node.args, node.kwargs), values.__getitem__))
    except (FxpruneError, Warning):
        raise
    except Exception as error:
        raise ArgumentError(
            "a batch of the loader does not fit the example that the model was analysed with: "
            f"{error}. Give batches of the example's sizes; only the number of samples may be "
            "another."
        ) from error


def _placeholder_values(trace: Trace, batch: LoaderBatch) -> dict[str, Any]:
    """Return a batch's inputs by the names of the graph's placeholders.

    The loader may pass inputs by position or by name. Constants of the example (numbers, flags,
    None) that the loader leaves out keep the example's value.

    Parameters
    ----------
    trace:
        The traced graph, with the example that it was traced with.
    batch:
        The batch of the loader.

    Returns
    -------
    dict
        One value for each placeholder.

    Raises
    ------
    ArgumentError
        If the inputs do not fit ``forward``, are not those of the example, or have another number
        of dimensions.
    """
    placeholders = [node for node in trace.graph.nodes if node.op == "placeholder"]
    names = [str(node.target) for node in placeholders]
    values = _by_parameter(_bound(trace, batch, names))
    if set(values) != set(names):
        raise ArgumentError(
            f"the loader gave the inputs {', '.join(sorted(values))}, the model was analysed with "
            f"{', '.join(sorted(names))}: give the same ones."
        )
    for node, name in zip(placeholders, names, strict=True):
        if isinstance(values[name], Tensor):
            check_dimensions(f"the input {node.target!r}", values[name], node.meta["val"])
    return values


def _bound(trace: Trace, batch: LoaderBatch, names: Sequence[str]) -> inspect.BoundArguments:
    """Return a batch's inputs and the example's constants, bound to the model's forward.

    Raises
    ------
    ArgumentError
        If they do not fit its parameters.
    """
    # As the tracer does, take the signature of the function itself, not of one that it wraps.
    model = trace.meta_copy.model
    signature = inspect.signature(type(model).forward, follow_wrapped=False)
    given = {*list(signature.parameters)[1 : 1 + len(batch.args)], *batch.kwargs}
    constants = {}
    for name, value in zip(names, trace.placeholders, strict=False):
        if name not in given and not holds_tensors(value):
            constants[name] = value
    try:
        return signature.bind(model, *batch.args, **batch.kwargs, **constants)
    except TypeError as error:
        raise ArgumentError(
            f"the loader's inputs do not fit the model's forward: {error}."
        ) from error


def _by_parameter(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Return bound arguments by name, but not ``self``; ``*args`` are named by position."""
    values: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            values.update({f"args_{i}": item for i, item in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            values.update(value)
        else:
            values[name] = value
    return values
