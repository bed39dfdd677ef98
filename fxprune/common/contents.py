"""The contents of values, including objects that ``torch.utils._pytree`` does not know."""

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
    "check_not_lazy",
    "has_tensors_as_keys",
    "iterate_leaves",
    "leaves",
    "leaves_of",
    "named_tensors",
    "slots_of",
    "tensors_of",
]


def leaves(value: Any) -> Iterator[Any]:
    """Yield the tensors, numbers and strings in a value, in a fixed order.

    Containers and objects of any class are searched, see :func:`iterate_leaves`.

    >>> from types import SimpleNamespace
    >>> list(leaves({"a": [1, SimpleNamespace(b=2)], "c": "text"}))
    [1, 2, 'text']
    """
    return (leaf for leaf in iterate_leaves(value) if isinstance(leaf, _VALUES))


def leaves_of(value: Any) -> list[Any]:
    """Return all leaves of nested containers and of the dataclasses in them.

    Any object that is neither a container of ``torch.utils._pytree`` nor a dataclass is a leaf.
    """
    found: list[Any] = []
    for leaf in tree_leaves(value):
        fields = _fields_of(leaf)
        found += [leaf] if fields is None else leaves_of(fields)
    return found


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in nested containers, in order.

    They are the tensors among ``tree_leaves(value)``. This function has a short path for tuples,
    lists and dicts, because ``tree_leaves`` takes five times as long on simple arguments.
    """
    kind = type(value)
    if kind is tuple or kind is list or kind is dict:
        tensors: list[Tensor] = []
        for item in value.values() if kind is dict else value:
            if type(item) not in _PLAIN:
                tensors += tensors_of(item)
        return tensors
    if isinstance(value, Tensor):
        return [value]
    if kind in _PLAIN:
        return []
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


_VALUES = (Tensor, int, float, complex, str)
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by name.

    A tensor that has several names appears once, under the first of them.
    """
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def check_not_lazy(output: Any, model: nn.Module) -> None:
    """Refuse an output that computes its content after ``forward`` has returned.

    The analysis cannot follow such a computation.

    Parameters
    ----------
    output:
        The value that ``forward`` returned.
    model:
        The model, which the error message names.

    Raises
    ------
    TraceError
        If the output contains a generator, another iterator, or a function.
    """
    for leaf in iterate_leaves(output, lazy=True):
        if isinstance(leaf, (Iterator, FunctionType, MethodType)):
            raise TraceError(
                f"{type(model).__name__} gives back a {type(leaf).__name__}, whose content is "
                "computed later, outside of forward: what in it must keep its shape cannot be "
                "known. Give back a list, a tuple or a dict."
            )


def iterate_leaves(value: Any, lazy: bool = False) -> Iterator[Any]:
    """Yield everything in a value that does not itself contain something.

    Containers are searched, and so are objects of any class: their attributes, their slots, and
    what they refer to in C. Each object is searched once.

    Parameters
    ----------
    value:
        Any object.
    lazy:
        Yield iterators as leaves. False: consume them and search their items.
    """
    seen: IdentitySet[Any] = IdentitySet()

    def walk(value: Any) -> Iterator[Any]:
        """Yield the leaves of a value, except for objects that were searched before."""
        for leaf in tree_leaves(value, is_leaf=has_tensors_as_keys):
            if leaf in seen and not isinstance(leaf, _VALUES):
                continue
            content = None if lazy and isinstance(leaf, Iterator) else _contents_of(leaf)
            if content is None:
                yield leaf
                yield from _tensors_set_on(leaf)
            else:
                seen.add(leaf)
                yield from walk(content)

    return walk(value)


def _tensors_set_on(leaf: Any) -> list[Tensor]:
    """Return the tensors that were set as attributes of a plain tensor (``y.features = h``)."""
    if type(leaf) is not Tensor:
        return []
    return [value for value in vars(leaf).values() if isinstance(value, Tensor)]


