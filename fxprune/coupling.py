"""Which channels are coupled: units, groups, balance partitions, and what is pinned and why.

The model runs once on labels (:mod:`fxprune.propagation`); what is left is to read off the result.
Nodes of the coupling graph are segments of parameter axes, edges carry the fx nodes that tied
them; its connected components are the groups.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import networkx as nx
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fxprune.balance import Balance, resolve, shrinking_dim
from fxprune.contents import leaves, refuse_lazy, tensors_of
from fxprune.dispatch import META, map_tensors
from fxprune.doors import door, shown
from fxprune.eager import PYTHON, Explored, Parts
from fxprune.errors import ArgumentError, ModelError
from fxprune.hooks import refuse_hooks
from fxprune.identity import IdentityMap
from fxprune.inputs import Arguments
from fxprune.labels import Array
from fxprune.ops import Context, Contraction, Record
from fxprune.ops.convolution import is_convolution
from fxprune.ops.running import ShapeMode
from fxprune.propagation import LabelMode
from fxprune.trace import MetaCopy, Trace, trace

__all__ = [
    "KEPT",
    "OUTPUT",
    "Axis",
    "Coupling",
    "Group",
    "Labelling",
    "Pinned",
    "check_coupling",
    "couple",
]

KEPT = "is kept by request"
"""The reason of a pin that the caller asked for."""

OUTPUT = "is an output of the model"
"""The reason of a pin of what the model gives."""


@door
@dataclass(frozen=True, order=True)
class Axis:
    """A segment of one axis of a parameter (or buffer): positions ``start`` to ``stop`` of
    ``length``.

    An axis that is a product (heads x head dimension, laid flat) can bear several labellings:
    ``layer`` counts them.

    >>> str(Axis("conv.weight", 0, 0, 64, 64)), str(Axis("fc.weight", 1, 8, 16, 64))
    ('conv.weight:0', 'fc.weight:1[8:16]')
    """

    parameter: str
    dim: int
    start: int
    stop: int
    length: int
    layer: int = 0

    def __hash__(self) -> int:
        return hash((self.parameter, self.dim, self.start, self.layer))

    def __str__(self) -> str:
        whole = self.start == 0 and self.stop == self.length
        part = "" if whole else f"[{self.start}:{self.stop}]"
        return f"{self.parameter}:{self.dim}{part}" + (
            f" (layer {self.layer})" if self.layer else ""
        )


@door
@dataclass(frozen=True)
class Group:
    """Units that compete with each other: they lie on the same axes.

    ``blocks`` is the number of balanced blocks (0: none); ``normalised`` names the nodes that take
    statistics over this group, over its survivors in the pruned model; ``units`` are their labels,
    shape (size,), ascending, read-only.
    """

    name: str
    size: int
    axes: tuple[Axis, ...]
    blocks: int
    normalised: tuple[str, ...]
    units: Array = field(compare=False)

    def __str__(self) -> str:
        balanced = f" in {self.blocks} balanced blocks" if self.blocks else ""
        shown = ", ".join(map(str, self.axes[:6])) + (
            f", ... ({len(self.axes)} in all)" if len(self.axes) > 6 else ""
        )
        return f"{self.size} units{balanced}: {shown}"


@door
@dataclass(frozen=True)
class Pinned:
    """Axes that keep their size, the reason, and the fx node that gave it."""

    axes: tuple[Axis, ...]
    reason: str
    node: str

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.axes[:4])) + (
            f", ... ({len(self.axes)} in all)" if len(self.axes) > 4 else ""
        )
        return f"{shown}: {self.reason}" + (f" (at {self.node})" if self.node else "")


@door
@dataclass(eq=False)
class Coupling:
    """The result of the analysis; ``print`` it, or draw :meth:`to_networkx`.

    Attributes
    ----------
    groups, pinned:
        What can be pruned together, and what cannot be pruned.
    untouched:
        Parameters that no executed op met; they stay as they are.
    decisions:
        Control flow that was decided while tracing, one line each.
    example:
        What the model is called with, in shapes; in values where its Python has run on them.
    not_one_graph:
        What keeps the model from being one graph, with the line; empty if it is one.
    untrained:
        Why the graph is evaluation's alone, with the line; empty if it is not.
    """

    groups: tuple[Group, ...]
    pinned: tuple[Pinned, ...]
    untouched: tuple[str, ...]
    decisions: tuple[str, ...]
    graph: nx.Graph
    meta_copy: MetaCopy
    traces: tuple[Trace, ...]
    context: Context
    balance: Balance
    parameters: dict[str, Tensor]
    contractions: tuple[Contraction, ...]  # in evaluation mode
    example: Arguments = ((), {})
    not_one_graph: str = ""
    untrained: str = ""
    _labels: IdentityMap[Tensor, list[Array]] = field(
        default_factory=IdentityMap, init=False, repr=False
    )
    _dims: IdentityMap[Array, int] = field(default_factory=IdentityMap, init=False, repr=False)

    @property
    def parts(self) -> tuple[str, ...]:
        """Paths of the modules that were traced one by one; empty if the model was traced
        whole.
        """
        return tuple(dict.fromkeys(own.path for own in self.traces if own.path))

    @property
    def not_set(self) -> tuple[str, ...]:
        """Attributes that forward sets to what it computes of the inputs; nothing reads them, and
        graphs do not set them.
        """
        return tuple(
            dict.fromkeys(
                f"{own.path}.{name}".lstrip(".") for own in self.traces for name in own.not_set
            )
        )

    @functools.cached_property
    def units(self) -> Array:
        """The labels of all units, ascending; shape (units,)."""
        return np.sort(
            np.concatenate([np.zeros(0, dtype=np.int64), *(group.units for group in self.groups)])
        )

    @door
    def to_networkx(self) -> nx.Graph:
        """The coupling graph: nodes are :class:`Axis`, edges have ``nodes``, the fx nodes that
        tied the two ends.
        """
        return self.graph.copy()

    def labels(self, tensor: Any) -> list[Array]:
        """The live labels of a tensor of the labelled run, one array per field; not to be
        changed.
        """
        known = self._labels.get(tensor)
        if known is None:
            record = self.context.record(tensor)
            if record is None:
                return []
            known = self._labels[tensor] = [f.labels for f in record.fields]
        return known

    def wide_dims(self, tensor: Any) -> list[int]:
        """Dimensions of a tensor between parts that keep their size, because Python code that is
        not traced reads them.
        """
        wide = self.context.wide
        return sorted(
            {
                self.shrinking_dim(a)
                for a in self.labels(tensor)
                if wide and np.isin(a, wide[0]).any()
            }
        )

    def shrinking_dim(self, labels: Array) -> int:
        """Along which dimension a tensor with these live labels gets smaller
        (:func:`fxprune.balance.shrinking_dim`).
        """
        if labels not in self._dims:
            self._dims[labels] = shrinking_dim(labels, self.balance.block)
        return self._dims[labels]

    @door
    def macs(
        self,
        shape: Callable[[Tensor], Sequence[int]] | None = None,
        of: Iterable[Contraction] | None = None,
    ) -> int:
        """Multiply-accumulates of the example's batch.

        ``shape`` gives another size to each tensor of the labelled run; ``of`` are the
        contractions that count, default: all.
        """
        if shape is not None and not callable(shape):
            raise ArgumentError(
                f"shape is {shown(shape)}: give a function from a tensor to its sizes, or None."
            )
        return round(
            sum(ran.share * ran.macs(shape) for ran in (self.contractions if of is None else of))
        )

    @door
    def pinned_macs(self) -> dict[str, float]:
        """For each reason of a pin the share of the multiply-accumulates that it holds, the
        largest first.

        Those of a layer count for its two channel axes in equal parts, and for an axis as far as
        its positions stay: where all inputs and half of the outputs stay, three quarters of them
        are held, one half and one quarter by two reasons.
        """
        held: dict[tuple[str, int], list[tuple[str, Fraction]]] = {}
        for pinned in self.pinned:
            for axis in pinned.axes:
                part = Fraction(axis.stop - axis.start, axis.length)
                held.setdefault((axis.parameter, axis.dim), []).append((pinned.reason, part))
        names = IdentityMap((tensor, name) for name, tensor in self.parameters.items())
        shares: dict[str, Fraction] = {}
        for ran in self.contractions:
            channels = 2 if is_convolution(ran.func) else None  # its other axes are the kernel's
            weights = [t for t in ran.read if t.dim() > 1 and self.context.of_weights(t)]
            axes = [
                (weight, dim)
                for weight in weights
                for dim, size in enumerate(weight.shape[:channels])
                if size > 1
            ]
            for weight, dim in axes:
                for reason, part in (
                    held.get((names[weight], dim), ())
                    if weight in names
                    else self._held(weight, dim)
                ):
                    shares[reason] = shares.get(
                        reason, Fraction(0)
                    ) + ran.share * ran.macs() * part / len(axes)
        total = self.macs() or 1
        return {
            reason: float(share / total)
            for reason, share in sorted(shares.items(), key=lambda item: -item[1])
        }

    def _held(self, weight: Tensor, dim: int) -> list[tuple[str, Fraction]]:
        """Why an axis stays of a weight that forward computes."""
        if any(labels.shape[dim] > 1 for labels in self.labels(weight)):
            return []
        return [(self.context.why_fixed([weight], dims=[dim])[0], Fraction(1))]

    def _parameter(self, name: str) -> Tensor:
        if not isinstance(name, str) or name not in self.parameters:
            raise ArgumentError(
                f"{shown(name)} is no parameter of the model that was analysed: they are the "
                "keys of .parameters."
            )
        return self.parameters[name]

    def _own(self, group: Group) -> Group:
        if not isinstance(group, Group) or not any(group is own for own in self.groups):
            raise ArgumentError(
                f"{shown(group)} is no group of this coupling: give one of its .groups."
            )
        return group

    @door
    def role(self, name: str, dim: int) -> str:
        """What a parameter's axis is to its units: ``"own"`` (their filters, biases), ``"scale"``
        (of a normalisation), or ``"dependent"`` (what the next layers read them with).
        """
        tensor = self._parameter(name)
        if not isinstance(dim, int) or not 0 <= dim < max(tensor.dim(), 1):
            raise ArgumentError(
                f"dim={shown(dim)} is no axis of {name!r}, which has {tensor.dim()}."
            )
        record = self.context.record(tensor)
        number = record.axes[dim] if record is not None and record.axes else -1
        if number in self.context.scale_axes:
            return "scale"
        return "dependent" if number in self.context.summed_axes else "own"

    @door
    def parameter_labels(self, name: str) -> list[Array]:
        """The live labels of a parameter of the meta copy."""
        return self.labels(self._parameter(name))

    @door
    def elements(self, group: Group) -> dict[str, list[Tensor]]:
        """For each parameter of a group: the unit's index in the group at each element, -1 where
        none of its units lies.

        Every tensor is broadcastable to the parameter's shape; a parameter on which the group lies
        twice has two.
        """
        group = self._own(group)
        index = np.full(self.context.units.count, -1, dtype=np.int64)
        index[group.units] = np.arange(group.size)
        out: dict[str, list[Tensor]] = {}
        for name in dict.fromkeys(axis.parameter for axis in group.axes):
            own = [index[labels] for labels in self.parameter_labels(name)]
            out[name] = [torch.from_numpy(a) for a in own if (a >= 0).any()]
        return out

    @door
    def blocks(self, group: Group) -> Tensor:
        """The block of each unit of a group: units may only be exchanged within one. All zero
        without balance.
        """
        cells = self.balance.cell[self._own(group).units]
        return torch.from_numpy(np.unique(cells, return_inverse=True)[1].reshape(-1))

    def __str__(self) -> str:
        lines = [f"{len(self.groups)} groups, {sum(g.size for g in self.groups)} units"]
        lines += [f"  {g}" for g in self.groups]
        if self.pinned:
            lines.append("pinned")
            lines += [f"  {p}" for p in self.pinned]
            shares = [
                f"{share:.1%} because it {reason}" for reason, share in self.pinned_macs().items()
            ]
            lines += [f"multiply-accumulates held: {', '.join(shares)}"] if shares else []
        if self.untouched:
            lines.append(f"untouched: {', '.join(self.untouched)}")
        if self.not_one_graph:
            lines.append(f"in parts, not one graph: {self.not_one_graph}")
        if self.not_set:
            lines.append(f"set by forward, not by its graph: {', '.join(self.not_set)}")
        if self.decisions:
            lines.append("decided while tracing")
            lines += [f"  {d}" for d in self.decisions]
        return "\n".join(lines)


@dataclass(frozen=True)
class Terms:
    """What the analysis is told.

    Attributes
    ----------
    keep:
        Names of parameters whose every axis stays.
    pinned_nodes:
        Names of fx nodes whose operands stay: the fallback for a node that cannot be emitted
        smaller.
    heads:
        Names of parameters whose attention heads go as a whole or not at all.
    """

    keep: tuple[str, ...] = ()
    pinned_nodes: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


class Labelling:
    """Labels on the tensors of a meta copy, put there while it is traced: in one mode, or in both.

    Parameters
    ----------
    ties:
        Number of a parameter axis -> for each position the first one that it goes with
        (:meth:`head_ties`).
    unread:
        Names of nodes that get no labels, because nothing comes of them (:meth:`unread`).
    overwritten:
        Names of parameters and buffers in which an earlier call leaves non-zeros at removed
        elements (:meth:`overwritten`).
    coupling:
        Without it nothing is united and nothing pinned: labels say on which axis they began,
        wherever an op can carry them.
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
        self.meta_copy = meta_copy
        self.context = Context()
        self.context.units.pinning = self.context.units.uniting = coupling
        self.context.ties = dict(ties or {})
        self.context.weights = Context()
        self.context.weights.units.pinning = False
        self.parameters = meta_copy.tensors
        number = 0
        for name, tensor in self.parameters.items():
            if tensor.is_meta:
                axes = tuple(range(number, number + tensor.dim()))
                self.context.parameter(tensor, name, axes, overwritten=name in overwritten)
                number += tensor.dim()
        self.traces: list[Trace] = []
        self.inputs: list[Any] = []
        # the line of Python that reads values, in a model that was not traced whole
        self.decided = ""
        self._pinned_nodes, self._unread = frozenset(terms.pinned_nodes), frozenset(unread)
        for name in terms.keep:
            record = self.context.record(self.parameters[name])
            assert record is not None
            for axis in sorted(record.unlabelled):
                self.context.fix_axis(record, axis, KEPT)

    def trace(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool = False
    ) -> Trace:
        """Trace the meta copy (see :func:`fxprune.trace.trace`), every node under labels."""
        watch = self._watch("train." if training else "")
        for tensor in tensors_of((args, kwargs)):
            self.context.is_input(tensor)
        traced = trace(self.meta_copy, args, kwargs, training=training, watch=watch)
        refuse_hooks(self.meta_copy.model)
        self.context.node = traced.prefix + "output"
        self._finish(traced.outputs)
        self.inputs, self.traces = traced.placeholders, [*self.traces, traced]
        return traced

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], explored: Explored) -> None:
        """Run a meta copy that cannot be traced whole, and trace its parts (see
        :class:`fxprune.eager.Parts`).
        """
        parts = Parts(self.meta_copy, self.context, self._watch)
        self.inputs = [*args, *kwargs.values()]
        out = parts.run(explored, args, kwargs)
        self.context.node = "output"
        self._finish(out)
        parts.settle()
        self.decided = parts.decided
        self.traces += parts.traces.values()

    def head_ties(self, names: Collection[str]) -> dict[int, Array]:
        """What must go together for the heads of these parameters to stay whole or go: see
        ``ties``.

        A head is what a product of two activations sums over at one position of an axis that both
        have: the query's and the key's channels for the scores of one head. Nothing is known of
        modules or of names.
        """
        context, units = self.context, self.context.units
        units.uniting = True
        own = {
            record.axes[next(iter(f.dims))]: f.labels.ravel()
            for name, tensor in self.parameters.items()
            if (record := context.record(tensor)) is not None
            for f in record.own_fields
            if len(f.dims) == 1
        }
        asked = [own[number] for name in names for number in self._axes(name) if number in own]
        for labels, along in context.heads:
            if any(np.isin(units.find(labels), units.find(one)).any() for one in asked):
                context.tie(labels, along)
        ties = {}
        for number, labels in own.items():
            _, first, inverse = np.unique(
                units.find(labels), return_index=True, return_inverse=True
            )
            if len(first) < labels.size:
                ties[number] = first[inverse]
        return ties

    def unread(self) -> set[str]:
        """Names of the nodes of which nothing is read, and that change no tensor and draw no
        random number: attention weights for a caller who drops them, say. A module that is called
        stays: it may count, or draw, in training.
        """
        out: set[str] = set()
        for traced in self.traces:
            for node in reversed(traced.graph.nodes):
                name = traced.prefix + node.name
                read = any(traced.prefix + user.name not in out for user in node.users)
                call = node.op in ("call_function", "call_method")
                if call and not read and not node.is_impure() and name not in self.context.writes:
                    out.add(name)
        return out

    def overwritten(self) -> set[str]:
        """Names of parameters and buffers in which a call may leave non-zeros at removed elements,
        for the next call to read.
        """
        found = {name: self.context.record(tensor) for name, tensor in self.parameters.items()}
        return {
            name for name, record in found.items() if record is not None and record.overwritten
        }

    def drop_unread(self) -> None:
        """Take the nodes that got no labels out of the graphs: they are not emitted."""
        for traced in self.traces:
            for node in reversed(list(traced.graph.nodes)):
                if traced.prefix + node.name in self._unread:
                    traced.graph.erase_node(node)

    def _axes(self, name: str) -> tuple[int, ...]:
        record = self.context.record(self.parameters[name])
        return () if record is None else record.axes

    def missed(self) -> list[str]:
        """Parameters that no op has met."""
        known = {
            name: self.context.record(tensor)
            for name, tensor in self.parameters.items()
            if tensor.is_floating_point()
        }
        return [name for name, record in known.items() if record is not None and record.unmet]

    def _finish(self, outputs: Any) -> None:
        refuse_lazy(outputs, self.meta_copy.model)
        for leaf in leaves(outputs):
            self.context.pin_all(self.context.fields(leaf), OUTPUT)

    def _watch(self, prefix: str) -> Callable[[fx.Node], LabelMode | ShapeMode]:
        context, mode = self.context, LabelMode(self.context)
        axes = {
            name: int(axis)
            for name, _, axis in (entry.rpartition("@") for entry in self._pinned_nodes)
            if name
        }

        def watch(node: fx.Node) -> LabelMode | ShapeMode:
            context.node, context.target = prefix + node.name, node.target
            if context.node in self._unread:
                return ShapeMode()
            if context.node in self._pinned_nodes:
                for operand in node.all_input_nodes:
                    for leaf in tree_leaves(operand.meta["val"]):
                        context.pin_all(context.fields(leaf), "could not be emitted smaller")
            elif context.node in axes:
                values = tree_leaves([operand.meta["val"] for operand in node.all_input_nodes])
                first = next(value for value in values if isinstance(value, Tensor))
                cut = [own for own in context.fields(first) if axes[context.node] in own.dims]
                context.pin_all(cut, "is cut to a length that inputs decide")
            return mode

        return watch


