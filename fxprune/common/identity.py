"""Dictionaries and sets that compare objects by identity, not by value.

The functions at the end handle the memo of ``copy.deepcopy``: a dictionary from the ids of objects
to their replacements in a copy. A memo does not keep the objects alive; its creator must.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeAlias, TypeVar, overload

__all__ = [
    "IdentityMap",
    "IdentitySet",
    "Memo",
    "drop_from_memo",
    "from_memo",
    "in_memo",
    "memo_of",
    "to_memo",
]

K = TypeVar("K")
V = TypeVar("V")
D = TypeVar("D")


class IdentityMap(Generic[K, V]):
    """A dictionary that compares its keys by identity.

    Python may give the ``id`` of a deleted object to a new one. The map keeps its keys alive, so
    that a new object never finds the entry of a deleted one.

    Examples
    --------
    >>> import torch
    >>> noted, x = IdentityMap(), torch.zeros(2)
    >>> noted[x] = "x"
    >>> noted.get(x), noted.get(torch.zeros(2)), x in noted, len(noted)
    ('x', None, True, 1)
    """

    __slots__ = ("_entries",)

    def __init__(self, items: Iterable[tuple[K, V]] = ()) -> None:
        self._entries: dict[int, tuple[K, V]] = {id(key): (key, value) for key, value in items}

    def __setitem__(self, key: K, value: V) -> None:
        self._entries[id(key)] = key, value

    def __getitem__(self, key: K) -> V:
        return self._entries[id(key)][1]

    def __contains__(self, key: object) -> bool:
        return id(key) in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[K]:
        return (key for key, _ in self._entries.values())

    @overload
    def get(self, key: object) -> V | None: ...
    @overload
    def get(self, key: object, default: D) -> V | D: ...
    def get(self, key: object, default: D | None = None) -> V | D | None:
        """Return the value of an object, or ``default`` if the object is not a key."""
        entry = self._entries.get(id(key))
        return default if entry is None else entry[1]

    def setdefault(self, key: K, value: V) -> V:
        """Return the value of an object; store ``value`` first if the object is not a key."""
        return self._entries.setdefault(id(key), (key, value))[1]

    def discard(self, key: K) -> None:
        """Remove an object if it is a key."""
        self._entries.pop(id(key), None)

    def values(self) -> Iterator[V]:
        """Return an iterator over the values."""
        return (value for _, value in self._entries.values())

    def items(self) -> Iterator[tuple[K, V]]:
        """Return an iterator over the pairs of key and value."""
        return iter(self._entries.values())


class IdentitySet(Generic[K]):
    """A set that compares its members by identity and keeps them in order.

    Examples
    --------
    >>> import torch
    >>> x = torch.zeros(2)
    >>> seen = IdentitySet([x, x])
    >>> x in seen, torch.zeros(2) in seen, len(seen)
    (True, False, 1)
    """

    __slots__ = ("_members",)

    def __init__(self, members: Iterable[K] = ()) -> None:
        self._members: dict[int, K] = {id(member): member for member in members}

    def add(self, member: K) -> None:
        """Add an object to the set."""
        self._members[id(member)] = member

    def __contains__(self, member: object) -> bool:
        return id(member) in self._members

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[K]:
        return iter(self._members.values())


Memo: TypeAlias = dict[int, Any]


def memo_of(pairs: Iterable[tuple[object, Any]]) -> Memo:
    """Return a memo made from pairs of object and replacement.

    >>> import copy
    >>> old, new = [1], [2]
    >>> copy.deepcopy({"held": old}, memo_of([(old, new)]))
    {'held': [2]}
    """
    return {id(original): replacement for original, replacement in pairs}


def in_memo(memo: Memo, original: object) -> bool:
    """Tell whether the memo has a replacement for an object."""
    return id(original) in memo


_RAISES = object()


def from_memo(memo: Memo, original: object, default: Any = _RAISES) -> Any:
    """Return the replacement of an object.

    Raises
    ------
    KeyError
        If there is none and no default is given.
    """
    return memo[id(original)] if default is _RAISES else memo.get(id(original), default)


def drop_from_memo(memo: Memo, original: object) -> None:
    """Remove the replacement of an object, if there is one."""
    memo.pop(id(original), None)


def to_memo(memo: Memo, original: object, replacement: V) -> V:
    """Store the replacement of an object, and return it."""
    memo[id(original)] = replacement
    return replacement
