"""Stand-ins for the values of a traced call. Each knows the value that it has for the example, as far as shapes go."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxprune.errors import TraceError
from fxprune.memory import AUGMENTED, is_again
from fxprune.trace.lines import user_line

if TYPE_CHECKING:
    from fxprune.trace.tracer import Tracer

__all__ = ["ASKS", "SizeTuple", "ValueAttribute", "ValueProxy", "asks_device", "symbolic"]


_of_the_tensor = torch._C.DisableTorchFunction
"""Attributes of the stand-ins themselves: what looks at how they are read answers for the user's tensors."""

_TOLD = (int, float, bool, torch.device, torch.dtype)
"""Kinds of values that ``isinstance`` tells, beside tensors."""

_DEVICE, _GRADIENT = "on which device a tensor is", "whether a tensor has a gradient"

ASKS: dict[str, str] = {
    **dict.fromkeys(("get_device", "is_cpu", "is_cuda", "is_ipu", "is_maia", "is_meta", "is_mps", "is_mtia"), _DEVICE),
    **dict.fromkeys(("is_vulkan", "is_xla", "is_xpu"), _DEVICE),
    **dict.fromkeys(("grad_fn", "is_leaf", "requires_grad"), _GRADIENT),
}
"""Attributes of a tensor that tell what is the caller's business, and what they tell."""


def asks(what: str, how: str) -> str:
    return (
        f"forward asks {what} ({how}, at {user_line()}), to do something else then. A graph has one path for all answers: hand "
        "x.device and x.dtype on, as in device=x.device, or keep that line inside a module of its own."
    )


def asks_device(how: str) -> str:
    return asks(_DEVICE, how)


class SizeTuple(tuple[Any, ...]):
    """What ``x.shape`` gives while tracing: a tuple whose entries are proxies of ``x.size(i)``."""

    def numel(self) -> Any:
        total: Any = 1
        for size in self:
            total = total * size
        return total


class ValueProxy(fx.Proxy):
    """A proxy that knows the value it stands for, as far as shapes go."""

    tracer: Tracer

    if TYPE_CHECKING:  # torch.fx adds the operators to its class when it is imported

        def __getitem__(self, index: Any) -> Any: ...

    @property
    def value(self) -> Any:
        return self.node.meta["val"]

    @property
    def __class__(self) -> type:
        # isinstance(x, Tensor) in users' code must be answered as for the tensor itself.
        kind = type(self.node.meta.get("val"))
        return Tensor if issubclass(kind, Tensor) else kind if kind in _TOLD else ValueProxy

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise TypeError("the class of a proxy is fixed")

    def __getattr__(self, name: str) -> Any:
        value = self.value
        if name == "shape" and isinstance(value, Tensor):
            return self.size()
        if isinstance(value, dict) and name in ("values", "items"):
            pairs = [(key, self[key]) for key in value]
            return lambda: pairs if name == "items" else [item for _, item in pairs]
        with _of_the_tensor():
            has = hasattr(value, name)
        if not has:
            raise AttributeError(f"{type(value).__name__!r} object has no attribute {name!r}")
        if isinstance(value, torch.device):
            raise TraceError(asks_device(f"{self!r}.{name}"))
        if isinstance(value, Tensor) and name in ASKS:
            raise TraceError(asks(ASKS[name], f"{self!r}.{name}"))
        return ValueAttribute(self, name)

    def size(self, dim: Any = None) -> Any:
        if dim is not None:
            return self.tracer.create_proxy("call_method", "size", (self, dim), {})
        return SizeTuple(self.tracer.create_proxy("call_method", "size", (self, i), {}) for i in range(self.value.dim()))

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(Tensor, name) and not is_again(getattr(value, "node", None), getattr, self.node, name):
            raise TraceError(
                f"{name!r} of a tensor is set (at {user_line()}), which a graph cannot do. Write into the tensor instead, with "
                "copy_() or another operation in place."
            )
        super().__setattr__(name, value)

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        value = self.value
        if isinstance(value, dict):
            return iter(value)
        return iter([self[i] for i in range(len(value))])

    def __contains__(self, item: Any) -> bool:
        return item in self.value if isinstance(self.value, dict) else any(item is own or bool(item == own) for own in self)

    def keys(self) -> Any:
        return self.value.keys()

    def __index__(self) -> int:
        return int(self.tracer.decide(self, int))

    def __int__(self) -> int:
        return int(self.tracer.decide(self, int))

    def __float__(self) -> float:
        return float(self.tracer.decide(self, float))

    def __bool__(self) -> bool:
        return bool(self.tracer.decide(self, bool))

    def __hash__(self) -> int:
        if self.__class__ in (torch.device, torch.dtype):
            raise TraceError(asks("for something by the device or the dtype of a tensor", f"{self!r} as a key"))
        return id(self)

    def __repr__(self) -> str:
        value = self.__dict__["node"].meta.get("val")
        return f"{self.node.name}{tuple(value.shape)}" if isinstance(value, Tensor) else f"{self.node.name}={value!r}"

    def __str__(self) -> str:
        return format(self)

    def __format__(self, spec: str) -> str:
        """The text of the example's value, which no node holds: most of it goes into messages that are never shown."""
        kind = self.__class__
        if kind is torch.device:
            raise TraceError(asks_device(f"str({self!r})"))
        return format(self._read(), spec) if kind in _TOLD else repr(self)

    def _read(self) -> Any:
        """The value, without making a node of it."""
        return self.node.meta.get("val")


def _augmented(function: Callable[..., Any]) -> Callable[..., Any]:
    """``x += y`` writes into a tensor; a number is bound anew, to what ``x + y`` gives."""

    def write(self: ValueProxy, other: Any) -> Any:
        if not isinstance(self.value, Tensor):
            return NotImplemented
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return write


for _name in AUGMENTED:
    setattr(ValueProxy, f"__{_name}__", _augmented(getattr(operator, _name)))


class ValueAttribute(ValueProxy):
    """``x.attr`` before it is known whether it will be read (``x.device``) or called (``x.view(...)``)."""

    def __init__(self, root: ValueProxy, attr: str) -> None:
        self.root, self.attr = root, attr
        self.tracer = root.tracer
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:
        if self._node is None:
            made = self.tracer.create_proxy("call_function", getattr, (self.root, self.attr), {})
            self._node = made.node
        return self._node

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        kind = type(self._read())
        return Tensor if issubclass(kind, Tensor) else kind if kind in _TOLD else ValueAttribute

    def __repr__(self) -> str:
        return f"{self.root!r}.{self.attr}={self._read()!r}"

    def _read(self) -> Any:
        with _of_the_tensor():
            return getattr(self.root.value, self.attr)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


def symbolic(value: Any) -> bool:
    """Whether there is a proxy in nested arguments."""
    if isinstance(value, (tuple, list)):
        return any(map(symbolic, value))
    if isinstance(value, dict):
        return any(map(symbolic, value.values()))
    return type(value) in (ValueProxy, ValueAttribute)
