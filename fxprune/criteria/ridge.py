"""The penalty of least squares: how much weights are held where they are."""

from __future__ import annotations

import math
from typing import Any

from fxprune.common.numbers import as_number
from fxprune.common.public import short_repr
from fxprune.errors import ArgumentError

__all__ = ["check_ridge", "default_ridge"]


_SAMPLES = 50
"""With this many samples, the penalty weighs as much as the mean square of an input.

On pretrained networks and inputs from other sources than those of the fit, a share between a tenth
and one keeps most, with 200 samples; a share of 1e-4 fits the sources
(``benchmarks/pretrained.py``).
"""


def default_ridge(samples: int) -> float:
    """Return the penalty for this many samples, as a share of the inputs' mean square.

    >>> default_ridge(200)
    0.25
    """
    return _SAMPLES / samples


def check_ridge(ridge: Any) -> float | None:
    """Return ``ridge`` as a number of at least 0, or None if it is None.

    Raises
    ------
    ArgumentError
        If it is neither.
    """
    number = as_number(ridge)
    if ridge is not None and (number is None or not 0 <= number < math.inf):
        raise ArgumentError(
            f"ridge={short_repr(ridge)} must be a number of at least 0, e.g. ridge=0.1."
        )
    return number
