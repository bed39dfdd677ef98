"""The base of all penalties: a term of the loss whose strength follows a schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from fxprune.common.public import public, short_repr
from fxprune.errors import ArgumentError
from fxprune.training.schedules import Schedule, as_schedule, value_at

__all__ = ["Penalty", "checked_unit_strengths", "weighted_sum"]


@public
class Penalty(ABC):
    """A term of the loss: call it for its value, and call :meth:`step` after each update.

    This is the base of all penalties. One of your own computes its value in ``_value()``.

    Parameters
    ----------
    strength:
        The factor of the term: a number of at least 0, or a schedule of such numbers.

    Attributes
    ----------
    schedule:
        The strength as a schedule.
    steps:
        How often :meth:`step` was called. Set it to go on after an interruption.

    Raises
    ------
    ArgumentError
        If ``strength`` is neither a number of at least 0 nor a schedule.

    Examples
    --------
    >>> import fxprune; from fxprune.training import GroupSparsity, Linear; from torch import nn
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> coupling = fxprune.analyze(net, torch.zeros(1, 3))
    >>> penalty = GroupSparsity(net, coupling, strength=Linear(0, 0.1, steps=100))
    >>> penalty.step()
    >>> penalty.steps, penalty.strength
    (1, 0.001)
    """

    def __init__(self, strength: float | Schedule) -> None:
        self.schedule = as_schedule("strength", strength)
        self.steps = 0

    @property
    def strength(self) -> float:
        """The factor at the current step."""
        return value_at(self.schedule, self.steps)

    @public
    def step(self) -> None:
        """Go on to the next step of the schedule."""
        self.steps += 1

    @public
    def __call__(self) -> Tensor:
        """Return the penalty, a scalar through which gradients flow.

        Raises
        ------
        ArgumentError
            If the model's parameters are no longer those that were analysed.
        """
        return self.strength * self._value()

    @abstractmethod
    def _value(self) -> Tensor:
        """Return the penalty for a strength of 1."""


def checked_unit_strengths(strengths: Any, count: int) -> Tensor | None:
    """Return the strengths of single units as a tensor; None if there are none.

    Parameters
    ----------
    strengths:
        Numbers of at least 0, shape (units,), or None.
    count:
        The number of units.

    Raises
    ------
    ArgumentError
        If they are no such numbers.

    >>> checked_unit_strengths([1, 0.5], 2)
    tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    if strengths is None:
        return None
    try:
        found = torch.as_tensor(strengths, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"unit_strengths={short_repr(strengths)} is no array of numbers: give one number for "
            "each entry of coupling.units."
        ) from error
    if found.shape != (count,):
        raise ArgumentError(
            f"unit_strengths has shape {tuple(found.shape)}: give one number for each entry of "
            f"coupling.units, shape ({count},)."
        )
    if not bool((found.isfinite() & (found >= 0)).all()):
        raise ArgumentError("unit_strengths holds numbers below 0, infinity or NaN.")
    return found


def weighted_sum(values: Tensor, strengths: Tensor | None) -> Tensor:
    """Return the sum of the units' values, (units,), times their strengths if there are any.

    >>> weighted_sum(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5]))
    tensor(2.)
    """
    return values.sum() if strengths is None else (strengths.to(values) * values).sum()
