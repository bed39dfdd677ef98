"""Stand-ins for tensors, and the base classes of all stand-ins."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx
from torch.fx.graph import magic_methods, reflectable_magic_methods

from fxprune.common.dispatch import META
from fxprune.common.identity import to_memo
from fxprune.errors import TraceError
from fxprune.trace.aliasing import AUGMENTED
from fxprune.trace.decisions import formula
from fxprune.trace.user_code import user_line

if TYPE_CHECKING:
    from fxprune.trace.tracer import Tracer
from fxprune.trace.sequences import TracedPieces

__all__ = [
    "Operators",
    "TorchFunctionMixin",
    "Traced",
    "TracedTensor",
    "find_traced",
    "map_leaves",
]


class Traced:
    """The base class of all stand-ins.

    Attributes
    ----------
    fx_node:
        The node whose value this object represents.
    tracer:
        The tracer, which records the operations on this object.
    apparent_class:
        The class that ``isinstance`` sees.
    """

    fx_node: fx.Node
    tracer: Tracer
    apparent_class: Any

    @property
    def __class__(self) -> type:
        return cast(type, self.apparent_class)

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise TypeError("the class of a stand-in is fixed")

    @property
    def example(self) -> Any:
        """The node's value for the example."""
        return self.fx_node.meta["val"]

    @property
    def rank(self) -> int:
        """The number of a tensor's axes."""
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


class TorchFunctionMixin(Traced):
    """A stand-in that sends torch functions to the tracer, through ``__torch_function__``.

    Stand-ins for whole numbers are not of this class: torch would no longer read the arguments of
    ``x.view(n, -1)`` as a list of sizes. A mode in the tracing thread sees those calls.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = find_traced((args, kwargs))
        if found is None:  # torch reads its own attributes of the class
            return func(*args, **kwargs)
        return found.tracer.on_function(func, args, kwargs)


class Operators:
    """Python's operators on a stand-in, recorded as functions of :mod:`operator`.

    A conversion to a Python number is a decision (see :meth:`Guarded.decide`).
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


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (list, str)) or type(value) is tuple


def _operator(name: str, reflected: bool) -> Callable[..., Any]:
    """Return the method behind an operator; ``reflected``: with the stand-in on the right."""
    function = getattr(operator, name)
    of_tensors = getattr(Tensor, f"__{'r' if reflected else ''}{name.strip('_')}__", None)

    def record(self: Any, *others: Any) -> Any:
        if (
            of_tensors is not None
            and isinstance(self, TracedTensor)
            and self.tracer.is_overridden()
        ):
            return of_tensors(self, *others)
        if name in ("add", "mul") and any(map(_is_sequence, others)):
            return NotImplemented  # Python repeats or concatenates the sequence itself
        args = (*others, self) if reflected else (self, *others)
        return self.tracer.record("call_function", function, args, {})

    return record


for _name in filter(operator.__dict__.__contains__, magic_methods):
    setattr(Operators, f"__{_name.strip('_')}__", _operator(_name, reflected=False))


for _name in filter(operator.__dict__.__contains__, reflectable_magic_methods):
    setattr(Operators, f"__r{_name.strip('_')}__", _operator(_name, reflected=True))


class TracedTensor(Operators, TorchFunctionMixin, Tensor, fx.Proxy):
    """A stand-in for a tensor.

    ``example`` is a meta tensor, unless it is computed from constants only. The class also derives
    from ``fx.Proxy``, for libraries that check whether they are traced; it uses nothing of it.
    """

    @staticmethod
    def __new__(cls: Any, node: fx.Node, tracer: Tracer) -> TracedTensor:
        value: Tensor = node.meta["val"]
        if value.layout is not torch.strided:
            raise TraceError(
                f"{node.name!r} is a tensor of layout {value.layout} (at {user_line()}), which a "
                "graph cannot follow."
            )
        tensor: TracedTensor = Tensor._make_wrapper_subclass(
            cls,
            value.size(),
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=META,
            dispatch_sizes_strides_policy="sizes",
        )
        tensor.fx_node = tensor.node = node
        tensor.tracer = tracer
        tracer.stand_ins.append(weakref.ref(tensor))
        return tensor

    def __init__(self, node: fx.Node, tracer: Tracer) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"'Tensor' object has no attribute {name!r}")

    apparent_class = Tensor

    @property
    def user_attributes(self) -> list[str]:
        """The names of the attributes that forward has set on the tensor.

        C++ stores attributes there too, in capsules. They are left out, and so is every attribute
        whose name begins with that of a capsule.
        """
        added = {name: value for name, value in vars(self).items() if name not in _OWN_ATTRIBUTES}
        capsules = [name for name, value in added.items() if type(value).__name__ == "PyCapsule"]
        return [name for name in added if not name.startswith(tuple(capsules))]

    def __copy__(self) -> Any:
        return self.tracer.record("call_method", "detach", (self,), {})

    def __deepcopy__(self, memo: Any) -> Any:
        return to_memo(memo, self, self.tracer.record("call_method", "clone", (self,), {}))

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
        return object.__hash__(self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        with torch._C.DisableTorchFunction():
            return f"{self.fx_node.name}{tuple(self.example.shape)}"

    def __str__(self) -> str:
        return repr(self)

    def __format__(self, spec: str) -> str:
        return repr(self)


_OWN_ATTRIBUTES = frozenset({"fx_node", "node", "tracer"})


def _augmented_assignment(name: str) -> Callable[..., Any]:
    """Return the method behind an augmented assignment, which writes into the tensor."""

    def write(self: TracedTensor, other: Any) -> Any:
        if self.tracer.is_overridden():
            return getattr(Tensor, f"__{name}__")(self, other)
        return self.tracer.record("call_function", getattr(operator, name), (self, other), {})

    return write


for _name in AUGMENTED:
    setattr(TracedTensor, f"__{_name}__", _augmented_assignment(_name))


def find_traced(value: Any) -> Traced | None:
    """Return the first stand-in in nested arguments, or None.

    A ``torch.SymInt`` that C++ made from a traced number counts as its stand-in.
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
    """Apply ``function`` to each leaf of a call's nested arguments.

    A container in which nothing changes is returned as it is.
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
        bounds = (value.start, value.stop, value.step)
        return slice(*(map_leaves(function, bound) for bound in bounds))
    return function(value)
