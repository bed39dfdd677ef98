"""The time of an operation as a function of its widths, interpolated on a measured grid."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from fxprune.common.arrays import Floats

__all__ = ["Surface", "grid"]

_EIGHTHS = {1: (1, 2, 3, 4, 6, 8), 2: (1, 2, 3, 4, 6, 8), 3: (2, 5, 8)}
"""For each number of axes of a grid, the eighths of the full size at which to measure."""

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
        indices = list(np.ndindex(self.values.shape))
        for index in indices:
            self.values[index] = ms(tuple(axis[i] for axis, i in zip(axes, index, strict=True)))
        if again is None:
            return
        for index in indices:
            point = tuple(axis[i] for axis, i in zip(axes, index, strict=True))
            with_more_work = self.values[tuple(slice(i, None) for i in index)]
            if self.values[index] > _LATE * with_more_work.min():
                self.values[index] = again(point)

    def at(self, sizes: Floats) -> Floats:
        """Return the time at n points, in milliseconds, shape (n,).

        ``sizes`` are the points, shape (n, axes).
        """
        neighbours, fractions = [], []
        for axis, column in zip(self.axes, sizes.T, strict=True):
            if len(axis) == 1:
                neighbours.append(np.zeros((2, len(column)), dtype=np.int64))
                fractions.append(np.zeros(len(column)))
                continue
            low = np.clip(np.searchsorted(axis, column, side="right") - 1, 0, len(axis) - 2)
            neighbours.append(np.stack([low, low + 1]))
            fractions.append((column - axis[low]) / (axis[low + 1] - axis[low]))
        out = np.zeros(len(sizes))
        for sides in itertools.product((0, 1), repeat=len(self.axes)):
            weight = np.ones(len(sizes))
            for side, fraction in zip(sides, fractions, strict=True):
                weight = weight * (fraction if side else 1 - fraction)
            corner = tuple(pair[side] for pair, side in zip(neighbours, sides, strict=True))
            out += weight * self.values[corner]
        return np.maximum(out, 0.0)
