"""Random numbers that Python draws by itself, past torch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

__all__ = ["undrawn"]


@contextmanager
def undrawn() -> Iterator[Callable[[], bool]]:
    """Tell whether something was drawn from the generators of :mod:`random` and NumPy, and put them back in the end.

    >>> with undrawn() as drawn:
    ...     before, _, after = drawn(), random.random(), drawn()
    >>> before, after
    (False, True)
    """
    states = _states()
    try:
        yield lambda: not _same(states, _states())
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _states() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()


def _same(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    numbers = all(np.array_equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    return bool(one[0] == other[0]) and numbers
