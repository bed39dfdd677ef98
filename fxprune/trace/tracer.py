"""Follows a model's code and records each operation as a node, which has the value that it gives
for the example.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import inspect
import itertools
import operator
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    is_tensor_method_or_property,
)
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import SUPPORTED_NODES, tree_leaves, tree_map_only

from fxprune.contents import leaves, tensors_of
from fxprune.dispatch import META, DispatchMode, aten, holds_tensors
from fxprune.errors import ChanceError, FxpruneError, InputError, TraceError
from fxprune.hooks import has_own_forward, is_hooked
from fxprune.memory import Snapshot, is_again, written
from fxprune.ops import Trait, has, name_of_op
from fxprune.regions import BOUNDS, enter, leave
from fxprune.trace.arguments import check_keywords, left_out, parameter_names
from fxprune.trace.decisions import formula, from_mode, number_decides, of_rank
from fxprune.trace.lines import UNKNOWN, ElsewhereError, is_ours, user_line
from fxprune.trace.lookups import Lookup, at
from fxprune.trace.meta_copy import MetaCopy
from fxprune.trace.sizes import EVERY, asked_sizes, own_sizes, reads_size, with_traced_sizes
from fxprune.trace.values import (
    ASKS,
    OF_PARAMETERS,
    Number,
    SizeTuple,
    Traced,
    TracedPieces,
    TracedTensor,
    asks,
    asks_device,
    find_traced,
    map_leaves,
    stand_in,
)

__all__ = ["MADE_FROM_INPUT", "Tracer", "execute", "is_leaf"]

MADE_FROM_INPUT = (
    "Make it from an input, with x.new_zeros(...) or device=x.device, so that the graph makes it "
    "at each call."
)


def execute(root: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """What a node of a graph over ``root`` gives for these arguments."""
    target: Any = node.target
    if node.op == "call_function":
        return None if target in BOUNDS else target(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    if node.op == "call_module":
        module: Any = root  # past Module.__getattr__, which is slow
        for name in target.split("."):
            module = module._modules[name]
        return module(*args, **kwargs)
    return operator.attrgetter(target)(root)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module stays one node.

    A module of torch.nn without children is one operation, unless its forward was replaced. One
    with children is a container or a composite, unless the children are parametrisations of
    torch's own, which compute its weights and belong to it. Those of a user are code like any
    other.
    """
    if not type(module).__module__.startswith("torch.nn") or has_own_forward(module):
        return False
    if parametrize.is_parametrized(module):
        return all(
            type(child).__module__.startswith("torch.nn")
            for child in module._modules["parametrizations"].modules()
        )
    return all(child is None for child in module._modules.values())


def _unseen(method: Any) -> Any:
    """A method in which torch's functions do what they do outside of tracing."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return method(*args, **kwargs)

    return call


class _ModeReadError(Exception):
    """A leaf function branches on ``training``: it has to stay whole."""


class _DrawsError(Exception):
    """A call without stand-ins among its arguments draws random numbers."""


class _NoDraws(DispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _DrawsError
        return func(*args, **(kwargs or {}))


class _Recording(TorchFunctionMode):
    """Sees, in the thread that traces, the calls of torch's functions in which no argument is a
    stand-in for a tensor.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.tracer.on_call(func, args, kwargs or {})


_SEQUENCES = frozenset({tuple, list, torch.Size, SizeTuple, TracedPieces})
_CONSTANTS = (
    bool,
    int,
    float,
    complex,
    str,
    torch.dtype,
    torch.layout,
    torch.memory_format,
    enum.Enum,
)


def _is_operator(name: str) -> bool:
    """Whether Python has an operator of this name that takes a tensor on either side."""
    return hasattr(operator, name) and hasattr(Tensor, f"__r{name}__")


