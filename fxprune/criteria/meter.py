"""Measurement of a traced model's activations while it runs on data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from fxprune.calibration import LoaderBatch, called, check_dimensions
from fxprune.common.contents import tensors_of
from fxprune.common.dispatch import holds_tensors
from fxprune.coupling import Coupling
from fxprune.coupling.parts import intercepted
from fxprune.criteria.views import in_single_at_least
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

    def part(path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        """Run the graph of a part under the meter, then make the intercepted call itself."""
        names = [
            str(node.target) for node in meter.traces[path].graph.nodes if node.op == "placeholder"
        ]
        inputs = tree_map_only(Tensor, Tensor.clone, [*args, *kwargs.values()])
        meter.watch(
            path, model.get_submodule(path), dict(zip(names, inputs, strict=True)), batch.size
        )
        return call()

    with intercepted(model, coupling.parts, part):
        called(model, batch)


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
        For each label, how many terms this sum has; shape (labels,).
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
        alike = [d for d, extent in enumerate(labels.shape) if extent == 1]
        means = (
            in_single_at_least(value).abs().mean(alike, keepdim=True)
            if alike
            else in_single_at_least(value).abs()
        )
        units, place = np.unique(labels.ravel(), return_inverse=True)
        summed = np.bincount(place, means.expand(labels.shape).cpu().numpy().ravel())
        here = units > 0
        self.total[units[here]] += size * (summed / np.bincount(place))[here]
        self.times[units[here]] += size


def _reads(coupling: Coupling, trace: Trace) -> dict[fx.Node, list[tuple[fx.Node, Array]]]:
    """Return, for each node that reads units, the operands it reads, with their labels.

    A node reads a field of an operand if it is a contraction, or if its results have none of the
    field's units and it tells no positions apart: then it sums them up. Operands that are computed
    from weights alone are no activations, so they do not count.
    """
    contracting = {ran.node for ran in coupling.contractions}
    learned: set[fx.Node] = set()
    out: dict[fx.Node, list[tuple[fx.Node, Array]]] = {}
    for node in trace.graph.nodes:
        name = trace.prefix + node.name
        operands = [
            operand for operand in node.all_input_nodes if isinstance(operand.meta["val"], Tensor)
        ]
        if node.op == "get_attr" or (operands and learned.issuperset(operands)):
            learned.add(node)  # a weight, or computed from weights alone
        results = tensors_of(node.meta.get("val"))
        if not results:
            continue
        left = np.concatenate(
            [
                np.zeros(1, np.int64),
                *(labels.ravel() for leaf in results for labels in coupling.labels(leaf)),
            ]
        )
        for operand in operands:
            for labels in coupling.labels(operand.meta["val"]) if operand not in learned else ():
                summed_up = (
                    not np.isin(labels[labels > 0], left).any()
                    and name not in coupling.context.found.positional
                )
                if name in contracting or summed_up:
                    out.setdefault(node, []).append((operand, labels))
    return out


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
    # As the tracer does, take the signature of the function itself, not of one that it wraps.
    signature = inspect.signature(type(trace.meta_copy.model).forward, follow_wrapped=False)
    names = [str(node.target) for node in trace.graph.nodes if node.op == "placeholder"]
    given = {*list(signature.parameters)[1 : 1 + len(batch.args)], *batch.kwargs}
    example = zip(names, trace.placeholders, strict=False)
    constants = {
        name: value for name, value in example if name not in given and not holds_tensors(value)
    }
    try:
        bound = signature.bind(
            trace.meta_copy.model, *batch.args, **batch.kwargs, **constants
        ).arguments
    except TypeError as error:
        raise ArgumentError(
            f"the loader's inputs do not fit the model's forward: {error}."
        ) from error
    out: dict[str, Any] = {}
    for name, value in list(bound.items())[1:]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            out.update({f"args_{i}": item for i, item in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            out.update(value)
        else:
            out[name] = value
    if set(out) != set(names):
        raise ArgumentError(
            f"the loader gave the inputs {', '.join(sorted(out))}, the model was analysed with "
            f"{', '.join(sorted(names))}: give the same ones."
        )
    for node in trace.graph.nodes:
        if node.op == "placeholder" and isinstance(out[str(node.target)], Tensor):
            check_dimensions(f"the input {node.target!r}", out[str(node.target)], node.meta["val"])
    return out
