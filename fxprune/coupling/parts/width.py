"""A size that shrinks, as Python between parts reads it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fxprune.labels import Array

__all__ = ["Width"]


class Width(torch.SymInt):
    """A number that Python has read off a tensor, and that is smaller in the smaller model.

    It answers as an ``int``, but is none: C code reads an ``int`` without asking (``range(n)``,
    ``math.log(n)``, ``int(n)``), and has to ask this for its number, which is told. To torch it is
    a number like others.

    Parameters
    ----------
    number:
        The size for the example.
    read:
        Gives the labels of the axis, by field.
    tell:
        Called with the labels where something is computed from the number, which a smaller one
        would change.
    """

    def __init__(
        self, number: int, read: Callable[[], list[Array]], tell: Callable[[list[Array]], None]
    ) -> None:
        self.number, self._read, self._tell = number, read, tell

    @property
    def __class__(self) -> type:
        return int

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise TypeError("the class of a size is fixed")

    @property
    def node(self) -> _Known:
        return _Known(self)

    @property
    def labels(self) -> list[Array]:
        return self._read()

    def told(self) -> int:
        """The number, for something that must not change with it."""
        self._tell(self._read())
        return self.number

    def is_size_of(self, other: Any) -> bool:
        """Whether another number is the same size, also when both have shrunk."""
        pairs = (
            zip(self.labels, other.labels, strict=False)
            if type(other) is Width and self.number == other.number
            else ()
        )
        return any(np.array_equal(a.ravel(), b.ravel()) for a, b in pairs)

    def __getattr__(self, name: str) -> Any:
        if not hasattr(int, name):
            raise AttributeError(f"'int' object has no attribute {name!r}")
        return getattr(self.told(), name)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return np.asarray(self.told())

    def __hash__(self) -> int:
        return hash(self.told())

    def __repr__(self) -> str:
        return repr(self.told())

    def __format__(self, spec: str) -> str:
        return format(self.told(), spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return int, (self.told(),)

    def __deepcopy__(self, memo: Any) -> Width:
        return self


class _Known:
    """What C++ asks for the number, where it does."""

    def __init__(self, width: Width) -> None:
        self.width = width

    def is_int(self) -> bool:
        return True

    def is_float(self) -> bool:
        return False

    is_bool = is_symbolic = is_nested_int = is_float
    is_constant = is_int

    def maybe_as_int(self) -> int:
        return self.width.told()

    def guard_int(self, file: str, line: int) -> int:
        return self.width.told()


def _asking(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def method(self: Width, *args: Any) -> Any:
        return plain(self.told(), *args)

    return method


def _operator_of(function: Callable[..., Any], reflected: bool) -> Callable[..., Any]:
    """An operator, with whatever is on its other side: a float has no word for a number that is no
    ``int``.
    """

    def method(self: Width, other: Any) -> Any:
        if function in (operator.eq, operator.ne) and self.is_size_of(other):
            return function is operator.eq
        number, other = self.told(), other.told() if type(other) is Width else other
        return function(other, number) if reflected else function(number, other)

    return method


_OBJECT_NAMES = frozenset(dir(object)) | {"__getnewargs__"}
for _name in set(dir(int)) - _OBJECT_NAMES:
    if _name.startswith("__"):
        setattr(Width, _name, _asking(_name))
for _name in (
    "add",
    "sub",
    "mul",
    "floordiv",
    "truediv",
    "mod",
    "pow",
    "lshift",
    "rshift",
    "and",
    "or",
    "xor",
    "divmod",
):
    _function = divmod if _name == "divmod" else getattr(operator, f"__{_name}__")
    setattr(Width, f"__{_name}__", _operator_of(_function, reflected=False))
    setattr(Width, f"__r{_name}__", _operator_of(_function, reflected=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Width, f"__{_name}__", _operator_of(getattr(operator, _name), reflected=False))
