"""Protocols of the questions that a corrector asks while the smaller model is written."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor, fx

__all__ = ["KnownExtents", "NewNumbers", "SurvivorCounts"]


class SurvivorCounts(Protocol):
    """The surviving elements of the original's tensors."""

    def shape(self, tensor: Tensor) -> list[int]:
        """Return the shape of a tensor in the smaller model."""
        ...

    def rows(self, tensor: Any, dim: int) -> npt.NDArray[np.bool_] | None:
        """Return which positions of an axis survive, a row per block; None if all survive."""
        ...

    def count(self, tensor: Any, dim: int, start: int, stop: int) -> int | None:
        """Return how many positions in ``start:stop`` survive; None if the axis loses nothing."""
        ...


class KnownExtents(Protocol):
    """How sizes in the smaller model follow from the original's sizes, for any input."""

    def is_known(self, node: fx.Node, axis: int) -> bool:
        """Tell whether anything is known about the size of an axis."""
        ...

    def is_fixed(self, node: fx.Node, axis: int) -> bool:
        """Tell whether the size of an axis is the same for every input."""
        ...

    def has_equal_shares(self, tensor: Tensor, axis: int) -> bool:
        """Tell whether the same share of an axis survives, whatever its size."""
        ...


class NewNumbers(Protocol):
    """The numbers in the new graph."""

    @property
    def survivors(self) -> SurvivorCounts:
        """The surviving elements of the original's tensors."""
        ...

    @property
    def extents(self) -> KnownExtents:
        """How sizes follow from the original's sizes."""
        ...

    def old_value(self, value: Any) -> Any:
        """Return the value of an argument in the original, for the example input."""
        ...

    def new_value(self, value: Any) -> Any:
        """Return the value that the original's code computes in the smaller model."""
        ...

    def new_node(self, node: fx.Node) -> fx.Node:
        """Return the node of the new graph that computes the value of :meth:`new_value`."""
        ...

    def original_size(self, tensor: fx.Node, axis: int) -> Any:
        """Return the original's size of an axis, as a number or as a node of the new graph."""
        ...

    def new_size(self, value: Any, old: Any, wanted: Any, *, even: bool = True) -> Any:
        """Return a size that is ``old`` in the original and ``wanted`` in the smaller model.

        Parameters
        ----------
        value:
            The original's size: a literal, or a node.
        old, wanted:
            The sizes for the example input.
        even:
            Whether ``wanted`` is the same share of ``old`` for inputs of any size.
        """
        ...

    def hold_positions(self, tensor: fx.Node, axis: int, *bounds: Any) -> None:
        """Make the graph check that an axis has the example's size.

        It is needed where numbers that name positions on the axis are right for that size only.
        ``bounds`` are such numbers; they are checked as well.
        """
        ...

    def create(self, op: str, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        """Create a node of the new graph that computes a number, ``value`` for the example."""
        ...
