"""Families of operations that differ only in their widths, measured together."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from fxprune.common.arrays import Counts, Floats
from fxprune.latency.layers import Layer
from fxprune.latency.surface import Surface, grid
from fxprune.latency.table import Table

__all__ = ["LayerFamily", "ScaledSizes"]

_WIDTH_STEPS = (1, 2, 4, 8, 16, 32)
# the hardware does not like a width that takes this many times as long as the widths around it
_WORSE = 1.05


@dataclass(frozen=True)
class ScaledSizes:
    """Sizes of an operation that shrink in proportion to each other.

    Attributes
    ----------
    base:
        Number of the smallest of these sizes.
    full:
        Value of that size in the dense model.
    step:
        Smallest amount by which that size can shrink. It can be above one, because a dimension of
        several blocks loses one position from each block at once.
    multiples:
        For the number of each size the ratio of its value to that of ``base``.
    """

    base: int
    full: int
    step: int
    multiples: Mapping[int, float]

    @property
    def steps(self) -> int:
        """Number of steps in the full size; the last one to remain may be smaller."""
        return -(-self.full // self.step)

    def sizes(self, left: int) -> dict[int, int]:
        """Return the value of each size if ``left`` steps are left."""
        value = self.full - self.step * (self.steps - left)
        return {number: round(value * multiple) for number, multiple in self.multiples.items()}


@dataclass
class LayerFamily:
    """Operations that differ only in their widths.

    Attributes
    ----------
    layer:
        One of the operations.
    table:
        Where the times are looked up and stored.
    device:
        Where the operations run.
    axes:
        The axes of each operation.
    """

    layer: Layer
    table: Table
    device: torch.device
    axes: list[list[ScaledSizes]] = field(default_factory=list)
    _surface: Surface | None = None

    @property
    def widest(self) -> list[ScaledSizes]:
        """The axes of ``layer``, each as long as the longest of all operations."""
        out = []
        for place, axis in enumerate(self.axes[0]):
            out.append(replace(axis, full=max(axes[place].full for axes in self.axes)))
        return out

    @property
    def numbers(self) -> Counts:
        """Numbers of the sizes on which the operations depend, shape (operations, axes)."""
        return np.array([[axis.base for axis in axes] for axes in self.axes])

    def at(self, widths: Floats) -> Floats:
        """Return the time of an operation at n combinations of widths, in milliseconds.

        ``widths`` has the shape (n, axes), and the result has the shape (n,). Call :meth:`measure`
        first.
        """
        assert self._surface is not None
        return self._surface.at(widths)

    def measure(self) -> None:
        """Time the operation on a grid of widths that ends at the widest of all operations."""
        widest = self.widest
        widths, steps_left = [], []
        for axis in widest:
            steps = grid(axis.steps, len(widest))
            widths.append([axis.sizes(left)[axis.base] for left in steps])
            steps_left.append(dict(zip(widths[-1], steps, strict=True)))

        def ms(point: tuple[int, ...], again: bool = False) -> float:
            """Return the time at a point of the grid, in milliseconds."""
            left = [steps[width] for steps, width in zip(steps_left, point, strict=True)]
            return self.ms(left, again)

        self._surface = Surface(widths, ms, functools.partial(ms, again=True))

    def ms(self, left: Sequence[int], again: bool = False) -> float:
        """Return the time if ``left`` has the remaining steps of each axis, in milliseconds.

        See :meth:`Table.ms` for ``again``.
        """
        sizes: dict[int, int] = {}
        for axis, steps in zip(self.widest, left, strict=True):
            sizes.update(axis.sizes(steps))
        return self.table.ms(
            self.layer.description(sizes),
            lambda: self.layer.prepared(sizes, self.device),
            again=again,
        )

    def preferred_step(self, place: int) -> int:
        """Return the smallest step along an axis that suits the hardware.

        A step s suits the hardware if widths that are multiples of s, but not of 2s, take hardly
        longer than a linear interpolation between two widths of a much coarser step.

        Parameters
        ----------
        place:
            Index of the axis.

        Returns
        -------
        The step, in steps of the axis.
        """
        full = [axis.steps for axis in self.widest]
        coarse = _coarse_step(full[place])
        top = min(full[place] * 3 // 4 // coarse + 1, full[place] // coarse) * coarse
        if top <= coarse:
            return 1

        def ms(left: int) -> float:
            """Return the time in milliseconds if ``left`` steps of the axis are left."""
            return self.ms([*full[:place], left, *full[place + 1 :]])

        high, low = ms(top), ms(top - coarse)
        for step in _WIDTH_STEPS:
            if 2 * step > coarse:
                break
            # two widths that lie symmetrically, so that their interpolated times add up to both
            if ms(top - step) + ms(top - coarse + step) <= _WORSE * (high + low):
                return step
        return coarse // 2


def _coarse_step(full: int) -> int:
    """Return the largest power of two, from 2 to 64, that fits at least twice into ``full``."""
    coarse = 2 * _WIDTH_STEPS[-1]
    while coarse > 2 and full < 2 * coarse:
        coarse //= 2
    return coarse
