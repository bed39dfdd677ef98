"""Model and example inputs -> ``torch.fx.GraphModule``, on tensors without data.

Three things make tracing reach models that ``torch.fx.symbolic_trace`` does not:

* every proxy carries the value it has for the example, so Python control flow on shapes runs, while the sizes themselves stay
  symbolic in the graph. What was decided is listed, and guarded by an assertion in the graph;
* ``self.training`` is read through the graph, so that dropout and stochastic depth keep both their modes;
* functions that libraries mark as leaves are entered, because parameters pass through them.

The model that runs is a *twin*: same structure, parameters on the meta device. The user's model is never called nor changed.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import inspect
import itertools
import operator
import sys
import traceback
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import SUPPORTED_NODES, tree_flatten, tree_leaves, tree_map

from fxprune.errors import FxpruneError, InputError, TraceError
from fxprune.lowering import lower
from fxprune.memory import AUGMENTED, Snapshot, is_again, written
from fxprune.regions import BOUNDS, enter, leave, recorded
from fxprune.shapes import META, ShapeMode, holds_tensors
from fxprune.state import Attributes, Change, assigned, carried, keep, same_graph

__all__ = ["Trace", "Twin", "example_of", "execute", "is_leaf", "put_tensors", "slow_path", "trace", "twin_of", "user_line"]

_TRAINING = "training"


@dataclass(frozen=True)
class Twin:
    """A structural copy of a model with parameters on the meta device.

    ``real`` leads from the id of a twin's tensor to the tensor of the user's model that it stands for; ``tensors`` are the twin's
    parameters and buffers by name.
    """

    model: nn.Module
    real: dict[int, Tensor]
    tensors: dict[str, Tensor]

    @contextmanager
    def holding(self, values: Mapping[int, Tensor]) -> Iterator[nn.Module]:
        """The twin's model with other tensors, given by the ids of the twin's, for a while."""
        changed = put_tensors(self.model, values)
        try:
            yield self.model
        finally:
            for store, name, tensor in changed:
                store[name] = tensor

    def instance(self, values: Mapping[int, Tensor] | None = None) -> nn.Module:
        """A copy of the twin's model to run: with these tensors, by the ids of the twin's, or the user's (buffers copied)."""
        memo: dict[int, Any] = {}
        for tensor in self.tensors.values():
            own = self.real[id(tensor)].detach() if values is None else values[id(tensor)]
            memo[id(tensor)] = nn.Parameter(own, False) if isinstance(tensor, nn.Parameter) else own.clone()
        return _copy_module(self.model, memo)

    def part(self, path: str) -> Twin:
        """The twin of a module below."""
        model = self.model.get_submodule(path)
        return Twin(model, self.real, {**dict(model.named_parameters()), **dict(model.named_buffers())})


@dataclass
class Trace:
    """A traced model: the graph, its twin, and what tracing had to decide.

    ``graph``'s nodes carry the value they had for the example in ``node.meta["val"]`` (meta tensors, ints, tuples). The twin is
    that of the traced module.
    """

    graph: fx.Graph
    twin: Twin
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    decisions: list[str] = field(default_factory=list)
    asked_mode: bool = False
    training: bool = False
    constants: dict[str, Tensor] = field(default_factory=dict)
    path: str = ""  # of the traced module below the model; empty: the model itself

    @property
    def prefix(self) -> str:
        """What tells the nodes of this graph from those of the others, in front of their names."""
        return (f"{self.path}:" if self.path else "") + ("train." if self.training else "")

    @property
    def placeholders(self) -> list[Any]:
        """The example's values in the order of the graph's placeholders."""
        return [*self.args, *self.kwargs.values()]

    @property
    def outputs(self) -> Any:
        """What the graph gave for the example."""
        output = next(iter(reversed(self.graph.nodes)))
        return fx.node.map_arg(output.args[0], lambda node: node.meta["val"])


