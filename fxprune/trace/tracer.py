"""Follows a model's code and records each operation as a node, which has the value that it gives for the example."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import SUPPORTED_NODES, tree_leaves

from fxprune.errors import FxpruneError, InputError, TraceError
from fxprune.hooks import has_own_forward
from fxprune.memory import Snapshot, written
from fxprune.regions import BOUNDS, enter, leave
from fxprune.shapes import holds_tensors
from fxprune.trace.arguments import check_keywords, left_out, parameter_names
from fxprune.trace.decisions import formula, from_mode, number_decides, of_rank
from fxprune.trace.lines import is_ours, user_line
from fxprune.trace.proxies import SizeTuple, ValueAttribute, ValueProxy, asks_device
from fxprune.trace.twin import Twin

__all__ = ["MADE_FROM_INPUT", "Tracer", "execute", "is_leaf"]

MADE_FROM_INPUT = "Make it from an input, with x.new_zeros(...) or device=x.device, so that the graph makes it at each call."


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

    A module of torch.nn without children is one operation, unless its forward was replaced. One with children is a container or
    a composite, unless the children are parametrisations, which compute its weights and belong to it.
    """
    if not type(module).__module__.startswith("torch.nn") or has_own_forward(module):
        return False
    return all(child is None for child in module._modules.values()) or parametrize.is_parametrized(module)


class _ModeReadError(Exception):
    """A leaf function branches on ``training``: it has to stay whole."""


