"""The tracer: it follows a model's code and records each operation as a node.

Each node stores its value for the example.
"""

from __future__ import annotations

import inspect
import operator
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    is_tensor_method_or_property,
)
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_map_only

from fxprune.common.contents import leaves
from fxprune.common.dispatch import META, holds_tensors
from fxprune.common.hooks import has_replaced_forward, is_hooked
from fxprune.common.identity import IdentitySet
from fxprune.errors import TraceError
from fxprune.trace.aliasing import computes_call
from fxprune.trace.arguments import check_keywords, omitted_integers, parameter_names
from fxprune.trace.asks import PARAMETER_ANSWERS, UNANSWERABLE, question_message
from fxprune.trace.below import BelowPython
from fxprune.trace.execution import (
    DrawsError,
    ModeReadError,
    NoDraws,
    untraced,
)
from fxprune.trace.tensors import TracedTensor, find_traced, map_leaves
from fxprune.trace.user_code import user_line
from fxprune.trace.values import stand_in

__all__ = ["Tracer", "is_leaf"]


def is_leaf(module: nn.Module) -> bool:
    """Tell whether a module becomes one node of the graph.

    A module of ``torch.nn`` without children is a leaf, unless its forward was replaced. A module
    with children is entered. Parametrizations from ``torch.nn`` are an exception: they compute the
    module's own weights, so the module stays a leaf. A user's parametrizations are entered.
    """
    if not type(module).__module__.startswith("torch.nn") or has_replaced_forward(module):
        return False
    if parametrize.is_parametrized(module):
        parametrizations = module._modules["parametrizations"].modules()
        return all(type(child).__module__.startswith("torch.nn") for child in parametrizations)
    return all(child is None for child in module._modules.values())