def check_coupling(coupling: Any, model: Any) -> None:
    """Refuse what is no analysis of a model.

    Raises
    ------
    ModelError, ArgumentError
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module as model, got a {type(model).__name__}.")
    if not isinstance(coupling, Coupling):
        raise ArgumentError(
            f"coupling is a {type(coupling).__name__}: give what fxprune.analyze(model, "
            "example_inputs) gives."
        )
    parameters = dict(model.named_parameters())
    for name, analysed in coupling.parameters.items():
        if isinstance(analysed, nn.Parameter) and (
            name not in parameters or parameters[name].shape != analysed.shape
        ):
            raise ArgumentError(
                f"the coupling is of another architecture than this {type(model).__name__}: it "
                f"has {name!r} of shape {tuple(analysed.shape)}. Analyse the very model."
            )


def couple(labelling: Labelling, share: Fraction = Fraction(1)) -> Coupling:
    """Read off a labelled meta copy what can only be pruned together.

    ``share`` is the example's batch over the labelled one.
    """
    labelling.drop_unread()
    context, parameters, traces = labelling.context, labelling.parameters, tuple(labelling.traces)
    context.node = ""
    while True:
        balance = resolve(context)
        version = context.units.version
        context.settle()
        if context.units.version == version:
            break
    groups, graph = _groups_of(context, parameters, balance)
    share_of = {
        name: part
        for own in traces
        if not own.training
        for name, part in _cost_shares(own, share).items()
    }
    return Coupling(
        groups,
        _pins(context, parameters),
        tuple(labelling.missed()),
        tuple(dict.fromkeys(d for trace in traces for d in trace.decisions)),
        graph,
        labelling.meta_copy,
        traces,
        context,
        balance,
        parameters,
        tuple(
            replace(ran, share=share_of[ran.node])
            if ran.node in share_of
            else _of_python(ran, context, share)
            for ran in context.contractions
            if ran.node in share_of or ran.node.startswith(PYTHON)
        ),
    )


def _cost_shares(traced: Trace, share: Fraction) -> dict[str, Fraction]:
    """For each node the part of its costs that the example has: all of it where only weights are
    read.
    """
    out: dict[str, Fraction] = {}
    for node in traced.graph.nodes:
        read = [out[traced.prefix + source.name] for source in node.all_input_nodes]
        out[traced.prefix + node.name] = (
            share if node.op == "placeholder" else min(read, default=Fraction(1))
        )
    return out


def _of_python(ran: Contraction, context: Context, share: Fraction) -> Contraction:
    """What Python code contracts, without the data; at full width where it sees that."""
    wide = context.wide[0] if context.wide else np.zeros(0, dtype=np.int64)
    whole = any(
        np.isin(f.labels, wide).any() for tensor in ran.tensors for f in context.fields(tensor)
    )

    def shape_of(tensor: Tensor) -> Tensor:
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device=META)
        if not whole and context.fields(tensor):
            context.records[made] = Record(made, list(context.fields(tensor)))
        return made

    args, kwargs, out = (map_tensors(shape_of, value) for value in (ran.args, ran.kwargs, ran.out))
    return replace(ran, args=args, kwargs=kwargs, out=out, share=share)


def _positions(record: Record, balance: Balance) -> list[tuple[int, Array]]:
    """(dim, labels along it) for each field of a parameter; a field over several axes counts on
    the one that shrinks.
    """
    out = []
    for f in record.fields:
        dim = shrinking_dim(f.labels, balance.block)
        flat = f.labels.size == f.labels.shape[dim]
        out.append(
            (
                dim,
                (f.labels if flat else np.moveaxis(f.labels, dim, -1)).reshape(
                    -1, f.labels.shape[dim]
                ),
            )
        )
    return out


def _groups_of(
    context: Context, parameters: dict[str, Tensor], balance: Balance
) -> tuple[tuple[Group, ...], nx.Graph]:
    signature, axes = _signed_axes(context, parameters, balance)
    graph: nx.Graph = nx.Graph()
    by_signature: dict[int, list[tuple[Axis, int]]] = {}
    layers: dict[int, int] = {}
    for name, dim, number, rows in axes:
        layer = layers[number] = layers.get(number, -1) + 1
        own = signature[rows]
        cuts = (np.flatnonzero((own[:, 1:] != own[:, :-1]).any(axis=0)) + 1).tolist()
        for start, stop in itertools.pairwise([0, *cuts, own.shape[1]]):
            # several where blocks of an axis bear units of different kinds
            for key in sorted(set(own[:, start].tolist())):
                if key:
                    segment = Axis(name, dim, start, stop, own.shape[1], layer)
                    graph.add_node(segment)
                    by_signature.setdefault(key, []).append((segment, number))
    for alike in by_signature.values():
        _connect(graph, alike, context)
    units = np.flatnonzero(signature)
    _connect_cells(graph, by_signature, signature, units, balance)
    statistics = [
        (node, np.unique(np.concatenate([context.units.live(a).ravel() for a in arrays])))
        for (node, _), arrays in context.statistics.items()
    ]
    keys_of: dict[Axis, list[int]] = {}
    for key, alike in by_signature.items():
        for segment, _ in alike:
            keys_of.setdefault(segment, []).append(key)
    order = {segment: i for i, segment in enumerate(graph.nodes)}
    sorter = np.argsort(signature[units], kind="stable")
    sorted_keys = signature[units][sorter]
    groups = []
    for component in nx.connected_components(graph):
        segments = sorted(component, key=order.__getitem__)
        keys = np.array(
            sorted({key for segment in segments for key in keys_of[segment]}), dtype=np.uint64
        )
        spans = [
            sorter[
                np.searchsorted(sorted_keys, k, "left") : np.searchsorted(sorted_keys, k, "right")
            ]
            for k in keys
        ]
        members = np.sort(units[np.concatenate(spans)])
        members.flags.writeable = False
        cells = balance.cell[members]
        groups.append(
            Group(
                str(segments[0]),
                len(members),
                tuple(segments),
                len(np.unique(cells[cells >= 0])),
                tuple(
                    dict.fromkeys(
                        node
                        for node, labels in statistics
                        if np.isin(members, labels, assume_unique=True).any()
                    )
                ),
                members,
            )
        )
    groups.sort(key=lambda g: order[g.axes[0]])
    return tuple(groups), graph


def _signed_axes(
    context: Context, parameters: dict[str, Tensor], balance: Balance
) -> tuple[npt.NDArray[np.uint64], list[tuple[str, int, int, Array]]]:
    """For each unit a number that says on which axes it lies; and the axes: parameter, dimension,
    number of the axis, rows of labels.
    """
    rng = np.random.default_rng(0)
    signature = np.zeros(context.units.count, dtype=np.uint64)
    axes: list[tuple[str, int, int, Array]] = []
    for name, tensor in parameters.items():
        record = context.record(tensor)
        for dim, rows in _positions(record, balance) if record is not None else ():
            axes.append((name, dim, record.axes[dim], rows))  # type: ignore[union-attr]
            # An axis adds its random number once to every label that lies on it (fancy indexing
            # does not repeat).
            signature[rows.ravel()] += rng.integers(1, 2**63, dtype=np.uint64)
    signature[0] = 0
    return signature, axes


def _connect_cells(
    graph: nx.Graph,
    by_signature: dict[int, list[tuple[Axis, int]]],
    signature: npt.NDArray[np.uint64],
    units: Array,
    balance: Balance,
) -> None:
    """Cells of one kind keep equally many units: the groups they lie in are one."""
    celled = units[balance.cell[units] >= 0]
    for kind in np.unique(balance.kind[balance.cell[celled]]) if celled.size else ():
        keys = np.unique(signature[celled[balance.kind[balance.cell[celled]] == kind]]).tolist()
        first = by_signature[keys[0]][0][0]
        for key in keys[1:]:
            graph.add_edge(first, by_signature[key][0][0], nodes=("balance",))


def _connect(graph: nx.Graph, segments: list[tuple[Axis, int]], context: Context) -> None:
    """Edges between segments of one signature: those that an op tied, and, where ops tied through
    a third one, one to the first.
    """
    first, first_number = segments[0]
    for segment, number in segments[1:]:
        pair = (min(first_number, number), max(first_number, number))
        graph.add_edge(first, segment, nodes=tuple(context.edges.get(pair, ())))


def _pins(context: Context, parameters: dict[str, Tensor]) -> tuple[Pinned, ...]:
    found: dict[int, list[Axis]] = {}
    for name, tensor in parameters.items():
        record = context.record(tensor)
        if record is None:
            continue
        for dim, number in enumerate(record.axes):
            if number in context.fixed_axes:
                size = tensor.shape[dim]
                found.setdefault(context.fixed_axes[number], []).append(
                    Axis(name, dim, 0, size, size)
                )
    for name, tensor in parameters.items():
        record = context.record(tensor)
        for f in record.own_fields if record is not None else ():
            if not context.units.reasons(f.labels).any():
                continue
            for dim in sorted(f.dims):
                reasons = context.units.reasons(
                    np.moveaxis(f.labels, dim, -1).reshape(-1, f.labels.shape[dim])[0]
                )
                cuts = np.flatnonzero(np.diff(reasons)) + 1
                bounds = [0, *cuts.tolist(), len(reasons)]
                for start, stop in itertools.pairwise(bounds):
                    if reasons[start]:
                        found.setdefault(int(reasons[start]), []).append(
                            Axis(name, dim, start, stop, len(reasons))
                        )
    return tuple(
        Pinned(tuple(dict.fromkeys(axes)), *context.reasons[reason])
        for reason, axes in sorted(found.items())
    )
