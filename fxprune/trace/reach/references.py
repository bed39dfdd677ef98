"""The names, attributes and imports that a piece of code refers to."""

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
"""Packages whose functions return the same for the same arguments, or only report something.

Looking through their code is not needed.
"""


def note_nested(values: Iterable[Any], found: IdentitySet[Any]) -> None:
    """Add to ``found`` the containers among some values, and the containers nested in them."""
    for value in values:
        if type(value) in (list, tuple, dict, set) and value not in found:
            found.add(value)
            note_nested(value.values() if type(value) is dict else value, found)


NOT_OF_THE_USER = frozenset(vars(nn.Module()))
"""Names of the attributes that every module has."""


def is_function(value: Any) -> bool:
    """Tell whether an object is callable and has a qualified name, as compiled functions have."""
    return callable(value) and inspect.getattr_static(value, "__qualname__", None) is not None


def followed_along(value: Any, attributes: list[str]) -> list[Any]:
    """Return the objects on a chain of attributes.

    The chain is followed as far as this runs no code of the user.

    Parameters
    ----------
    value:
        The object at which the chain starts.
    attributes:
        The names of the chain, in order.

    Returns
    -------
    The start and the objects on the way. If the start is a module or a class that has the first
    attribute, only the last object.
    """
    found = [value]
    for name in attributes:
        if isinstance(value, ModuleType) and name not in vars(value):
            break
        if (
            isinstance(value, (nn.Module, Tensor))
            or hasattr(type(value), "__getattr__")
            or _is_computed(type(value), name)
        ):
            break  # reading the attribute would run the user's code
        try:
            value = getattr(value, name)
        except Exception:
            break
        found.append(value)
    return found[-1:] if isinstance(found[0], (ModuleType, type)) and len(found) > 1 else found


def _is_computed(kind: type, name: str) -> bool:
    """Tell whether an attribute of a class is a property."""
    own = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
    return isinstance(own, (property, functools.cached_property))


@functools.lru_cache(maxsize=4096)
def references_of(
    code: CodeType,
) -> tuple[list[list[str]], list[str], frozenset[str], bool, dict[str, list[str]], list[str]]:
    """Return the names and attributes to which the code of a function refers.

    Returns
    -------
    A tuple of six items:

    1. chains: each name that the function reads from outside, followed by the attributes read of
    it, 2. the modules that it imports, 3. all names in its code, 4. whether it sets attributes, 5.
    the global names (``"STORE_GLOBAL"``) and closure variables (``"STORE_DEREF"``) that it binds,
    6. the attributes that it reads of other values.
    """
    chains: list[list[str]] = []
    imported: list[str] = []
    others: list[str] = []
    bound: dict[str, list[str]] = {"STORE_GLOBAL": [], "STORE_DEREF": []}  # by instruction
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
    """Yield a function's code and the code of the functions defined inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from code_within(constant)
