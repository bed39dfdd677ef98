"""The ways in which a comparison can end."""

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
    "describe_error",
    "refuse_rounding",
]


LIMITS = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}
"""The largest relative error that still counts as rounding, by dtype."""


class RefusedError(Exception):
    """The original cannot be run on these values."""


class RoundingError(RefusedError):
    """The original amplifies rounding on these values, so that it cannot be compared."""


class PrunedFailsError(Exception):
    """The pruned model fails where the original runs."""


class GuardedError(Exception):
    """A guard in the pruned model's graph refuses sizes that it was not traced for."""


@dataclass(frozen=True)
class Outcome:
    """The measurements of one comparison of both models.

    Attributes
    ----------
    error:
        The largest relative error over all compared tensors.
    outputs:
        The number of output tensors.
    notes:
        What ran instead of the original's own code, and why. Empty if that code ran.
    """

    error: float
    outputs: int
    notes: tuple[str, ...] = ()


def refuse_rounding(gap: float, moved: float, subject: str) -> None:
    """Raise an error if rounding alone can explain a gap between the models.

    This happens if the original divides by numbers close to zero, which amplifies rounding.

    Parameters
    ----------
    gap:
        The difference between the two models.
    moved:
        How far the same value of the original moves if its weights are rounded differently. If
        this is not finite, nothing is raised.
    subject:
        The name of the value in the message.

    Raises
    ------
    RoundingError
        If the gap is not much larger than ``moved``.
    """
    if math.isfinite(moved) and gap <= _AMPLIFIED * moved:
        raise RoundingError(
            f"rounding alone moves {subject} by {moved:.1e}, so that it cannot be compared"
        )


_AMPLIFIED = 10.0
"""How many times larger than ``moved`` a gap may be and still count as amplified rounding."""


def describe_error(error: Exception) -> str:
    """Return a text for messages: the error, and the user's line where it was raised."""
    where = user_line(traceback.extract_tb(error.__traceback__))
    return f"{type(error).__name__}: {error} (at {where})"
