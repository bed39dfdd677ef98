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

from fxprune.common.random_state import detecting_draws
from fxprune.trace.reach.changes import Reach
from fxprune.trace.reach.reached import Reached
from fxprune.trace.reach.references import follow_attributes, references_of

__all__ = ["restoring_draws", "watching_draws"]


@contextmanager
def restoring_draws(reached: Reached) -> Iterator[None]:
    """Undo the draws and the cached tensors of a run inside this context.

    On exit, the random generators that the model's code can reach are restored (see
    :meth:`Reach.put_back`), and new tensors are removed from dicts and objects (see
    :meth:`Reach.take_out_tables`).

    Parameters
    ----------
    reached:
        What the model's code can reach. Contexts of the same ``reached`` may follow each other,
        but must not be nested.
    """
    reach = reached.now()
    try:
        yield
    finally:
        reach.put_back()
        reach.take_out_tables()


@contextmanager
def watching_draws(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Tell whether code of this thread draws random numbers of Python or NumPy.

    Like :func:`~fxprune.common.random_state.detecting_draws`, which also counts draws of other
    threads. This context counts a draw only if code that ran in this thread may have drawn. The
    generators are restored on exit.

    Parameters
    ----------
    model:
        The model whose code runs inside the context.

    Returns
    -------
    A function that tells whether something has been drawn since the context was entered.

    Examples
    --------
    >>> with watching_draws(nn.ReLU()) as drawn:
    ...     before, _, after = drawn(), random.random(), drawn()
    >>> before, after
    (False, True)
    """
    watch, before = _DrawWatch(), sys.getprofile()

    def may_have_drawn() -> bool:
        """Tell whether code of this thread may have drawn."""
        if threading.active_count() == 1 or watch.draws:
            return True
        generators = Reach(model, watch.seen).generators
        return any(generator is _NUMPY_GENERATOR for generator in generators)

    with detecting_draws() as drawn:
        sys.setprofile(watch)
        try:
            # in this order: drawn() itself calls functions of the generators
            yield lambda: may_have_drawn() and drawn()
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
            self._enter(frame)

    def _enter(self, frame: FrameType) -> None:
        """Note that a function starts to run."""
        code = frame.f_code
        if code.co_freevars:
            closure = [frame.f_locals.get(name) for name in code.co_freevars]
            self.draws |= any(map(_leads_to_generator, closure))
        if code not in self.seen:
            self.seen.add(code)
            self.draws |= _may_draw(frame)


def _is_process_wide(generator: Any) -> bool:
    """Tell whether an object is the global generator of :mod:`random` or of NumPy."""
    return generator is _PYTHON_GENERATOR or generator is _NUMPY_GENERATOR


def _leads_to_generator(value: Any) -> bool:
    """Tell whether a value is a global generator, one of its methods, or a NumPy module."""
    if value is np or value is np.random:
        return True
    return _is_process_wide(getattr(value, "__self__", None)) or _is_process_wide(value)


_PYTHON_GENERATOR: Any = random.random.__self__  # type: ignore[attr-defined]


_NUMPY_GENERATOR: Any = np.random.random.__self__


def _numpy_methods() -> Iterator[str]:
    """Yield the names of the functions of ``numpy.random`` that draw from its global generator."""
    for name, value in vars(np.random).items():
        if _is_process_wide(getattr(value, "__self__", None)):
            yield name


_METHODS = frozenset(_numpy_methods())


def _may_draw(frame: FrameType) -> bool:
    """Tell whether a function may draw from NumPy's generator.

    It may if it imports NumPy, if a name that it reads leads to NumPy's generator, or if it reads
    an attribute of an unknown object that is named like a method of that generator.
    """
    names = frame.f_globals
    if str(names.get("__name__")).partition(".")[0] in ("fxprune", "numpy", "torch"):
        return False
    references = references_of(frame.f_code)
    imports_numpy = any(name.startswith("numpy") for name in references.imported)
    if imports_numpy or not _METHODS.isdisjoint(references.attributes):
        return True
    for name, *rest in references.chains:
        *_, last = follow_attributes(names.get(name), rest)
        if _leads_to_generator(last):
            return True
    return False
