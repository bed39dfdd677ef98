"""The recorder: it adds nodes to a graph and runs each node on the example."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import SUPPORTED_NODES

from fxprune.common.contents import leaves
from fxprune.common.dispatch import holds_tensors
from fxprune.common.identity import IdentityMap, IdentitySet
from fxprune.errors import TraceError
from fxprune.trace.aliasing import Snapshot, written_arguments
from fxprune.trace.asks import device_question_message
from fxprune.trace.constants import (
    CONSTANTS,
    MADE_FROM_INPUT,
    SEQUENCES,
    as_plain_constant,
    cannot_hold_error,
    refuse_device_questions,
)
from fxprune.trace.execution import (
    untraced,
)
from fxprune.trace.executor import Executor
from fxprune.trace.lookups import Lookup
from fxprune.trace.meta_copy import MetaCopy
from fxprune.trace.numbers import Number
from fxprune.trace.sizes import ALL_DIMS
from fxprune.trace.tensors import Traced, TracedTensor, map_leaves
from fxprune.trace.user_code import ElsewhereError, user_line
from fxprune.trace.values import stand_in
from fxprune.trace.views import changes_layout, view_counterpart

if TYPE_CHECKING:
    from fxprune.trace.tracer import Tracer

__all__ = ["Recorder"]


class Recorder(Executor):
    """A graph under construction: each call becomes a node, which runs at once on the example.

    Parameters
    ----------
    meta_copy:
        The meta copy of the model to trace.
    args, kwargs:
        The example's arguments, on the meta device.
    training:
        Whether the model is traced in training mode.
    watch:
        Returns the context in which a node runs (see :func:`fxprune.trace.trace`).
    """

    asked_mode = False  # whether Python has decided by ``self.training``
    other_thread_error: ElsewhereError | None = None  # set when another thread uses a stand-in
    _closed = False
    _inside_leaf_function = 0
    # how many function modes and dispatch modes are active before the model runs
    _modes: tuple[int, int] = (0, 0)
    # axes whose sizes C++ may decide by when it reads them as plain numbers
    _decisive_dims: frozenset[Any] = ALL_DIMS
    _differentiates = False  # whether a transform of torch.func has taken gradients
    _inputs_guarded = False

    def __init__(
        self,
        meta_copy: MetaCopy,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        training: bool,
        watch: Callable[[fx.Node], AbstractContextManager[Any]],
    ) -> None:
        super().__init__(meta_copy.model, watch)
        self.graph = fx.Graph()
        self.example = (args, kwargs)
        self.training = training
        self.thread = threading.get_ident()
        self.stand_ins: list[weakref.ref[TracedTensor]] = []  # of all tensors
        # placeholders of int arguments that the example leaves out
        self.omitted: list[fx.Node] = []
        self.checkpoints: list[str] = []  # the user's lines of non-reentrant checkpoints
        self._reached = meta_copy.reached
        self._prepare_tensors(meta_copy)
        self._prepare_guards()

    def _prepare_tensors(self, meta_copy: MetaCopy) -> None:
        """Create the tables of the tensors that the graph knows."""
        # tensors that are plain attributes of modules or are made by forward, with their names
        self.constants: IdentityMap[Tensor, tuple[Tensor, str]] = IdentityMap()
        self.constant_targets: set[str] = set()  # names of the constants that the graph reads
        # constants that modules have before the model runs
        self._initial_constants: IdentitySet[Any] = IdentitySet()
        # attributes added to the root for tensors that forward makes
        self.made_constant_names: list[str] = []
        # values of the tensors that forward makes without any input: constants of the graph
        self.made_constants = Snapshot()
        self._names = IdentityMap((tensor, name) for name, tensor in meta_copy.tensors.items())
        modules = list(self.root.named_modules(remove_duplicate=False))
        self._paths = IdentityMap((module, path) for path, module in reversed(modules))
        # stand-ins of the parameters and buffers read so far
        self._read_tensors: dict[str, Any] = {}
        # the node that produced a tensor
        self._values: IdentityMap[Tensor, fx.Node] = IdentityMap()

    def _prepare_guards(self) -> None:
        """Create the lists of the decisions that Python and C++ make."""
        self.decisions: list[str] = []
        # tensors and axes whose sizes are guarded
        self._guarded_sizes: set[tuple[fx.Node, int]] = set()
        # operations whose numbers C++ may have computed from sizes, with the user's lines
        self.cpp_lines: dict[fx.Node, str] = {}
        # tensors computed from constants whose values Python has read, with the user's lines
        self._read_values: list[tuple[fx.Node, str]] = []
        self.lookups: list[Lookup] = []
        # texts of numbers, each with the nodes that guard the number and its decisions
        self._texts: list[tuple[str, list[fx.Node], list[str]]] = []

    @untraced
    def stand_in(self, node: fx.Node) -> Any:
        """Return a stand-in for a node's value (see :func:`fxprune.trace.values.stand_in`)."""
        return stand_in(node, cast("Tracer", self))

    def stand_in_if_known(self, value: Any) -> Any:
        """Return the stand-in for a tensor that the graph knows; any other value as it is.

        The graph knows the model's parameters and buffers, and the values of its nodes.
        """
        if not isinstance(value, Tensor) or isinstance(value, Traced):
            return value
        name = self._names.get(value)
        if name is not None:
            if name not in self._read_tensors:
                self._read_tensors[name] = self.record("get_attr", name, (), {})
            return self._read_tensors[name]
        node = self._values.get(value) if value.is_meta else None
        return value if node is None else self.stand_in(node)

    def refuse_other_threads(self) -> None:
        """Refuse to work in a thread other than the tracing one.

        The order of its operations is not fixed, and it does not run under the modes and contexts
        of the tracing thread.

        Raises
        ------
        ElsewhereError
        """
        if not self.is_tracing_thread():
            self.other_thread_error = self.other_thread_error or ElsewhereError.at(self.thread)
            raise self.other_thread_error

    def in_transform(self) -> bool:
        """Tell whether ``vmap``, ``grad`` or another transform of ``torch.func`` is active."""
        return torch._C._functorch.peek_interpreter_stack() is not None

    def _with_examples(self, value: Any) -> Any:
        """Return nested arguments with each stand-in replaced by its example value."""

        def example(leaf: Any) -> Any:
            return leaf.example if isinstance(leaf, Traced) else leaf

        return map_leaves(example, value)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """Append a node to the graph, without running it."""
        return self.graph.create_node(kind, target, args, kwargs)

    @untraced
    def record(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Create a node, run it on the example, and return a stand-in for its value.

        Parameters
        ----------
        kind:
            The node's ``op``: ``"call_function"``, ``"call_method"``, ``"call_module"`` or
            ``"get_attr"``.
        target:
            The function, or the name of the method, module or attribute.
        args, kwargs:
            The arguments, with stand-ins at any depth.

        Raises
        ------
        TraceError
            If a graph cannot hold the call or one of its arguments.
        InputError
            If the operation refuses the shapes of the example.
        """
        self.refuse_other_threads()
        if self._closed:
            raise TraceError(
                f"a stand-in of an earlier call of fxprune is used (at {user_line()}): forward "
                "kept it, in a cache say, outside of the model. Empty that cache."
            )
        view = (
            view_counterpart(kind, target) if args and isinstance(args[0], TracedTensor) else None
        )
        # inputs and parameters keep their layout: the caller sees them
        if view is not None and args[0].fx_node.op not in ("get_attr", "placeholder"):
            args[0].fx_node = args[0].node = self.record(kind, view, args, kwargs).fx_node
            return args[0]
        if view is None:
            _refuse_layout_change(kind, target)
        if target is torch._assert:
            self._drop_message_guards(*self.create_arg(args), **self.create_arg(kwargs))
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs))
        self._refuse_to_write_into_constants(node)
        refuse_device_questions(node)
        value = node.meta["val"] = self._execute(node)
        if isinstance(value, Tensor):
            self._values.setdefault(value, node)
        return self.stand_in(node)

    @untraced
    def create_arg(self, a: Any) -> Any:
        """Convert a value to an argument of a node: stand-ins become nodes, at any depth.

        Raises
        ------
        TraceError
            If a graph cannot hold a value of this kind.
        """
        if issubclass(type(a), Traced):
            return a.fx_node
        a = as_plain_constant(a)
        kind = type(a)
        if a is None or a is ... or kind in (fx.Node, range) or issubclass(kind, CONSTANTS):
            return a
        if issubclass(kind, (tuple, list)):
            return self._sequence_arg(a)
        if issubclass(kind, dict):
            return self._mapping_arg(a)
        if kind is slice:
            return slice(*map(self.create_arg, (a.start, a.stop, a.step)))
        if isinstance(a, Tensor):
            return self._tensor_arg(a)
        return self._other_arg(a)

    def _other_arg(self, a: Any) -> Any:
        """Convert a torch number, a device, a dataclass or a function to an argument of a node."""
        kind = type(a)
        if kind in (torch.SymInt, torch.SymFloat, torch.SymBool):
            number = getattr(a.node, "number", None)
            if isinstance(number, Number):
                return number.fx_node
        if kind is torch.device:
            if a.type == "meta":
                raise TraceError(device_question_message("torch.device(x.device)"))
            return a
        if dataclasses.is_dataclass(a) and not isinstance(a, type):
            fields = dataclasses.fields(a)
            if all(field.init for field in fields):
                entries = {field.name: self.create_arg(getattr(a, field.name)) for field in fields}
                return self._constructor_node(kind, (), entries)
        is_function = callable(a) and hasattr(a, "__name__")
        if is_function and not any(isinstance(leaf, Traced) for leaf in leaves(a)):
            return a
        raise cannot_hold_error(kind)

    def _sequence_arg(self, a: Any) -> Any:
        """Convert a tuple or list to an argument of a node."""
        # a node makes the named tuple, so that it has a value like any other node
        if hasattr(a, "_fields"):
            return self._constructor_node(type(a), tuple(map(self.create_arg, a)), {})
        entries = [self.create_arg(entry) for entry in a]
        if hasattr(type(a), "n_sequence_fields"):  # torch.max returns such a sequence
            return self._constructor_node(type(a), (tuple(entries),), {})
        if type(a) not in SEQUENCES:
            raise cannot_hold_error(type(a))
        return tuple(entries) if isinstance(a, tuple) else entries

    def _mapping_arg(self, a: Any) -> Any:
        """Convert a dict to an argument of a node."""
        if any(isinstance(key, Traced) for key in a):
            raise TraceError(
                f"forward handles a {type(a).__qualname__} of which tensors are keys (at "
                f"{user_line()})."
            )
        if type(a) is dict:
            return {key: self.create_arg(value) for key, value in a.items()}
        if type(a) not in SUPPORTED_NODES:
            raise cannot_hold_error(type(a))
        content = dict(zip(a.keys(), map(self.create_arg, a.values()), strict=True))
        if dataclasses.is_dataclass(a):
            return self._constructor_node(type(a), (), content)
        return self._constructor_node(type(a), (content,), {})

    def _constructor_node(self, kind: type, args: Any, kwargs: Any) -> fx.Node:
        """Create a node that builds an object of class ``kind`` from its arguments."""
        node = self.create_node("call_function", kind, args, kwargs)
        node.meta["val"] = self._execute(node)
        return node

    def _tensor_arg(self, a: Tensor) -> fx.Node:
        """Return the node for a tensor that is not a stand-in.

        It is a parameter or buffer of the model, the value of a node, or a constant. A constant
        without a name is added to the root as an attribute.
        """
        known = self.stand_in_if_known(a)
        if known is not a:
            return cast(fx.Node, known.fx_node)
        if torch._C._functorch.is_functorch_wrapped_tensor(a):
            raise TraceError(
                "a tensor inside of a transform of torch.func is handled outside of it (at "
                f"{user_line()})."
            )
        _, name = self.constants.get(a, (None, None))
        if name is None:
            name = self._add_constant(a)
        self.constant_targets.add(name)
        node = self.create_node("get_attr", name, (), {})
        # nodes run on meta tensors, which accept data on the CPU beside them
        node.meta["val"] = a if a.is_meta else a.cpu()
        return node

    def _add_constant(self, a: Tensor) -> str:
        """Add a tensor that forward makes to the root as an attribute, and return its name."""
        if isinstance(a, nn.Parameter):
            raise TraceError(
                f"forward makes a parameter of its own (at {user_line()}), which a graph "
                "cannot hold."
            )
        if a.is_meta:
            raise TraceError(
                f"forward uses a tensor without data that no operation made (at {user_line()})."
            )
        names = map("_constant{}".format, itertools.count())
        name = next(name for name in names if not hasattr(self.root, name))
        self.constants[a] = a, name
        self.made_constants.take(a, user_line())
        self.made_constant_names.append(name)
        setattr(self.root, name, a)
        return name

    def _refuse_to_write_into_constants(self, node: fx.Node) -> None:
        """Refuse a node that writes into a tensor that forward made without any input."""
        values = [place.meta["val"] for place in written_arguments(node)]
        tensors = [value for value in values if isinstance(value, Tensor)]
        if any(map(self.made_constants.shares_memory_with, tensors)):
            raise TraceError(
                "values that depend on the input are written into a tensor that forward makes "
                f"without it (at {user_line()}), and that a graph has once for all calls. "
                f"{MADE_FROM_INPUT}"
            )

    @untraced
    def read_mode(self, module: nn.Module) -> Any:
        """Record a read of ``module.training`` and return its stand-in."""
        path = self._paths[module]
        node = self.create_node("get_attr", f"{path}.training" if path else "training", (), {})
        # a module that overrides train() may have another mode than the model
        node.meta["val"] = module.__dict__["training"]
        node.meta["mode"] = True
        return self.stand_in(node)

    def is_tracing_thread(self) -> bool:
        """Tell whether the current thread is the tracing one."""
        return threading.get_ident() == self.thread

    def _drop_message_guards(self, condition: Any, message: Any = "") -> None:
        """Remove the guards of numbers that were only formatted for an assertion's message.

        The message is shown only when the assertion fails, so the graph need not be held to these
        numbers.
        """
        texts, self._texts = self._texts, []
        later = itertools.takewhile(lambda node: node is not condition, reversed(self.graph.nodes))
        between = set(itertools.takewhile(lambda node: not holds_tensors(node.meta["val"]), later))
        for text, guards, decisions in texts:
            if isinstance(message, str) and text in message and between.issuperset(guards):
                for node in guards:
                    self.graph.erase_node(node)
                self.decisions[:] = [line for line in self.decisions if line not in decisions]


def _refuse_layout_change(kind: str, target: Any) -> None:
    """Refuse a call that changes the layout of a tensor in place and has no view counterpart."""
    if changes_layout(kind, target):
        raise TraceError(
            "forward gives a tensor another size or other memory in place (at "
            f"{user_line()}), which a graph cannot do. Use the tensor that it is to be, or "
            "keep that line inside a module of its own."
        )
