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
from typing import Any, NamedTuple

from torch import Tensor, nn

from fxprune.common.identity import IdentitySet

__all__ = [
    "COMPUTING_PACKAGES",
    "MODULE_ATTRIBUTES",
    "References",
    "add_nested",
    "code_within",
    "follow_attributes",
    "is_function",
    "references_of",
]


COMPUTING_PACKAGES = frozenset(
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
COMPUTING_PACKAGES |= {
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
COMPUTING_PACKAGES |= {
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


def add_nested(values: Iterable[Any], found: IdentitySet[Any]) -> None:
    """Add to ``found`` the containers among some values, and the containers nested in them."""
    for value in values:
        if type(value) in (list, tuple, dict, set) and value not in found:
            found.add(value)
            add_nested(value.values() if type(value) is dict else value, found)


MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
"""Names of the attributes that every module has."""


def is_function(value: Any) -> bool:
    """Tell whether an object is callable and has a qualified name, as compiled functions have."""
    return callable(value) and inspect.getattr_static(value, "__qualname__", None) is not None


def follow_attributes(value: Any, attributes: list[str]) -> list[Any]:
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
    member = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
    return isinstance(member, (property, functools.cached_property))


class References(NamedTuple):
    """The names and attributes to which the code of a function refers.

    Attributes
    ----------
    chains:
        Each name that the function reads from outside, followed by the attributes read of it.
    imported:
        The modules that it imports.
    names:
        All names in its code.
    sets_attributes:
        Whether it sets attributes.
    bound:
        The global names (``"STORE_GLOBAL"``) and closure variables (``"STORE_DEREF"``) that it
        binds.
    attributes:
        The attributes that it reads of other values.
    """

    chains: list[list[str]]
    imported: list[str]
    names: frozenset[str]
    sets_attributes: bool
    bound: dict[str, list[str]]
    attributes: list[str]


@functools.lru_cache(maxsize=4096)
def references_of(code: CodeType) -> References:
    """Return the names and attributes to which the code of a function refers."""
    chains: list[list[str]] = []
    imported: list[str] = []
    attributes: list[str] = []
    bound: dict[str, list[str]] = {"STORE_GLOBAL": [], "STORE_DEREF": []}  # by instruction
    sets_attributes = in_chain = False
    for step in dis.get_instructions(code):
        sets_attributes |= step.opname == "STORE_ATTR"
        if step.opname in bound:
            bound[step.opname].append(step.argval)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF"):
            chains.append([step.argval])
            in_chain = True
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and in_chain:
            chains[-1].append(step.argval)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.append(step.argval)
        else:
            in_chain = in_chain and step.opname == "PUSH_NULL"
            imported += [step.argval] if step.opname == "IMPORT_NAME" else []
    return References(
        chains, imported, frozenset(code.co_names), sets_attributes, bound, attributes
    )


def code_within(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code and the code of the functions defined inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from code_within(constant)
