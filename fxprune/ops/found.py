"""What a labelled run has found, beside the labels themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fxprune.labels import Array
from fxprune.ops.records import Contraction, Event

__all__ = ["Found"]


@dataclass
class Found:
    """What ran, and what has to hold for it in the smaller model.

    Nodes are named as in the graph, with the prefix of their part.

    Attributes
    ----------
    ran:
        Node -> the ops that it ran, with their arguments.
    events:
        Ops that a run with data has to know again, in the order of execution.
    contractions:
        Everything that costs multiply-accumulates.
    statistics:
        (Node, how many-th in it) -> labels whose elements leave the statistics that it takes.
    noted:
        Of the op that runs: labels of its input that its statistics go over.
    rescaled:
        Nodes that are a mean or a variance -> labels of the averaged elements.
    moved:
        Nodes in which labelled positions were laid out anew.
    positional:
        Nodes with an op that tells positions apart: these, slices, groups, look-ups.
    writes:
        Nodes with an op that writes into a tensor or draws random numbers.
    summed_axes:
        Numbers of the parameter axes that a contraction sums over: what a consumer reads.
    summed_groups:
        Nodes with a convolution whose groups sum over several input channels.
    scale_axes:
        Numbers of the axes of normalisations' scales.
    heads:
        Fields that a product of activations sums over, head by head, along what.
    pairs:
        Labels of which every block keeps two, because of one value alone no statistic is taken.
    wide:
        Labels of axes that Python code, which is not traced, has to see as wide as they were.
    trusted:
        Ops whose rules the user gave: what they say is to be proved.
    """

    ran: dict[str, list[tuple[Any, tuple[Any, ...], dict[str, Any]]]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    statistics: dict[tuple[str, int], list[Array]] = field(default_factory=dict)
    noted: tuple[Array, ...] = ()
    rescaled: dict[str, list[Array]] = field(default_factory=dict)
    moved: set[str] = field(default_factory=set)
    positional: set[str] = field(default_factory=set)
    writes: set[str] = field(default_factory=set)
    summed_axes: set[int] = field(default_factory=set)
    summed_groups: set[str] = field(default_factory=set)
    scale_axes: set[int] = field(default_factory=set)
    heads: list[tuple[Array, list[int]]] = field(default_factory=list)
    pairs: list[Array] = field(default_factory=list)
    wide: list[Array] = field(default_factory=list)
    trusted: set[str] = field(default_factory=set)
    _statistics_in_node: dict[str, int] = field(default_factory=dict)

    def note_statistic(self, node: str, labels: list[Array], taken: bool) -> None:
        """A node's op goes over these labels; ``taken=False``: in another mode than this."""
        self.noted = tuple(labels)
        index = self._statistics_in_node.get(node, 0)
        self._statistics_in_node[node] = index + 1
        if labels and taken:
            self.statistics[node, index] = labels
