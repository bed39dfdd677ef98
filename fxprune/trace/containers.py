"""Containers that are copied entry by entry, and the layout of objects in memory."""

from __future__ import annotations

import collections
import threading
import types
from typing import Any

__all__ = ["CONTAINERS", "COPIED_SEQUENCES", "MAPPINGS", "layout_of"]


COPIED_SEQUENCES = (list, tuple, set, frozenset, collections.deque)


MAPPINGS = (dict, collections.OrderedDict)


CONTAINERS = frozenset(
    {list, dict, set, collections.deque, collections.OrderedDict, collections.defaultdict}
)


def layout_of(value: Any) -> Any:
    """Return the built-in class that holds an object's state beside its attributes.

    None if the object has more state, which Python does not see.
    """
    kind = type(value)
    layout = next(base for base in kind.__mro__ if base in _LAYOUTS)
    above = kind.__mro__[: kind.__mro__.index(layout)]
    return layout if layout is not object or all(map(_is_of_python, above)) else None


def _is_of_python(kind: type) -> bool:
    """Tell whether a class was made by a class statement rather than in C."""
    members = vars(kind)
    has_functions = any(isinstance(member, types.FunctionType) for member in members.values())
    has_layout = not members.keys().isdisjoint(("__weakref__", "__slots__"))
    return has_functions or has_layout or any(map(_is_of_python, kind.__bases__))


_LAYOUTS: frozenset[Any] = frozenset(
    {object, types.SimpleNamespace, threading.local, *COPIED_SEQUENCES, *MAPPINGS}
)
"""Classes whose objects hold nothing but what Python sees."""
