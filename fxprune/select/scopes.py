"""Scopes: sets of groups whose units are ranked against each other."""

from __future__ import annotations

from collections.abc import Mapping

import networkx as nx
from torch import nn

from fxprune.common.identity import IdentityMap
from fxprune.coupling import Axis, Coupling, Group
from fxprune.ops.table import name_of_op
from fxprune.select.matching import value_of_groups

__all__ = ["ISOMORPHIC", "isomorphism_classes", "scopes_of"]

ISOMORPHIC = "isomorphic"


def scopes_of(coupling: Coupling, scopes: str | Mapping[str, tuple[str, ...]] | None) -> list[int]:
    """Return the number of the scope of each group.

    Parameters
    ----------
    coupling:
        The analysis.
    scopes:
        ``"isomorphic"``, or a mapping from the names of scopes to globs; None for a single scope.
        The last glob that matches a group counts. Groups that none matches form one more scope.

    Raises
    ------
    ArgumentError
        If a glob matches no group.
    """
    if scopes is None:
        return [0] * len(coupling.groups)
    if isinstance(scopes, str):
        return isomorphism_classes(coupling)
    pairs = []
    for number, globs in enumerate(scopes.values(), start=1):
        pairs += [(glob, number) for glob in globs]
    found = value_of_groups(coupling, "scopes", pairs)
    return [found.get(group, 0) for group in range(len(coupling.groups))]


def isomorphism_classes(coupling: Coupling) -> list[int]:
    """Return a number for each group; groups of isomorphic structure have the same.

    The nodes of a group's graph are the axes on which its units lie. An edge ties two axes that
    met in an operation. An isomorphism keeps the edges and, for every axis, its role
    (:meth:`Coupling.role`), its dimension, the number of dimensions of the parameter, whether that
    is a parameter or a buffer, and the operations that contract it. Balanced groups (heads,
    grouped convolutions) are isomorphic to balanced ones only. Sizes and names do not count.

    Notes
    -----
    Fang et al., "Isomorphic Pruning for Vision Models", ECCV 2024.
    """
    contracted = _contractions_by_tensor(coupling)
    neighbours = _neighbours(coupling)
    known: list[tuple[bool, nx.Graph]] = []
    numbers = []
    for group in coupling.groups:
        is_balanced, graph = group.blocks > 0, _structure(coupling, group, contracted, neighbours)
        for number, (balanced, other) in enumerate(known):
            if balanced == is_balanced and _is_isomorphic(graph, other):
                numbers.append(number)
                break
        else:
            numbers.append(len(known))
            known.append((is_balanced, graph))
    return numbers


def _is_isomorphic(one: nx.Graph, other: nx.Graph) -> bool:
    """Tell whether two graphs are isomorphic, labels of nodes included."""
    return bool(nx.vf2pp_is_isomorphic(one, other, node_label="label"))


def _contractions_by_tensor(coupling: Coupling) -> dict[str, set[str]]:
    """Return for the name of each parameter the operations that contract it."""
    names = IdentityMap((tensor, name) for name, tensor in coupling.parameters.items())
    found: dict[str, set[str]] = {}
    for ran in coupling.contractions:
        for tensor in ran.read:
            if tensor in names:
                found.setdefault(names[tensor], set()).add(name_of_op(ran.func))
    return found


def _neighbours(coupling: Coupling) -> dict[int, set[int]]:
    """Return for the number of each parameter axis those of the axes that it met."""
    found: dict[int, set[int]] = {}
    for one, other in coupling.context.edges:
        found.setdefault(one, set()).add(other)
        found.setdefault(other, set()).add(one)
    return found


def _structure(
    coupling: Coupling,
    group: Group,
    contracted: Mapping[str, set[str]],
    neighbours: Mapping[int, set[int]],
) -> nx.Graph:
    """Return the graph of a group: its axes with their labels, and edges where they met."""
    graph = nx.Graph()
    by_number: dict[int, list[Axis]] = {}
    for axis in group.axes:
        tensor = coupling.parameters[axis.parameter]
        record = coupling.context.record(tensor)
        assert record is not None  # every axis of a group has labels
        by_number.setdefault(record.axes[axis.dim], []).append(axis)
        label = (
            coupling.role(axis.parameter, axis.dim),
            axis.dim,
            tensor.dim(),
            isinstance(tensor, nn.Parameter),
            tuple(sorted(contracted.get(axis.parameter, ()))),
        )
        graph.add_node(axis, label=label)
    for number, axes in by_number.items():
        for other in neighbours.get(number, set()) & by_number.keys():
            graph.add_edges_from((a, b) for a in axes for b in by_number[other])
    return graph