def has_tensors_as_keys(value: Any) -> bool:
    """Tell whether a value is a dict with a tensor among its keys.

    Torch's functions for nested containers cannot take apart and compare such a dict.
    """
    return isinstance(value, dict) and any(isinstance(key, Tensor) for key in value)


_CODE = (FunctionType, MethodType, ModuleType, CodeType, FrameType)
_NOT_SEARCHED = (*_VALUES, bytes, *_CODE)


def _contents_of(holder: Any) -> list[Any] | None:
    """Return what an object contains, or None if it contains nothing and is a leaf itself.

    The object is not a container of ``torch.utils._pytree``. Of a class only the tensors among its
    attributes count. Of a set only the tensors count, ordered by shape, because sets have no fixed
    order.
    """
    if holder is None or isinstance(holder, _NOT_SEARCHED):
        return None
    if isinstance(holder, type):
        return [value for value in vars(holder).values() if isinstance(value, Tensor)] or None
    if isinstance(holder, nn.Module):
        return _contents_of_module(holder) or None
    if isinstance(holder, Mapping):
        keys = [key for key in holder if isinstance(key, Tensor)]
        return [*keys, *holder.values(), *_attributes(holder)]
    if isinstance(holder, Set):
        return _tensors_in_set(holder)
    fields = _fields_of(holder)
    if fields is not None:
        return fields
    if isinstance(holder, Iterator):
        return list(holder)
    if isinstance(holder, np.ndarray):
        return list(holder.ravel()) if holder.dtype.hasobject else None
    attributes = _attributes(holder)
    return [*attributes, *_referents(holder, attributes)] or None


def _contents_of_module(module: nn.Module) -> list[Any]:
    """Return the submodules of a module and the objects among its public attributes.

    Parameters, buffers and numbers belong to the module. If a call returns the module, they are
    not results of that call.
    """
    contents: list[Any] = list(module._modules.values())
    for name, value in vars(module).items():
        if not name.startswith("_") and not isinstance(value, (int, float, complex, str)):
            contents.append(value)
    return contents


def _tensors_in_set(values: Set[Any]) -> list[Tensor]:
    """Return the tensors in a set, ordered by shape."""
    found = [leaf for item in values for leaf in tree_leaves(item)]
    tensors = [leaf for leaf in found if isinstance(leaf, Tensor)]
    return sorted(tensors, key=lambda tensor: (tensor.dim(), *tensor.shape))


def slots_of(holder: Any) -> dict[str, Any]:
    """Return the values in the ``__slots__`` of an object, by name; empty slots are left out."""
    found = {}
    for kind in type(holder).__mro__:
        for name, attribute in vars(kind).items() if "__slots__" in vars(kind) else ():
            if isinstance(attribute, MemberDescriptorType):
                found[name] = getattr(holder, name, _EMPTY)
    return {name: value for name, value in found.items() if value is not _EMPTY}


_EMPTY = object()


def _attributes(holder: Any) -> list[Any]:
    """Return the values of all attributes of an object, in its ``__dict__`` and its slots."""
    return [*getattr(holder, "__dict__", {}).values(), *slots_of(holder).values()]


def _referents(holder: Any, attributes: list[Any]) -> list[Any]:
    """Return the objects that an object written in C refers to, beyond its attributes.

    Examples are the items of a subclass of ``list`` and the arguments of an exception.
    """
    known = IdentitySet((*attributes, getattr(holder, "__dict__", None)))
    others = [value for value in gc.get_referents(holder) if value not in known]
    return [value for value in others if not isinstance(value, (type, *_CODE))]


def _fields_of(holder: Any) -> list[Any] | None:
    """Return the values of the fields of a dataclass, or None for any other object."""
    if not dataclasses.is_dataclass(holder) or isinstance(holder, type):
        return None
    return [getattr(holder, field.name, None) for field in dataclasses.fields(holder)]