def twin_of(model: nn.Module) -> Twin:
    """Copy a model's structure; its parameters and float buffers become meta tensors, other tensors stay data on the CPU.

    Raises
    ------
    TraceError
        If an attribute of the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    real: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> None:
        if id(tensor) in memo:
            return
        if isinstance(tensor, nn.Parameter):
            new: Tensor = nn.Parameter(torch.empty_like(tensor, device=META), requires_grad=False)
        elif tensor.is_floating_point() or tensor.is_complex():
            new = torch.empty_like(tensor, device=META)
        else:
            new = tensor.detach().to("cpu", copy=True)
        memo[id(tensor)] = new
        real[id(new)] = tensor

    modules = list(model.modules())
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                stand_in(tensor)
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, Tensor) and id(value) not in memo:
                # Not a parameter, not a buffer: a constant whose value may matter, or one that a hook computes at each call.
                held = value.detach().to("cpu", copy=True) if value.grad_fn is None else torch.empty_like(value, device=META)
                memo[id(value)], real[id(held)] = held, value
    try:
        copied = _copy_module(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({error}). fxprune traces a copy so that your model stays untouched: "
            "make every attribute of the model copyable with copy.deepcopy (no locks, open files or generators)."
        ) from error
    twin = lower(copied)
    return Twin(twin, real, {**dict(twin.named_parameters()), **dict(twin.named_buffers())})


def put_tensors(model: nn.Module, new: Mapping[int, Tensor]) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Put tensors into the places of registered ones, by the ids of these; returns (place, name, what was there)."""
    changed: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, tensor in store.items():
                if tensor is not None and id(tensor) in new:
                    changed.append((store, name, tensor))
    for store, name, tensor in changed:
        value = new[id(tensor)]
        wrap = isinstance(tensor, nn.Parameter) and not isinstance(value, nn.Parameter)
        store[name] = nn.Parameter(value, False) if wrap else value
    return changed


_PLAIN = frozenset({bool, int, float, str, torch.dtype, type(None), types.FunctionType, types.BuiltinFunctionType, type})
_STORES = frozenset({dict, collections.OrderedDict, set})


def _copy_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """copy.deepcopy for a module tree, several times faster: most attributes are numbers, which need no copy."""
    if id(module) in memo:
        copied: nn.Module = memo[id(module)]
        return copied
    if hasattr(type(module), "__deepcopy__"):
        return copy.deepcopy(module, memo)
    new = type(module).__new__(type(module))
    memo[id(module)] = new
    for child in module._modules.values():
        if child is not None and id(child) not in memo:
            _copy_module(child, memo)
    for name, value in vars(module).items():
        kind = type(value)
        if kind in _PLAIN or (kind is tuple and all(type(item) in _PLAIN for item in value)):
            new.__dict__[name] = value
        elif kind in _STORES and not value:
            new.__dict__[name] = value.copy()
        elif kind is dict and name in ("_parameters", "_buffers", "_modules"):
            new.__dict__[name] = {key: None if item is None else memo[id(item)] for key, item in value.items()}
        else:
            new.__dict__[name] = copy.deepcopy(value, memo)
    return new


