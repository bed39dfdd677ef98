"""Options that name layers by globs: which groups they mean."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import TypeVar

from fxprune.coupling import Coupling, Group
from fxprune.errors import ArgumentError

__all__ = ["value_of_groups"]

Value = TypeVar("Value")


def value_of_groups(
    coupling: Coupling, option: str, pairs: Iterable[tuple[str, Value]]
) -> dict[int, Value]:
    """Return the value of each group that a glob matches; the last glob that matches counts.

    A glob matches a group by the name of a parameter or module whose own filters are units of the
    group.

    Parameters
    ----------
    coupling:
        The analysis.
    option:
        The name of the option, for the message.
    pairs:
        Globs with their values.

    Returns
    -------
    dict
        Position of a group in ``coupling.groups`` -> value; other groups are left out.

    Raises
    ------
    ArgumentError
        If a glob matches no group.
    """
    values: dict[int, Value] = {}
    owners: list[list[str]] = []
    for glob, value in pairs:
        owners = owners or [_owners(coupling, group) for group in coupling.groups]
        found = []
        for group, names in enumerate(owners):
            if any(fnmatch.fnmatchcase(name, glob) for name in names):
                found.append(group)
        if not found:
            some = ", ".join(dict.fromkeys(name for names in owners[:4] for name in names))
            raise ArgumentError(
                f"{option}: {glob!r} matches no layer whose channels can be pruned. There are: "
                f"{some}, ..."
            )
        values.update(dict.fromkeys(found, value))
    return values


def _owners(coupling: Coupling, group: Group) -> list[str]:
    """Return the names of the parameters and modules whose own filters are units of a group."""
    parameters = []
    for axis in group.axes:
        if coupling.role(axis.parameter, axis.dim) == "own":
            parameters.append(axis.parameter)
    return [*parameters, *(name.rpartition(".")[0] for name in parameters)]
