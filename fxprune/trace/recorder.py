"""The recorder: it adds nodes to a graph and runs each node on the example."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import SUPPORTED_NODES, tree_map_only

from fxprune.common.contents import leaves, tensors_of
from fxprune.common.dispatch import holds_tensors
from fxprune.common.identity import IdentityMap, IdentitySet
from fxprune.errors import ChanceError, FxpruneError, InputError, TraceError
from fxprune.trace.aliasing import Snapshot, written
from fxprune.trace.asks import asks_device
from fxprune.trace.constants import (
    CONSTANTS,
    MADE_FROM_INPUT,
    SEQUENCES,
    cannot_hold,
    in_words_of_code,
    refuse_to_tell_devices,
)
from fxprune.trace.execution import (
    DrawsError,
    NoDraws,
    Only,
    execute,
    sources,
    unseen,
    zeros_like_meta,
)
from fxprune.trace.lookups import Lookup
from fxprune.trace.meta_copy import MetaCopy
from fxprune.trace.numbers import Number
from fxprune.trace.sizes import EVERY
from fxprune.trace.tensors import Traced, TracedTensor, map_leaves
from fxprune.trace.user_code import ElsewhereError, user_line
from fxprune.trace.values import stand_in
from fxprune.trace.views import lays_out_anew, view_instead

if TYPE_CHECKING:
    from fxprune.trace.tracer import Tracer

__all__ = ["Recorder"]


class Recorder:
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
        self.elsewhere: ElsewhereError | None = None  # set when another thread uses a stand-in
        self.stand_ins: list[weakref.ref[TracedTensor]] = []  # of all tensors
        # placeholders of int arguments that the example leaves out
        self.left_out: list[fx.Node] = []
        # tensors that are plain attributes of modules or are made by forward, with their names
        self.constants: IdentityMap[Tensor, tuple[Tensor, str]] = IdentityMap()
        self.constant_targets: set[str] = set()  # names of the constants that the graph reads
        # constants that modules have before the model runs
        self._given: IdentitySet[Any] = IdentitySet()
        self.made_names: list[str] = []  # attributes added to the root for tensors forward makes
        # values of the tensors that forward makes without any input: constants of the graph
        self.made = Snapshot()
        self._names = IdentityMap((tensor, name) for name, tensor in meta_copy.tensors.items())
        self._tensors = list(meta_copy.tensors.values())  # keeps the tensors alive
        self._paths = IdentityMap(
            (module, name)
            for name, module in reversed(list(self.root.named_modules(remove_duplicate=False)))
        )
        self._read: dict[str, Any] = {}  # stand-ins of the parameters and buffers read so far
        # the node that produced a tensor
        self._values: IdentityMap[Tensor, fx.Node] = IdentityMap()
        self._inside_leaf_function = 0
        # True while a node runs on meta tensors: modules then behave as outside of tracing
        self.executing = False
        self._closed = False
        # how many function modes and dispatch modes are active before the model runs
        self._modes: tuple[int, int] = (0, 0)
        # axes whose sizes C++ may decide by when it reads them as plain numbers
        self._asked: frozenset[Any] = EVERY
        # tensors and axes whose sizes are guarded
        self._held: set[tuple[fx.Node, int]] = set()
        self.checkpoints: list[str] = []  # the user's lines of non-reentrant checkpoints
        # operations whose numbers C++ may have computed from sizes, with the user's lines
        self.below_lines: dict[fx.Node, str] = {}
        self._differentiates = False  # whether a transform of torch.func has taken gradients
        self._sizes_held = False
        # tensors computed from constants whose values Python has read, with the user's lines
        self._read_values: list[tuple[fx.Node, str]] = []
        self.lookups: list[Lookup] = []
        self._reached = meta_copy.reached
        # texts of numbers, each with the nodes that guard the number and its decisions
        self._texts: list[tuple[str, list[fx.Node], list[str]]] = []

    @unseen
    def stand_in(self, node: fx.Node) -> Any:
        """Return a stand-in for a node's value (see :func:`fxprune.trace.values.stand_in`)."""
        return stand_in(node, cast("Tracer", self))

    def known(self, value: Any) -> Any:
        """Return the stand-in for a tensor that the graph knows; any other value as it is.

        The graph knows the model's parameters and buffers, and the values of its nodes.
        """
        if not isinstance(value, Tensor) or isinstance(value, Traced):
            return value
        name = self._names.get(value)
        if name is not None:
            if name not in self._read:
                self._read[name] = self.record("get_attr", name, (), {})
            return self._read[name]
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
        if not self.is_mine():
            self.elsewhere = self.elsewhere or ElsewhereError.at(self.thread)
            raise self.elsewhere

    def in_transform(self) -> bool:
        """Tell whether ``vmap``, ``grad`` or another transform of ``torch.func`` is active."""
        return torch._C._functorch.peek_interpreter_stack() is not None

    def _of_examples(self, value: Any) -> Any:
        """Return nested arguments with each stand-in replaced by its example value."""

        def example(leaf: Any) -> Any:
            return leaf.example if isinstance(leaf, Traced) else leaf

        return map_leaves(example, value)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """Append a node to the graph, without running it."""
        return self.graph.create_node(kind, target, args, kwargs)

    @unseen
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
        view = view_instead(kind, target) if args and isinstance(args[0], TracedTensor) else None
        # inputs and parameters keep their layout: the caller sees them
        if view is not None and args[0].fx_node.op not in ("get_attr", "placeholder"):
            args[0].fx_node = args[0].node = self.record(kind, view, args, kwargs).fx_node
            return args[0]
        if view is None and lays_out_anew(kind, target):
            raise TraceError(
                "forward gives a tensor another size or other memory in place (at "
                f"{user_line()}), which a graph cannot do. Use the tensor that it is to be, or "
                "keep that line inside a module of its own."
            )
        if target is torch._assert:
            self._release(*self.create_arg(args), **self.create_arg(kwargs))
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs))
        self._refuse_to_write_into_constants(node)
        refuse_to_tell_devices(node)
        value = node.meta["val"] = self._execute(node)
        if isinstance(value, Tensor):
            self._values.setdefault(value, node)
        return self.stand_in(node)

    @unseen
    def create_arg(self, a: Any) -> Any:
        """Convert a value to an argument of a node: stand-ins become nodes, at any depth.

        Raises
        ------
        TraceError
            If a graph cannot hold a value of this kind.
        """
        kind = type(a)
        if issubclass(kind, Traced):
            return a.fx_node
        a = in_words_of_code(a)
        kind = type(a)
        if a is None or a is ... or kind is fx.Node or issubclass(kind, CONSTANTS):
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
        raise cannot_hold(kind)

    def _sequence(self, a: Any) -> Any:
        """Convert a tuple or list to an argument of a node."""
        # a node makes the named tuple, so that it has a value like any other node
        if hasattr(a, "_fields"):
            return self._made_by(type(a), tuple(map(self.create_arg, a)), {})
        entries = [self.create_arg(entry) for entry in a]
        if hasattr(type(a), "n_sequence_fields"):  # torch.max returns such a sequence
            return self._made_by(type(a), (tuple(entries),), {})
        if type(a) not in SEQUENCES:
            raise cannot_hold(type(a))
        return tuple(entries) if isinstance(a, tuple) else entries

    def _mapping(self, a: Any) -> Any:
        """Convert a dict to an argument of a node."""
        if any(isinstance(key, Traced) for key in a):
            raise TraceError(
                f"forward handles a {type(a).__qualname__} of which tensors are keys (at "
                f"{user_line()})."
            )
        if type(a) is dict:
            return {key: self.create_arg(value) for key, value in a.items()}
        if type(a) not in SUPPORTED_NODES:
            raise cannot_hold(type(a))
        content = dict(zip(a.keys(), map(self.create_arg, a.values()), strict=True))
        return self._made_by(
            type(a), *(((), content) if dataclasses.is_dataclass(a) else ((content,), {}))
        )

    def _made_by(self, kind: type, args: Any, kwargs: Any) -> fx.Node:
        """Create a node that builds an object of class ``kind`` from its arguments."""
        node = self.create_node("call_function", kind, args, kwargs)
        node.meta["val"] = self._execute(node)
        return node

    def _tensor(self, a: Tensor) -> fx.Node:
        """Return the node for a tensor that is not a stand-in.

        It is a parameter or buffer of the model, the value of a node, or a constant. A constant
        without a name is added to the root as an attribute.
        """
        known = self.known(a)
        if known is not a:
            return cast(fx.Node, known.fx_node)
        if torch._C._functorch.is_functorch_wrapped_tensor(a):
            raise TraceError(
                "a tensor inside of a transform of torch.func is handled outside of it (at "
                f"{user_line()})."
            )
        _, name = self.constants.get(a, (None, None))
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
            self.constants[a] = a, name
            self.made.take(a, user_line())
            self.made_names.append(name)
            setattr(self.root, name, a)
        self.constant_targets.add(name)
        node = self.create_node("get_attr", name, (), {})
        # nodes run on meta tensors, which accept data on the CPU beside them
        node.meta["val"] = a if a.is_meta else a.cpu()
        return node

    def _refuse_to_write_into_constants(self, node: fx.Node) -> None:
        """Refuse a node that writes into a tensor that forward made without any input."""
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
        """Run a node on the values of its arguments, under ``watch``."""
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
        """Run torch inside this context as if nothing were traced."""
        self.executing = True
        try:
            with torch.inference_mode():
                yield
        finally:
            self.executing = False

    def _refusal(self, node: fx.Node, args: Any, kwargs: Any, error: Exception) -> FxpruneError:
        """Return the error for a node that failed.

        A node that runs on zeros needs data: that is a TraceError, or a ChanceError if it depends
        on random numbers. A node that fails on zeros too is an InputError.
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
        """Tell whether a node's value depends on random numbers."""
        for own in sources(node):
            args, kwargs = fx.node.map_arg((own.args, own.kwargs), lambda n: n.meta["val"])
            try:
                with self._as_outside(), NoDraws():
                    execute(self.root, own, args, kwargs)
            except DrawsError:
                return True
            except Exception:
                continue
        return False

    def _runs_on_data(self, node: fx.Node, args: Any, kwargs: Any) -> bool:
        """Tell whether an operation that fails on meta tensors runs on zeros."""
        state = torch.get_rng_state()
        try:
            args, kwargs = tree_map_only(Tensor, zeros_like_meta, (args, kwargs))
            root = self.root
            if node.op == "call_module":
                root = Only(
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

    @unseen
    def read_mode(self, module: nn.Module) -> Any:
        """Record a read of ``module.training`` and return its stand-in."""
        path = self._paths[module]
        node = self.create_node("get_attr", f"{path}.training" if path else "training", (), {})
        # a module that overrides train() may have another mode than the model
        node.meta["val"] = module.__dict__["training"]
        node.meta["mode"] = True
        return self.stand_in(node)

    def is_mine(self) -> bool:
        """Tell whether the current thread is the tracing one."""
        return threading.get_ident() == self.thread

    def _release(self, condition: Any, message: Any = "") -> None:
        """Remove the guards of numbers that were only formatted for an assertion's message.

        The message is shown only when the assertion fails, so the graph need not be held to these
        numbers.
        """
        texts, self._texts = self._texts, []
        later = itertools.takewhile(lambda node: node is not condition, reversed(self.graph.nodes))
        between = set(itertools.takewhile(lambda node: not holds_tensors(node.meta["val"]), later))
        for text, made, decisions in texts:
            if isinstance(message, str) and text in message and between.issuperset(made):
                for node in made:
                    self.graph.erase_node(node)
                self.decisions[:] = [line for line in self.decisions if line not in decisions]
