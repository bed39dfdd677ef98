"""Stand-ins for numbers, devices and dtypes."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxprune.errors import TraceError
from fxprune.trace.decisions import formula
from fxprune.trace.user_code import calling_function, user_line

if TYPE_CHECKING:
    from fxprune.trace.tracer import Tracer
from fxprune.trace.asks import device_question_message, question_message
from fxprune.trace.tensors import Operators, TorchFunctionMixin, Traced

__all__ = ["Number", "TracedBool", "TracedDevice", "TracedDtype", "TracedFloat", "TracedInt"]


class _SymNode:
    """The interface through which C++ reads a traced number (``torch.SymInt.node``).

    Each conversion to a Python number is a decision.
    """

    def __init__(self, number: Number) -> None:
        self.number = number

    def is_int(self) -> bool:
        return isinstance(self.number, TracedInt)

    def is_float(self) -> bool:
        return isinstance(self.number, TracedFloat)

    def is_bool(self) -> bool:
        return isinstance(self.number, TracedBool)

    def is_symbolic(self) -> bool:
        return True

    def is_constant(self) -> bool:
        return False

    def is_nested_int(self) -> bool:
        return False

    def nested_int(self) -> None:
        return None

    def maybe_as_int(self) -> None:
        return None

    def guard_int(self, file: Any = None, line: Any = None) -> int:
        return int(self.number)

    def guard_float(self, file: Any = None, line: Any = None) -> float:
        return float(self.number)

    def guard_bool(self, file: Any = None, line: Any = None) -> bool:
        return bool(self.number)

    expect_size = expect_true = guard_size_oblivious = guard_or_false = guard_or_true = guard_bool

    def clone(self) -> _SymNode:
        return self

    def _graph_repr(self) -> str:
        return str(self.number)

    def wrap_int(self, value: int) -> int:
        return value

    wrap_float = wrap_bool = wrap_int

    def __getattr__(self, name: str) -> Any:
        if name == "str":
            return self._graph_repr
        function: Any = getattr(
            operator, {"and": "and_", "or": "or_", "sym_not": "not_"}.get(name, name), None
        )
        if function is None:
            raise TraceError(
                f"{calling_function()} reads the number {formula(self.number.fx_node)} in C++ (at "
                f"{user_line()}), which a graph cannot follow. Keep that line inside a module of "
                "its own."
            )
        numbers = [self.number]

        def compute(*others: Any) -> Any:
            result = function(*numbers, *(getattr(other, "number", other) for other in others))
            return result.node if isinstance(result, Number) else result

        return compute


class Number(Operators, Traced):
    """A stand-in for a number that is computed from sizes.

    Python's questions about the number are decisions, which the graph guards.
    """

    def __init__(self, node: fx.Node, tracer: Tracer) -> None:
        self.fx_node, self.tracer = node, tracer

    @property
    def node(self) -> _SymNode:
        """The interface of this number for C++."""
        return _SymNode(self)

    @property
    def apparent_class(self) -> type:
        """The class that ``isinstance`` sees: that of the example's number."""
        return type(self.fx_node.meta["val"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(self.example, name):
            raise AttributeError(
                f"{type(self.example).__name__!r} object has no attribute {name!r}"
            )
        return getattr(self.tracer.decide(self, type(self.example)), name)

    def __abs__(self) -> Any:
        return self.tracer.record("call_function", operator.abs, (self,), {})

    def __round__(self, digits: Any = None) -> Any:
        return self.tracer.record(
            "call_function", round, (self,) if digits is None else (self, digits), {}
        )

    def __floor__(self) -> Any:
        return self.tracer.record("call_function", math.floor, (self,), {})

    def __ceil__(self) -> Any:
        return self.tracer.record("call_function", math.ceil, (self,), {})

    def __trunc__(self) -> Any:
        return self.tracer.record("call_function", math.trunc, (self,), {})

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __eq__(self, other: Any) -> Any:
        self.tracer.note_comparison()
        if issubclass(type(other), Number) and other.tracer is not self.tracer:
            other.tracer.note_comparison()
            return False  # a key that an earlier trace left in a cache
        return Operators.__eq__(self, other)

    def __hash__(self) -> int:
        """Return the hash of the example's number, so that tables find equal keys."""
        self.tracer.note_lookup(self)
        return hash(self.example)

    def __repr__(self) -> str:
        return self.tracer.text(self, repr)

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return self.tracer.text(self, lambda number: format(number, spec))


class TracedInt(Number, torch.SymInt):
    """A stand-in for a whole number."""


class TracedFloat(Number, torch.SymFloat):
    """A stand-in for a floating-point number."""


class TracedBool(Number, TorchFunctionMixin, torch.SymBool):
    """A stand-in for a truth value: a comparison of sizes, or the mode of a module."""


class _TensorAttribute(Traced):
    """A stand-in for a tensor's device or dtype.

    Comparisons become nodes. It cannot be a key of a dict or set.
    """

    def __eq__(self, other: Any) -> Any:
        return self.tracer.record("call_function", operator.eq, (self, other), {})

    def __ne__(self, other: Any) -> Any:
        return self.tracer.record("call_function", operator.ne, (self, other), {})

    def __hash__(self) -> int:
        what = "for something by the device or the dtype of a tensor"
        raise TraceError(question_message(what, f"{self!r} as a key"))

    def __repr__(self) -> str:
        return f"{self.fx_node.name}={self.example!r}"


class TracedDevice(_TensorAttribute, str):
    """A stand-in for a device, which cannot be asked for its type.

    It is a ``str``, because torch accepts one as a device.
    """

    apparent_class = torch.device

    def __new__(cls, node: fx.Node, tracer: Tracer) -> TracedDevice:
        device = super().__new__(cls, "meta")
        device.fx_node, device.tracer = node, tracer
        return device

    def __getattribute__(self, name: str) -> Any:
        if name in ("fx_node", "tracer", "example", "apparent_class") or name.startswith("__"):
            return super().__getattribute__(name)
        raise TraceError(device_question_message(f"{self!r}.{name}"))

    def __str__(self) -> str:
        raise TraceError(device_question_message(f"str({self!r})"))

    def __format__(self, spec: str) -> str:
        raise TraceError(device_question_message(f"str({self!r})"))


class TracedDtype(_TensorAttribute, TorchFunctionMixin):
    """A stand-in for a dtype."""

    def __init__(self, node: fx.Node, tracer: Tracer) -> None:
        self.fx_node, self.tracer = node, tracer

    apparent_class = torch.dtype

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(self.example, name):
            raise AttributeError(f"'torch.dtype' object has no attribute {name!r}")
        if callable(getattr(self.example, name)):
            return lambda *args: self.tracer.record("call_method", name, (self, *args), {})
        return self.tracer.record("call_function", getattr, (self, name), {})

    def __str__(self) -> str:
        return str(self.example)

    def __format__(self, spec: str) -> str:
        return format(self.example, spec)
