"""Tuples of traced values: the sizes of a tensor, and the pieces that it is cut into."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils._pytree import register_pytree_node

from fxprune.trace.aliasing import name_of

if TYPE_CHECKING:
    from fxprune.trace.tracer import Tracer

__all__ = ["SizeTuple", "TracedPieces", "cuts_tensor"]


class SizeTuple(tuple[Any, ...]):
    """The result of ``x.shape`` while tracing: a tuple with a stand-in for each ``x.size(i)``."""

    @property
    def __class__(self) -> type:
        return torch.Size  # for isinstance(x.shape, torch.Size) in users' code

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise TypeError("the class of a stand-in is fixed")

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return SizeTuple(found) if isinstance(index, slice) else found

    def numel(self) -> Any:
        """Return the product of the sizes."""
        return math.prod(self)

    def __repr__(self) -> str:
        return f"torch.Size([{', '.join(map(repr, self))}])"


class TracedPieces(tuple[Any, ...]):
    """The pieces of a tensor that an operation cuts into a list.

    The number of pieces depends on the tensor's size. Reading it, as ``len`` and iteration do,
    guards it in the graph. ``pieces[0]`` reads that one piece only and needs no guard.
    """

    tracer: Tracer
    fx_node: fx.Node
    counted = False

    def guard_count(self) -> TracedPieces:
        """Guard the number of pieces in the graph, and return these pieces."""
        if not self.counted and not self.tracer.executing:
            self.counted = True
            # before the nodes that read pieces that another input may not have
            with self.tracer.graph.inserting_before(self.fx_node.next):
                int(self.tracer.record("call_function", len, (self.fx_node,), {}))
        return self

    def __len__(self) -> int:
        return tuple.__len__(self.guard_count())

    def __iter__(self) -> Iterator[Any]:
        return tuple.__iter__(self.guard_count())

    def __getitem__(self, index: Any) -> Any:
        first = isinstance(index, int) and 0 <= index < tuple.__len__(self)
        return tuple.__getitem__(self if first else self.guard_count(), index)

    def __add__(self, other: Any) -> Any:
        return tuple.__add__(self.guard_count(), other)

    def __mul__(self, times: Any) -> Any:
        return tuple.__mul__(self.guard_count(), times)


register_pytree_node(SizeTuple, lambda sizes: ([*sizes], None), lambda sizes, _: SizeTuple(sizes))


# pytree functions see the pieces, and rebuild them as a plain tuple
register_pytree_node(
    TracedPieces, lambda pieces: ([*pieces], None), lambda pieces, _: tuple(pieces)
)


def cuts_tensor(node: fx.Node) -> bool:
    """Tell whether an operation cuts a tensor into a list of tensors, as ``split`` does."""
    packet = getattr(torch.ops.aten, name_of(node), None)
    if packet is None:
        return False
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    return any(map(_maps_tensor_to_list, schemas))


def _maps_tensor_to_list(schema: Any) -> bool:
    return (
        bool(schema.arguments and schema.returns)
        and isinstance(schema.arguments[0].type, torch.TensorType)
        and isinstance(schema.returns[0].type, torch.ListType)
    )
