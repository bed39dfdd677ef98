"""Rounding in outputs that cancel.

The sum of centred channels is zero except for rounding, so its relative error means nothing. The
original therefore runs again with its weights rounded differently, which shows how far rounding
moves each output. A gap of that size between the models is no error. A fixed threshold would not
work, because the outputs of one model may be as small as the rounding in another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fxprune.verification.comparing import count_tensors, gaps
from fxprune.verification.runs import Run

__all__ = ["EXACT", "Rounding", "bound_rounding", "largest_rounding", "measure_rounding"]

_STEPS = 4096
_MARGIN = 10.0  # the pruned model adds up in another order


@dataclass(frozen=True)
class Rounding:
    """Absolute gaps that rounding alone explains.

    Attributes
    ----------
    outputs:
        The gap of each output tensor, or one gap for all of them.
    buffers:
        The gap of each buffer after the run, by name.
    deciding:
        The gap of the tensors that decide which random numbers are drawn.
    """

    outputs: Sequence[float] | float = 0.0
    buffers: Mapping[str, float] = field(default_factory=dict)
    deciding: float = 0.0


EXACT = Rounding()


def largest_rounding(dtype: torch.dtype) -> float:
    """Return the absolute gap that may remain when terms of order one cancel.

    >>> largest_rounding(torch.float64) < 1e-12
    True
    """
    return _STEPS * torch.finfo(dtype).eps


def bound_rounding(moved: Sequence[float], dtype: torch.dtype) -> float:
    """Return the absolute gap that rounding explains, given how far rounding moved a value.

    >>> bound_rounding([0.0], torch.float64), bound_rounding([1e-20], torch.float64)
    (0.0, 1e-19)
    """
    return min(largest_rounding(dtype), _MARGIN * max(moved, default=0.0))


def measure_rounding(reference: Run, perturbed: Sequence[Run], dtype: torch.dtype) -> Rounding:
    """Return how far rounding moves the outputs and buffers of a run.

    Parameters
    ----------
    reference:
        A run of the original.
    perturbed:
        Runs of the original on the same values, with its weights rounded differently.
    dtype:
        The dtype of the runs.
    """
    number = count_tensors(reference.outputs)
    alike = [run for run in perturbed if count_tensors(run.outputs) == number]
    by_output = zip(*(gaps(run.outputs, reference.outputs) for run in alike), strict=True)
    outputs = [bound_rounding(moved, dtype) for moved in by_output] if alike else 0.0
    buffers: dict[str, float] = {}
    for name, old in reference.buffers.items():
        moved = [gap for run in alike for gap in gaps(run.buffers.get(name, old), old)]
        buffers[name] = bound_rounding(moved, dtype)
    return Rounding(outputs, buffers, largest_rounding(dtype))
