"""What a labelled run finds out besides the labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fxprune.labels import Array
from fxprune.ops.records import Contraction, Event

__all__ = ["Found"]


@dataclass
class Found:
    """The ops that ran, and constraints on them in the smaller model.

    Nodes are named as in the graph, with the prefix of their part.

    Attributes
    ----------
    ran:
        Node -> the ops that it ran, with their arguments.
    events:
        Ops that a run with data must recognise, in the order of execution.
    contractions:
        All ops that cost multiply-accumulates.
    statistics:
        (Node, index of the statistic in it) -> labels whose removed elements leave the statistic.
    current_statistic:
        For the op that runs now: labels of its input over which it takes statistics.
    rescaled:
        Node that is a mean or a variance -> labels of the averaged elements.
    moved:
        Nodes that move labelled positions and do not commute with removal.
    positional:
        Nodes with an op that does not commute with removal, such as a slice, a grouped
        convolution or a look-up.
    writes:
        Nodes with an op that writes into a tensor or draws random numbers.
    summed_axes:
        Numbers of the parameter axes that a contraction sums over.
    summed_groups:
        Nodes with a convolution whose groups sum over several input channels.
    scale_axes:
        Numbers of the axes of the scales of normalisations.
    heads:
        Labels of activations whose product is summed over some of their dimensions only, with
        those dimensions: the channels of attention heads.
    keep_two:
        Labels of which every block keeps two, because one value alone has no statistic.
    full_width:
        Labels of axes that untraced Python code must see at full width.
    custom_rules:
        Ops whose rules the user registered. Models with such ops are proved.
    """

    ran: dict[str, list[tuple[Any, tuple[Any, ...], dict[str, Any]]]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    statistics: dict[tuple[str, int], list[Array]] = field(default_factory=dict)
    current_statistic: tuple[Array, ...] = ()
    rescaled: dict[str, list[Array]] = field(default_factory=dict)
    moved: set[str] = field(default_factory=set)
    positional: set[str] = field(default_factory=set)
    writes: set[str] = field(default_factory=set)
    summed_axes: set[int] = field(default_factory=set)
    summed_groups: set[str] = field(default_factory=set)
    scale_axes: set[int] = field(default_factory=set)
    heads: list[tuple[Array, list[int]]] = field(default_factory=list)
    keep_two: list[Array] = field(default_factory=list)
    full_width: list[Array] = field(default_factory=list)
    custom_rules: set[str] = field(default_factory=set)
    _statistics_in_node: dict[str, int] = field(default_factory=dict)

    def note_statistic(self, node: str, labels: list[Array], taken: bool) -> None:
        """Note that a node's op takes a statistic over elements with these labels.

        ``taken=False`` means that the op takes it in the other mode only (training or evaluation).
        """
        self.current_statistic = tuple(labels)
        index = self._statistics_in_node.get(node, 0)
        self._statistics_in_node[node] = index + 1
        if labels and taken:
            self.statistics[node, index] = labels
