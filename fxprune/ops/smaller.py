"""What a corrector may ask of the smaller model while it is written."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor, fx

__all__ = ["KnownExtents", "NewNumbers", "WhatIsLeft"]


class WhatIsLeft(Protocol):
    """What is left of the tensors of the original."""

    def shape(self, tensor: Tensor) -> list[int]:
        """The sizes of what is left of a tensor."""
        ...

    def rows(self, tensor: Any, dim: int) -> npt.NDArray[np.bool_] | None:
        """Which positions of an axis are left, a row for each block of it; None for all."""
        ...

    def count(self, tensor: Any, dim: int, start: int, stop: int) -> int | None:
        """How many positions are left between two; None for all."""
        ...


class KnownExtents(Protocol):
    """How sizes of the smaller model follow from those of the original, for any input."""

    def known(self, node: fx.Node, axis: int) -> bool:
        """Whether anything is known of an axis."""
        ...

    def fixed(self, node: fx.Node, axis: int) -> bool:
        """Whether an axis is the same for every input."""
        ...

    def even(self, tensor: Tensor, axis: int) -> bool:
        """Whether what is left of an axis is one share of all, whatever its size."""
        ...


class NewNumbers(Protocol):
    """The numbers of the graph that is written."""

    @property
    def survivors(self) -> WhatIsLeft: ...

    @property
    def extents(self) -> KnownExtents: ...

    def old(self, value: Any) -> Any:
        """What an argument is in the original, for the example."""
        ...

    def new(self, value: Any) -> Any:
        """What the original's code computes it to be in the smaller model."""
        ...

    def now(self, node: fx.Node) -> fx.Node:
        """The same, as the new graph has it."""
        ...

    def size(self, tensor: fx.Node, axis: int) -> Any:
        """The original's size of an axis: a number, or a node of the new graph."""
        ...

    def sized(self, value: Any, old: Any, wanted: Any, *, even: bool = True) -> Any:
        """A size that was ``old`` and is ``wanted`` now, for the example."""
        ...

    def hold_positions(self, tensor: fx.Node, axis: int, *bounds: Any) -> None:
        """Hold an axis to the example's size, if positions on it are told by numbers that are
        right for that size alone.
        """
        ...

    def create(self, op: str, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        """A node of the new graph that gives a number; ``value`` is the example's."""
        ...
