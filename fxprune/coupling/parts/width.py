"""The size of a prunable axis, as the Python code between parts reads it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fxprune.labels import Array

__all__ = ["Width"]


class Width(torch.SymInt):
    """A size that Python code has read off a tensor, and that is smaller in the pruned model.

    It behaves like an ``int`` but is none. C code reads the value of an ``int`` directly
    (``range(n)``, ``math.log(n)``, ``int(n)``). It has to call a method of this class for the
    number, so that every use is seen. Torch takes it as a number.

    Parameters
    ----------
    number:
        The size before pruning.
    read:
        Returns the labels along the axis, one array per field.
    report:
        Called with these labels when something is computed from the number, which would come out
        differently for a smaller one.
    """

    def __init__(
        self, number: int, read: Callable[[], list[Array]], report: Callable[[list[Array]], None]
    ) -> None:
        self.number, self._read, self._report = number, read, report

    @property
    def __class__(self) -> type:
        return int

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise TypeError("the class of a size is fixed")

    @property
    def node(self) -> _WidthNode:
        """The object that torch asks for the number of a ``SymInt``."""
        return _WidthNode(self)

    @property
    def labels(self) -> list[Array]:
        """The labels along the axis, one array per field."""
        return self._read()

    def use(self) -> int:
        """Return the number for a computation, and report the labels of the axis."""
        self._report(self._read())
        return self.number

    def is_size_of(self, other: Any) -> bool:
        """Tell whether another number is the same size, before and after pruning."""
        if type(other) is not Width or self.number != other.number:
            return False
        pairs = zip(self.labels, other.labels, strict=False)
        return any(np.array_equal(a.ravel(), b.ravel()) for a, b in pairs)

    def __getattr__(self, name: str) -> Any:
        if not hasattr(int, name):
            raise AttributeError(f"'int' object has no attribute {name!r}")
        return getattr(self.use(), name)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return np.asarray(self.use())

    def __hash__(self) -> int:
        return hash(self.use())

    def __repr__(self) -> str:
        return repr(self.use())

    def __format__(self, spec: str) -> str:
        return format(self.use(), spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return int, (self.use(),)

    def __deepcopy__(self, memo: Any) -> Width:
        return self


class _WidthNode:
    """The methods that torch's C++ code calls on the node of a ``SymInt``."""

    def __init__(self, width: Width) -> None:
        self.width = width

    def is_int(self) -> bool:
        """Return True."""
        return True

    def is_float(self) -> bool:
        """Return False."""
        return False

    is_bool = is_symbolic = is_nested_int = is_float
    is_constant = is_int

    def maybe_as_int(self) -> int:
        """Return the number."""
        return self.width.use()

    def guard_int(self, file: str, line: int) -> int:
        """Return the number."""
        return self.width.use()


def _int_method(name: str) -> Callable[..., Any]:
    """Return the method of ``int`` of this name, called on a width's number."""
    plain = getattr(int, name)

    def method(self: Width, *args: Any) -> Any:
        return plain(self.use(), *args)

    return method


def _operator_of(function: Callable[..., Any], reflected: bool) -> Callable[..., Any]:
    """Return the method of a binary operator.

    It applies the operator itself, not the method of ``int``, because that one does not accept a
    float, and the reflected method of ``float`` does not accept a :class:`Width`.
    """

    def method(self: Width, other: Any) -> Any:
        if function in (operator.eq, operator.ne) and self.is_size_of(other):
            return function is operator.eq
        number, other = self.use(), other.use() if type(other) is Width else other
        return function(other, number) if reflected else function(number, other)

    return method


_OBJECT_NAMES = frozenset(dir(object)) | {"__getnewargs__"}
for _name in set(dir(int)) - _OBJECT_NAMES:
    if _name.startswith("__"):
        setattr(Width, _name, _int_method(_name))
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