def example_of(example_inputs: Any, batch: int | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Normalise ``example_inputs`` to (args, kwargs) of meta tensors; ``batch`` replaces a leading size of 1.

    A batch of 1 is ambiguous (an axis of size 1 broadcasts), so the analysis prefers 2.

    Raises
    ------
    InputError
        If a leaf is not a tensor.
    """
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    if isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    elif isinstance(example_inputs, tuple):
        args, kwargs = example_inputs, {}
    else:
        args, kwargs = (example_inputs,), {}
    leaves = tree_leaves((args, kwargs))
    if not leaves:
        raise InputError("example_inputs is empty: pass the tensor (or tuple, or dict of tensors) that the model is called with.")
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise InputError(
                f"example_inputs must consist of tensors, got {type(leaf).__name__}: {leaf!r:.60}. Pass a tensor, a tuple "
                "of positional arguments or a dict of keyword arguments; bind anything else with functools.partial or a "
                "wrapper module."
            )
    ranked = [leaf for leaf in leaves if leaf.dim() > 0]
    widen = batch is not None and bool(ranked) and all(leaf.shape[0] == 1 for leaf in ranked)

    def to_meta(leaf: Tensor) -> Tensor:
        shape = list(leaf.shape)
        if batch is not None and widen and shape:
            shape[0] = batch
        return torch.empty(shape, dtype=leaf.dtype, device=META)

    return tree_map(to_meta, (args, kwargs))


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


def trace(
    twin: Twin,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    training: bool = False,
    watch: Callable[[fx.Node], AbstractContextManager[Any]] | None = None,
) -> Trace:
    """Trace the twin on meta inputs (see :func:`example_of`) in evaluation mode, or in training mode.

    Parameters
    ----------
    watch:
        Called with each node before it runs, for what it is to run under: a dispatch mode that executes ATen ops on tensors
        without data, and may look on. Default: :class:`~fxprune.shapes.ShapeMode`.

    Raises
    ------
    TraceError
        If the model branches on values, or its code cannot be followed; the message names the line.
    InputError
        If an operation refuses the shapes of the example.
    """
    if any(module.__dict__["training"] is not training for module in twin.model.modules()):
        twin.model.train(training)
    attributes, made = Attributes(twin.model), frozenset[str]()
    try:
        result, made = _follow(_Tracer(twin, args, kwargs, training, watch or _on_shapes), twin)
        changes = [*attributes.changes(made)]
        _refuse_memory(result.graph, assigned(changes), twin.model)
        state = carried(changes)
        if state:
            attributes.restore(made)
            keep(state)
            _refuse_state(result, state)
        return result
    except FxpruneError:
        made = frozenset()
        raise
    finally:
        attributes.restore(made)


def _on_shapes(node: fx.Node) -> AbstractContextManager[Any]:
    return ShapeMode()


def _follow(tracer: _Tracer, twin: Twin) -> tuple[Trace, frozenset[str]]:
    """Trace once; also the names of the constants that the twin's module has got by it."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        stack.enter_context(slow_path())
        stack.enter_context(_taken_over(tracer))
        stack.enter_context(_leaf_functions(tracer))
        stack.enter_context(_mode_through_graph(twin.model, tracer))
        stack.enter_context(recorded(tracer.begin_region, tracer.end_region, tracer.is_users))
        stack.enter_context(_states_refused(tracer))
        try:
            graph = tracer.trace(twin.model)
            for node in tracer.left_out:
                if node.users:
                    raise TraceError(_number_decides(node))
                graph.erase_node(node)
            place = tracer.made.changed()
            if place is not None:
                raise TraceError(f"a tensor is changed after a graph has taken it for a constant (at {place}). {_MADE_FROM_INPUT}")
        except FxpruneError:
            raise
        except Exception as error:
            where = user_line(traceback.extract_tb(error.__traceback__))
            raise TraceError(
                f"{type(twin.model).__name__} cannot be traced: {type(error).__name__}: {error} (at {where}). "
                "Keep what cannot be traced inside a module of its own, or rewrite that line with tensor operations."
            ) from error
    constants = {
        name: twin.real.get(id(t), t)
        for t, name in tracer.tensor_attrs.items()
        if isinstance(t, Tensor) and name in tracer.constant_targets
    }
    args, kwargs = tracer.example
    result = Trace(graph, twin, args, kwargs, tracer.decisions, tracer.asked_mode, tracer.training, constants)
    _drop_unused_sizes(graph)
    return result, frozenset(tracer.made_names)


_MADE_FROM_INPUT = "Make it from an input, with x.new_zeros(...) or device=x.device, so that the graph makes it at each call."


class SizeTuple(tuple[Any, ...]):
    """What ``x.shape`` gives while tracing: a tuple whose entries are proxies of ``x.size(i)``."""

    def numel(self) -> Any:
        total: Any = 1
        for size in self:
            total = total * size
        return total


class ValueProxy(fx.Proxy):
    """A proxy that knows the value it stands for, as far as shapes go."""

    tracer: _Tracer

    if TYPE_CHECKING:  # torch.fx adds the operators to its class when it is imported

        def __getitem__(self, index: Any) -> Any: ...

    @property
    def value(self) -> Any:
        return self.node.meta["val"]

    @property
    def __class__(self) -> type:
        # isinstance(x, Tensor) in users' code must be answered as for the tensor itself.
        kind = type(self.node.meta.get("val"))
        return Tensor if issubclass(kind, Tensor) else kind if kind in (int, float, bool) else ValueProxy

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
        if not hasattr(value, name):
            raise AttributeError(f"{type(value).__name__!r} object has no attribute {name!r}")
        if isinstance(value, torch.device | torch.dtype):
            return getattr(value, name)
        return _ValueAttribute(self, name)

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
        return id(self)

    def __repr__(self) -> str:
        value = self.__dict__["node"].meta.get("val")
        return f"{self.node.name}{tuple(value.shape)}" if isinstance(value, Tensor) else f"{self.node.name}={value!r}"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)


