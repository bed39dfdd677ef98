"""The contents of containers and objects: reading, comparing and restoring them."""

from __future__ import annotations

import collections
import operator
from collections.abc import Callable, Iterable
from types import (
    CellType,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.common.contents import slots_of, tensors_of
from fxprune.common.identity import IdentitySet, memo_of
from fxprune.trace.copying import is_filled

__all__ = [
    "HOLDERS",
    "MISSING",
    "PLAIN_TYPES",
    "Globals",
    "content_of",
    "has_tensors",
    "have_same_value",
    "is_plain_name",
    "keys_of",
    "named_contents",
    "put_back",
    "state_of",
    "store_of",
    "take_out_of",
    "without_plain",
]


PLAIN_TYPES = (type(None), bool, int, float, complex, str, bytes)


HOLDERS = (list, dict, set, collections.deque)


MISSING = object()
"""Marks the place of a value that is not there."""


def keys_of(table: Any) -> list[Any]:
    """Return the keys of a dict, or the members of a set, without running code of a subclass."""
    return [*(set.__iter__(table) if isinstance(table, set) else dict.keys(table))]


def without_plain(values: Iterable[Any]) -> list[Any]:
    """Return the values that may lead to other objects.

    Numbers and strings do not, and a vocabulary, for example, has many of them.
    """
    return [value for value in values if type(value) not in PLAIN_TYPES]


class Globals:
    """Some names of a module's dictionary.

    Parameters
    ----------
    store:
        The module's dictionary.
    names:
        The names in it that count.
    """

    def __init__(self, store: dict[str, Any], names: list[str]) -> None:
        self.store, self.names = store, names


def take_out_of(holder: Any, before: Any, holds: Callable[..., bool]) -> dict[Any, Any]:
    """Remove entries that a run has added to a container or an object, if ``holds`` accepts them.

    A dict or an object gets back what it held under these names before.

    Parameters
    ----------
    holder:
        A list, deque, set, dict, :class:`Globals` or object. An array is left as it is.
    before:
        What :func:`content_of` returned for the holder before the run.
    holds:
        Tells whether the values given to it (a name and its value, or one entry) hold something
        that has to be removed.

    Returns
    -------
    What was removed from a dict or an object, by its name there; empty for other containers.
    """
    if isinstance(holder, (list, collections.deque)):
        _take_out_of_list(holder, before, holds)
    elif isinstance(holder, set):
        _take_out_of_set(holder, before, holds)
    elif not isinstance(holder, np.ndarray):
        return _take_out_of_names(holder, before, holds)
    return {}


def _take_out_of_list(holder: Any, before: Any, holds: Callable[..., bool]) -> None:
    """Remove new entries from a list or deque if ``holds`` accepts them."""
    known = IdentitySet(value for value in before)
    # the methods of the base class: those of a user's class could run any code
    kind: Any = list if isinstance(holder, list) else collections.deque
    for place in reversed(range(kind.__len__(holder))):  # other threads may append meanwhile
        value = kind.__getitem__(holder, place)
        if value not in known and holds(value):
            kind.__delitem__(holder, place)


def _take_out_of_set(holder: set[Any], before: Any, holds: Callable[..., bool]) -> None:
    """Remove new members from a set if ``holds`` accepts them."""
    new = [value for key, value in content_of(holder).items() if key not in before]
    for value in filter(holds, new):
        holder.discard(value)


def _take_out_of_names(holder: Any, before: Any, holds: Callable[..., bool]) -> dict[Any, Any]:
    """Restore names of a dict or an object if ``holds`` accepts what is there; return that."""
    was = named_contents(holder, before)
    now = named_contents(holder, content_of(holder))
    store = store_of(holder)
    changed = [name for name, value in now.items() if value is not was.get(name, was)]
    foreign = [name for name in changed if holds(name, now[name])]
    if foreign and not isinstance(holder, dict):
        foreign = changed  # attributes that belong to a cached tensor, such as its size
    for name in foreign:
        put_back(holder, store, name, was)
    return {name: now[name] for name in foreign}


def named_contents(holder: Any, content: Any) -> dict[Any, Any]:
    """Return the content of a dict or an object (see :func:`content_of`) by name."""
    if not isinstance(holder, dict):
        return content
    half = len(content) // 2
    return dict(zip(content[:half], content[half:], strict=True))


def store_of(holder: Any) -> dict[Any, Any] | None:
    """Return the dictionary in which a holder's names are stored; None for an object."""
    if isinstance(holder, Globals):
        return holder.store
    return holder if isinstance(holder, dict) else None


def has_tensors(named: dict[Any, Any]) -> bool:
    """Tell whether there are tensors among the values of a dict."""
    return bool(tensors_of(without_plain(named.values())))


def is_plain_name(name: Any) -> bool:
    """Tell whether a key is a number, a string, a dtype, or a tuple of these."""
    return isinstance(name, (*PLAIN_TYPES, torch.dtype)) or (
        isinstance(name, tuple) and all(map(is_plain_name, name))
    )


def put_back(holder: Any, store: dict[Any, Any] | None, name: Any, was: dict[Any, Any]) -> None:
    """Restore what a holder had under a name before.

    Parameters
    ----------
    store:
        The dictionary in which the names are stored; None for an object (see :func:`store_of`).
    was:
        The earlier content by name. A name that is not in it is deleted.
    """
    # Use the methods of type and object, so that no __setattr__ of the user runs. The dictionary
    # of a class cannot be written to.
    if store is None:
        kind: Any = type if isinstance(holder, type) else object
        if name in was:
            kind.__setattr__(holder, name, was[name])
        else:
            kind.__delattr__(holder, name)
    elif name in was:
        store[name] = was[name]
    else:
        store.pop(name, None)


def content_of(holder: Any) -> Any:
    """Return the content of a container or an object, in a form that can be compared later."""
    if isinstance(holder, Globals):
        return {name: holder.store[name] for name in holder.names if name in holder.store}
    if isinstance(holder, np.ndarray):
        return holder.copy()
    # Use the methods of the built-in classes: code of a user's subclass must not run.
    if isinstance(holder, dict):
        return [*dict.keys(holder), *dict.values(holder)]
    if isinstance(holder, set):
        return memo_of((item, item) for item in set.__iter__(holder))
    if isinstance(holder, list):
        return [*list.__iter__(holder)]
    if isinstance(holder, collections.deque):
        return [*collections.deque.__iter__(holder)]
    if isinstance(holder, CellType):
        return {"cell_contents": holder.cell_contents} if is_filled(holder) else {}
    return {
        **getattr(holder, "__dict__", {}),
        **({} if isinstance(holder, type) else slots_of(holder)),
    }


def state_of(value: Any) -> Any:
    """Return the state of an object that has one which can be set; None for other objects.

    A random generator has one: its class is compiled, and it changes with each use.
    """
    if not hasattr(type(value), "__setstate__"):
        return None
    try:
        reduced = value.__reduce_ex__(2)
    except Exception:
        return None
    return reduced[2] if isinstance(reduced, tuple) and len(reduced) > 2 else None


def have_same_value(one: Any, other: Any) -> bool:
    """Tell whether two values are equal.

    Numbers, arrays and tensors are compared by value, containers entry by entry, and other objects
    by identity.
    """
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return one.shape == other.shape and bool(_equal_entries(one, other).all())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and (
            all(map(operator.is_, one, other)) or all(map(have_same_value, one, other))
        )
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return False
        pairs = [(value, other[key]) for key, value in one.items()]
        return all(a is b for a, b in pairs) or all(have_same_value(*pair) for pair in pairs)
    if type(one) is Tensor:
        return (
            _has_values(one)
            and _has_values(other)
            and one.dtype is other.dtype
            and one.shape == other.shape
            and bool(_equal_entries(one, other).all())
        )
    return isinstance(one, PLAIN_TYPES) and one == other


def _equal_entries(one: Any, other: Any) -> Any:
    """Compare two arrays or tensors entry by entry; NaN equals NaN."""
    return (one == other) | ((one != one) & (other != other))


def _has_values(tensor: Tensor) -> bool:
    """Tell whether the values of a tensor can be compared."""
    return tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized
