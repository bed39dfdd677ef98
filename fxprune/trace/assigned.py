"""Attributes to which forward and the methods that it calls assign."""

from __future__ import annotations

import dis
import inspect
import weakref
from typing import Any

from torch import nn

from fxprune.trace.reach.references import code_within

__all__ = ["assigned_names"]


# weak keys: a class of the user's must not be kept alive
_names_by_class: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()


def assigned_names(kind: type) -> frozenset[str]:
    """Return the result of :func:`_find_assigned_names`, which is computed once per class."""
    if kind not in _names_by_class:
        _names_by_class[kind] = _find_assigned_names(kind)
    return _names_by_class[kind]


def _find_assigned_names(kind: type) -> frozenset[str]:
    """Return the names of attributes to which methods assign that forward calls.

    Methods are found by the names in the code.
    """
    if kind.__module__.partition(".")[0] == "torch":
        return frozenset()
    methods = _methods_of(kind)
    names: set[str] = set()
    seen, waiting = {"forward"}, ["forward"]
    while waiting:
        code = getattr(methods.get(waiting.pop()), "__code__", None)
        for inner in () if code is None else code_within(code):
            steps = dis.get_instructions(inner)
            names |= {step.argval for step in steps if step.opname == "STORE_ATTR"}
            called = set(inner.co_names) & methods.keys() - nn.Module.__dict__.keys() - seen
            seen |= called
            waiting += called
    return frozenset(names)


def _methods_of(kind: type) -> dict[str, Any]:
    """Return the methods of a class by name, without decorators that keep the original."""
    members = [item for base in reversed(kind.__mro__) for item in vars(base).items()]
    return {name: inspect.unwrap(member) for name, member in members if callable(member)}