def _augmented(function: Callable[..., Any]) -> Callable[..., Any]:
    """``x += y`` writes into a tensor; a number is bound anew, to what ``x + y`` gives."""

    def write(self: ValueProxy, other: Any) -> Any:
        if not isinstance(self.value, Tensor):
            return NotImplemented
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return write


for _name in AUGMENTED:
    setattr(ValueProxy, f"__{_name}__", _augmented(getattr(operator, _name)))


class _ValueAttribute(ValueProxy):
    """``x.attr`` before it is known whether it will be read (``x.device``) or called (``x.view(...)``)."""

    def __init__(self, root: ValueProxy, attr: str) -> None:
        self.root, self.attr = root, attr
        self.tracer = root.tracer
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        if self._node is None:
            made = self.tracer.create_proxy("call_function", getattr, (self.root, self.attr), {})
            self._node = made.node
        return self._node

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        kind = type(getattr(self.root.value, self.attr))
        return Tensor if issubclass(kind, Tensor) else kind if kind in (int, float, bool) else _ValueAttribute

    def __repr__(self) -> str:
        return f"{self.root!r}.{self.attr}={getattr(self.root.value, self.attr)!r}"  # without making the node

    __str__ = __repr__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module stays one node.

    A module of torch.nn without children is one operation. One with children is a container or a composite, unless the children are
    parametrisations, which compute its weights and belong to it.
    """
    if not type(module).__module__.startswith("torch.nn"):
        return False
    return all(child is None for child in module._modules.values()) or parametrize.is_parametrized(module)


class _ModeReadError(Exception):
    """A leaf function branches on ``training``: it has to stay whole."""


class _Tracer(fx.Tracer):
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
        names = _parameter_names(root_fn, len(args))
        _check_keywords(root_fn, kwargs)
        values = {**dict(zip(names, args, strict=True)), **kwargs}
        proxies = {name: self._placeholder(name, value) for name, value in values.items()}
        given = {name: proxy if holds_tensors(values[name]) else values[name] for name, proxy in proxies.items()}
        positional = [given[name] for name in names]
        keywords = {name: given[name] for name in kwargs}
        for name, value in _left_out(root_fn, values).items():
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
        if type(a) in (ValueProxy, _ValueAttribute):
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
                node.meta["val"] = a
                return node
        return super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs))
        self._refuse_to_write_into_constants(node)
        node.meta["val"] = self._execute(node)
        return self.proxy(node)

    def _refuse_to_write_into_constants(self, node: fx.Node) -> None:
        values = (place.meta["val"] for place in written(node))
        if any(isinstance(value, Tensor) and self.made.shares_memory_with(value) for value in values):
            raise TraceError(
                f"values that depend on the input are written into a tensor that forward makes without it (at {user_line()}), and "
                f"that a graph has once for all calls. {_MADE_FROM_INPUT}"
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
        return not self._executing and not filename.startswith((_OWN, _TORCH))

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
        target = f"{path}.{_TRAINING}" if path else _TRAINING
        node = self.create_node("get_attr", target, (), {})
        node.meta["val"] = self.training
        node.meta["mode"] = True
        return self.proxy(node)

    def decide(self, proxy: ValueProxy, kind: type) -> Any:
        """A Python decision needs a value now: take the example's, list it, and guard it in the graph."""
        value = proxy.value
        if proxy.node in self.left_out:
            raise TraceError(_number_decides(proxy.node))
        if isinstance(value, Tensor):
            if value.is_meta:
                raise TraceError(
                    f"the model branches on the values of a tensor (at {user_line()}). A graph has one path for all values: "
                    "use torch.where or masks, or keep that part in a module that is not pruned."
                )
            return kind(value)
        if _from_mode(proxy.node):
            if self._inside_leaf_function:
                raise _ModeReadError
            self.asked_mode = True
            return kind(value)
        value = kind(value) if not isinstance(value, tuple | list | str) and value is not None else value
        where = user_line()
        text = f"{where}: {_formula(proxy.node)} was taken as {value!r}"
        if text not in self.decisions and not _of_rank(proxy.node):
            self.decisions.append(text)
        self._hold(proxy, value, f"inputs with {_formula(proxy.node)}", f" (decided at {where})")
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


