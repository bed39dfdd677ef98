"""Groups, balance and pins of a labelled model.

The nodes of the coupling graph are segments of parameter axes. An edge names the fx nodes that
tied its two ends. The connected components are the groups.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction

import networkx as nx
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxprune.common.dispatch import META, map_tensors
from fxprune.coupling.balance import Balance, resolve, shrinking_dim
from fxprune.coupling.labelling import Labelling
from fxprune.coupling.parts import PYTHON
from fxprune.coupling.result import Axis, Coupling, Group, Pinned
from fxprune.labels import Array
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
    # What follows from all splits together is attributed to the last one.
    with context.at(context.sightings[-1].node if context.sightings else ""):
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
            for ran in context.found.contractions
            if ran.node in share_of or ran.node.startswith(PYTHON)
        ),
    )


def _cost_shares(traced: Trace, share: Fraction) -> dict[str, Fraction]:
    """Return for each node the fraction of its MACs that the example causes.

    It is 1 where a node reads weights alone, because these do not depend on the batch.
    """
    out: dict[str, Fraction] = {}
    for node in traced.graph.nodes:
        read = [out[traced.prefix + source.name] for source in node.all_input_nodes]
        out[traced.prefix + node.name] = (
            share if node.op == "placeholder" else min(read, default=Fraction(1))
        )
    return out


def _of_python(ran: Contraction, context: Context, share: Fraction) -> Contraction:
    """Return a contraction of Python code with meta tensors in place of its data.

    If Python sees one of its tensors at full width, the tensors carry no labels.
    """
    wide = context.found.wide[0] if context.found.wide else np.zeros(0, dtype=np.int64)
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
    """Return for each field of a parameter the dimension that shrinks and the labels along it.

    The labels have shape (positions on the other dimensions, size of the dimension).
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
    """Return the groups, in the order of their first axes, and the coupling graph."""
    signature, axes = _signed_axes(context, parameters, balance)
    graph, by_signature = _segments(signature, axes)
    for alike in by_signature.values():
        _connect(graph, alike, context)
    units = np.flatnonzero(signature)
    _connect_cells(graph, by_signature, signature, units, balance)
    statistics = [
        (node, np.unique(np.concatenate([context.units.live(a).ravel() for a in arrays])))
        for (node, _), arrays in context.found.statistics.items()
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
        own = signature[rows]
        cuts = (np.flatnonzero((own[:, 1:] != own[:, :-1]).any(axis=0)) + 1).tolist()
        for start, stop in itertools.pairwise([0, *cuts, own.shape[1]]):
            # there are several keys where blocks of an axis have units of different kinds
            for key in sorted(set(own[:, start].tolist())):
                if key:
                    segment = Axis(name, dim, start, stop, own.shape[1], layer)
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