class Tracer(fx.Tracer):
    """One trace: the graph so far, and what was learned while making it."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        twin: Twin,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        training: bool,
        watch: Callable[[fx.Node], AbstractContextManager[Any]],
    ) -> None:
        super().__init__(autowrap_modules=())
        self.example = (args, kwargs)
        self.watch = watch
        self._tensor_names = {id(tensor): name for name, tensor in twin.tensors.items()}
        self.training = training
        self.decisions: list[str] = []
        self.asked_mode = False
        self.left_out: list[fx.Node] = []  # whole numbers among the arguments for which the example has nothing
        self.constant_targets: set[str] = set()
        self.made_names: list[str] = []
        self.made = Snapshot()  # tensors that forward makes without any input, and the graph holds as constants
        self._inside_leaf_function = 0
        self._executing = False  # while a node runs on meta tensors, modules behave as outside of tracing

    # -- inputs and arguments

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Placeholders for the inputs that the example has; parameters it leaves out keep their Python defaults."""
        args, kwargs = self.example
        names = parameter_names(root_fn, len(args))
        check_keywords(root_fn, kwargs)
        values = {**dict(zip(names, args, strict=True)), **kwargs}
        proxies = {name: self._placeholder(name, value) for name, value in values.items()}
        given = {name: proxy if holds_tensors(values[name]) else values[name] for name, proxy in proxies.items()}
        positional = [given[name] for name in names]
        keywords = {name: given[name] for name in kwargs}
        for name, value in left_out(root_fn, values).items():
            keywords[name] = self._placeholder(name, value)
            self.left_out.append(keywords[name].node)
        for name, proxy in proxies.items():
            if given[name] is not proxy:
                self._hold(proxy, values[name], f"its argument {name!r}")

        def call(module: nn.Module, *inputs: Any) -> Any:
            return root_fn(module, *inputs, **keywords)

        return call, [self.root, *positional]

    def _placeholder(self, name: str, value: Any) -> Any:
        node = self.create_node("placeholder", name, (), {})
        node.meta["val"] = value
        return self.proxy(node)

    def proxy_of(self, tensor: Tensor) -> ValueProxy | None:
        """A parameter or buffer of the model, read through the graph."""
        name = None if self._executing else self._tensor_names.get(id(tensor))
        return None if name is None else self.create_proxy("get_attr", name, (), {})

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers are read through the graph, each by one node."""
        if self._executing or not isinstance(attr_val, Tensor):
            return attr_val
        name = self._tensor_names.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    # -- nodes

    def proxy(self, node: fx.Node) -> ValueProxy:
        return ValueProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if type(a) in (ValueProxy, ValueAttribute):
            return a.node
        if type(a) is SizeTuple:
            return tuple(self.create_arg(item) for item in a)
        if isinstance(a, tuple) and hasattr(a, "_fields"):  # a named tuple is made by a node, which has a value like any other
            return self.create_proxy("call_function", type(a), tuple(a), {}).node
        if isinstance(a, dict) and type(a) is not dict and type(a) in SUPPORTED_NODES:  # OrderedDict, and what libraries return
            content: Any = ((), dict(a)) if dataclasses.is_dataclass(a) else ((dict(a),), {})
            return self.create_proxy("call_function", type(a), *content).node
        if isinstance(a, Tensor):
            known = {id(t): name for t, name in self.tensor_attrs.items()}
            name = known.get(id(a))
            if name is None and not isinstance(a, nn.Parameter):
                name = next(n for n in map("_constant{}".format, itertools.count()) if not hasattr(self.root, n))
                self.tensor_attrs[a] = name
                self.made.take(a, user_line())
                self.made_names.append(name)
                setattr(self.root, name, a)
            if name is not None:
                self.constant_targets.add(name)
                node = self.create_node("get_attr", name, (), {})
                node.meta["val"] = a if a.is_meta else a.cpu()  # the graph runs on the meta device, which takes data from a CPU
                return node
        return super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs))
        self._refuse_to_write_into_constants(node)
        _refuse_to_tell_devices(node)
        node.meta["val"] = self._execute(node)
        return self.proxy(node)

    def _refuse_to_write_into_constants(self, node: fx.Node) -> None:
        values = (place.meta["val"] for place in written(node))
        if any(isinstance(value, Tensor) and self.made.shares_memory_with(value) for value in values):
            raise TraceError(
                f"values that depend on the input are written into a tensor that forward makes without it (at {user_line()}), and "
                f"that a graph has once for all calls. {MADE_FROM_INPUT}"
            )

    def call_leaf_function(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace into a function that its library marked as a leaf; leave it whole where it branches on the mode."""
        if not isinstance(function, types.FunctionType) or _is_torch(function):
            return self.create_proxy("call_function", function, args, kwargs)
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
            return self.create_proxy("call_function", function, args, kwargs)
        finally:
            self._inside_leaf_function -= 1

    def _execute(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        try:
            self._executing = True
            with self.watch(node):
                return execute(self.root, node, args, kwargs)
        except FxpruneError:
            raise
        except Exception as error:
            shapes = [tuple(a.shape) for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
            what = f"{node.target if isinstance(node.target, str) else getattr(node.target, '__name__', node.target)}"
            kind = (
                TraceError if "data" in str(error) or "item" in str(error) or isinstance(error, NotImplementedError) else InputError
            )
            advice = (
                "The analysis runs on tensors without data, so no value can be read: rewrite that line without .item(), boolean "
                "indexing or other reads of values."
                if kind is TraceError
                else "Check that the example input has the shape, dtype and order of arguments that the model is called with."
            )
            own = dict(self.root.get_submodule(str(node.target)).named_parameters()) if node.op == "call_module" else {}
            has = f", with {', '.join(f'{name} {tuple(p.shape)}' for name, p in own.items())}" if own else ""
            raise kind(f"{what!r} failed on shapes {shapes}{has}: {error} (at {user_line()}). {advice}") from error
        finally:
            self._executing = False

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        # Without torch.fx's record of the stack of modules, copied for each node: nobody reads it.
        if self._executing or not is_leaf(m):
            return forward(*args, **kwargs)
        return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

    # -- regions

    def is_users(self, filename: str) -> bool:
        """Whether code of this file is followed: not while a node runs, and not inside of torch."""
        return not self._executing and not is_ours(filename)

    def begin_region(self, kind: str, *args: Any, **kwargs: Any) -> ValueProxy:
        proxy: ValueProxy = self.create_proxy("call_function", enter, (kind, *args), kwargs)
        return proxy

    def end_region(self, entry: ValueProxy) -> None:
        following = itertools.dropwhile(lambda node: node is not entry.node, self.graph.nodes)
        if any(holds_tensors(node.meta["val"]) for node in following):
            self.create_proxy("call_function", leave, (entry,), {})
        else:
            self.graph.erase_node(entry.node)

    # -- decisions

    def read_mode(self, module: nn.Module) -> Any:
        path = self.path_of_module(module) if module is not self.root else ""
        target = f"{path}.training" if path else "training"
        node = self.create_node("get_attr", target, (), {})
        node.meta["val"] = self.training
        node.meta["mode"] = True
        return self.proxy(node)

    def decide(self, proxy: ValueProxy, kind: type) -> Any:
        """A Python decision needs a value now: take the example's, list it, and guard it in the graph."""
        value = proxy.value
        if proxy.node in self.left_out:
            raise TraceError(number_decides(proxy.node))
        if isinstance(value, Tensor):
            if value.is_meta:
                raise TraceError(
                    f"the model branches on the values of a tensor (at {user_line()}). A graph has one path for all values: "
                    "use torch.where or masks, or keep that part in a module that is not pruned."
                )
            return kind(value)
        if from_mode(proxy.node):
            if self._inside_leaf_function:
                raise _ModeReadError
            self.asked_mode = True
            return kind(value)
        value = kind(value) if not isinstance(value, tuple | list | str) and value is not None else value
        where = user_line()
        text = f"{where}: {formula(proxy.node)} was taken as {value!r}"
        if text not in self.decisions and not of_rank(proxy.node):
            self.decisions.append(text)
        self._hold(proxy, value, f"inputs with {formula(proxy.node)}", f" (decided at {where})")
        return value

    def _hold(self, proxy: ValueProxy, value: Any, what: str, why: str = "") -> None:
        """Let the graph say so where a value is another one than it was traced for."""
        # Not operator.not_, which asks for the truth of a proxy when the emitted graph is traced in its turn.
        same = operator.is_ if value is None else operator.eq
        held = proxy if value is True else self.create_proxy("call_function", same, (proxy, value), {})
        message = f"this graph was traced for {what} == {value!r}{why}"
        guard = self.create_proxy("call_function", torch._assert, (held, message), {})
        guard.node.meta["guard"] = True

    def to_bool(self, obj: Any) -> bool:
        return bool(self.decide(obj, bool))


def _refuse_to_tell_devices(node: fx.Node) -> None:
    """From one that is written down, that is: two tensors lie on the same one wherever the model is. ``x.type()`` names it, too."""
    of_tensors = [isinstance(arg, fx.Node) and isinstance(arg.meta["val"], torch.device) for arg in node.args]
    compares = node.target in (operator.eq, operator.ne) and any(of_tensors) and not all(of_tensors)
    if compares or (node.op == "call_method" and node.target == "type" and len(node.args) == 1 and not node.kwargs):
        raise TraceError(asks_device(formula(node)))


def _is_torch(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").split(".")[0] == "torch"
