"""Operations that return their input unchanged outside training."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

__all__ = ["drop_identities"]


def drop_identities(root: fx.GraphModule) -> None:
    """Remove such operations from a graph, in place."""
    for node in list(root.graph.nodes):
        source = _source(root, node)
        if source is not None:
            node.replace_all_uses_with(source)
            root.graph.erase_node(node)


def _source(root: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the argument that a node returns unchanged; None if it does not.

    The function is called with an empty tensor, and must return that very object.
    """
    if len(node.all_input_nodes) != 1 or "rank" not in node.meta:
        return None
    (first,) = node.all_input_nodes
    function: Any
    if node.op == "call_module":
        function = root.get_submodule(str(node.target))
        if not isinstance(function, (nn.Identity, _DropoutNd)):
            return None
    elif node.op == "call_function" and _has_mode(node.target):
        function = node.target
    else:
        return None
    probe = torch.zeros([2] * node.meta["rank"], device="meta")
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: probe)
    try:
        return first if function(*args, **kwargs) is probe else None
    except Exception:  # it does not accept such a probe, and stays
        return None


def _has_mode(function: Any) -> bool:
    """Tell whether a function has a parameter ``training``."""
    try:
        return "training" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a built-in function has no signature
        return False
