"""Types of the NumPy arrays that the selection computes with."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Counts", "Floats"]

Counts: TypeAlias = npt.NDArray[np.int64]
"""Numbers of units, one for each kind or pool."""

Floats: TypeAlias = npt.NDArray[np.float64]
"""Scores, costs, times."""
