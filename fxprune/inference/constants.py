"""Nodes that depend on parameters, buffers and the mode only are computed once."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.common.dispatch import DispatchMode
from fxprune.trace import execute

__all__ = ["compute_constants", "new_buffer"]

_NUMBERS = (bool, int, float)


def compute_constants(root: fx.GraphModule, changing: Collection[fx.Node]) -> dict[fx.Node, Any]:
    """Evaluate every node that needs no input.

    Results that other nodes read become buffers, or numbers in their arguments. Calls that draw
    random numbers stay.

    Parameters
    ----------
    root:
        The graph and its module, changed in place.
    changing:
        Nodes whose memory something in the graph writes to; these stay, too (see
        :meth:`fxprune.trace.aliasing.Memory.changing`).

    Returns
    -------
    The constant nodes and their values, including the new buffers.
    """
    constants: dict[fx.Node, Any] = {}
    for node in root.graph.nodes:
        if node.op == "get_attr":
            value = execute(root, node, (), {})
            if node not in changing and isinstance(value, (Tensor, *_NUMBERS)):
                constants[node] = value
        elif node not in changing and _is_computable(node, constants):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), constants.__getitem__)
            with _PurityWatch() as watch:
                value = execute(root, node, args, kwargs)
            if watch.is_pure:
                constants[node] = value
    for node, value in list(constants.items()):
        if isinstance(value, _NUMBERS):
            for user in list(node.users):
                user.args, user.kwargs = _with_literal(node, value, user)
            continue
        is_read = any(user not in constants for user in node.users)
        if is_read and isinstance(value, Tensor) and node.op != "get_attr":
            node.replace_all_uses_with(new_buffer(root, constants, node.name, value))
    return constants


def _is_computable(node: fx.Node, constants: Collection[fx.Node]) -> bool:
    """Tell whether all arguments of a call are constants, and there are some."""
    operands = node.all_input_nodes
    is_call = node.op in ("call_function", "call_method")
    return is_call and bool(operands) and all(operand in constants for operand in operands)


def new_buffer(
    root: fx.GraphModule, constants: dict[fx.Node, Any], name: str, value: Tensor
) -> fx.Node:
    """Register a buffer, and return a new node that reads it at the top of the graph.

    Parameters
    ----------
    root:
        The module that gets the buffer.
    constants:
        The constant nodes and their values; the new node is added.
    name:
        The name of the buffer. If it is taken, a number is appended.
    value:
        The values of the buffer; they are copied.
    """
    names = chain([name], (f"{name}_{i}" for i in count(1)))
    free = next(candidate for candidate in names if not hasattr(root, candidate))
    root.register_buffer(free, value.detach().clone(memory_format=torch.contiguous_format))
    with root.graph.inserting_before(next(n for n in root.graph.nodes if n.op != "placeholder")):
        node = root.graph.get_attr(free)
    node.meta = {"rank": value.dim()}
    constants[node] = value
    return node


def _with_literal(node: fx.Node, value: Any, user: fx.Node) -> Any:
    """Return the arguments of ``user`` with a number in the place of a node."""
    return fx.node.map_arg(
        (user.args, user.kwargs), lambda operand: value if operand is node else operand
    )


class _PurityWatch(DispatchMode):
    """A mode that tells whether operations give the same result each time and change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.is_pure = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.is_pure &= (
            torch.Tag.nondeterministic_seeded not in func.tags and not func._schema.is_mutable
        )
        return func(*args, **(kwargs or {}))
