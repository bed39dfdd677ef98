"""The types of NumPy's arrays that the selection computes with."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Counts", "Floats"]

Counts: TypeAlias = npt.NDArray[np.int64]
"""How many units of each kind or pool, in whole numbers."""

Floats: TypeAlias = npt.NDArray[np.float64]
"""Scores, costs, times."""
