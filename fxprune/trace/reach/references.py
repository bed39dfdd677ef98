"""What an object or a piece of code refers to."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterable, Iterator
from types import (
    CodeType,
    ModuleType,
)
from typing import Any

from torch import Tensor, nn

from fxprune.common.identity import IdentitySet

__all__ = [
    "CALCULATING",
    "NOT_OF_THE_USER",
    "code_within",
    "followed_along",
    "is_function",
    "note_nested",
    "references_of",
]


CALCULATING = frozenset(
    {
        "builtins",
        "math",
        "cmath",
        "operator",
        "_operator",
        "itertools",
        "functools",
        "_functools",
        "typing",
        "re",
    }
)
CALCULATING |= {
    "collections",
    "_collections",
    "_collections_abc",
    "abc",
    "enum",
    "copy",
    "dataclasses",
    "types",
    "torch",
    "fxprune",
}
CALCULATING |= {
    "numpy",
    "_io",
    "io",
    "contextlib",
    "inspect",
    "string",
    "_thread",
    "threading",
    "warnings",
    "_warnings",
    "logging",
}
"""Packages whose functions give the same for the same arguments, or say something and give
nothing.
"""


def note_nested(values: Iterable[Any], found: IdentitySet[Any]) -> None:
    """Add the ids of the containers among values, and in these."""
    for value in values:
        if type(value) in (list, tuple, dict, set) and value not in found:
            found.add(value)
            note_nested(value.values() if type(value) is dict else value, found)


NOT_OF_THE_USER = frozenset(vars(nn.Module()))


def is_function(value: Any) -> bool:
    """Whether an object is a function that is compiled, of a kind of its own."""
    return callable(value) and inspect.getattr_static(value, "__qualname__", None) is not None


def followed_along(value: Any, attributes: list[str]) -> list[Any]:
    """What the longest part of a chain of attributes leads to, and the objects on the way."""
    found = [value]
    for name in attributes:
        if isinstance(value, ModuleType) and name not in vars(value):
            break
        if (
            isinstance(value, (nn.Module, Tensor))
            or hasattr(type(value), "__getattr__")
            or _is_computed(type(value), name)
        ):
            break  # the user's code would run
        try:
            value = getattr(value, name)
        except Exception:
            break
        found.append(value)
    return found[-1:] if isinstance(found[0], (ModuleType, type)) and len(found) > 1 else found


def _is_computed(kind: type, name: str) -> bool:
    own = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
    return isinstance(own, (property, functools.cached_property))


@functools.lru_cache(maxsize=4096)
def references_of(
    code: CodeType,
) -> tuple[list[list[str]], list[str], frozenset[str], bool, dict[str, list[str]], list[str]]:
    """Names that a function reads outside of it, each with the attributes that are read of it;
    imports; all names; whether it sets attributes; the names of others' variables that it binds;
    the attributes that are read of other values.
    """
    chains: list[list[str]] = []
    imported: list[str] = []
    others: list[str] = []
    bound: dict[str, list[str]] = {"STORE_GLOBAL": [], "STORE_DEREF": []}  # by how
    sets = follows = False
    for at in dis.get_instructions(code):
        sets |= at.opname == "STORE_ATTR"
        if at.opname in bound:
            bound[at.opname].append(at.argval)
        if at.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF"):
            chains.append([at.argval])
            follows = True
        elif at.opname in ("LOAD_ATTR", "LOAD_METHOD") and follows:
            chains[-1].append(at.argval)
        elif at.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            others.append(at.argval)
        else:
            follows = follows and at.opname == "PUSH_NULL"
            imported += [at.argval] if at.opname == "IMPORT_NAME" else []
    return chains, imported, frozenset(code.co_names), sets, bound, others


def code_within(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from code_within(constant)
