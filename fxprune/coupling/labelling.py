"""Labelling of a model: it runs on labels, and labels that belong together are united."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fxprune.common.contents import check_not_lazy, leaves, tensors_of
from fxprune.common.hooks import refuse_hooks
from fxprune.coupling.parts import Explored, Parts
from fxprune.coupling.propagation import LabelMode
from fxprune.coupling.result import KEPT, OUTPUT
from fxprune.labels import Array
from fxprune.ops import Context
from fxprune.ops.records import Record
from fxprune.ops.running import ShapeMode
from fxprune.trace import MetaCopy, Trace, trace

__all__ = ["Labelling", "Terms"]


@dataclass(frozen=True)
class Terms:
    """What the caller wants kept.

    Attributes
    ----------
    keep:
        Names of parameters of which no axis is pruned.
    pinned_nodes:
        Names of fx nodes whose operands are pinned, because the node could not be emitted smaller.
        An entry ``"name@axis"`` pins only that axis of the node's first operand.
    heads:
        Names of parameters whose attention heads are removed as a whole or not at all.
    """

    keep: tuple[str, ...] = ()
    pinned_nodes: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


class Labelling:
    """Labels on the tensors of a meta copy, made while it is traced in one mode or in both.

    Parameters
    ----------
    meta_copy:
        The model to trace.
    terms:
        What the caller wants kept.
    ties:
        Number of a parameter axis -> for each of its positions, the first position that belongs to
        the same unit (see :meth:`head_ties`).
    unread:
        Names of nodes that get no labels, because nothing reads their results (see
        :meth:`unread`).
    overwritten:
        Names of parameters and buffers in which an earlier call may leave non-zeros at removed
        elements (see :meth:`overwritten`).
    coupling:
        Whether labels are united and pinned. Without it, labels only tell on which axis they
        originate.

    Attributes
    ----------
    context:
        The labels of all tensors, and what was found while the model ran.
    parameters:
        Parameters and buffers of the meta copy, by name.
    traces:
        The graphs that were traced.
    inputs:
        What the model was called with.
    decided:
        The line of Python that reads values, in a model that is traced in parts; empty if there is
        none.
    """

    def __init__(
        self,
        meta_copy: MetaCopy,
        terms: Terms,
        *,
        ties: Mapping[int, Array] | None = None,
        unread: Collection[str] = (),
        overwritten: Collection[str] = (),
        coupling: bool = True,
    ) -> None:
        self.meta_copy, self.parameters = meta_copy, meta_copy.tensors
        self.context = Context()
        self.context.units.pinning = self.context.units.uniting = coupling
        self.context.ties = dict(ties or {})
        self.context.weights = Context()
        self.context.weights.units.pinning = False
        self._register_parameters(overwritten)
        self.traces: list[Trace] = []
        self.inputs: list[Any] = []
        self.decided = ""
        self._pinned_nodes, self._unread = frozenset(terms.pinned_nodes), frozenset(unread)
        for name in terms.keep:
            record = self.context.record(self.parameters[name])
            assert record is not None
            for axis in sorted(record.unlabelled):
                self.context.fix_axis(record, axis, KEPT)

    def _register_parameters(self, overwritten: Collection[str]) -> None:
        """Number the axes of all parameters and make them known to the context."""
        number = 0
        for name, tensor in self.parameters.items():
            if tensor.is_meta:
                axes = tuple(range(number, number + tensor.dim()))
                self.context.parameter(tensor, name, axes, overwritten=name in overwritten)
                number += tensor.dim()

    def trace(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool = False
    ) -> Trace:
        """Trace the meta copy and label every node (see :func:`fxprune.trace.trace`)."""
        watch = self._watch("train." if training else "")
        for tensor in tensors_of((args, kwargs)):
            self.context.note_input(tensor)
        with self.context.at(""):
            traced = trace(self.meta_copy, args, kwargs, training=training, watch=watch)
        refuse_hooks(self.meta_copy.model)
        with self.context.at(traced.prefix + "output"):
            self._finish(traced.outputs)
        self.inputs, self.traces = traced.placeholders, [*self.traces, traced]
        return traced

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], explored: Explored) -> None:
        """Run a meta copy that cannot be traced whole, and trace and label its parts.

        See :class:`fxprune.coupling.parts.Parts`.
        """
        parts = Parts(self.meta_copy, self.context, self._watch)
        self.inputs = [*args, *kwargs.values()]
        with self.context.at(""):
            out = parts.run(explored, args, kwargs)
        with self.context.at("output"):
            self._finish(out)
            parts.settle()
        self.decided = parts.decided
        self.traces += parts.traces.values()

    def head_ties(self, names: Collection[str]) -> dict[int, Array]:
        """Return the ties that keep the attention heads of some parameters whole.

        A head consists of the channels that a product of two activations sums over, at one
        position of an axis that both activations have. For example, the scores of one head sum
        over channels of the query and the key. Modules and names play no role.

        Call it on a labelling without coupling. Afterwards its labels are united.

        Parameters
        ----------
        names:
            Names of the parameters.

        Returns
        -------
        dict
            Number of a parameter axis -> for each of its positions, the first position that
            belongs to the same unit. It is the ``ties`` of another labelling.
        """
        context, units = self.context, self.context.units
        units.uniting = True
        labels_of = self._labels_of_axes()
        numbers = [number for name in names for number in self._axes(name)]
        asked = [labels_of[number] for number in numbers if number in labels_of]
        for labels, along in context.found.heads:
            if any(np.isin(units.find(labels), units.find(one)).any() for one in asked):
                context.tie(labels, along)
        ties = {}
        for number, labels in labels_of.items():
            _, first, inverse = np.unique(
                units.find(labels), return_index=True, return_inverse=True
            )
            if len(first) < labels.size:
                ties[number] = first[inverse]
        return ties

    def _labels_of_axes(self) -> dict[int, Array]:
        """Return the labels of each parameter axis, by its number, with one label per position."""
        labels_of: dict[int, Array] = {}
        for record in self._records().values():
            for f in record.own_fields:
                if len(f.dims) == 1:
                    labels_of[record.axes[next(iter(f.dims))]] = f.labels.ravel()
        return labels_of

    def unread(self) -> set[str]:
        """Return the names of nodes whose results nothing reads.

        An example are attention weights that the caller drops. Nodes that change a tensor or draw
        random numbers are not among them. Neither are calls of modules, because a module may count
        or draw in training mode.
        """
        unread: set[str] = set()
        for traced in self.traces:
            for node in reversed(traced.graph.nodes):
                name = traced.prefix + node.name
                is_read = any(traced.prefix + user.name not in unread for user in node.users)
                is_call = node.op in ("call_function", "call_method")
                if not is_call or is_read or node.is_impure():
                    continue
                if name not in self.context.found.writes:
                    unread.add(name)
        return unread

    def overwritten(self) -> set[str]:
        """Return the names of parameters and buffers that a call may leave non-zero where removed.

        The next call then reads non-zeros at removed elements.
        """
        return {name for name, record in self._records().items() if record.overwritten}

    def _records(self) -> dict[str, Record]:
        """Return the records of the parameters and buffers that have one, by name."""
        found = {name: self.context.record(tensor) for name, tensor in self.parameters.items()}
        return {name: record for name, record in found.items() if record is not None}

    def drop_unread(self) -> None:
        """Erase the nodes without labels from the graphs, so that they are not emitted."""
        for traced in self.traces:
            for node in reversed(list(traced.graph.nodes)):
                if traced.prefix + node.name in self._unread:
                    traced.graph.erase_node(node)

    def _axes(self, name: str) -> tuple[int, ...]:
        """Return the numbers of a parameter's axes."""
        record = self.context.record(self.parameters[name])
        return () if record is None else record.axes

    def unmet_parameters(self) -> list[str]:
        """Return the names of floating-point parameters and buffers that no op has met."""
        unmet = [name for name, record in self._records().items() if record.unmet]
        return [name for name in unmet if self.parameters[name].is_floating_point()]

    def _finish(self, outputs: Any) -> None:
        """Pin the labels of the model's outputs."""
        check_not_lazy(outputs, self.meta_copy.model)
        for leaf in leaves(outputs):
            self.context.pin_all(self.context.fields(leaf), OUTPUT)

    def _watch(self, prefix: str) -> Callable[[fx.Node], LabelMode | ShapeMode]:
        """Return a function that prepares each traced node and gives the mode it runs under.

        ``prefix`` goes before the names of the nodes.
        """
        context, mode = self.context, LabelMode(self.context)
        axes = _pinned_axes(self._pinned_nodes)

        def watch(node: fx.Node) -> LabelMode | ShapeMode:
            # The node stays current after it has run: what the Python code behind a part does is
            # attributed to the last node of the part, until the next operation runs.
            name = prefix + node.name
            context.node, context.target = name, node.target
            if name in self._unread:
                return ShapeMode()
            if name in self._pinned_nodes:
                self._pin_operands(node)
            elif name in axes:
                self._pin_axis(node, axes[name])
            return mode

        return watch

    def _pin_operands(self, node: fx.Node) -> None:
        """Pin the operands of a node."""
        for operand in node.all_input_nodes:
            for leaf in tree_leaves(operand.meta["val"]):
                self.context.pin_all(self.context.fields(leaf), "could not be emitted smaller")

    def _pin_axis(self, node: fx.Node, axis: int) -> None:
        """Pin the labels along an axis of a node's first operand."""
        values = tree_leaves([operand.meta["val"] for operand in node.all_input_nodes])
        first = next(value for value in values if isinstance(value, Tensor))
        cut = [f for f in self.context.fields(first) if axis in f.dims]
        self.context.pin_all(cut, "is cut to a length that inputs decide")


def _pinned_axes(pinned_nodes: Collection[str]) -> dict[str, int]:
    """Return the nodes of which one axis is pinned, with that axis."""
    parts = (entry.rpartition("@") for entry in pinned_nodes)
    return {name: int(axis) for name, _, axis in parts if name}
