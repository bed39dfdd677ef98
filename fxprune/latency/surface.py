"""The time of an operation as a function of its widths, interpolated on a measured grid."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["Surface", "grid"]
from fxprune.common.arrays import Floats

_EIGHTHS = {1: (1, 2, 3, 4, 6, 8), 2: (1, 2, 3, 4, 6, 8), 3: (2, 5, 8)}
"""For each number of axes of a grid, the eighths of the full size at which to measure.
"""

# An operation is measured again if it takes this many times as long as one with more work.
_LATE = 1.15


def grid(full: int, axes: int) -> tuple[int, ...]:
    """Return the sizes along an axis at which to measure, in ascending order.

    They are eighths of the full size, and the last one is the full size. If the full size is 16 or
    more, the others are rounded up to multiples of a power of two.

    Parameters
    ----------
    full:
        The full size.
    axes:
        Number of axes of the grid. With three axes there are fewer sizes per axis.

    Examples
    --------
    >>> grid(512, 2), grid(24, 2), grid(3, 1), grid(100, 3)
    ((64, 128, 192, 256, 384, 512), (4, 6, 10, 12, 18, 24), (1, 2, 3), (32, 64, 100))
    """
    step = 1
    while step < 32 and full >= 16 * step:
        step *= 2
    eighths = _EIGHTHS.get(axes, _EIGHTHS[3])
    return tuple(sorted({min(-(-full * k // 8 // step) * step or step, full) for k in eighths}))


class Surface:
    """The time of an operation as a function of its sizes, piecewise linear on a grid.

    Outside the grid the function is extrapolated linearly, but it is never negative.

    Parameters
    ----------
    axes:
        For each axis of the grid its sizes, in ascending order.
    ms:
        Returns the time at a point of the grid, in milliseconds. It receives one size per axis.
    again:
        Measures a point once more, and returns the least of its times. It is called for points
        that took longer than points with more work: either the device is like that, or something
        else delayed the measurement.

    Examples
    --------
    >>> plane = Surface([(2, 4), (1, 3)], lambda sizes: sizes[0] + 10.0 * sizes[1])
    >>> plane.at(np.array([[3.0, 2.0], [4.0, 3.0], [1.0, 1.0]])).tolist()
    [23.0, 34.0, 11.0]
    """

    def __init__(
        self,
        axes: Sequence[Sequence[int]],
        ms: Callable[[tuple[int, ...]], float],
        again: Callable[[tuple[int, ...]], float] | None = None,
    ) -> None:
        self.axes = [np.array(axis, dtype=np.float64) for axis in axes]
        self.values = np.zeros([len(axis) for axis in axes])
        points = list(np.ndindex(self.values.shape))
        for point in points:
            self.values[point] = ms(tuple(axis[i] for axis, i in zip(axes, point, strict=True)))
        if again is None:
            return
        for point in points:
            larger = self.values[tuple(slice(i, None) for i in point)]
            if self.values[point] > _LATE * larger.min():
                self.values[point] = again(
                    tuple(axis[i] for axis, i in zip(axes, point, strict=True))
                )

    def at(self, sizes: Floats) -> Floats:
        """Return the time at n points, in milliseconds, shape (n,).

        ``sizes`` are the points, shape (n, axes).
        """
        corners, parts = [], []
        for axis, own in zip(self.axes, sizes.T, strict=True):
            if len(axis) == 1:
                corners.append(np.zeros((2, len(own)), dtype=np.int64))
                parts.append(np.zeros(len(own)))
                continue
            low = np.clip(np.searchsorted(axis, own, side="right") - 1, 0, len(axis) - 2)
            corners.append(np.stack([low, low + 1]))
            parts.append((own - axis[low]) / (axis[low + 1] - axis[low]))
        out = np.zeros(len(sizes))
        for choice in itertools.product((0, 1), repeat=len(self.axes)):
            weight = np.ones(len(sizes))
            for side, part in zip(choice, parts, strict=True):
                weight = weight * (part if side else 1 - part)
            out += (
                weight
                * self.values[
                    tuple(corner[side] for corner, side in zip(corners, choice, strict=True))
                ]
            )
        return np.maximum(out, 0.0)