class Tracer:
    """One trace: the graph so far, and what was learned while making it.

    Parameters
    ----------
    watch:
        What a node runs under (see :func:`fxprune.trace.trace`).
    """

    def __init__(
        self,
        meta_copy: MetaCopy,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        training: bool,
        watch: Callable[[fx.Node], AbstractContextManager[Any]],
    ) -> None:
        self.root = meta_copy.model
        self.graph = fx.Graph()
        self.example = (args, kwargs)
        self.watch = watch
        self.training = training
        self.thread = threading.get_ident()
        self.decisions: list[str] = []
        self.asked_mode = False
        self.elsewhere: ElsewhereError | None = None  # once another thread has handled a stand-in
        self.stand_ins: list[weakref.ref[TracedTensor]] = []
        # whole numbers among the arguments for which the example has nothing
        self.left_out: list[fx.Node] = []
        # Plain attributes of modules, and what forward makes: by the id of a tensor, which is held
        # here.
        self.constants: dict[int, tuple[Tensor, str]] = {}
        self.constant_targets: set[str] = set()
        # the ids of those that modules have from the beginning
        self._given: frozenset[int] = frozenset()
        self.made_names: list[str] = []
        # tensors that forward makes without any input, and the graph holds as constants
        self.made = Snapshot()
        self._names = {id(tensor): name for name, tensor in meta_copy.tensors.items()}
        self._tensors = list(meta_copy.tensors.values())  # keeps the ids above
        self._paths = {
            id(module): name
            for name, module in reversed(list(self.root.named_modules(remove_duplicate=False)))
        }
        self._read: dict[str, Any] = {}  # parameters and buffers that have a node: their stand-ins
        # by the id of the tensor that a node gave, which its meta keeps
        self._values: dict[int, fx.Node] = {}
        self._inside_leaf_function = 0
        # while a node runs on meta tensors, modules behave as outside of tracing
        self.executing = False
        self._closed = False
        # those of functions and of operations that are there before the model runs
        self._modes: tuple[int, int] = (0, 0)
        # the dimensions by whose sizes C++ may go that reads them as plain numbers
        self._asked: frozenset[Any] = EVERY
        # tensors and the dimensions whose sizes the graph is held to
        self._held: set[tuple[fx.Node, int]] = set()
        self.checkpoints: list[str] = []  # the lines of those that are not reentrant
        # of what C++ has done with numbers that it may have computed from sizes
        self.below_lines: dict[fx.Node, str] = {}
        self._differentiates = False  # whether a transform of torch.func has taken gradients
        self._sizes_held = False
        # of tensors that follow from constants, with the lines
        self._read_values: list[tuple[fx.Node, str]] = []
        self.lookups: list[Lookup] = []
        self._reached = meta_copy.reached
        # of numbers; the nodes that hold these, and the decisions
        self._texts: list[tuple[str, list[fx.Node], list[str]]] = []

    def trace(self) -> fx.Graph:
        """Call the root on stand-ins for the example's arguments. Hooks of a user's run around its
        graph, in Python.
        """
        for path, module in self.root.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor):
                    self.constants.setdefault(
                        id(value), (value, f"{path}.{name}".removeprefix("."))
                    )
        self._given = frozenset(self.constants)
        args, kwargs = self._arguments()
        with _Recording(self), torch._C._AutoDispatchBelowAutograd():
            self._modes = (
                torch._C._len_torch_function_stack(),
                torch._C._len_torch_dispatch_stack(),
            )
            result = (self.root.forward if is_hooked(self.root) else self.root._call_impl)(
                *args, **kwargs
            )
            self.create_node("output", "output", (self.create_arg(result),), {})
        for leaf in leaves((args, kwargs, result)):
            if isinstance(leaf, TracedTensor) and leaf.marks:
                raise TraceError(
                    f"forward sets {leaf.marks[0]!r} on a tensor that its caller gets, "
                    f"{leaf.fx_node.name!r}: a graph would not. Hand it out as a result of its "
                    "own, or keep that line inside a module of its own."
                )
        self._refuse_values_that_change()
        return self.graph

    def close(self) -> None:
        """From now on the stand-ins of this trace stand for nothing."""
        self._closed = True

    # -- inputs and arguments

    @_unseen
    def _arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Placeholders for the inputs that the example has; parameters it leaves out keep their
        Python defaults.
        """
        args, kwargs = self.example
        forward = type(self.root).forward
        # self
        own = (
            0
            if isinstance(inspect.getattr_static(type(self.root), "forward"), staticmethod)
            else 1
        )
        names = parameter_names(forward, len(args), own)
        check_keywords(forward, kwargs, own)
        values = {**dict(zip(names, args, strict=True)), **kwargs}
        made = {name: self._placeholder(name, value) for name, value in values.items()}
        given = {
            name: made[name] if holds_tensors(values[name]) else values[name] for name in made
        }
        keywords = {name: given[name] for name in kwargs}
        for name, value in left_out(forward, values).items():
            keywords[name] = self._placeholder(name, value)
            self.left_out.append(keywords[name].fx_node)
        for name, value in made.items():
            if given[name] is not value:
                self._hold(value, values[name], f"its argument {name!r}")
        for node in [*self.graph.nodes]:
            if node.op == "placeholder" and holds_tensors(node.meta["val"]):
                self._hold_contents(node, str(node.target))
        return [given[name] for name in names], keywords

    def _hold_contents(self, node: fx.Node, what: str) -> None:
        """How long a container among the arguments is, before its entries are read, and the
        constants in it.
        """
        value = node.meta["val"]
        if isinstance(value, Tensor):
            return
        with self.graph.inserting_before(node.next):
            if value is None or isinstance(value, (bool, int, float, str)):
                self._hold(node, value, f"inputs with {what}")
            elif isinstance(value, (list, tuple, dict)):
                self._hold(
                    self.record("call_function", len, (node,), {}),
                    len(value),
                    f"inputs with len({what})",
                )
        for entry in [user for user in node.users if user.target is operator.getitem]:
            self._hold_contents(entry, f"{what}[{entry.args[1]!r}]")

    def _placeholder(self, name: str, value: Any) -> Any:
        node = self.create_node("placeholder", name, (), {})
        node.meta["val"] = value
        return node if value is None or isinstance(value, str) else stand_in(node, self)

    @_unseen
    def known(self, value: Any) -> Any:
        """A parameter or buffer of the model, or what a node gave: the stand-in for it. Anything
        else as it is.
        """
        if not isinstance(value, Tensor) or isinstance(value, Traced):
            return value
        name = self._names.get(id(value))
        if name is not None:
            if name not in self._read:
                self._read[name] = self.record("get_attr", name, (), {})
            return self._read[name]
        node = self._values.get(id(value)) if value.is_meta else None
        return value if node is None else stand_in(node, self)

    # -- what is called

    def on_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call of one of torch's functions in the thread that traces, whatever its arguments."""
        if self.executing:
            return func(*args, **kwargs)
        if self.in_transform():
            return self.below(func, args, kwargs)
        if find_traced((args, kwargs)) is None:
            args, kwargs = map_leaves(self.known, args), map_leaves(self.known, kwargs)
            if find_traced((args, kwargs)) is None:
                return self._without_inputs(func, args, kwargs)
        return self.on_function(func, args, kwargs)

    def _without_inputs(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What follows from constants alone is one, but for random numbers: the graph draws them
        at each call.
        """
        if getattr(func, "__name__", "") in ("__get__", "__set__"):
            return func(*args, **kwargs)
        try:
            with _NoDraws():
                return func(*args, **kwargs)
        except _DrawsError:
            return self._draw(func, args, kwargs)

    def _draw(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Random numbers that depend on no input: a node, whose value nobody can know, and the
        generator stays as it was.
        """
        state = torch.get_rng_state()
        try:
            drawn = self._function(func, args, kwargs)
        finally:
            torch.set_rng_state(state)
        drawn.fx_node.meta["val"] = tree_map_only(
            Tensor, lambda tensor: tensor.to(META), drawn.example
        )
        return stand_in(drawn.fx_node, self)

    def refuse_other_threads(self) -> None:
        """What another thread does to a tensor comes at a time of its own, and under none of what
        is entered here.
        """
        if not self.is_mine():
            self.elsewhere = self.elsewhere or ElsewhereError.at(self.thread)
            raise self.elsewhere

    def on_function(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call of one of torch's functions, methods or properties with a stand-in among its
        arguments.
        """
        if self.executing and self.is_mine():
            args, kwargs = self._of_examples((args, kwargs))
            return func(*args, **kwargs)
        self.refuse_other_threads()
        if self.in_transform():
            return self.below(func, args, kwargs)
        self._refuse_modes()
        return self._function(func, map_leaves(self.known, args), map_leaves(self.known, kwargs))

    def in_transform(self) -> bool:
        """Whether ``vmap``, ``grad`` or another transform of ``torch.func`` is at work."""
        return torch._C._functorch.peek_interpreter_stack() is not None

    def is_overridden(self) -> bool:
        """Whether a transform, or a mode of the model's own, sees and may change what functions
        do.
        """
        self._refuse_modes()
        before = self._modes[0]
        if torch._C._len_torch_function_stack() > before and _users(
            _get_current_function_mode_stack()[before:]
        ):
            return True
        return self.in_transform()

    def _refuse_modes(self) -> None:
        """A mode that sees ATen operations stands below gradients: which formulas they then have
        no graph can say.
        """
        before = self._modes[1]
        own = torch._C._len_torch_dispatch_stack() > before and _users(
            _get_current_dispatch_mode_stack()[before:]
        )
        if own:
            raise TraceError(
                f"forward runs under a {own} (at {user_line()}), which sees operations that a "
                "graph has not. Keep that line inside a module of its own."
            )

    def below(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Inside of ``torch.func``'s transforms tensors are wrapped: what they do to stand-ins is
        seen as ATen operations.

        A size that Python reads there is a plain number, so the graph is held to it.
        """
        self._differentiates = self._differentiates or _in_gradient()
        if reads_size(func):
            self._hold_sizes(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*map_leaves(self.known, args), **map_leaves(self.known, kwargs))

    def _function(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            what = func.__self__.__name__
            return (
                self._attribute(args[0], what)
                if name == "__get__"
                else self._set_attribute(args[0], what, args[1])
            )
        if not is_tensor_method_or_property(func):
            return self.record("call_function", func, args, kwargs)
        if name == "size":
            return self._size(*args, **kwargs)
        if name in ASKS:
            raise TraceError(asks(ASKS[name], f"{args[0]!r}.{name}"))
        if name.startswith("__") and name.endswith("__"):
            return self._special(name, func, args, kwargs)
        return self.record("call_method", name, args, kwargs)

    def _special(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """A method behind an operator or a builtin function, of a tensor that is no stand-in
        itself.
        """
        own = name.strip("_")
        if _is_operator(own) or own in ("setitem", "getitem"):
            return self.record("call_function", getattr(operator, own), args, kwargs)
        if own.startswith("r") and _is_operator(own[1:]):
            return self.record("call_function", getattr(operator, own[1:]), args[::-1], kwargs)
        if isinstance(args[0], TracedTensor) and name in vars(TracedTensor):
            return getattr(args[0], name)(*args[1:], **kwargs)
        return self.record("call_method", name, args, kwargs)

    def _attribute(self, tensor: Any, name: str) -> Any:
        if name == "shape":
            return self._size(tensor)
        if name in OF_PARAMETERS and isinstance(tensor, nn.Parameter):
            return OF_PARAMETERS[name]
        if name in ASKS:
            raise TraceError(asks(ASKS[name], f"{tensor!r}.{name}"))
        return self.record("call_function", getattr, (tensor, name), {})

    @_unseen
    def _set_attribute(self, tensor: Any, name: str, value: Any) -> None:
        if not is_again(
            getattr(value, "fx_node", None), getattr, getattr(tensor, "fx_node", None), name
        ):
            raise TraceError(
                f"{name!r} of a tensor is set (at {user_line()}), which a graph cannot do. Write "
                "into the tensor instead, with copy_() or another operation in place."
            )

    @_unseen
    def _size(self, tensor: Any, dim: Any = None) -> Any:
        if dim is not None:
            return self.record("call_method", "size", (tensor, dim), {})
        return SizeTuple(self.size_of(tensor, i) for i in range(tensor.example.dim()))

    def size_of(self, tensor: Any, dim: int) -> Any:
        """The size of a tensor along a dimension, as a number of the graph."""
        return self.record("call_method", "size", (tensor, dim), {})

    def on_dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An ATen operation on stand-ins that no function of torch's Python interface has
        announced.
        """
        if self.executing:
            args, kwargs = self._of_examples((args, kwargs))
            return func(*args, **kwargs)
        # C++ asks for its layout without a word of Python's
        if has(name_of_op(func), Trait.ASKS | Trait.ASKS_SIZES):
            return self._tell_layout(func, *args)
        if self._differentiates:
            self._hold_inputs()
        if self._for_shape_alone(func, args, kwargs):
            args, kwargs = self._of_examples((args, kwargs))
            return func(*args, **kwargs)
        if torch._C._current_graph_task_id() != -1:
            kwargs = self._in_place_of_meta(kwargs, find_traced(args))
        before = next(iter(reversed(self.graph.nodes)))
        result = self.record("call_function", func, self._with_sizes(func, args), kwargs)
        if self.in_transform() or any(type(leaf) is int for leaf in tree_leaves((args, kwargs))):
            self.below_lines[before.next] = user_line()
        return list(result.count_parts()) if type(result) is TracedPieces else result

    @_unseen
    def _for_shape_alone(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether formulas of gradients compute with what no node has made: so they find the shape
        of zeros that nobody computes.

        What comes out has no node either: a graph that wants its values is refused.
        """
        leaves = (
            tree_leaves((args, kwargs))
            if self._differentiates and not func._schema.is_mutable
            else ()
        )
        unknown = (
            leaf
            for leaf in leaves
            if isinstance(leaf, Tensor) and not isinstance(leaf, Traced) and leaf.is_meta
        )
        return any(self.known(leaf) is leaf for leaf in unknown)

    @_unseen
    def _in_place_of_meta(self, value: Any, beside: Any) -> Any:
        """Formulas of gradients put a tensor where another one is: the graph asks one of the call
        for its device.
        """

        def own(leaf: Any) -> Any:
            is_meta = isinstance(leaf, torch.device) and leaf.type == "meta"
            return (
                self.record("call_function", getattr, (beside, "device"), {}) if is_meta else leaf
            )

        return map_leaves(own, value)

    @_unseen
    def _tell_layout(self, func: Any, tensor: Any, *args: Any) -> Any:
        """C++ asks how a tensor lies in memory, which is answered by the example.

        Where it takes sizes as plain numbers (not ``sym_size``) it may go by them: how often a
        loop turns, which branch is taken. What torch does for a transform is another matter: that
        is found by traces of other inputs.
        """
        if func.overloadpacket in (aten.size, aten.numel) and not self.in_transform():
            for dim in range(tensor.rank):
                if self._asked is EVERY or not self._asked.isdisjoint((dim, dim - tensor.rank)):
                    self._hold_size(tensor, dim)
        return func(tensor.example, *args)

    def call_script(self, call: Callable[[], Any], graph: Any, inputs: Any) -> Any:
        """A scripted function, which holds the graph to the sizes by which it goes, as its code
        says.
        """
        asked = asked_sizes(graph)
        # tensors that a transform wraps are asked without a word
        if asked is None or (asked and self.in_transform()):
            for leaf in tree_leaves(inputs):
                self._hold_sizes(leaf)
        before, self._asked = self._asked, EVERY if asked is None or asked >= EVERY else asked
        try:
            with torch.jit.optimized_execution(False):  # which asks for sizes to note them
                return call()
        finally:
            self._asked = before

    @_unseen
    def _with_sizes(self, func: Any, args: Any) -> Any:
        """Numbers of the graph in the place of sizes that C++ has read."""
        if not args or not isinstance(args[0], TracedTensor):
            return args
        of, hold = (
            functools.partial(function, args[0]) for function in (self.size_of, self._hold_size)
        )
        return with_traced_sizes(func, args, args[0].example.shape, of, hold)

    @_unseen
    def _hold_sizes(self, wrapped: Any) -> None:
        for tensor, dim in own_sizes(wrapped):
            self._hold_size(tensor, dim)

    @_unseen
    def _hold_size(self, tensor: Any, dim: int) -> None:
        """Hold the graph to the example's size of a dimension."""
        if (tensor.fx_node, dim) not in self._held:
            self._held.add((tensor.fx_node, dim))
            int(self.size_of(tensor, dim))

    @_unseen
    def hold_input(self, node: fx.Node, dim: int, where: str) -> None:
        """Hold the finished graph to the size of an input, by which C++ went for the sake of a
        line of the user's.
        """
        self._closed = False
        with torch.no_grad(), self.graph.inserting_before(node.next):
            number = self.size_of(stand_in(node, self), dim)
        self._hold_finished(number, where)

    @_unseen
    def hold_rank(self, node: fx.Node) -> None:
        """Hold the finished graph to the number of axes of what a node gives."""
        self._closed = False
        with torch.no_grad(), self.graph.inserting_before(node.next):
            rank = self.record("call_method", "dim", (stand_in(node, self),), {})
            self._hold(rank, rank.example, f"inputs with {formula(rank.fx_node)}")
        self._closed = True

    def _hold_finished(self, number: Any, where: str) -> None:
        self._closed, node = False, number.fx_node
        text = f"{where}: {formula(node)} was taken as {number.example!r}"
        with torch.no_grad(), self.graph.inserting_before(node.next):
            if text not in self.decisions and not of_rank(node):
                self.decisions.append(text)
            self._hold(
                number, number.example, f"inputs with {formula(node)}", f" (decided at {where})"
            )
        self._closed = True

    def _hold_inputs(self) -> None:
        """Formulas of gradients have sizes as plain numbers, of unknown origin: the graph is for
        inputs of these sizes alone.
        """
        if not self._sizes_held:
            self._sizes_held = True
            for node in [node for node in self.graph.nodes if node.op == "placeholder"]:
                for tensor in (
                    tree_leaves(stand_in(node, self)) if node not in self.left_out else ()
                ):
                    if isinstance(tensor, TracedTensor):
                        for size in self._size(tensor):
                            int(size)

    def _of_examples(self, value: Any) -> Any:
        def example(leaf: Any) -> Any:
            return leaf.example if isinstance(leaf, Traced) else leaf

        return map_leaves(example, value)

    # -- nodes

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        return self.graph.create_node(kind, target, args, kwargs)

    @_unseen
    def record(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Make a node, run it, and give back what stands for its value.

        Raises
        ------
        TraceError, InputError
        """
        self.refuse_other_threads()
        if self._closed:
            raise TraceError(
                f"a stand-in of an earlier call of fxprune is used (at {user_line()}): forward "
                "kept it, in a cache say, outside of the model. Empty that cache."
            )
        view = _view_instead(kind, target) if args and isinstance(args[0], TracedTensor) else None
        # those stay so, for the caller
        if view is not None and args[0].fx_node.op not in ("get_attr", "placeholder"):
            args[0].fx_node = args[0].node = self.record(kind, view, args, kwargs).fx_node
            return args[0]
        if view is None and _lays_out_anew(kind, target):
            raise TraceError(
                "forward gives a tensor another size or other memory in place (at "
                f"{user_line()}), which a graph cannot do. Use the tensor that it is to be, or "
                "keep that line inside a module of its own."
            )
        if target is torch._assert:
            self._release(*self.create_arg(args), **self.create_arg(kwargs))
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs))
        self._refuse_to_write_into_constants(node)
        _refuse_to_tell_devices(node)
        value = node.meta["val"] = self._execute(node)
        if isinstance(value, Tensor):
            self._values.setdefault(id(value), node)
        return stand_in(node, self)

    @_unseen
    def create_arg(self, a: Any) -> Any:
        """An argument of a node: nodes in the place of stand-ins, at any depth.

        Raises
        ------
        TraceError
            If it is of a kind that a graph cannot hold.
        """
        kind = type(a)
        if issubclass(kind, Traced):
            return a.fx_node
        a = _in_words_of_code(a)
        kind = type(a)
        if a is None or a is ... or kind is fx.Node or issubclass(kind, _CONSTANTS):
            return a
        if issubclass(kind, (tuple, list)):
            return self._sequence(a)
        if issubclass(kind, dict):
            return self._mapping(a)
        if kind is slice:
            return slice(
                self.create_arg(a.start), self.create_arg(a.stop), self.create_arg(a.step)
            )
        if kind is range:
            return a
        if isinstance(a, Tensor):
            return self._tensor(a)
        if kind in (torch.SymInt, torch.SymFloat, torch.SymBool) and isinstance(
            getattr(a.node, "number", None), Number
        ):
            return a.node.number.fx_node
        if kind is torch.device:
            if a.type == "meta":
                raise TraceError(asks_device("torch.device(x.device)"))
            return a
        if (
            dataclasses.is_dataclass(a)
            and not isinstance(a, type)
            and all(own.init for own in dataclasses.fields(a))
        ):
            fields = {
                own.name: self.create_arg(getattr(a, own.name)) for own in dataclasses.fields(a)
            }
            return self._made_by(kind, (), fields)
        if (
            callable(a)
            and hasattr(a, "__name__")
            and not any(isinstance(leaf, Traced) for leaf in leaves(a))
        ):
            return a
        raise _unheld(kind)

    def _sequence(self, a: Any) -> Any:
        # a named tuple is made by a node, which has a value like any other
        if hasattr(a, "_fields"):
            return self._made_by(type(a), tuple(map(self.create_arg, a)), {})
        entries = [self.create_arg(entry) for entry in a]
        if hasattr(type(a), "n_sequence_fields"):  # what torch.max gives
            return self._made_by(type(a), (tuple(entries),), {})
        if type(a) not in _SEQUENCES:
            raise _unheld(type(a))
        return tuple(entries) if isinstance(a, tuple) else entries

    def _mapping(self, a: Any) -> Any:
        if any(isinstance(key, Traced) for key in a):
            raise TraceError(
                f"forward handles a {type(a).__qualname__} of which tensors are keys (at "
                f"{user_line()})."
            )
        if type(a) is dict:
            return {key: self.create_arg(value) for key, value in a.items()}
        if type(a) not in SUPPORTED_NODES:
            raise _unheld(type(a))
        content = dict(zip(a.keys(), map(self.create_arg, a.values()), strict=True))
        return self._made_by(
            type(a), *(((), content) if dataclasses.is_dataclass(a) else ((content,), {}))
        )

    def _made_by(self, kind: type, args: Any, kwargs: Any) -> fx.Node:
        """A node that makes an object of what stands in its arguments."""
        node = self.create_node("call_function", kind, args, kwargs)
        node.meta["val"] = self._execute(node)
        return node

    def _tensor(self, a: Tensor) -> fx.Node:
        """A node for a tensor that is no stand-in: one of the model's, one that a node gave, or a
        constant.
        """
        known = self.known(a)
        if known is not a:
            return cast(fx.Node, known.fx_node)
        if torch._C._functorch.is_functorch_wrapped_tensor(a):
            raise TraceError(
                "a tensor inside of a transform of torch.func is handled outside of it (at "
                f"{user_line()})."
            )
        _, name = self.constants.get(id(a), (None, None))
        if name is None:
            if isinstance(a, nn.Parameter):
                raise TraceError(
                    f"forward makes a parameter of its own (at {user_line()}), which a graph "
                    "cannot hold."
                )
            if a.is_meta:
                raise TraceError(
                    "forward uses a tensor without data that no operation made (at "
                    f"{user_line()})."
                )
            name = next(
                n
                for n in map("_constant{}".format, itertools.count())
                if not hasattr(self.root, n)
            )
            self.constants[id(a)] = a, name
            self.made.take(a, user_line())
            self.made_names.append(name)
            setattr(self.root, name, a)
        self.constant_targets.add(name)
        node = self.create_node("get_attr", name, (), {})
        # the graph runs on the meta device, which takes data from a CPU
        node.meta["val"] = a if a.is_meta else a.cpu()
        return node

    def _refuse_to_write_into_constants(self, node: fx.Node) -> None:
        values = (place.meta["val"] for place in written(node))
        if any(
            isinstance(value, Tensor) and self.made.shares_memory_with(value) for value in values
        ):
            raise TraceError(
                "values that depend on the input are written into a tensor that forward makes "
                f"without it (at {user_line()}), and that a graph has once for all calls. "
                f"{MADE_FROM_INPUT}"
            )

    def _execute(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        try:
            with self._as_outside(), self.watch(node):
                return execute(self.root, node, args, kwargs)
        except FxpruneError:
            raise
        except Exception as error:
            raise self._refusal(node, args, kwargs, error) from error

    @contextmanager
    def _as_outside(self) -> Iterator[None]:
        """Run torch as if nothing were traced."""
        self.executing = True
        try:
            with torch.inference_mode():
                yield
        finally:
            self.executing = False

    def _refusal(self, node: fx.Node, args: Any, kwargs: Any, error: Exception) -> FxpruneError:
        """Why a node cannot run without data: because it needs some, or because it cannot run at
        all.
        """
        shapes = [tuple(a.shape) for a in tensors_of((args, kwargs))]
        target = node.target
        what = str(target if isinstance(target, str) else getattr(target, "__name__", target))
        own = (
            dict(self.root.get_submodule(str(node.target)).named_parameters())
            if node.op == "call_module"
            else {}
        )
        has = (
            f", with {', '.join(f'{name} {tuple(p.shape)}' for name, p in own.items())}"
            if own
            else ""
        )
        failed = f"{what!r} failed on shapes {shapes}{has}: {error} (at {user_line()})."
        if self._runs_on_data(node, args, kwargs):
            return (ChanceError if self._by_chance(node) else TraceError)(
                f"{failed} The analysis runs on tensors without data, so no value can be read: "
                "rewrite that line without .item(), boolean indexing or other reads of values."
            )
        check = (
            "Check that the example input has the shape, dtype and order of arguments that the "
            "model is called with."
        )
        return InputError(f"{failed} {check}", user_line())

    def _by_chance(self, node: fx.Node) -> bool:
        """Whether a value depends on random numbers."""
        for own in _sources(node):
            args, kwargs = fx.node.map_arg((own.args, own.kwargs), lambda n: n.meta["val"])
            try:
                with self._as_outside(), _NoDraws():
                    execute(self.root, own, args, kwargs)
            except _DrawsError:
                return True
            except Exception:
                continue
        return False

    def _runs_on_data(self, node: fx.Node, args: Any, kwargs: Any) -> bool:
        """Whether an operation that fails on tensors without data runs on zeros."""
        state = torch.get_rng_state()
        try:
            args, kwargs = tree_map_only(Tensor, _zeros, (args, kwargs))
            root = self.root
            if node.op == "call_module":
                root = _Only(
                    str(node.target),
                    copy.deepcopy(root.get_submodule(str(node.target))).to_empty(device="cpu"),
                )
            with self._as_outside():
                execute(root, node, args, kwargs)
        except Exception:
            return False
        finally:
            torch.set_rng_state(state)
        return True

    # -- modules

    def call_leaf_function(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace into a function that its library marked as a leaf; leave it whole where it
        branches on the mode.
        """
        if not isinstance(function, types.FunctionType) or _is_torch(function):
            return self.record("call_function", function, args, kwargs)
        last = next(iter(reversed(self.graph.nodes)), None)
        decisions = len(self.decisions)
        self._inside_leaf_function += 1
        try:
            return function(*args, **kwargs)
        except _ModeReadError:
            for node in reversed(list(self.graph.nodes)):
                if node is last:
                    break
                self.graph.erase_node(node)
            del self.decisions[decisions:]
            return self.record("call_function", function, args, kwargs)
        finally:
            self._inside_leaf_function -= 1

    def call_module(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A call of a module that stays whole."""
        return self.record("call_module", self._paths[id(module)], args, kwargs)

    def is_as_given(self, module: nn.Module) -> bool:
        """Whether a leaf computes with tensors that the model had from the beginning, and nothing
        sees what it computes.
        """
        own = (*module._parameters.values(), *module._buffers.values())
        return (
            not self.is_overridden()
            and all(tensor is None or id(tensor) in self._names for tensor in own)
            and all(
                id(value) in self._given
                for value in vars(module).values()
                if isinstance(value, Tensor)
            )
        )

    @_unseen
    def read_mode(self, module: nn.Module) -> Any:
        path = self._paths[id(module)]
        node = self.create_node("get_attr", f"{path}.training" if path else "training", (), {})
        # a module whose train() is its own may not follow the model
        node.meta["val"] = module.__dict__["training"]
        node.meta["mode"] = True
        return stand_in(node, self)

    # -- regions

    def is_users(self, filename: str) -> bool:
        """Whether code of this file is followed: not while a node runs, not inside of torch, and
        not in another thread.
        """
        return not self.executing and self.is_mine() and not is_ours(filename)

    def is_mine(self) -> bool:
        """Whether the thread that asks is the one that traces."""
        return threading.get_ident() == self.thread

    def begin_region(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.create_node(
            "call_function", enter, self.create_arg((kind, *args)), self.create_arg(kwargs)
        )
        node.meta["val"] = None
        return node

    @_unseen
    def end_region(self, entry: fx.Node) -> None:
        following = itertools.dropwhile(lambda node: node is not entry, self.graph.nodes)
        if any(holds_tensors(node.meta["val"]) for node in following):
            self.create_node("call_function", leave, (entry,), {}).meta["val"] = None
        else:
            self.graph.erase_node(entry)

    # -- decisions

    @_unseen
    def decide(self, value: Any, kind: type) -> Any:
        """A Python decision needs a value now: take the example's, list it, and guard it in the
        graph.
        """
        node, example = value.fx_node, value.example
        if node in self.left_out:
            raise TraceError(number_decides(node))
        if isinstance(example, Tensor):
            if example.is_meta:
                kind_of_error = ChanceError if self._by_chance(node) else TraceError
                raise kind_of_error(
                    f"the model branches on the values of a tensor (at {user_line()}). A graph "
                    "has one path for all values: use torch.where or masks, or keep that part in "
                    "a module that is not pruned."
                )
            self._read_values.append((node, user_line()))
            self._refuse_values_that_change()
            return kind(example)
        if from_mode(node):
            if self._inside_leaf_function:
                raise _ModeReadError
            self.asked_mode = True
            return kind(example)
        taken = kind(example)
        where = user_line()
        text = f"{where}: {formula(node)} was taken as {taken!r}"
        if text not in self.decisions and not of_rank(node):
            self.decisions.append(text)
        held = example if kind is int else taken  # int(n / 3): the graph holds n / 3
        self._hold(value, held, f"inputs with {formula(node)}", f" (decided at {where})")
        return taken

    def is_looked_up(self, number: Number) -> None:
        """Code of the model looks something up by a number, or puts something there; libraries do
        so in what they remember.
        """
        frame = sys._getframe(2)
        if (
            self._closed
            or not self.is_users(frame.f_code.co_filename)
            or self._reached.trusts(frame.f_globals.get("__name__", ""))
        ):
            return
        number.fx_node.meta["looked_up"] = True
        self.lookups.append(Lookup(number.fx_node, at(frame), user_line(), self._reached.made))

    def is_compared(self) -> None:
        """A number is compared; by a table, if one was looked up in the same place."""
        if self.lookups and self.lookups[-1].place == at(sys._getframe(2)):
            for own in itertools.takewhile(
                lambda own: own.place == self.lookups[-1].place, reversed(self.lookups)
            ):
                own.answered = True

    @_unseen
    def hold_looked_up(self, lookup: Lookup) -> None:
        """Hold the finished graph to a number by which something was looked up, and was not
        there.
        """
        if from_mode(lookup.node):
            self.asked_mode = True
            return
        self._hold_finished(stand_in(lookup.node, self), lookup.line)

    @_unseen
    def text(self, number: Number, write: Callable[[Any], str]) -> str:
        """The text of a number, which the graph is held to: Python may do anything with a text."""
        if self.executing or self._closed or not self.is_mine():
            return write(number.example)
        last, decided = next(iter(reversed(self.graph.nodes))), len(self.decisions)
        text = write(self.decide(number, type(number.example)))
        made = [*itertools.takewhile(lambda node: node is not last, reversed(self.graph.nodes))]
        self._texts.append((text, made, self.decisions[decided:]))
        return text

    def _release(self, condition: Any, message: Any = "") -> None:
        """Do not hold the graph to texts that were written for the message of an assertion: it is
        shown where that fails alone.
        """
        texts, self._texts = self._texts, []
        later = itertools.takewhile(lambda node: node is not condition, reversed(self.graph.nodes))
        between = set(itertools.takewhile(lambda node: not holds_tensors(node.meta["val"]), later))
        for text, made, decisions in texts:
            if isinstance(message, str) and text in message and between.issuperset(made):
                for node in made:
                    self.graph.erase_node(node)
                self.decisions[:] = [line for line in self.decisions if line not in decisions]

    def _refuse_values_that_change(self) -> None:
        """A value that Python has read off a buffer which the graph writes, before or after that,
        is another one at each call.
        """
        for value, where in self._read_values:
            if any(
                own.op == "get_attr" and any(own in written(user)[:1] for user in own.users)
                for own in _sources(value)
            ):
                raise TraceError(
                    f"forward reads the value of a buffer that it writes (at {where}): it is "
                    "another one at each call, and a graph would hold this one. Compute with the "
                    "buffer as a tensor."
                )

    def _hold(self, value: Any, taken: Any, what: str, why: str = "") -> None:
        """Let the graph say so where a value is another one than it was traced for."""
        # Not operator.not_, which asks for the truth of a stand-in when the emitted graph is
        # traced in its turn.
        same = operator.is_ if taken is None else operator.eq
        held = value if taken is True else self.record("call_function", same, (value, taken), {})
        message = f"this graph was traced for {what} == {taken!r}{why}"
        node = self.create_node(
            "call_function", torch._assert, (self.create_arg(held), message), {}
        )
        node.meta.update(val=None, guard=True)


class _Only(nn.Module):
    """A tree with one module in it, at a path of its own."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__()
        *above, name = path.split(".")
        place: nn.Module = self
        for own in above:
            place._modules[own] = nn.Module()
            place = cast(nn.Module, place._modules[own])
        place._modules[name] = module


def _unheld(kind: type) -> TraceError:
    """Said of an object of a class that a graph cannot make."""
    line = user_line()
    if line == UNKNOWN:  # forward has come to its end
        return TraceError(
            f"forward gives back a {kind.__qualname__}, which a graph cannot make. Give back a "
            "tensor, or tensors in a tuple, a list, a dict or a dataclass, and make of them what "
            "you need outside of the model."
        )
    return TraceError(
        f"forward handles a {kind.__qualname__} (at {line}), which a graph cannot hold."
    )


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """A node and all nodes that its value follows from."""
    seen, waiting = {node}, [node]
    while waiting:
        own = waiting.pop()
        yield own
        waiting += [above for above in own.all_input_nodes if above not in seen]
        seen.update(own.all_input_nodes)


def _in_words_of_code(value: Any) -> Any:
    """A constant as the code of a graph can hold it: NumPy's numbers, and those of classes of
    their own, are Python's.
    """
    if isinstance(value, (np.longdouble, np.complexfloating)) and not isinstance(value, complex):
        value = float(value.real)  # as torch takes it
    elif isinstance(value, np.generic):
        value = value.item()
    kind: Any
    for kind in (int, float, complex, str):
        if (
            isinstance(value, kind)
            and type(value) is not kind
            and not isinstance(value, (bool, enum.Enum))
        ):
            return kind(value)
    # x.type(...) takes either
    return (
        f"{value.__module__}.{value.__name__}" if type(value) is type(torch.FloatTensor) else value
    )


@functools.cache
def _view_instead(kind: str, target: Any) -> Any:
    """What gives a view as which a call lays out its tensor anew, in place: ``x.squeeze(1)`` for
    ``x.squeeze_(1)``; else None.
    """
    name = _target_name(kind, target)
    views = _overloads(name[:-1])
    if not _lays_out_anew(kind, target) or not all(
        given.alias_info is not None for own in views for given in own._schema.returns
    ):
        return None
    if isinstance(target, torch._ops.OpOverload):
        return next((overload for overload in views if _takes(overload) == _takes(target)), None)
    return name[:-1] if kind == "call_method" else getattr(torch, name[:-1], None)


@functools.cache
def _lays_out_anew(kind: str, target: Any) -> bool:
    """Whether a call gives its tensor another shape, other strides or other memory, in place."""
    name = _target_name(kind, target)
    return name.endswith("_") and any(
        torch.Tag.inplace_view in overload.tags for overload in _overloads(name)
    )


def _target_name(kind: str, target: Any) -> str:
    name = target if kind == "call_method" else getattr(target, "__name__", "")
    return str(getattr(getattr(target, "_schema", None), "name", name)).removeprefix("aten::")


def _takes(overload: Any) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in overload._schema.arguments]


def _overloads(name: str) -> list[Any]:
    """The overloads of an ATen operation that give their result."""
    packet = (
        getattr(aten, name, None) if name.isidentifier() and not name.startswith("__") else None
    )
    return (
        []
        if packet is None
        else [getattr(packet, own) for own in packet.overloads() if "out" not in own]
    )


def _in_gradient() -> bool:
    """Whether ``grad``, ``vjp``, ``jvp`` or another transform that differentiates is at work."""
    kinds = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
    return any(own.key() in kinds for own in torch._C._functorch.get_interpreter_stack() or ())


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor


def _refuse_to_tell_devices(node: fx.Node) -> None:
    """From one that is written down, that is: two tensors lie on the same one wherever the model
    is. ``x.type()`` names it, too.
    """
    of_tensors = [
        isinstance(arg, fx.Node) and isinstance(arg.meta["val"], torch.device) for arg in node.args
    ]
    compares = (
        node.target in (operator.eq, operator.ne) and any(of_tensors) and not all(of_tensors)
    )
    if compares or (
        node.op == "call_method"
        and node.target == "type"
        and len(node.args) == 1
        and not node.kwargs
    ):
        raise TraceError(asks_device(formula(node)))


def _users(modes: Iterable[Any]) -> str:
    """The name of the first mode that torch does not bring along: its own ones look on, or choose
    a device.
    """
    names = [
        type(mode).__name__ for mode in modes if not type(mode).__module__.startswith("torch.")
    ]
    return names[0] if names else ""


def _is_torch(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").split(".")[0] == "torch"
