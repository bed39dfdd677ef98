"""The methods of compensation by name, and the one function that applies them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from fxprune.common.public import iterate_user_input, short_repr
from fxprune.coupling import Coupling
from fxprune.errors import ArgumentError
from fxprune.rewrite import Survivors
from fxprune.training.batch_norm import estimate_statistics
from fxprune.training.compensation import Compensation, fold_constants
from fxprune.training.least_squares import reconstruct

__all__ = ["DEFAULT", "compensate_by", "read_methods"]

Method = Callable[[Coupling, Survivors, nn.Module, nn.Module, Iterable[Any]], Compensation]

DEFAULT = ("least_squares",)
"""The methods that :func:`fxprune.prune` takes if it is given data and no method."""


def _methods(ridge: float | None = None) -> Mapping[str, Method]:
    """Return the methods in the order in which they are applied.

    Statistics come last, because corrected weights change them.
    """
    return {
        "least_squares": functools.partial(reconstruct, ridge=ridge),
        "constants": fold_constants,
        "batch_norm": estimate_statistics,
    }


_OF_WEIGHTS = {"least_squares", "constants"}  # each makes up for all of the loss


def read_methods(option: str, value: object, others: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the methods that a caller names, in the order in which they are applied.

    Parameters
    ----------
    option:
        The name of the argument, for messages.
    value:
        A name, or several.
    others:
        Further values that the caller could have given, for messages.

    Raises
    ------
    ArgumentError
        If a name is unknown, there is none, or two of them correct the same weights.
    """
    names = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    known = _methods()
    if not names or not all(isinstance(name, str) and name in known for name in names):
        raise ArgumentError(
            f"{option}={short_repr(value)} is none of "
            f"{', '.join(map(repr, (*known, *others)))}, and no list of these."
        )
    if set(names) >= _OF_WEIGHTS:
        raise ArgumentError(
            f"{option}={short_repr(value)} would correct the same weights twice: least squares "
            "include the constants. Give one of the two."
        )
    return tuple(name for name in known if name in names)


def compensate_by(
    methods: Sequence[str],
    coupling: Coupling,
    survivors: Survivors,
    model: nn.Module,
    pruned: nn.Module,
    loader: Iterable[object],
    *,
    ridge: float | None = None,
) -> Compensation:
    """Correct a pruned model for what was removed.

    Parameters
    ----------
    methods:
        What :func:`read_methods` returns.
    coupling, survivors, model, pruned, loader:
        As for :func:`fxprune.training.compensation.fold_constants`.
    ridge:
        As for :func:`fxprune.training.least_squares.reconstruct`.

    Returns
    -------
    Compensation
        The modules that any method has changed, and the others that one should have changed.
    """
    if len(methods) > 1:
        loader = list(iterate_user_input(loader))  # each method reads it
    known = _methods(ridge)
    done = [known[name](coupling, survivors, model, pruned, loader) for name in methods]
    changed = dict.fromkeys(name for each in done for name in each.changed)
    uncorrected = dict.fromkeys(name for each in done for name in each.uncorrected)
    return Compensation(
        tuple(changed),
        tuple(name for name in uncorrected if name not in changed),
        tuple(note for each in done for note in each.notes),
    )
