"""Stand-ins for the values of a traced call: each belongs to a node of the graph and knows the
example's value but for its data.

The stand-in for a tensor *is* a tensor: a wrapper subclass on the meta device, which holds no
memory. C++ can be handed it like any other. What Python does with it is recorded at
``__torch_function__``, in the words of torch's Python interface. What passes below that unseen
(scripted functions, ``vmap``, extensions) is recorded at ``__torch_dispatch__``, as calls of ATen
operations. Whoever asks for its memory gets an error.

The stand-ins for numbers are ``torch.SymInt``, ``SymFloat`` and ``SymBool``, which torch's
functions accept wherever they accept a number; those for devices and dtypes are accepted as such.
"""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx
from torch.fx.graph import magic_methods, reflectable_magic_methods
from torch.utils._pytree import register_pytree_node

from fxprune.dispatch import META
from fxprune.errors import TraceError
from fxprune.memory import AUGMENTED, name_of
from fxprune.trace.decisions import formula
from fxprune.trace.lines import asker, user_line

if TYPE_CHECKING:
    from fxprune.trace.tracer import Tracer

__all__ = [
    "ASKS",
    "OF_PARAMETERS",
    "Number",
    "SizeTuple",
    "Traced",
    "TracedTensor",
    "asks",
    "asks_device",
    "find_traced",
    "map_leaves",
    "stand_in",
]


_DEVICE, _GRADIENT = "on which device a tensor is", "whether a tensor has a gradient"

ASKS: dict[str, str] = {
    **dict.fromkeys(
        ("get_device", "is_cpu", "is_cuda", "is_ipu", "is_maia", "is_meta", "is_mps", "is_mtia"),
        _DEVICE,
    ),
    **dict.fromkeys(("is_vulkan", "is_xla", "is_xpu"), _DEVICE),
    **dict.fromkeys(("grad_fn", "is_leaf", "requires_grad"), _GRADIENT),
}
"""Attributes of a tensor that tell what is the caller's business, and what they tell."""

OF_PARAMETERS: dict[str, Any] = {"grad_fn": None, "is_leaf": True}
"""What those tell of each ``nn.Parameter(...)``, whatever it is made of: ``self.weight =
nn.Parameter(w)`` asks.
"""


def asks(what: str, how: str) -> str:
    who = asker()
    if who != "forward":
        return (
            f"{who} asks {what} (at {user_line()}), to do something else then, and a graph has "
            "one path for all answers. Keep that line inside a module of its own."
        )
    return (
        f"forward asks {what} ({how}, at {user_line()}), to do something else then. A graph has "
        "one path for all answers: hand x.device and x.dtype on, as in device=x.device, or keep "
        "that line inside a module of its own."
    )


def asks_device(how: str) -> str:
    return asks(_DEVICE, how)


class SizeTuple(tuple[Any, ...]):
    """What ``x.shape`` gives while tracing: a tuple whose entries stand for ``x.size(i)``."""

    @property
    def __class__(self) -> type:
        return torch.Size  # for isinstance(x.shape, torch.Size) in users' code

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise TypeError("the class of a stand-in is fixed")

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return SizeTuple(found) if isinstance(index, slice) else found

    def numel(self) -> Any:
        return math.prod(self)

    def __repr__(self) -> str:
        return f"torch.Size([{', '.join(map(repr, self))}])"


class TracedPieces(tuple[Any, ...]):
    """What an operation gives that cuts one tensor into a list of them: their number depends on
    how long that tensor is.

    Whoever asks how many there are holds the graph to this number; ``parts[0]`` asks for no more
    than that one.
    """

    tracer: Tracer
    fx_node: fx.Node
    counted = False

    def count_parts(self) -> TracedPieces:
        """Hold the graph to their number."""
        if not self.counted and not self.tracer.executing:
            self.counted = True
            # before entries that another input has not
            with self.tracer.graph.inserting_before(self.fx_node.next):
                int(self.tracer.record("call_function", len, (self.fx_node,), {}))
        return self

    def __len__(self) -> int:
        return tuple.__len__(self.count_parts())

    def __iter__(self) -> Iterator[Any]:
        return tuple.__iter__(self.count_parts())

    def __getitem__(self, index: Any) -> Any:
        first = isinstance(index, int) and 0 <= index < tuple.__len__(self)
        return tuple.__getitem__(self if first else self.count_parts(), index)

    def __add__(self, other: Any) -> Any:
        return tuple.__add__(self.count_parts(), other)

    def __mul__(self, times: Any) -> Any:
        return tuple.__mul__(self.count_parts(), times)


