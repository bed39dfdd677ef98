"""The costs that selection works with: functions of how many units of each kind survive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fxprune.common.arrays import Counts

__all__ = ["TimeCost", "WidthCost"]


class WidthCost(Protocol):
    """The cost of a model as a whole number, given how many units of each kind survive.

    The kinds are those of :class:`~fxprune.select.kinds.Kinds`.
    """

    def at(self, counts: Counts) -> int:
        """Return the cost for these numbers of surviving units, shape (kinds,)."""

    def saved(self, counts: Counts, lost: Counts) -> Counts:
        """Return for each pool how much the cost falls if only this pool loses units.

        Parameters
        ----------
        counts:
            How many units of each kind survive before, shape (kinds,).
        lost:
            How many units of each kind its pool loses, shape (kinds,).

        Returns
        -------
        Counts
            The differences, shape (pools,).
        """


class TimeCost(WidthCost, Protocol):
    """A cost in time that also knows the steps by which pools should shrink.

    The steps lead to widths that the hardware runs well.
    """

    @property
    def steps(self) -> Sequence[int]:
        """For each pool, how many units of each block it should lose at a time."""
