"""Detection of random numbers that a model's code draws from Python or NumPy."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import (
    CodeType,
    FrameType,
)
from typing import Any

import numpy as np
from torch import nn

from fxprune.common.random_state import undrawn
from fxprune.trace.reach.reached import Reached
from fxprune.trace.reach.references import followed_along, references_of
from fxprune.trace.reach.walk import Reach

__all__ = ["drawing", "undrawn_by"]


@contextmanager
def undrawn_by(reached: Reached) -> Iterator[None]:
    """Undo the draws and the cached tensors of a run inside this context.

    On exit, the random generators that the model's code can reach are restored (see
    :meth:`Reach.put_back`), and new tensors are removed from dicts and objects (see
    :meth:`Reach.take_out_tables`).

    Parameters
    ----------
    reached:
        What the model's code can reach. Contexts of the same ``reached`` may follow each other,
        but
        must not be nested.
    """
    reach = reached.now()
    try:
        yield
    finally:
        reach.put_back()
        reach.take_out_tables()


@contextmanager
def drawing(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Tell whether code of this thread draws random numbers of Python or NumPy.

    Like :func:`~fxprune.common.random_state.undrawn`, which also counts draws of other threads.
    This context counts a draw only if code that ran in this thread may have drawn. The generators
    are restored on exit.

    Parameters
    ----------
    model:
        The model whose code runs inside the context.

    Returns
    -------
    A function that tells whether something has been drawn since the context was entered.

    Examples
    --------
    >>> with drawing(nn.ReLU()) as drawn:
    ...     before, _, after = drawn(), random.random(), drawn()
    >>> before, after
    (False, True)
    """
    watch, before = _DrawWatch(), sys.getprofile()

    def mine() -> bool:
        """Tell whether code of this thread may have drawn."""
        alone = threading.active_count() == 1
        return (
            alone
            or watch.draws
            or any(own is _NUMPYS for own in Reach(model, watch.seen)._generators)
        )

    with undrawn() as drawn:
        sys.setprofile(watch)
        try:
            # mine() first: drawn() itself calls functions of the generators
            yield lambda: mine() and drawn()
        finally:
            sys.setprofile(before)


class _DrawWatch:
    """A profile function (see :func:`sys.setprofile`) that watches one thread for draws."""

    def __init__(self) -> None:
        # Whether a method of a generator was called, or code ran that may call one. The latter
        # is needed because Python reports calls of some compiled methods only.
        self.draws = False
        self.seen: set[CodeType] = set()

    def __call__(self, frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call":
            self.draws |= _leads_to_generator(called)
        elif event == "call" and not self.draws:
            code = frame.f_code
            if code.co_freevars:
                self.draws |= any(
                    _leads_to_generator(frame.f_locals.get(name)) for name in code.co_freevars
                )
            if code not in self.seen:
                self.seen.add(code)
                self.draws |= _may_draw(frame)


def _is_process_wide(generator: Any) -> bool:
    """Tell whether an object is the global generator of :mod:`random` or of NumPy."""
    return generator is _PYTHONS or generator is _NUMPYS


def _leads_to_generator(value: Any) -> bool:
    """Tell whether a value is a global generator, one of its methods, or a NumPy module."""
    return (
        _is_process_wide(getattr(value, "__self__", None))
        or value is np
        or value is np.random
        or _is_process_wide(value)
    )


_PYTHONS: Any = random.random.__self__  # type: ignore[attr-defined]


_NUMPYS: Any = np.random.random.__self__


_METHODS = frozenset(
    name
    for name, value in vars(np.random).items()
    if _is_process_wide(getattr(value, "__self__", None))
)


def _may_draw(frame: FrameType) -> bool:
    """Tell whether a function may draw from NumPy's generator.

    It may if it imports NumPy, if a name that it reads leads to NumPy's generator, or if it reads
    an attribute of an unknown object that is named like a method of that generator.
    """
    known = frame.f_globals
    if str(known.get("__name__")).partition(".")[0] in ("fxprune", "numpy", "torch"):
        return False
    chains, imported, _, _, _, attributes = references_of(frame.f_code)
    if not _METHODS.isdisjoint(attributes) or any(name.startswith("numpy") for name in imported):
        return True
    return any(
        _leads_to_generator(value)
        for name, *rest in chains
        for value in followed_along(known.get(name), rest)[-1:]
    )
