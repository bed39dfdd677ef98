"""What objects hold: their contents as they are, and put back as they were."""

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
    "is_plain_name",
    "keys_of",
    "named_contents",
    "put_back",
    "same",
    "state_of",
    "store_of",
    "take_out_of",
    "without_plain",
]


PLAIN_TYPES = (type(None), bool, int, float, complex, str, bytes)


HOLDERS = (list, dict, set, collections.deque)


MISSING = object()
"""Nothing is there."""


def keys_of(table: Any) -> list[Any]:
    return [*(set.__iter__(table) if isinstance(table, set) else dict.keys(table))]


def without_plain(values: Iterable[Any]) -> list[Any]:
    """What may lead on: a table of words, say, has many entries that do not."""
    return [value for value in values if type(value) not in PLAIN_TYPES]


class Globals:
    """Some of the names of a module's dictionary."""

    def __init__(self, store: dict[str, Any], names: list[str]) -> None:
        self.store, self.names = store, names


def take_out_of(holder: Any, before: Any, holds: Callable[..., bool]) -> dict[Any, Any]:
    """Take entries out that hold something; what a dict or an object held in their places is put
    back.

    Returns what was taken out of a dict or an object, by its name there.
    """
    if isinstance(holder, (list, collections.deque)):
        known = IdentitySet(value for value in before)
        for place in reversed(range(len(holder))):  # others may append meanwhile
            if holder[place] not in known and holds(holder[place]):
                del holder[place]
    elif isinstance(holder, set):
        for value in [
            value
            for key, value in content_of(holder).items()
            if key not in before and holds(value)
        ]:
            holder.discard(value)
    elif not isinstance(holder, np.ndarray):
        was, now, store = (
            named_contents(holder, before),
            named_contents(holder, content_of(holder)),
            store_of(holder),
        )
        changed = [name for name, value in now.items() if value is not was.get(name, was)]
        foreign = [name for name in changed if holds(name, now[name])]
        if foreign and not isinstance(holder, dict):
            foreign = changed  # what belongs to a table, its size, say
        for name in foreign:
            put_back(holder, store, name, was)
        return {name: now[name] for name in foreign}
    return {}


def named_contents(holder: Any, content: Any) -> dict[Any, Any]:
    """What a dict or an object held, by name."""
    half = len(content) // 2
    return (
        dict(zip(content[:half], content[half:], strict=True))
        if isinstance(holder, dict)
        else content
    )


def store_of(holder: Any) -> dict[Any, Any] | None:
    return (
        holder.store
        if isinstance(holder, Globals)
        else holder
        if isinstance(holder, dict)
        else None
    )


def has_tensors(named: dict[Any, Any]) -> bool:
    return bool(tensors_of(without_plain(named.values())))


def is_plain_name(name: Any) -> bool:
    return isinstance(name, (*PLAIN_TYPES, torch.dtype)) or (
        isinstance(name, tuple) and all(map(is_plain_name, name))
    )


def put_back(holder: Any, store: dict[Any, Any] | None, name: Any, was: dict[Any, Any]) -> None:
    # past what a class of the user's makes of it; the dictionary of a class cannot be written into
    if store is None:
        kind: Any = type if isinstance(holder, type) else object
        kind.__setattr__(holder, name, was[name]) if name in was else kind.__delattr__(
            holder, name
        )
    elif name in was:
        store[name] = was[name]
    else:
        store.pop(name, None)


def content_of(holder: Any) -> Any:
    """What a container or an object holds now, as it can be compared later."""
    if isinstance(holder, Globals):
        return {name: holder.store[name] for name in holder.names if name in holder.store}
    if isinstance(holder, np.ndarray):
        return holder.copy()
    # as Python keeps it, whatever its class makes of it: the user's code must not run
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
    """The state of an object that changes by being asked, whose class is compiled; None: it has
    none that can be set.
    """
    if not hasattr(type(value), "__setstate__"):
        return None
    try:
        made = value.__reduce_ex__(2)
    except Exception:
        return None
    return made[2] if isinstance(made, tuple) and len(made) > 2 else None


def same(one: Any, other: Any) -> bool:
    """Whether two values hold the same: numbers and tensors by what they are, objects that are
    neither only if they are one.
    """
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return one.shape == other.shape and bool((one == other).all())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and (
            all(map(operator.is_, one, other)) or all(map(same, one, other))
        )
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return False
        pairs = [(value, other[key]) for key, value in one.items()]
        return all(a is b for a, b in pairs) or all(same(*pair) for pair in pairs)
    if type(one) is Tensor:
        return (
            _has_values(one)
            and _has_values(other)
            and one.dtype is other.dtype
            and torch.equal(one, other)
        )
    return isinstance(one, PLAIN_TYPES) and one == other


def _has_values(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized
