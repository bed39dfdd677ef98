"""Schedules compared with their formulas."""

import math
from typing import Any

import pytest

from fxprune.errors import ArgumentError
from fxprune.training import Constant, Cosine, Cubic, Geometric, Growing, Linear

STEPS = 7


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        (Linear, lambda t: 2 + (5 - 2) * t / STEPS),
        (Cosine, lambda t: 5 + (2 - 5) * (1 + math.cos(math.pi * t / STEPS)) / 2),
        (Cubic, lambda t: 5 + (2 - 5) * (1 - t / STEPS) ** 3),
        (Geometric, lambda t: 2 * (5 / 2) ** (t / STEPS)),
    ],
)
def test_from_one_value_to_another(kind: Any, formula: Any) -> None:
    schedule = kind(2, 5, steps=STEPS)
    for t in range(STEPS + 1):
        assert schedule(t) == pytest.approx(formula(t), rel=1e-12)
    # the ends are exact, and the last value stays
    assert (schedule(0), schedule(STEPS), schedule(STEPS + 3)) == (2, 5, 5)


def test_growing_is_the_loop_of_the_paper() -> None:
    """Algorithm 1 of Wang et al. adds delta every K steps, also at the first one."""
    schedule, strength = Growing(0.25, every=3, ceiling=0.7), 0.0
    for t in range(12):
        if t % 3 == 0:
            strength = min(strength + 0.25, 0.7)
        assert schedule(t) == strength


def test_constant() -> None:
    assert [Constant(0.5)(t) for t in (0, 9)] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(-1), "value=-1 must be a finite number of at least 0"),
        (lambda: Linear(0, math.inf, 5), "end=inf must be a finite number"),
        (lambda: Cubic(0, 1, 0), "steps=0 must be a whole number"),
        (lambda: Geometric(0, 1, 5), r"start=0\.0 must be a finite number above 0"),
        (lambda: Growing(0, 1, 1), "delta=0 must be a finite number above 0"),
        (lambda: Growing(1, 1.5, 1), r"every=1\.5 must be a whole number"),
        (lambda: Linear(0, 1, 5)(-1), "step=-1 must be a whole number"),
    ],
)
def test_what_is_no_schedule(make: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()
