"""How a comparison ends."""

from __future__ import annotations

import math
import traceback
from dataclasses import dataclass

import torch

from fxprune.trace import user_line

__all__ = [
    "LIMITS",
    "GuardedError",
    "Outcome",
    "PrunedFailsError",
    "RefusedError",
    "RoundingError",
    "refuse_rounding",
    "said",
]


LIMITS = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}
"""The relative error from which on a difference is no rounding."""


class RefusedError(Exception):
    """The original cannot be run on these values."""


class RoundingError(RefusedError):
    """What the original gives on these values is rounding, amplified."""


class PrunedFailsError(Exception):
    """The pruned model cannot be run where the original can."""


class GuardedError(Exception):
    """The pruned model's graph says that it was traced for other sizes."""


@dataclass(frozen=True)
class Outcome:
    """What was measured in one run of each model."""

    error: float
    outputs: int
    notes: tuple[str, ...] = ()  # what stood for the original's own code, and why


def refuse_rounding(gap: float, moved: float, what: str) -> None:
    """Say so where a gap between the models is one that rounding alone makes, in an original that
    divides what is nearly nothing.

    Raises
    ------
    RoundingError
    """
    if math.isfinite(moved) and gap <= _AMPLIFIED * moved:
        raise RoundingError(
            f"rounding alone moves {what} by {moved:.1e}, so that it cannot be compared"
        )


_AMPLIFIED = 10.0
"""So many times as far two runs may be apart as one whose weights are rounded otherwise."""


def said(error: Exception) -> str:
    """An error with the user's line, for a message."""
    where = user_line(traceback.extract_tb(error.__traceback__))
    return f"{type(error).__name__}: {error} (at {where})"
