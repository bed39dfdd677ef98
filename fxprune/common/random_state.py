"""Random numbers: those that Python draws by itself, past torch, and runs that draw the same
ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fxprune.common.process_lock import TURN

__all__ = ["RUNS", "seeded", "torch_states", "undrawn"]

RUNS = 3
"""So many runs that all draw are taken for a model's own draws."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The same random numbers for everything that runs inside, and after it the generators as they
    were.

    >>> with seeded(0):
    ...     one = torch.rand(2)
    >>> with seeded(0):
    ...     print(torch.equal(one, torch.rand(2)))
    True
    """
    used = _uses_cuda()
    with TURN, torch.random.fork_rng(devices=range(torch.cuda.device_count()) if used else []):
        states = _states()
        torch.default_generator.manual_seed(seed)
        if used:
            torch.cuda.manual_seed_all(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def undrawn() -> Iterator[Callable[[], bool]]:
    """Tell whether something was drawn from the generators of :mod:`random` and NumPy, and put
    them back in the end.

    They belong to the process: another thread may be the one that draws. Ask again, of another
    run, before it counts (:data:`RUNS` in all, of which ``drawing`` follows the others).

    >>> with undrawn() as drawn:
    ...     before, _, after = drawn(), random.random(), drawn()
    >>> before, after
    (False, True)
    """
    with TURN:
        states = _states()
        try:
            yield lambda: not _same_states(states, _states())
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def torch_states() -> list[torch.Tensor]:
    """Where the generators of torch stand."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if _uses_cuda() else [])]


def _uses_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _states() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()


def _same_states(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    numbers = all(np.array_equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    return bool(one[0] == other[0]) and numbers
