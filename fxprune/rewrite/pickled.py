"""Graphs as plain data that can be pickled: the form in which ``torch.save`` stores a model.

``torch.fx`` pickles the generated code and traces it again. That would lose the graph of the
second mode and regions without gradients, and calls would be traced instead of kept as they are.
Here every node is stored as it is.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

__all__ = ["pack", "unpack"]

_PACKED_AS_IS = (bool, int, float, str)


@dataclass(frozen=True)
class _Place:
    """A reference to a node by its position in the graph."""

    index: int


@dataclass(frozen=True)
class _Made:
    """A function without a name, stored as the call that makes it."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


@dataclass(frozen=True)
class _Op:
    """An operation of ``torch.ops``, stored by its name, such as ``aten.relu.default``.

    The operation itself cannot be pickled.
    """

    path: str


def pack(graph: fx.Graph) -> list[dict[str, Any]]:
    """Return the nodes of a graph in order, each as a dict; :func:`unpack` is the inverse.

    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> _ = graph.output(graph.call_function(torch.ops.aten.relu.default, (x,)))
    >>> str(unpack(pack(graph))) == str(graph)
    True
    """
    places = {node: _Place(index) for index, node in enumerate(graph.nodes)}
    return [_pack_node(node, places) for node in graph.nodes]


def _pack_node(node: fx.Node, places: Mapping[fx.Node, _Place]) -> dict[str, Any]:
    """Return a node as a dict."""
    as_data = functools.partial(_as_data, places=places)
    return {
        "name": node.name,
        "op": node.op,
        "target": as_data(node.target),
        "args": map_aggregate(node.args, as_data),
        "kwargs": map_aggregate(node.kwargs, as_data),
        "type_expr": node.type,
        "meta": {
            key: value for key, value in node.meta.items() if isinstance(value, _PACKED_AS_IS)
        },
    }


def _as_data(value: Any, places: Mapping[fx.Node, _Place]) -> Any:
    """Return a target or an argument in a form that can be pickled."""
    if isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return _Op(str(value))
    if isinstance(value, types.FunctionType) and hasattr(value, "made_by"):
        return _Made(*value.made_by)
    return places[value] if isinstance(value, fx.Node) else value


def unpack(packed: list[dict[str, Any]]) -> fx.Graph:
    """Return the graph that :func:`pack` stored."""
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    restored = functools.partial(_restored, nodes=nodes)
    for entry in packed:
        args, kwargs = (map_aggregate(entry[key], restored) for key in ("args", "kwargs"))
        target = restored(entry["target"])
        node = graph.create_node(
            entry["op"], target, args, kwargs, entry["name"], entry["type_expr"]
        )
        node.meta = dict(entry["meta"])
        nodes.append(node)
    return graph


def _restored(value: Any, nodes: Sequence[fx.Node]) -> Any:
    """Return the target or argument that :func:`_as_data` stored, given the nodes before it."""
    if isinstance(value, _Made):
        return value.function(*value.args)
    if isinstance(value, _Op):
        found: Any = torch.ops
        for name in value.path.split("."):
            found = getattr(found, name)
        return found
    return nodes[value.index] if isinstance(value, _Place) else value
