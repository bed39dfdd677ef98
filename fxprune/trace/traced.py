"""The result of a trace: the graph of a model or part, and what was learned about it."""

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
    """A traced model or part.

    Attributes
    ----------
    graph:
        The graph. ``node.meta["val"]`` is a node's value for the example: meta tensors, numbers,
        tuples.
    meta_copy:
        The meta copy of the traced module.
    args, kwargs:
        The example's arguments, on the meta device.
    decisions:
        The decisions that Python made by values, one line of text each.
    asked_mode:
        Whether Python decided by ``self.training``.
    training:
        Whether the module was traced in training mode.
    constants:
        The tensors that the graph holds as constants, by name, with their data.
    not_set:
        Paths of attributes that forward sets to values computed from inputs, and that are never
        read.
    stored_nodes:
        Nodes whose values forward has stored outside of its modules.
    missed_lookups:
        Lookups that found nothing.
    filled_keys:
        Dicts and sets, each with a key that forward has stored there.
    path:
        The path of the traced module in the model; empty for the model itself.
    """

    graph: fx.Graph
    meta_copy: MetaCopy
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    decisions: list[str] = field(default_factory=list)
    asked_mode: bool = False
    training: bool = False
    constants: dict[str, Tensor] = field(default_factory=dict)
    not_set: tuple[str, ...] = ()
    stored_nodes: list[fx.Node] = field(default_factory=list)
    missed_lookups: list[Lookup] = field(default_factory=list)
    filled_keys: list[tuple[Any, Any]] = field(default_factory=list)
    path: str = ""

    @property
    def prefix(self) -> str:
        """A prefix for node names that distinguishes this graph from the model's other graphs."""
        return (f"{self.path}:" if self.path else "") + ("train." if self.training else "")

    @property
    def placeholders(self) -> list[Any]:
        """The example's values in the order of the graph's placeholders."""
        return [*self.args, *self.kwargs.values()]

    @property
    def outputs(self) -> Any:
        """The graph's outputs for the example."""
        output = next(iter(reversed(self.graph.nodes)))
        return fx.node.map_arg(output.args[0], lambda node: node.meta["val"])
