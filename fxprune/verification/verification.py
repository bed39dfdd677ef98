"""The result of a proof."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxprune.common.public import public
from fxprune.verification.outcomes import (
    LIMITS,
)

__all__ = ["Verification"]


@public
@dataclass(frozen=True)
class Verification:
    """The result of a proof.

    Attributes
    ----------
    error:
        The relative error ``||out - reference|| / ||reference||``, the largest over the outputs
        and over all compared situations. NaN if only the structure was checked.
    outputs:
        The number of output tensors compared for the example.
    dtype:
        The dtype in which both models ran: float32 if an operation of the model does not support
        float64.
    compared:
        The situations in which both models agree.
    left_out:
        The situations that could not be compared, each with the reason, and those in which the
        traced graph ran instead of the original's code.
    """

    error: float
    outputs: int
    dtype: torch.dtype
    compared: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def limit(self) -> float:
        """The largest error that still counts as rounding in this dtype."""
        return LIMITS.get(self.dtype, LIMITS[torch.float32])

    def __str__(self) -> str:
        return (
            f"relative error {self.error:.1e} over {self.outputs} outputs in "
            f"{str(self.dtype).removeprefix('torch.')}"
        )