register_pytree_node(SizeTuple, lambda sizes: ([*sizes], None), lambda sizes, _: SizeTuple(sizes))
# of each a model takes the leaves
register_pytree_node(TracedPieces, lambda parts: ([*parts], None), lambda parts, _: tuple(parts))


def _is_cut(node: fx.Node) -> bool:
    """Whether an operation makes a list of tensors out of one: ``split``, ``unbind`` and their
    kind.
    """
    packet = getattr(torch.ops.aten, name_of(node), None)
    schemas = (
        ()
        if packet is None
        else [getattr(packet, overload)._schema for overload in packet.overloads()]
    )
    return any(
        bool(schema.arguments and schema.returns)
        and isinstance(schema.arguments[0].type, torch.TensorType)
        and isinstance(schema.returns[0].type, torch.ListType)
        for schema in schemas
    )


class Traced:
    """What all stand-ins have: their node, and the tracer that makes nodes of what is done to
    them.
    """

    fx_node: fx.Node
    tracer: Tracer
    claimed: Any
    """The class that ``isinstance`` sees."""

    @property
    def __class__(self) -> type:
        return cast(type, self.claimed)

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise TypeError("the class of a stand-in is fixed")

    @property
    def example(self) -> Any:
        """The value for the example."""
        return self.fx_node.meta["val"]

    @property
    def rank(self) -> int:
        """How many dimensions a tensor has."""
        with torch._C.DisableTorchFunction():
            return int(self.example.dim())

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TraceError(
            f"forward writes {formula(self.fx_node)} to a file or to another process (at "
            f"{user_line()}), which a graph cannot do."
        )


