"""Measurement of a traced model's activations while it runs on data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from fxprune.calibration import LoaderBatch, call_model, check_dimensions
from fxprune.common.contents import tensors_of
from fxprune.common.dispatch import holds_tensors
from fxprune.coupling import Coupling
from fxprune.coupling.parts import intercepted
from fxprune.criteria.views import at_least_float32
from fxprune.errors import ArgumentError, FxpruneError
from fxprune.labels import Array
from fxprune.trace import Trace, execute

__all__ = ["Meter", "RunningSum", "placeholder_values", "unchanged", "watch_parts"]


def watch_parts(meter: Meter, coupling: Coupling, model: nn.Module, batch: LoaderBatch) -> None:
    """Run a model that was not traced whole, and measure the activations of each part.

    Parameters
    ----------
    meter:
        Adds up what the parts read.
    coupling:
        The analysis; ``coupling.parts`` names the parts.
    model:
        The model to run, a copy that nobody else calls.
    batch:
        The batch to run it on.
    """

    def watch(path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        """Run the graph of a part under the meter, then make the intercepted call itself."""
        nodes = meter.traces[path].graph.nodes
        names = [str(node.target) for node in nodes if node.op == "placeholder"]
        inputs = tree_map_only(Tensor, Tensor.clone, [*args, *kwargs.values()])
        arguments = dict(zip(names, inputs, strict=True))
        meter.watch(path, model.get_submodule(path), arguments, batch.size)
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


class Meter:
    """Sums, by unit, of the activations that the layers of traced graphs read.

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
    total:
        For each label, the sum over samples and readers of the mean activation; shape (labels,).
    times:
        For each label, the number of samples times the number of readers; shape (labels,).
    samples:
        Number of samples seen.
    """

    def __init__(self, coupling: Coupling) -> None:
        self.traces = {trace.path: trace for trace in coupling.traces if not trace.training}
        self.reads = {path: _reads(coupling, trace) for path, trace in self.traces.items()}
        self.total = np.zeros(coupling.context.units.count)
        self.times = np.zeros(coupling.context.units.count)
        self.samples = 0
        self._last: dict[fx.Node, list[fx.Node]] = {}
        for trace in self.traces.values():
            for node in trace.graph.nodes:
                if node.users:
                    self._last.setdefault(max(node.users), []).append(node)

    def watch(self, path: str, root: nn.Module, arguments: Mapping[str, Any], size: int) -> None:
        """Run a graph on a batch and add up what its nodes read.

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
        values: dict[fx.Node, Any] = {}
        for node in self.traces[path].graph.nodes:
            if node.op == "output":
                break
            # Read the operand now, because it may have changed in place since it was made.
            for operand, labels in self.reads[path].get(node, ()):
                self._add(values[operand], labels, size)
            values[node] = _node_value(self.traces[path], root, node, arguments, values)
            for done in self._last.get(node, ()):
                del values[done]

    def _add(self, value: Tensor, labels: Array, size: int) -> None:
        """Add the mean absolute value of each unit that lies on a tensor."""
        means = at_least_float32(value).abs()
        shared = [d for d, extent in enumerate(labels.shape) if extent == 1]
        if shared:
            means = means.mean(shared, keepdim=True)
        units, place = np.unique(labels.ravel(), return_inverse=True)
        summed = np.bincount(place, means.expand(labels.shape).cpu().numpy().ravel())
        live = units > 0
        self.total[units[live]] += size * (summed / np.bincount(place))[live]
        self.times[units[live]] += size


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
        kept = _labels_on(coupling, results)
        for operand in [source for source in operands if source not in of_weights]:
            for labels in coupling.labels(operand.meta["val"]):
                summed_up = not positional and not np.isin(labels[labels > 0], kept).any()
                if contracts or summed_up:
                    reads.setdefault(node, []).append((operand, labels))
    return reads


def _labels_on(coupling: Coupling, tensors: Iterable[Tensor]) -> Array:
    """Return all labels that lie on these tensors, as one row."""
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


def placeholder_values(trace: Trace, batch: LoaderBatch) -> dict[str, Any]:
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
