"""Whether code draws random numbers of Python or NumPy."""

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
    """Let a run inside draw and fill tables; what a model's code can reach is as it was
    afterwards.

    See :meth:`Reach.put_back` and :meth:`Reach.take_out_tables`. Contexts of one ``reached``
    follow each other, and are not nested.
    """
    reach = reached.now()
    try:
        yield
    finally:
        reach.put_back()
        reach.take_out_tables()


@contextmanager
def drawing(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """As :func:`undrawn`, of this thread alone: whether something was drawn, and
    what ran here may have done so.

    >>> with drawing(nn.ReLU()) as drawn:
    ...     before, _, after = drawn(), random.random(), drawn()
    >>> before, after
    (False, True)
    """
    watch, before = _DrawWatch(), sys.getprofile()

    def mine() -> bool:
        alone = threading.active_count() == 1
        return (
            alone
            or watch.draws
            or any(own is _NUMPYS for own in Reach(model, watch.seen)._generators)
        )

    with undrawn() as drawn:
        sys.setprofile(watch)
        try:
            yield lambda: mine() and drawn()  # in this order: the latter asks the generators
        finally:
            sys.setprofile(before)


class _DrawWatch:
    """What :func:`sys.setprofile` tells of the functions of one thread."""

    def __init__(self) -> None:
        # a generator's method was called, or code ran that may call one: not all compiled methods
        # are told
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
    """Whether it is the one of :mod:`random`, or NumPy's, which belong to the process."""
    return generator is _PYTHONS or generator is _NUMPYS


def _leads_to_generator(value: Any) -> bool:
    """Whether it is a method of such a generator, or what leads to NumPy's."""
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
    """Whether a function reads what leads to NumPy's generator, or, of something unknown, what has
    the name of its methods.
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