class _SeenByTorch(Traced):
    """What torch's functions hand over before they look at it.

    Whole numbers are not: ``x.view(n, -1)`` would not be taken for a list of sizes. The mode of
    the thread that traces sees them.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = find_traced((args, kwargs))
        if found is None:  # torch asks about its own attributes of the class
            return func(*args, **kwargs)
        return found.tracer.on_function(func, args, kwargs)


class _Operators:
    """Python's operators, recorded as functions of :mod:`operator`; what asks for a Python number
    is a decision.
    """

    tracer: Tracer

    def __index__(self) -> int:
        return int(self.tracer.decide(self, int))

    def __int__(self) -> int:
        return int(self.tracer.decide(self, int))

    def __float__(self) -> float:
        return float(self.tracer.decide(self, float))

    def __complex__(self) -> complex:
        return complex(self.tracer.decide(self, complex))

    def __bool__(self) -> bool:
        return bool(self.tracer.decide(self, bool))


def _operator(name: str, reflected: bool) -> Callable[..., Any]:
    function = getattr(operator, name)
    of_tensors = getattr(Tensor, f"__{'r' if reflected else ''}{name.strip('_')}__", None)

    def record(self: Any, *others: Any) -> Any:
        if (
            of_tensors is not None
            and isinstance(self, TracedTensor)
            and self.tracer.is_overridden()
        ):
            return of_tensors(self, *others)
        if any(
            isinstance(other, (list, str)) or type(other) is tuple for other in others
        ) and name in ("add", "mul"):
            return NotImplemented  # a sequence, so often as the number says
        args = (*others, self) if reflected else (self, *others)
        return self.tracer.record("call_function", function, args, {})

    return record


for _name in filter(operator.__dict__.__contains__, magic_methods):
    setattr(_Operators, f"__{_name.strip('_')}__", _operator(_name, reflected=False))
for _name in filter(operator.__dict__.__contains__, reflectable_magic_methods):
    setattr(_Operators, f"__r{_name.strip('_')}__", _operator(_name, reflected=True))


# -- tensors


class TracedTensor(_Operators, _SeenByTorch, Tensor, fx.Proxy):
    """Stands for a tensor; ``example`` is one without data, unless it follows from constants
    alone.

    It is a proxy of torch.fx as well, for libraries that ask whether they are traced; nothing of
    that class is used.
    """

    @staticmethod
    def __new__(cls: Any, node: fx.Node, tracer: Tracer) -> TracedTensor:
        value: Tensor = node.meta["val"]
        if value.layout is not torch.strided:
            raise TraceError(
                f"{node.name!r} is a tensor of layout {value.layout} (at {user_line()}), which a "
                "graph cannot follow."
            )
        made: TracedTensor = Tensor._make_wrapper_subclass(
            cls,
            value.size(),
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=META,
            dispatch_sizes_strides_policy="sizes",
        )
        made.fx_node = made.node = node
        made.tracer = tracer
        tracer.stand_ins.append(weakref.ref(made))
        return made

    def __init__(self, node: fx.Node, tracer: Tracer) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"'Tensor' object has no attribute {name!r}")

    claimed = Tensor

    @property
    def marks(self) -> list[str]:
        """The names of attributes that forward has set on the tensor: what C++ keeps there, as a
        capsule and what belongs to it, is none of these.
        """
        own = {name: value for name, value in vars(self).items() if name not in _OF_STAND_INS}
        kept = tuple(name for name, value in own.items() if type(value).__name__ == "PyCapsule")
        return [name for name in own if not name.startswith(kept)]

    def __copy__(self) -> Any:
        return self.tracer.record("call_method", "detach", (self,), {})

    def __deepcopy__(self, memo: Any) -> Any:
        copied = memo[id(self)] = self.tracer.record("call_method", "clone", (self,), {})
        return copied

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = cast(Traced, find_traced((args, kwargs)))
        return found.tracer.on_dispatch(func, args, kwargs or {})

    def __setitem__(self, index: Any, value: Any) -> None:
        if self.tracer.is_overridden():
            Tensor.__setitem__(self, index, value)
        else:
            self.tracer.record("call_function", operator.setitem, (self, index, value), {})

    def __len__(self) -> int:
        if not self.rank:
            raise TypeError("len() of a 0-d tensor")
        return int(self.tracer.size_of(self, 0))

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(len(self))])

    def __reversed__(self) -> Any:
        return self.tracer.record("call_method", "flip", (self, 0), {}) if self.rank else self

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        with torch._C.DisableTorchFunction():
            return f"{self.fx_node.name}{tuple(self.example.shape)}"

    def __str__(self) -> str:
        return repr(self)

    def __format__(self, spec: str) -> str:
        return repr(self)


_OF_STAND_INS = frozenset({"fx_node", "node", "tracer"})


def _augmented(name: str) -> Callable[..., Any]:
    """``x += y`` writes into a tensor."""

    def write(self: TracedTensor, other: Any) -> Any:
        if self.tracer.is_overridden():
            return getattr(Tensor, f"__{name}__")(self, other)
        return self.tracer.record("call_function", getattr(operator, name), (self, other), {})

    return write


for _name in AUGMENTED:
    setattr(TracedTensor, f"__{_name}__", _augmented(_name))


# -- numbers


class _ForCpp:
    """What C++ asks of a number that it was given: with each answer of Python's the number is
    decided upon.
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

    def clone(self) -> _ForCpp:
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
                f"{asker()} reads the number {formula(self.number.fx_node)} in C++ (at "
                f"{user_line()}), which a graph cannot follow. Keep that line inside a module of "
                "its own."
            )
        numbers = [self.number]

        def compute(*others: Any) -> Any:
            result = function(*numbers, *(getattr(other, "number", other) for other in others))
            return result.node if isinstance(result, Number) else result

        return compute


class Number(_Operators, Traced):
    """Stands for a number that follows from sizes. Python's questions about it are decisions,
    which the graph guards.
    """

    def __init__(self, node: fx.Node, tracer: Tracer) -> None:
        self.fx_node, self.tracer = node, tracer

    @property
    def node(self) -> _ForCpp:
        return _ForCpp(self)

    @property
    def claimed(self) -> type:
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
        self.tracer.is_compared()
        if issubclass(type(other), Number) and other.tracer is not self.tracer:
            other.tracer.is_compared()
            return False  # a key that an earlier trace has left in a cache
        return _Operators.__eq__(self, other)

    def __hash__(self) -> int:
        """As the number: a table finds it, and asks whether it is the same one."""
        self.tracer.is_looked_up(self)
        return hash(self.example)

    def __repr__(self) -> str:
        return self.tracer.text(self, repr)

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return self.tracer.text(self, lambda number: format(number, spec))


class TracedInt(Number, torch.SymInt):
    """Stands for a whole number."""


class TracedFloat(Number, torch.SymFloat):
    """Stands for a floating-point number."""


class TracedBool(Number, _SeenByTorch, torch.SymBool):
    """Stands for a truth value: a comparison of sizes, or the mode of a module."""


# -- devices and dtypes


