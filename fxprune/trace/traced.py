"""A traced model, or part: its graph, and what it is known by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from fxprune.trace.lookups import Lookup
from fxprune.trace.meta_copy import (
    MetaCopy,
)

__all__ = ["DRAWS", "Trace"]


DRAWS = (
    "forward of this {} draws random numbers from {}, which a graph would hold as constants. "
    "Draw them with torch and hand them on as tensors, or keep that line inside a module of its "
    "own."
)


@dataclass
class Trace:
    """A traced model: the graph, its meta copy, and what tracing had to decide.

    ``graph``'s nodes carry the value they had for the example in ``node.meta["val"]`` (meta
    tensors, ints, tuples). The meta copy is that of the traced module.
    """

    graph: fx.Graph
    meta_copy: MetaCopy
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    decisions: list[str] = field(default_factory=list)
    asked_mode: bool = False
    training: bool = False
    constants: dict[str, Tensor] = field(default_factory=dict)
    # attributes that forward sets to what it computes of inputs, and nothing reads
    not_set: tuple[str, ...] = ()
    # what forward has left outside of its modules
    left: list[fx.Node] = field(default_factory=list)
    missed: list[Lookup] = field(default_factory=list)  # lookups that have found nothing
    # dicts and sets, and keys that forward has put there then
    filled: list[tuple[Any, Any]] = field(default_factory=list)
    path: str = ""  # of the traced module below the model; empty: the model itself

    @property
    def prefix(self) -> str:
        """What tells the nodes of this graph from those of the others, in front of their names."""
        return (f"{self.path}:" if self.path else "") + ("train." if self.training else "")

    @property
    def placeholders(self) -> list[Any]:
        """The example's values in the order of the graph's placeholders."""
        return [*self.args, *self.kwargs.values()]

    @property
    def outputs(self) -> Any:
        """What the graph gave for the example."""
        output = next(iter(reversed(self.graph.nodes)))
        return fx.node.map_arg(output.args[0], lambda node: node.meta["val"])