def _parameter_names(function: Any, count: int) -> list[str]:
    code = function.__code__
    names = list(code.co_varnames[1 : code.co_argcount])
    if count > len(names) and not code.co_flags & 0x04:  # 0x04: the function takes *args
        raise InputError(
            f"example_inputs has {count} positional inputs, but forward takes {len(names)} ({', '.join(names)}). "
            "Pass a tuple of positional arguments or a dict of keyword arguments."
        )
    return (names + [f"args_{i}" for i in range(count)])[:count]


def _left_out(function: Any, given: Mapping[str, Any]) -> dict[str, int]:
    """The arguments that a call leaves to their defaults, and these are whole numbers."""
    parameters = inspect.signature(function).parameters.items()
    return {name: parameter.default for name, parameter in parameters if name not in given and type(parameter.default) is int}


def _number_decides(node: fx.Node) -> str:
    return f"what the model does depends on its argument {str(node.target)!r}, a number: a graph is for one number only."


def _check_keywords(function: Any, kwargs: Mapping[str, Any]) -> None:
    code = function.__code__
    known = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    unknown = [name for name in kwargs if name not in known]
    if unknown and not code.co_flags & 0x08:  # 0x08: the function takes **kwargs
        raise InputError(
            f"example_inputs has {unknown[0]!r}, but forward takes {', '.join(known)}: use its argument names as keys."
        )


