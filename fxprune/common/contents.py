"""What a value holds, also in objects that ``torch.utils._pytree`` does not know."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Mapping, Set
from types import CodeType, FrameType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxprune.common.identity import IdentitySet
from fxprune.errors import TraceError

__all__ = [
    "every_leaf",
    "has_tensors_as_keys",
    "leaves",
    "leaves_of",
    "named_tensors",
    "refuse_lazy",
    "slots_of",
    "tensors_of",
]


def leaves(value: Any) -> Iterator[Any]:
    """Tensors, numbers and strings in a value, whatever holds them, in a fixed order.

    >>> from types import SimpleNamespace
    >>> list(leaves({"a": [1, SimpleNamespace(b=2)], "c": "text"}))
    [1, 2, 'text']
    """
    return (
        leaf for leaf in every_leaf(value) if isinstance(leaf, (Tensor, int, float, complex, str))
    )


def leaves_of(value: Any) -> list[Any]:
    """The leaves of nested containers, and of dataclasses in them, whatever they are."""
    found: list[Any] = []
    for leaf in tree_leaves(value):
        fields = _fields_of(leaf)
        found += [leaf] if fields is None else leaves_of(fields)
    return found


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested containers, in order: those of ``tree_leaves``, which takes five times
    as long on plain arguments.
    """
    kind = type(value)
    if kind is tuple or kind is list:
        return [
            tensor for item in value if type(item) not in _PLAIN for tensor in tensors_of(item)
        ]
    if kind is dict:
        return [
            tensor
            for item in value.values()
            if type(item) not in _PLAIN
            for tensor in tensors_of(item)
        ]
    if isinstance(value, Tensor):
        return [value]
    return (
        [] if kind in _PLAIN else [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    )


_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers by name; one that has several names is there once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def refuse_lazy(output: Any, model: nn.Module) -> None:
    """Refuse an output that computes its content later, where nothing can follow it.

    Raises
    ------
    TraceError
        If there is a generator, another iterator, or a function in the output.
    """
    for leaf in every_leaf(output, lazy=True):
        if isinstance(leaf, (Iterator, FunctionType, MethodType)):
            raise TraceError(
                f"{type(model).__name__} gives back a {type(leaf).__name__}, whose content is "
                "computed later, outside of forward: what in it must keep its shape cannot be "
                "known. Give back a list, a tuple or a dict."
            )


def every_leaf(value: Any, lazy: bool = False) -> Iterator[Any]:
    """All that is no container, whatever holds it; ``lazy`` leaves iterators as they are."""
    seen: IdentitySet[Any] = IdentitySet()

    def walk(value: Any) -> Iterator[Any]:
        for leaf in tree_leaves(value, is_leaf=has_tensors_as_keys):
            if leaf in seen and not isinstance(leaf, (Tensor, int, float, complex, str)):
                continue
            content = None if lazy and isinstance(leaf, Iterator) else _held_by(leaf)
            if content is None:
                yield leaf
            else:
                seen.add(leaf)
                yield from walk(content)

    return walk(value)


def has_tensors_as_keys(value: Any) -> bool:
    """Whether it is a dict that torch's functions for nested containers cannot take apart and
    compare.
    """
    return isinstance(value, dict) and any(isinstance(key, Tensor) for key in value)


_CODE = (FunctionType, MethodType, ModuleType, CodeType, FrameType)
_NO_HOLDERS = (Tensor, int, float, complex, str, bytes, *_CODE)


def _held_by(holder: Any) -> list[Any] | None:
    """What an object that is no container of torch's holds; None: nothing, it is a value
    itself.
    """
    if holder is None or isinstance(holder, _NO_HOLDERS):
        return None
    if isinstance(holder, type):
        return [value for value in vars(holder).values() if isinstance(value, Tensor)] or None
    # its parameters, buffers and numbers are its own: no results of a call that hands it out
    if isinstance(holder, nn.Module):
        held = (value for name, value in vars(holder).items() if not name.startswith("_"))
        return [
            *holder._modules.values(),
            *(value for value in held if not isinstance(value, (int, float, complex, str))),
        ] or None
    if isinstance(holder, Mapping):
        return [
            *(key for key in holder if isinstance(key, Tensor)),
            *holder.values(),
            *_attributes(holder),
        ]
    if isinstance(holder, Set):
        found = [leaf for item in holder for leaf in tree_leaves(item)]
        return sorted(
            (leaf for leaf in found if isinstance(leaf, Tensor)),
            key=lambda tensor: (tensor.dim(), *tensor.shape),
        )
    fields = _fields_of(holder)
    if fields is not None:
        return fields
    if isinstance(holder, Iterator):
        return list(holder)
    if isinstance(holder, np.ndarray):
        return list(holder.ravel()) if holder.dtype.hasobject else None
    own = _attributes(holder)
    return [*own, *_inside(holder, own)] or None


def slots_of(holder: Any) -> dict[str, Any]:
    """What an object holds in ``__slots__``, by name."""
    own = [
        item
        for kind in type(holder).__mro__
        if "__slots__" in vars(kind)
        for item in vars(kind).items()
    ]
    found = {
        name: getattr(holder, name, _EMPTY)
        for name, item in own
        if isinstance(item, MemberDescriptorType)
    }
    return {name: value for name, value in found.items() if value is not _EMPTY}


_EMPTY = object()


def _attributes(holder: Any) -> list[Any]:
    return [*getattr(holder, "__dict__", {}).values(), *slots_of(holder).values()]


def _inside(holder: Any, attributes: list[Any]) -> list[Any]:
    """What an object of a class that is written in C refers to: an entry of a list, an argument of
    an exception.
    """
    known = IdentitySet((*attributes, getattr(holder, "__dict__", None)))
    return [
        value
        for value in gc.get_referents(holder)
        if value not in known and not isinstance(value, (type, *_CODE))
    ]


def _fields_of(holder: Any) -> list[Any] | None:
    """What the fields of a dataclass hold; None: it is none."""
    if not dataclasses.is_dataclass(holder) or isinstance(holder, type):
        return None
    return [getattr(holder, own.name, None) for own in dataclasses.fields(holder)]
