"""Parameter axes, the groups of units on them, and what is pinned."""

from __future__ import annotations

from dataclasses import dataclass, field

from fxprune.common.public import public
from fxprune.labels import Array

__all__ = ["Axis", "Group", "Pinned"]


@public
@dataclass(frozen=True, order=True)
class Axis:
    """A segment of one axis of a parameter or buffer.

    Attributes
    ----------
    parameter:
        Name of the parameter or buffer.
    dim:
        Dimension of the axis.
    start, stop:
        The segment's positions: ``start`` is the first, ``stop`` is one after the last.
    length:
        Size of the whole axis.
    layer:
        Number of the field that labels the segment. It is above 0 where several fields label one
        axis, as on a flattened product of heads and head dimension.

    >>> str(Axis("conv.weight", 0, 0, 64, 64)), str(Axis("fc.weight", 1, 8, 16, 64))
    ('conv.weight:0', 'fc.weight:1[8:16]')
    """

    parameter: str
    dim: int
    start: int
    stop: int
    length: int
    layer: int = 0

    def __hash__(self) -> int:
        return hash((self.parameter, self.dim, self.start, self.layer))

    def __str__(self) -> str:
        whole = self.start == 0 and self.stop == self.length
        part = "" if whole else f"[{self.start}:{self.stop}]"
        return f"{self.parameter}:{self.dim}{part}" + (
            f" (layer {self.layer})" if self.layer else ""
        )


@public
@dataclass(frozen=True)
class Group:
    """Units that compete on the same axes.

    Attributes
    ----------
    name:
        The first axis of the group, as text.
    size:
        Number of units.
    axes:
        Segments of parameter axes on which the units lie.
    blocks:
        Number of balanced blocks, which keep equally many units; 0 if there are none.
    normalised:
        Names of the nodes that take statistics over this group. In the pruned model, these are
        statistics over the survivors.
    units:
        Labels of the units: shape (size,), ascending, read-only.
    """

    name: str
    size: int
    axes: tuple[Axis, ...]
    blocks: int
    normalised: tuple[str, ...]
    units: Array = field(compare=False)

    def __str__(self) -> str:
        balanced = f" in {self.blocks} balanced blocks" if self.blocks else ""
        shown = ", ".join(map(str, self.axes[:6])) + (
            f", ... ({len(self.axes)} in all)" if len(self.axes) > 6 else ""
        )
        return f"{self.size} units{balanced}: {shown}"


@public
@dataclass(frozen=True)
class Pinned:
    """Axes that are never pruned, the reason, and the fx node that gave it."""

    axes: tuple[Axis, ...]
    reason: str
    node: str

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.axes[:4])) + (
            f", ... ({len(self.axes)} in all)" if len(self.axes) > 4 else ""
        )
        return f"{shown}: {self.reason}" + (f" (at {self.node})" if self.node else "")