def _is_torch(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").split(".")[0] == "torch"


def _from_mode(node: fx.Node) -> bool:
    """Whether a scalar derives from ``self.training`` (and not from sizes alone)."""
    if node.meta.get("mode"):
        return True
    return not isinstance(node.meta.get("val"), Tensor) and any(
        _from_mode(n) for n in node.all_input_nodes if not isinstance(n.meta.get("val"), Tensor)
    )


def _of_rank(node: fx.Node) -> bool:
    """Whether a scalar depends on ranks alone (``x.dim() == 4``), which no input of the same kind changes."""
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    if tensors:
        return node.target in ("dim", "ndimension") or (node.target is getattr and str(node.args[1]) == "ndim")
    return bool(node.all_input_nodes) and all(_of_rank(n) for n in node.all_input_nodes)


def _formula(node: fx.Node) -> str:
    """A scalar node as a person would write it: ``x.size(2) % 7``."""
    if node.op in ("placeholder", "get_attr"):
        return str(node.target)
    if isinstance(node.meta.get("val"), Tensor):
        return node.name
    parts = [_formula(a) if isinstance(a, fx.Node) else repr(a) for a in node.args]
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if node.op == "call_method":
        return f"{parts[0]}.{name}({', '.join(parts[1:])})"
    return f"{name}({', '.join(parts)})"


def user_line(stack: Any = None) -> str:
    """``file:line`` of the innermost frame that belongs neither to torch nor to fxprune."""
    if stack is not None:
        for entry in reversed(stack):
            if not _internal(entry.filename):
                return f"{entry.filename.rsplit('/', 1)[-1]}:{entry.lineno}"
        return "an unknown line"
    frame = sys._getframe(1)
    while frame is not None:
        if not _internal(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "an unknown line"


_OWN = __file__.rsplit("/", 1)[0] + "/"
_TORCH = torch.__file__.rsplit("/", 1)[0] + "/"


@functools.cache
def _internal(filename: str) -> bool:
    return filename.startswith((_OWN, _TORCH, "<")) or "/contextlib.py" in filename or "/unittest/" in filename


@contextmanager
def slow_path() -> Iterator[None]:
    """Keep torch.nn's fused inference paths out of the graph: they exist for one mode only and hide the widths."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# Functions without a tensor among their arguments, to which proxies of sizes are passed: torch.fx does not see them otherwise.
_FACTORIES = (
    *("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros"),
    *("broadcast_shapes", "tril_indices", "triu_indices"),
)


# Functions of torch that try a number before a tensor at some argument: a proxy says that it is a tensor, and is then read as one
# in C++, which ends the process. A test finds them by their signatures.
_NUMBER_FIRST = {
    torch: (
        *("bitwise_and", "bitwise_left_shift", "bitwise_or", "bitwise_right_shift", "bitwise_xor", "float_power", "isin"),
        *("logspace", "pow", "quantize_per_tensor", "randint_like", "remainder", "result_type", "where", "xlogy"),
    ),
    torch.special: (
        *("hermite_polynomial_h", "hermite_polynomial_he", "laguerre_polynomial_l", "legendre_polynomial_p"),
        *(f"{prefix}chebyshev_polynomial_{kind}" for prefix in ("", "shifted_") for kind in "tuvw"),
        *("xlog1py", "xlogy", "zeta"),
    ),
}


@contextmanager
def _taken_over(tracer: _Tracer) -> Iterator[None]:
    """Make nodes of the calls of functions that torch.fx would not see, or would not survive."""
    create = functools.partial(tracer.create_proxy, "call_function")
    places = [*_number_first(), *((vars(torch), name) for name in _FACTORIES)]
    before = [(space, name, space[name]) for space, name in places]
    for space, name, function in before:
        space[name] = _if_symbolic(function, create)
    try:
        yield
    finally:
        for space, name, function in before:
            space[name] = function


@contextmanager
def _states_refused(tracer: _Tracer) -> Iterator[None]:
    """What a caller of the model decides (whether gradients are wanted, in which precision) is not known to a graph."""
    with ExitStack() as stack:
        for name in ("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled"):
            stack.enter_context(mock.patch.object(torch, name, _unless_users(getattr(torch, name), tracer)))
        yield


def _unless_users(function: Callable[..., Any], tracer: _Tracer) -> Callable[..., Any]:
    @functools.wraps(function)
    def ask(*args: Any, **kwargs: Any) -> Any:
        if tracer.is_users(sys._getframe(1).f_code.co_filename):
            raise TraceError(
                f"forward asks torch.{function.__name__}() (at {user_line()}), which a graph cannot: it has one path for all "
                "answers. Do the same for all, or keep that line inside a module of its own."
            )
        return function(*args, **kwargs)

    return ask


_scanned: set[str] = set()
_found: list[tuple[dict[str, Any], str]] = []


def _number_first() -> list[tuple[dict[str, Any], str]]:
    """Wherever a function of :data:`_NUMBER_FIRST` has a name: in torch, and in the modules that imported it from there."""
    functions = {id(getattr(space, name)) for space, names in _NUMBER_FIRST.items() for name in names}
    for name in sys.modules.keys() - _scanned:
        _scanned.add(name)
        if name in ("torch", "torch.special") or name.partition(".")[0] != "torch":
            space = getattr(sys.modules[name], "__dict__", {})
            _found.extend((space, key) for key, value in list(space.items()) if id(value) in functions)
    return [(space, key) for space, key in _found if id(space.get(key)) in functions]


@contextmanager
def _leaf_functions(tracer: _Tracer) -> Iterator[None]:
    """Take over from torch.fx the functions that were registered with ``torch.fx.wrap``."""
    registered = fx._symbolic_trace._wrapped_fns_to_patch
    with ExitStack() as stack:
        for (_, name), namespace in list(registered.items()):
            if callable(namespace.get(name)):
                patched = _if_symbolic(namespace[name], tracer.call_leaf_function)
                stack.enter_context(mock.patch.dict(namespace, {name: patched}))
        stack.enter_context(mock.patch.dict(registered, clear=True))
        yield


def _if_symbolic(original: Callable[..., Any], create: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but for calls with a proxy among their arguments."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return create(original, args, kwargs) if _symbolic(args) or _symbolic(kwargs) else original(*args, **kwargs)

    return call


def _symbolic(value: Any) -> bool:
    """Whether there is a proxy in nested arguments."""
    if isinstance(value, (tuple, list)):
        return any(map(_symbolic, value))
    if isinstance(value, dict):
        return any(map(_symbolic, value.values()))
    return type(value) in (ValueProxy, _ValueAttribute)


def _read_mode(module: nn.Module) -> Any:
    tracer = module.__dict__.get(_TRACER)
    return module.__dict__[_TRAINING] if tracer is None else tracer.read_mode(module)


def _write_mode(module: nn.Module, value: bool) -> None:
    """A module that forward makes, a slice of a ModuleList say, has a mode of its own; the others keep theirs."""
    if _TRACER in module.__dict__:
        raise TraceError(f"forward changes the mode of a {type(module).__name__} (at {user_line()}), which a graph cannot do.")
    module.__dict__[_TRAINING] = value


_TRACER = "_fxprune_tracer"
_mode_classes: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()


@contextmanager
def _mode_through_graph(root: nn.Module, tracer: _Tracer) -> Iterator[None]:
    """While tracing, reading ``module.training`` in any module that is traced into gives a node of the graph."""
    changed: list[tuple[nn.Module, type]] = []
    try:
        for name, module in root.named_modules():
            if name and is_leaf(module):
                continue
            kind = type(module)
            if kind not in _mode_classes:
                mode = property(_read_mode, _write_mode)
                _mode_classes[kind] = type(kind.__name__, (kind,), {_TRAINING: mode, "__module__": kind.__module__})
            changed.append((module, kind))
            module.__dict__[_TRACER] = tracer
            module.__class__ = _mode_classes[kind]
        yield
    finally:
        for module, kind in changed:
            module.__class__ = kind
            del module.__dict__[_TRACER]


def _refuse_memory(graph: fx.Graph, assigned: set[str], root: nn.Module) -> None:
    """A tensor that forward keeps for its next call is state, which a graph has not; one that only lends its size is a cache.

    Raises
    ------
    TraceError
        If values are read that a call before would have set.
    """
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in assigned:
            for user in node.users:
                if any(isinstance(leaf, Tensor) for leaf in tree_leaves(user.meta.get("val"))):
                    raise TraceError(
                        f"forward of this {type(root).__name__} reads {node.target!r} and sets it for its next call, which a graph "
                        "cannot do. Hand it in and out as an argument, or make it a buffer and write into it in place."
                    )


def _refuse_state(first: Trace, state: Sequence[Change]) -> None:
    """What the first call has left on the modules, where it now is, must not lead to another graph.

    Raises
    ------
    TraceError
        If a second call does something else, or leaves something else behind.
    """
    twin, attributes, made = first.twin, Attributes(first.twin.model), frozenset[str]()
    try:
        second, made = _follow(_Tracer(twin, first.args, first.kwargs, first.training, _on_shapes), twin)
        same = same_graph(first.graph, second.graph, first.constants, second.constants)
        moving = [change for change in carried(attributes.changes(made)) if not holds_tensors(change.after)]
    except FxpruneError:
        same, moving = False, []
    finally:
        attributes.restore(made)
    if not same or moving:
        names = ", ".join(sorted(repr(change.path) for change in state))
        raise TraceError(
            f"forward of this {type(twin.model).__name__} does something else when it is called again, because it sets {names}: a "
            "graph is one call. Hand it in and out as an argument, or make it a buffer and write into it in place."
        )


def _drop_unused_sizes(graph: fx.Graph) -> None:
    """Remove scalar nodes that nobody reads; tensors stay, because an in-place operation may have no reader."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("placeholder", "output") or node.users or node.target is torch._assert or node.target in BOUNDS:
            continue
        value = node.meta.get("val")
        scalar = node.op == "get_attr" or not any(isinstance(leaf, Tensor) for leaf in tree_flatten(value)[0])
        if scalar and node.target is not operator.setitem:
            graph.erase_node(node)
