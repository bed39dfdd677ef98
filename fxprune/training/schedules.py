"""Schedules: how a strength or a share changes from step to step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fxprune.common.numbers import as_number, check_integer, check_number
from fxprune.common.public import calling_user_code, public, short_repr
from fxprune.errors import ArgumentError

__all__ = [
    "Constant",
    "Cosine",
    "Cubic",
    "Geometric",
    "Growing",
    "Linear",
    "Schedule",
    "as_schedule",
    "value_at",
]


@runtime_checkable
class Schedule(Protocol):
    """A function from the number of a step, counted from 0, to a number."""

    def __call__(self, step: int) -> float:
        """Return the value at a step."""
        ...


@public
@dataclass(frozen=True)
class Constant:
    r"""The same value at every step: :math:`v_t = v`.

    Parameters
    ----------
    value:
        The value, at least 0.

    Raises
    ------
    ArgumentError
        If ``value`` is no finite number of at least 0.

    Examples
    --------
    >>> Constant(0.1)(7)
    0.1
    """

    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", check_number("value", self.value))

    @public
    def __call__(self, step: int) -> float:
        """Return the value at a step."""
        check_integer("step", step, 0)
        return self.value


@dataclass(frozen=True)
class _Interval(ABC):
    """A schedule that leads from one value to another, and stays there."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", check_number("start", self.start))
        object.__setattr__(self, "end", check_number("end", self.end))
        object.__setattr__(self, "steps", check_integer("steps", self.steps))

    @public
    def __call__(self, step: int) -> float:
        """Return the value at a step; from ``steps`` on it is ``end``."""
        done = min(check_integer("step", step, 0), self.steps) / self.steps
        return self._at(done)

    @abstractmethod
    def _at(self, done: float) -> float:
        """Return the value when this share of the steps is done."""

    def _after(self, way: float) -> float:
        """Return the value after a share of the way from the start to the end."""
        # in this form, both ends are exact
        return self.start * (1 - way) + self.end * way


@public
@dataclass(frozen=True)
class Linear(_Interval):
    r"""A straight line: :math:`v_t = v_0 + (v_n - v_0) \, t / n`.

    Parameters
    ----------
    start, end:
        The values at step 0 and from step ``steps`` on, at least 0.
    steps:
        Number of steps n between them.

    Raises
    ------
    ArgumentError
        If a value is no finite number of at least 0, or ``steps`` no whole number above 0.

    Examples
    --------
    >>> [Linear(0, 1, steps=4)(step) for step in range(6)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    def _at(self, done: float) -> float:
        """Return the value when this share of the steps is done."""
        return self._after(done)


@public
@dataclass(frozen=True)
class Cosine(_Interval):
    r"""Half a cosine: :math:`v_t = v_n + (v_0 - v_n) (1 + \cos(\pi t / n)) / 2`.

    It changes slowly at both ends and fastest in the middle.

    Parameters
    ----------
    start, end, steps:
        As for :class:`Linear`.

    Raises
    ------
    ArgumentError
        As for :class:`Linear`.

    Notes
    -----
    Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, eq.
    5, for one period.

    Examples
    --------
    >>> [round(Cosine(1, 0, steps=3)(step), 12) for step in range(4)]
    [1.0, 0.75, 0.25, 0.0]
    """

    def _at(self, done: float) -> float:
        """Return the value when this share of the steps is done."""
        return self._after((1 - math.cos(math.pi * done)) / 2)


@public
@dataclass(frozen=True)
class Cubic(_Interval):
    r"""A cubic curve: :math:`v_t = v_n + (v_0 - v_n) (1 - t / n)^3`.

    It changes fast at first, while there is much to prune, and slowly at the end.

    Parameters
    ----------
    start, end, steps:
        As for :class:`Linear`.

    Raises
    ------
    ArgumentError
        As for :class:`Linear`.

    Notes
    -----
    Zhu and Gupta, "To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model
    Compression", ICLR 2018 (workshop), eq. 1, with the first step at 0.

    Examples
    --------
    >>> [Cubic(0, 1, steps=2)(step) for step in range(3)]
    [0.0, 0.875, 1.0]
    """

    def _at(self, done: float) -> float:
        """Return the value when this share of the steps is done."""
        return self._after(1 - (1 - done) ** 3)


@public
@dataclass(frozen=True)
class Geometric(_Interval):
    r"""A constant factor from step to step: :math:`v_t = v_0 (v_n / v_0)^{t / n}`.

    Each step of pruning then removes the same share of what is left.

    Parameters
    ----------
    start, end, steps:
        As for :class:`Linear`, but ``start`` is above 0.

    Raises
    ------
    ArgumentError
        As for :class:`Linear`, or if ``start`` is 0.

    Examples
    --------
    >>> [Geometric(1, 0.25, steps=2)(step) for step in range(3)]
    [1.0, 0.5, 0.25]
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("start", self.start, above=0)

    def _at(self, done: float) -> float:
        """Return the value when this share of the steps is done."""
        return self.end if done == 1 else self.start * (self.end / self.start) ** done


@public
@dataclass(frozen=True)
class Growing:
    r"""Growth every K steps: :math:`v_t = \min(c, \delta (\lfloor t / K \rfloor + 1))`.

    Parameters
    ----------
    delta:
        What is added each time, above 0. It is also the value at step 0.
    every:
        The number of steps K between two additions.
    ceiling:
        The value c that is never exceeded, above 0.

    Raises
    ------
    ArgumentError
        If a number is not in its range.

    Notes
    -----
    Wang et al., "Neural Pruning via Growing Regularization", ICLR 2021, algorithm 1.

    Examples
    --------
    >>> [Growing(1, every=2, ceiling=3)(step) for step in range(8)]
    [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0]
    """

    delta: float
    every: int
    ceiling: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "delta", check_number("delta", self.delta, above=0))
        object.__setattr__(self, "every", check_integer("every", self.every))
        object.__setattr__(self, "ceiling", check_number("ceiling", self.ceiling, above=0))

    @public
    def __call__(self, step: int) -> float:
        """Return the value at a step."""
        additions = check_integer("step", step, 0) // self.every + 1
        return min(self.ceiling, self.delta * additions)


def as_schedule(name: str, value: float | Schedule) -> Schedule:
    """Return a schedule; a number is the same at every step.

    Parameters
    ----------
    name:
        Name of the argument, for the error message.
    value:
        A schedule, or a number of at least 0.

    Raises
    ------
    ArgumentError
        If it is neither.

    >>> as_schedule("strength", 0.1)
    Constant(value=0.1)
    """
    if as_number(value) is not None:
        return Constant(check_number(name, value))
    if isinstance(value, type) or not callable(value):
        raise ArgumentError(
            f"{name}={short_repr(value)} is neither a number nor a schedule: give 0.1, or an "
            "object such as Linear(0, 0.1, steps=1000)."
        )
    return value


def value_at(schedule: Schedule, step: int) -> float:
    """Return the value of a schedule at a step, checked.

    Raises
    ------
    CallbackError
        If a schedule of the user raises an error.
    ArgumentError
        If it gives no finite number of at least 0.

    >>> value_at(lambda step: step / 2, 3)
    1.5
    """
    with calling_user_code("the schedule, given a step,"):
        value = schedule(step)
    return check_number("the schedule's value", value)