class _Attribute(Traced):
    """Stands for what a tensor says of itself: nodes compare it, and nothing is looked up by
    it.
    """

    def __eq__(self, other: Any) -> Any:
        return self.tracer.record("call_function", operator.eq, (self, other), {})

    def __ne__(self, other: Any) -> Any:
        return self.tracer.record("call_function", operator.ne, (self, other), {})

    def __hash__(self) -> int:
        raise TraceError(
            asks("for something by the device or the dtype of a tensor", f"{self!r} as a key")
        )

    def __repr__(self) -> str:
        return f"{self.fx_node.name}={self.example!r}"


class TracedDevice(_Attribute, str):
    """Stands for a device, which nobody may ask for its kind. It is a text, because torch takes a
    text for a device.
    """

    claimed = torch.device

    def __new__(cls, node: fx.Node, tracer: Tracer) -> TracedDevice:
        made = super().__new__(cls, "meta")
        made.fx_node, made.tracer = node, tracer
        return made

    def __getattribute__(self, name: str) -> Any:
        if name in ("fx_node", "tracer", "example", "claimed") or name.startswith("__"):
            return super().__getattribute__(name)
        raise TraceError(asks_device(f"{self!r}.{name}"))

    def __str__(self) -> str:
        raise TraceError(asks_device(f"str({self!r})"))

    def __format__(self, spec: str) -> str:
        raise TraceError(asks_device(f"str({self!r})"))


class TracedDtype(_Attribute, _SeenByTorch):
    """Stands for a dtype."""

    def __init__(self, node: fx.Node, tracer: Tracer) -> None:
        self.fx_node, self.tracer = node, tracer

    claimed = torch.dtype

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


# -- all of them


_TRACED_KINDS: dict[type, Any] = {
    bool: TracedBool,
    int: TracedInt,
    float: TracedFloat,
    torch.device: TracedDevice,
    torch.dtype: TracedDtype,
}


def stand_in(node: fx.Node, tracer: Tracer) -> Any:
    """What stands for the value of a node: containers hold a stand-in for each entry; None, text
    and the like are themselves.

    Raises
    ------
    TraceError
        If the value is of a kind that a graph cannot follow.
    """
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return TracedTensor(node, tracer)
    kind = _TRACED_KINDS.get(type(value))
    if isinstance(value, torch.dtype) and not (value.is_floating_point or value.is_complex):
        return value  # no conversion of the model changes it
    if kind is not None:
        return kind(node, tracer)
    if isinstance(value, (tuple, list)):
        entries = [
            tracer.record("call_function", operator.getitem, (node, i), {})
            for i in range(len(value))
        ]
        if isinstance(value, torch.Size):
            return SizeTuple(entries)
        if type(value) in (tuple, list) and _is_cut(node):
            parts = TracedPieces(entries)
            parts.tracer, parts.fx_node = tracer, node
            return parts
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    if isinstance(value, dict):
        pairs = {
            key: tracer.record("call_function", operator.getitem, (node, key), {}) for key in value
        }
        return pairs if type(value) is dict else type(value)(pairs)
    if value is None or isinstance(value, (str, complex, torch.layout, torch.memory_format)):
        return value
    raise TraceError(
        f"{node.name!r} gives a {type(value).__name__} (at {user_line()}), which a graph cannot "
        "follow."
    )


def find_traced(value: Any) -> Traced | None:
    """The first stand-in in nested arguments; also one that C++ hands back as a number of
    torch.
    """
    kind = type(value)
    if issubclass(kind, Traced):
        return cast(Traced, value)
    if kind is tuple or kind is list or issubclass(kind, (tuple, list)):
        entries: Any = value
    elif issubclass(kind, dict):
        entries = value.values()
    elif kind is slice:
        entries = (value.start, value.stop, value.step)
    elif kind in (torch.SymInt, torch.SymFloat, torch.SymBool):
        return getattr(value.node, "number", None)
    else:
        return None
    for entry in entries:
        found = find_traced(entry)
        if found is not None:
            return found
    return None


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Nested arguments of a call with ``function`` of each leaf; the same object where nothing has
    changed.
    """
    kind = type(value)
    if issubclass(kind, (tuple, list)) and not issubclass(kind, Traced):
        entries = [map_leaves(function, entry) for entry in value]
        kind = tuple if kind is TracedPieces else kind
        if all(new is old for new, old in zip(entries, value, strict=True)):
            return value
        return kind(*entries) if hasattr(value, "_fields") else kind(entries)
    if kind is dict:
        pairs = {key: map_leaves(function, entry) for key, entry in value.items()}
        return value if all(pairs[key] is value[key] for key in value) else pairs
    if kind is slice:
        return slice(
            *(map_leaves(function, bound) for bound in (value.start, value.stop, value.step))
        )
    return function(value)
