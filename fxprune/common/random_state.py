"""Random numbers: runs that draw the same ones, and a check of whether a run draws any."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fxprune.common.process_lock import PROCESS_LOCK

__all__ = ["RUNS_TO_CONFIRM_DRAWS", "detecting_draws", "seeded", "torch_states"]

RUNS_TO_CONFIRM_DRAWS = 3
"""Number of runs that must all draw random numbers before the model counts as drawing them."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed all random generators for the code inside, and restore them afterwards.

    These are the generators of torch, :mod:`random` and NumPy.

    >>> with seeded(0):
    ...     one = torch.rand(2)
    >>> with seeded(0):
    ...     print(torch.equal(one, torch.rand(2)))
    True
    """
    uses_cuda = _uses_cuda()
    devices = range(torch.cuda.device_count()) if uses_cuda else []
    with PROCESS_LOCK, torch.random.fork_rng(devices=devices):
        states = _states()
        torch.default_generator.manual_seed(seed)
        if uses_cuda:
            torch.cuda.manual_seed_all(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def detecting_draws() -> Iterator[Callable[[], bool]]:
    """Detect draws from the generators of :mod:`random` and NumPy, and restore them at the end.

    The context gives a function that tells whether anything was drawn since the start. The
    generators belong to the process, so another thread may be the one that draws. Repeat the run
    under ``watching_draws``, which watches one thread, before you blame the model:
    :data:`RUNS_TO_CONFIRM_DRAWS` runs in total.

    >>> with detecting_draws() as drawn:
    ...     before, _, after = drawn(), random.random(), drawn()
    >>> before, after
    (False, True)
    """
    with PROCESS_LOCK:
        states = _states()
        try:
            yield lambda: not _same_states(states, _states())
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def torch_states() -> list[torch.Tensor]:
    """Return the states of torch's generators: the CPU's, then each GPU's if CUDA is in use."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if _uses_cuda() else [])]


def _uses_cuda() -> bool:
    """Tell whether this process has used CUDA already."""
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _states() -> tuple[Any, Any]:
    """Return the states of the generators of :mod:`random` and NumPy."""
    return random.getstate(), np.random.get_state()


def _same_states(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    """Tell whether two results of :func:`_states` are equal."""
    numbers = all(np.array_equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    return bool(one[0] == other[0]) and numbers