class _Recording(TorchFunctionMode):
    """A mode that sends each call of a torch function to the tracer.

    It also catches calls whose arguments contain no traced tensor. It is active in the tracing
    thread only.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.tracer.on_call(func, args, kwargs or {})


def _is_operator(name: str) -> bool:
    """Tell whether Python has an operator with this name that takes a tensor on either side."""
    return hasattr(operator, name) and hasattr(Tensor, f"__r{name}__")


class Tracer(BelowPython):
    """One trace of a model: the graph so far, and what was learned while building it."""

    def trace(self) -> fx.Graph:
        """Call the root module with stand-ins for the example's arguments and return the graph.

        If the root has hooks, its forward is called directly: hooks run around the graph, in
        Python.

        Raises
        ------
        TraceError
            If forward sets an attribute on a tensor that its caller can see, or if Python reads
            the value of a buffer that the graph writes.
        """
        for path, module in self.root.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor):
                    self.constants.setdefault(value, (value, f"{path}.{name}".removeprefix(".")))
        self._initial_constants = IdentitySet(self.constants)
        args, kwargs = self._arguments()
        with _Recording(self), torch._C._AutoDispatchBelowAutograd():
            self._modes = (
                torch._C._len_torch_function_stack(),
                torch._C._len_torch_dispatch_stack(),
            )
            call = self.root.forward if is_hooked(self.root) else self.root._call_impl
            result = call(*args, **kwargs)
            self.create_node("output", "output", (self.create_arg(result),), {})
        _refuse_user_attributes((args, kwargs, result))
        self._refuse_values_that_change()
        return self.graph

    def close(self) -> None:
        """End the trace: using one of its stand-ins afterwards is an error."""
        self._closed = True

    @untraced
    def _arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Create the placeholders and return the arguments to call the root with.

        An argument that holds tensors is passed as a stand-in. Any other argument is passed as it
        is, and an assertion guards its value. Arguments that the example leaves out keep their
        Python defaults. Those with an ``int`` as their default get a placeholder too, to find out
        whether the model reads them.
        """
        args, kwargs = self.example
        forward = type(self.root).forward
        definition = inspect.getattr_static(type(self.root), "forward")
        skipped = 0 if isinstance(definition, staticmethod) else 1  # 1 for self
        names = parameter_names(forward, len(args), skipped)
        check_keywords(forward, kwargs, skipped)
        values = {**dict(zip(names, args, strict=True)), **kwargs}
        placeholders = {name: self._placeholder(name, value) for name, value in values.items()}
        with_tensors = {name for name in values if holds_tensors(values[name])}
        passed = {**values, **{name: placeholders[name] for name in with_tensors}}
        keywords = {name: passed[name] for name in kwargs}
        for name, value in omitted_integers(forward, values).items():
            keywords[name] = self._placeholder(name, value)
            self.omitted.append(keywords[name].fx_node)
        for name, placeholder in placeholders.items():
            if name not in with_tensors:
                self._guard(placeholder, values[name], f"its argument {name!r}")
        for node in [*self.graph.nodes]:
            if node.op == "placeholder" and holds_tensors(node.meta["val"]):
                self._guard_contents(node, str(node.target))
        return [passed[name] for name in names], keywords

    def _guard_contents(self, node: fx.Node, what: str) -> None:
        """Guard the length of a container among the arguments, and the constants in it.

        The guard comes before the nodes that read the container's entries.
        """
        value = node.meta["val"]
        if isinstance(value, Tensor):
            return
        with self.graph.inserting_before(node.next):
            if value is None or isinstance(value, (bool, int, float, str)):
                self._guard(node, value, f"inputs with {what}")
            elif isinstance(value, (list, tuple, dict)):
                length = self.record("call_function", len, (node,), {})
                self._guard(length, len(value), f"inputs with len({what})")
        for entry in [user for user in node.users if user.target is operator.getitem]:
            self._guard_contents(entry, f"{what}[{entry.args[1]!r}]")

    def _placeholder(self, name: str, value: Any) -> Any:
        """Create a placeholder; return its stand-in, or the node itself for None and text."""
        node = self.create_node("placeholder", name, (), {})
        node.meta["val"] = value
        return node if value is None or isinstance(value, str) else stand_in(node, self)

    def on_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Handle a call of a torch function in the tracing thread, whatever its arguments are."""
        if self.executing:
            return func(*args, **kwargs)
        if self.in_transform():
            return self.call_in_transform(func, args, kwargs)
        if find_traced((args, kwargs)) is None:
            args, kwargs = (
                map_leaves(self.stand_in_if_known, args),
                map_leaves(self.stand_in_if_known, kwargs),
            )
            if find_traced((args, kwargs)) is None:
                return self._call_without_inputs(func, args, kwargs)
        return self.on_function(func, args, kwargs)

    def _call_without_inputs(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a call that has no traced argument.

        Its result is a constant. If it draws random numbers, it becomes a node instead, so that
        the graph draws them at each call.
        """
        if getattr(func, "__name__", "") in ("__get__", "__set__"):
            return func(*args, **kwargs)
        try:
            with NoDraws():
                return func(*args, **kwargs)
        except DrawsError:
            return self._record_draw(func, args, kwargs)

    def _record_draw(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record a call that draws random numbers and has no traced argument.

        The node's value moves to the meta device, because each call draws other numbers. The
        state of the generator is restored.
        """
        state = torch.get_rng_state()
        try:
            drawn = self._record_function(func, args, kwargs)
        finally:
            torch.set_rng_state(state)
        drawn.fx_node.meta["val"] = tree_map_only(
            Tensor, lambda tensor: tensor.to(META), drawn.example
        )
        return stand_in(drawn.fx_node, self)

    def on_function(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Handle a call of a torch function, method or property with a traced argument."""
        if self.executing and self.is_tracing_thread():
            args, kwargs = self._with_examples((args, kwargs))
            return func(*args, **kwargs)
        self.refuse_other_threads()
        if self.in_transform():
            return self.call_in_transform(func, args, kwargs)
        self._refuse_modes()
        return self._record_function(
            func,
            map_leaves(self.stand_in_if_known, args),
            map_leaves(self.stand_in_if_known, kwargs),
        )

    def is_overridden(self) -> bool:
        """Tell whether a transform, or a mode of the user's, may change what functions do.

        Raises
        ------
        TraceError
            If a dispatch mode of the user's is active.
        """
        self._refuse_modes()
        before = self._modes[0]
        if torch._C._len_torch_function_stack() > before:
            modes = _get_current_function_mode_stack()[before:]
            if _first_user_mode(modes):
                return True
        return self.in_transform()

    def _refuse_modes(self) -> None:
        """Refuse dispatch modes of the user's.

        Such a mode works on ATen operations, below autograd. A graph cannot express which gradient
        formulas then apply.
        """
        before = self._modes[1]
        if torch._C._len_torch_dispatch_stack() <= before:
            return
        mode = _first_user_mode(_get_current_dispatch_mode_stack()[before:])
        if mode:
            raise TraceError(
                f"forward runs under a {mode} (at {user_line()}), which sees operations that a "
                "graph has not. Keep that line inside a module of its own."
            )

    def _record_function(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record a call of a torch function, method or property."""
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._record_attribute(args[0], func.__self__.__name__)
        if name == "__set__":
            return self._set_attribute(args[0], func.__self__.__name__, args[1])
        if not is_tensor_method_or_property(func):
            return self.record("call_function", func, args, kwargs)
        if name == "size":
            return self._size(*args, **kwargs)
        if name in UNANSWERABLE:
            raise TraceError(question_message(UNANSWERABLE[name], f"{args[0]!r}.{name}"))
        if name.startswith("__") and name.endswith("__"):
            return self._record_special_method(name, func, args, kwargs)
        return self.record("call_method", name, args, kwargs)

    def _record_special_method(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Record a call of a special method, such as ``Tensor.__add__`` or ``Tensor.__len__``."""
        bare = name.strip("_")
        if _is_operator(bare) or bare in ("setitem", "getitem"):
            return self.record("call_function", getattr(operator, bare), args, kwargs)
        if bare.startswith("r") and _is_operator(bare[1:]):
            return self.record("call_function", getattr(operator, bare[1:]), args[::-1], kwargs)
        if isinstance(args[0], TracedTensor) and name in vars(TracedTensor):
            return getattr(args[0], name)(*args[1:], **kwargs)
        return self.record("call_method", name, args, kwargs)

    def _record_attribute(self, tensor: Any, name: str) -> Any:
        """Record a read of a tensor's attribute; refuse it if a graph cannot answer it."""
        if name == "shape":
            return self._size(tensor)
        if name in PARAMETER_ANSWERS and isinstance(tensor, nn.Parameter):
            return PARAMETER_ANSWERS[name]
        if name in UNANSWERABLE:
            raise TraceError(question_message(UNANSWERABLE[name], f"{tensor!r}.{name}"))
        return self.record("call_function", getattr, (tensor, name), {})

    @untraced
    def _set_attribute(self, tensor: Any, name: str, value: Any) -> None:
        """Refuse to set a tensor's attribute, except to itself, as ``x.data += 1`` does."""
        value_node, tensor_node = getattr(value, "fx_node", None), getattr(tensor, "fx_node", None)
        if not computes_call(value_node, getattr, tensor_node, name):
            raise TraceError(
                f"{name!r} of a tensor is set (at {user_line()}), which a graph cannot do. Write "
                "into the tensor instead, with copy_() or another operation in place."
            )

    def call_leaf_function(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace into a function that its library registered as a leaf.

        A function that branches on ``training`` becomes one node instead.
        """
        if not isinstance(function, types.FunctionType) or _is_torch(function):
            return self.record("call_function", function, args, kwargs)
        last = next(iter(reversed(self.graph.nodes)), None)
        decisions = len(self.decisions)
        self._inside_leaf_function += 1
        try:
            return function(*args, **kwargs)
        except ModeReadError:
            for node in reversed(list(self.graph.nodes)):
                if node is last:
                    break
                self.graph.erase_node(node)
            del self.decisions[decisions:]
            return self.record("call_function", function, args, kwargs)
        finally:
            self._inside_leaf_function -= 1

    def call_module(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Record a call of a leaf module."""
        return self.record("call_module", self._paths[module], args, kwargs)

    def is_unchanged_leaf(self, module: nn.Module) -> bool:
        """Tell whether a leaf module can be recorded as one node.

        That is so if it only holds tensors that the model had before the trace, and if no
        transform or mode is active that could change what it computes.
        """
        if self.is_overridden():
            return False
        registered = (*module._parameters.values(), *module._buffers.values())
        constants = [value for value in vars(module).values() if isinstance(value, Tensor)]
        if any(tensor is not None and tensor not in self._names for tensor in registered):
            return False
        return all(constant in self._initial_constants for constant in constants)


def _refuse_user_attributes(values: Any) -> None:
    """Refuse arguments and results on which forward has set attributes: the caller sees them."""
    for leaf in leaves(values):
        if isinstance(leaf, TracedTensor) and leaf.user_attributes:
            raise TraceError(
                f"forward sets {leaf.user_attributes[0]!r} on a tensor that its caller gets, "
                f"{leaf.fx_node.name!r}: a graph would not. Hand it out as a result of its "
                "own, or keep that line inside a module of its own."
            )


def _first_user_mode(modes: Iterable[Any]) -> str:
    """Return the class name of the first mode that is not torch's, or an empty string.

    torch's own modes are allowed: they only observe, or choose a device.
    """
    for mode in modes:
        if not type(mode).__module__.startswith("torch."):
            return type(mode).__name__
    return ""


def _is_torch(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").split(".")[0] == "torch"
