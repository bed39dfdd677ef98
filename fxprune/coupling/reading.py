"""Groups, balance and pins of a labelled model.

The nodes of the coupling graph are segments of parameter axes. An edge names the fx nodes that
tied its two ends. The connected components are the groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

import networkx as nx
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxprune.common.dispatch import META, map_tensors
from fxprune.coupling.balance import Balance, resolve, shrinking_dim
from fxprune.coupling.groups import Axis, Group, Pinned
from fxprune.coupling.labelling import Labelling
from fxprune.coupling.parts import PYTHON
from fxprune.coupling.result import Coupling
from fxprune.labels import Array, Field
from fxprune.ops import Context, Contraction, Record
from fxprune.trace import Trace

__all__ = ["couple"]


def couple(labelling: Labelling, share: Fraction = Fraction(1)) -> Coupling:
    """Return the coupling of a labelled model.

    Parameters
    ----------
    labelling:
        The labels. Nodes that nothing reads are erased from its graphs.
    share:
        The example's batch as a fraction of the labelled one.
    """
    labelling.drop_unread()
    context, parameters, traces = labelling.context, labelling.parameters, tuple(labelling.traces)
    balance = _settle(context)
    groups, graph = _groups_of(context, parameters, balance)
    return Coupling(
        groups,
        _pins(context, parameters),
        tuple(labelling.unmet_parameters()),
        tuple(dict.fromkeys(d for trace in traces for d in trace.decisions)),
        graph,
        labelling.meta_copy,
        traces,
        context,
        balance,
        parameters,
        _contractions_of(context, traces, share),
    )


def _settle(context: Context) -> Balance:
    """Resolve all splits and bring all labels up to date, until nothing changes any more."""
    # What follows from all splits together is attributed to the last one.
    with context.at(context.rectangles[-1].node if context.rectangles else ""):
        while True:
            balance = resolve(context)
            version = context.units.version
            context.settle()
            if context.units.version == version:
                return balance


def _contractions_of(
    context: Context, traces: Sequence[Trace], share: Fraction
) -> tuple[Contraction, ...]:
    """Return the contractions in evaluation mode, with the share of their MACs that counts."""
    share_of: dict[str, Fraction] = {}
    for traced in traces:
        if not traced.training:
            share_of |= _cost_shares(traced, share)
    found = []
    for ran in context.found.contractions:
        if ran.node in share_of:
            found.append(replace(ran, share=share_of[ran.node]))
        elif ran.node.startswith(PYTHON):
            found.append(_of_python(ran, context, share))
    return tuple(found)


def _cost_shares(traced: Trace, share: Fraction) -> dict[str, Fraction]:
    """Return for each node the fraction of its MACs that the example causes.

    It is 1 where a node reads weights alone, because these do not depend on the batch.
    """
    share_of: dict[str, Fraction] = {}
    for node in traced.graph.nodes:
        operands = [share_of[traced.prefix + source.name] for source in node.all_input_nodes]
        share_of[traced.prefix + node.name] = (
            share if node.op == "placeholder" else min(operands, default=Fraction(1))
        )
    return share_of


def _of_python(ran: Contraction, context: Context, share: Fraction) -> Contraction:
    """Return a contraction of Python code with meta tensors in place of its data.

    If Python sees one of its tensors at full width, the tensors carry no labels.
    """
    wide = context.found.full_width[0] if context.found.full_width else np.zeros(0, dtype=np.int64)
    fields = [f for tensor in ran.tensors for f in context.fields(tensor)]
    is_wide = any(np.isin(f.labels, wide).any() for f in fields)

    def as_meta(tensor: Tensor) -> Tensor:
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device=META)
        if not is_wide and context.fields(tensor):
            context.records[made] = Record(made, list(context.fields(tensor)))
        return made

    args, kwargs, out = (map_tensors(as_meta, value) for value in (ran.args, ran.kwargs, ran.out))
    return replace(ran, args=args, kwargs=kwargs, out=out, share=share)


def _positions(record: Record, balance: Balance) -> list[tuple[int, Array]]:
    """Return for each field of a parameter the dimension that shrinks and the labels along it.

    The labels have shape (positions on the other dimensions, size of the dimension).
    """
    positions = []
    for f in record.fields:
        dim = shrinking_dim(f.labels, balance.block)
        size = f.labels.shape[dim]
        last = f.labels if f.labels.size == size else np.moveaxis(f.labels, dim, -1)
        positions.append((dim, last.reshape(-1, size)))
    return positions


def _groups_of(
    context: Context, parameters: dict[str, Tensor], balance: Balance
) -> tuple[tuple[Group, ...], nx.Graph]:
    """Return the groups, in the order of their first axes, and the coupling graph."""
    signature, axes = _signed_axes(context, parameters, balance)
    graph, by_signature = _segments(signature, axes)
    for alike in by_signature.values():
        _connect(graph, alike, context)
    units = np.flatnonzero(signature)
    _connect_cells(graph, by_signature, signature, units, balance)
    units_by_signature = _UnitsBySignature(signature, units, by_signature)
    statistics = _statistics_of(context)
    order = {segment: i for i, segment in enumerate(graph.nodes)}
    groups = []
    for component in nx.connected_components(graph):
        segments = sorted(component, key=order.__getitem__)
        groups.append(_group_of(segments, units_by_signature.on(segments), balance, statistics))
    groups.sort(key=lambda g: order[g.axes[0]])
    return tuple(groups), graph


def _group_of(
    segments: list[Axis], members: Array, balance: Balance, statistics: list[tuple[str, Array]]
) -> Group:
    """Return the group of some units, which lie on these segments."""
    cells = balance.cell[members]
    normalised: dict[str, None] = {}
    for node, labels in statistics:
        if np.isin(members, labels, assume_unique=True).any():
            normalised[node] = None
    return Group(
        str(segments[0]),
        len(members),
        tuple(segments),
        len(np.unique(cells[cells >= 0])),
        tuple(normalised),
        members,
    )


def _statistics_of(context: Context) -> list[tuple[str, Array]]:
    """Return the nodes that take statistics, each with the units these go over, ascending."""
    found = []
    for (node, _), arrays in context.found.statistics.items():
        labels = [context.units.live(array).ravel() for array in arrays]
        found.append((node, np.unique(np.concatenate(labels))))
    return found


class _UnitsBySignature:
    """Look-up of the units that lie on segments.

    Parameters
    ----------
    signature:
        The signature of each label.
    units:
        Labels of all units, ascending.
    by_signature:
        Signature -> segments on which its units lie.
    """

    def __init__(
        self,
        signature: npt.NDArray[np.uint64],
        units: Array,
        by_signature: dict[int, list[tuple[Axis, int]]],
    ) -> None:
        self._units = units
        self._order = np.argsort(signature[units], kind="stable")
        self._sorted = signature[units][self._order]
        self._signatures: dict[Axis, list[int]] = {}
        for key, alike in by_signature.items():
            for segment, _ in alike:
                self._signatures.setdefault(segment, []).append(key)

    def on(self, segments: list[Axis]) -> Array:
        """Return the units on some segments, ascending and read-only."""
        found = {key for segment in segments for key in self._signatures[segment]}
        keys = np.array(sorted(found), dtype=np.uint64)
        starts = np.searchsorted(self._sorted, keys, "left")
        stops = np.searchsorted(self._sorted, keys, "right")
        spans = [self._order[i:j] for i, j in zip(starts, stops, strict=True)]
        members: Array = np.sort(self._units[np.concatenate(spans)])
        members.flags.writeable = False
        return members


def _segments(
    signature: npt.NDArray[np.uint64], axes: list[tuple[str, int, int, Array]]
) -> tuple[nx.Graph, dict[int, list[tuple[Axis, int]]]]:
    """Return the coupling graph without edges, and its segments by signature.

    An axis is cut into segments where the signature changes, that is, where its units lie on
    different sets of axes. Each segment comes with the number of its axis.
    """
    graph: nx.Graph = nx.Graph()
    by_signature: dict[int, list[tuple[Axis, int]]] = {}
    layers: dict[int, int] = {}
    for name, dim, number, rows in axes:
        layer = layers[number] = layers.get(number, -1) + 1
        keys = signature[rows]
        size = keys.shape[1]
        cuts = (np.flatnonzero((keys[:, 1:] != keys[:, :-1]).any(axis=0)) + 1).tolist()
        for start, stop in itertools.pairwise([0, *cuts, size]):
            # there are several keys where blocks of an axis have units of different kinds
            for key in sorted(set(keys[:, start].tolist())):
                if key:
                    segment = Axis(name, dim, start, stop, size, layer)
                    graph.add_node(segment)
                    by_signature.setdefault(key, []).append((segment, number))
    return graph, by_signature


def _signed_axes(
    context: Context, parameters: dict[str, Tensor], balance: Balance
) -> tuple[npt.NDArray[np.uint64], list[tuple[str, int, int, Array]]]:
    """Return the signature of each unit, and all labelled axes.

    The signature is a number that stands for the set of axes on which the unit lies; 0 if there
    are none. An axis is given by its parameter, dimension, number, and rows of labels.
    """
    rng = np.random.default_rng(0)
    signature = np.zeros(context.units.count, dtype=np.uint64)
    axes: list[tuple[str, int, int, Array]] = []
    for name, tensor in parameters.items():
        record = context.record(tensor)
        for dim, rows in _positions(record, balance) if record is not None else ():
            axes.append((name, dim, record.axes[dim], rows))  # type: ignore[union-attr]
            # An axis adds its random number to every label on it, and only once: += with an array
            # of indices ignores repeated ones.
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
    """Connect the segments of cells of one kind: they keep equally many units."""
    celled = units[balance.cell[units] >= 0]
    for kind in np.unique(balance.kind[balance.cell[celled]]) if celled.size else ():
        keys = np.unique(signature[celled[balance.kind[balance.cell[celled]] == kind]]).tolist()
        first = by_signature[keys[0]][0][0]
        for key in keys[1:]:
            graph.add_edge(first, by_signature[key][0][0], nodes=("balance",))


def _connect(graph: nx.Graph, segments: list[tuple[Axis, int]], context: Context) -> None:
    """Connect the segments of one signature, each to the first one.

    An edge names the nodes that tied the two axes directly; none if they are tied through others.
    """
    first, first_number = segments[0]
    for segment, number in segments[1:]:
        pair = (min(first_number, number), max(first_number, number))
        graph.add_edge(first, segment, nodes=tuple(context.edges.get(pair, ())))


def _pins(context: Context, parameters: dict[str, Tensor]) -> tuple[Pinned, ...]:
    """Return the pinned segments of parameter axes, by reason."""
    found: dict[int, list[Axis]] = {}
    for name, tensor in parameters.items():
        record = context.record(tensor)
        for dim, number in enumerate(record.axes if record is not None else ()):
            if number in context.fixed_axes:
                size = tensor.shape[dim]
                reason = context.fixed_axes[number]
                found.setdefault(reason, []).append(Axis(name, dim, 0, size, size))
    for name, tensor in parameters.items():
        record = context.record(tensor)
        for f in record.own_fields if record is not None else ():
            for reason, axis in _pinned_segments(context, name, f):
                found.setdefault(reason, []).append(axis)
    pins = []
    for reason, axes in sorted(found.items()):
        pins.append(Pinned(tuple(dict.fromkeys(axes)), *context.reasons[reason]))
    return tuple(pins)


def _pinned_segments(context: Context, name: str, f: Field) -> Iterator[tuple[int, Axis]]:
    """Yield the segments of a parameter on which a field is pinned, with the reason's number."""
    if not context.units.reasons(f.labels).any():
        return
    for dim in sorted(f.dims):
        size = f.labels.shape[dim]
        reasons = context.units.reasons(np.moveaxis(f.labels, dim, -1).reshape(-1, size)[0])
        cuts = np.flatnonzero(np.diff(reasons)) + 1
        for start, stop in itertools.pairwise([0, *cuts.tolist(), size]):
            if reasons[start]:
                yield int(reasons[start]), Axis(name, dim, start, stop, size)
