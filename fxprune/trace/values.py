"""Stand-ins: objects that represent the values of nodes while a model is traced.

A stand-in belongs to a node of the graph and knows the node's value for the example. Tensors have
no data.

The stand-in for a tensor *is* a tensor: a wrapper subclass on the meta device, without memory. It
can be passed to C++ like any tensor. Python's calls are recorded in ``__torch_function__``, as
calls of torch's Python functions. Calls that do not pass there (by scripted functions, ``vmap`` or
extensions) are recorded in ``__torch_dispatch__``, as calls of ATen operations. Access to its
memory is an error.

The stand-ins for numbers are ``torch.SymInt``, ``SymFloat`` and ``SymBool``, which torch's
functions accept as numbers. They also accept the stand-ins for devices and dtypes.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxprune.errors import TraceError
from fxprune.trace.user_code import user_line

if TYPE_CHECKING:
    from fxprune.trace.tracer import Tracer
from fxprune.trace.numbers import TracedBool, TracedDevice, TracedDtype, TracedFloat, TracedInt
from fxprune.trace.sequences import SizeTuple, TracedPieces, cuts_tensor
from fxprune.trace.tensors import TracedTensor

__all__ = ["stand_in"]


_TRACED_KINDS: dict[type, Any] = {
    bool: TracedBool,
    int: TracedInt,
    float: TracedFloat,
    torch.device: TracedDevice,
    torch.dtype: TracedDtype,
}


def stand_in(node: fx.Node, tracer: Tracer) -> Any:
    """Return a stand-in for the value of a node.

    A container is returned as a container with a stand-in for each entry. None, text and other
    constants are returned as they are.

    Raises
    ------
    TraceError
        If a graph cannot follow a value of this type.
    """
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return TracedTensor(node, tracer)
    kind = _TRACED_KINDS.get(type(value))
    if isinstance(value, torch.dtype) and not (value.is_floating_point or value.is_complex):
        return value  # converting the model to another dtype does not change it
    if kind is not None:
        return kind(node, tracer)
    if isinstance(value, (tuple, list)):
        entries = [_entry(node, tracer, place) for place in range(len(value))]
        return _sequence(node, tracer, entries)
    if isinstance(value, dict):
        pairs = {key: _entry(node, tracer, key) for key in value}
        return pairs if type(value) is dict else type(value)(pairs)
    if value is None or isinstance(value, (str, complex, torch.layout, torch.memory_format)):
        return value
    raise TraceError(
        f"{node.name!r} gives a {type(value).__name__} (at {user_line()}), which a graph cannot "
        "follow."
    )


def _entry(node: fx.Node, tracer: Tracer, key: Any) -> Any:
    """Record a read of an entry of a node's value."""
    return tracer.record("call_function", operator.getitem, (node, key), {})


def _sequence(node: fx.Node, tracer: Tracer, entries: list[Any]) -> Any:
    """Return a tuple or list like a node's value, with these entries."""
    value = node.meta["val"]
    if isinstance(value, torch.Size):
        return SizeTuple(entries)
    if type(value) in (tuple, list) and cuts_tensor(node):
        pieces = TracedPieces(entries)
        pieces.tracer, pieces.fx_node = tracer, node
        return pieces
    return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
