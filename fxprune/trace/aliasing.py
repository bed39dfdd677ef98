"""Calls that write into tensors, and results that share memory with their arguments.

A graph is a list of calls in order. If no call writes, the graph says everything. If one does, the
change is seen through every tensor that shares the memory.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fxprune.common.contents import tensors_of
from fxprune.common.dispatch import DispatchMode
from fxprune.ops import Trait, has_trait, name_of_op

__all__ = [
    "AUGMENTED",
    "Memory",
    "Snapshot",
    "UndoWrites",
    "computes_call",
    "first_argument",
    "name_of",
    "node_of",
    "shared_argument",
    "squeezes_all",
    "writes",
    "written_arguments",
]

AUGMENTED = (
    "iadd",
    "iand",
    "ifloordiv",
    "ilshift",
    "imod",
    "imul",
    "ior",
    "ipow",
    "irshift",
    "isub",
    "itruediv",
    "ixor",
)
"""The functions of :mod:`operator` behind ``x += y`` and the like.

They write into ``x`` if it is a tensor.
"""

_WRITING = frozenset(
    {*(getattr(operator, name) for name in AUGMENTED), operator.setitem, operator.delitem}
)


def writes(node: fx.Node, root: nn.Module | None = None) -> bool:
    """Tell whether a call may write into an argument.

    The name of the operation, a trailing underscore, ``inplace`` or ``out`` says so.

    Parameters
    ----------
    node:
        The call.
    root:
        The module of the graph. Without it, calls of modules count as not writing.

    Examples
    --------
    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> functions = torch.add, operator.iadd, torch.relu_, operator.invert
    >>> [writes(graph.call_function(function, (x, x))) for function in functions]
    [False, True, True, False]
    """
    if node.op == "call_module":
        module = None if root is None else root.get_submodule(str(node.target))
        return bool(getattr(module, "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    is_asked = node.kwargs.get("inplace") or node.kwargs.get("out") is not None
    if is_asked or node.target in _WRITING or _written_parameters(node.target):
        return True
    name = name_of(node)
    if _calls_operator(node):
        return False  # is_ and and_ end with an underscore because they are keywords without it
    if name.startswith("__") and name.endswith("__"):
        return name[2:-2] in AUGMENTED or name == "__setitem__"
    return name.endswith("_")


def written_arguments(node: fx.Node, root: nn.Module | None = None) -> Sequence[fx.Node]:
    """Return the arguments that a call may write into.

    For an operation that torch documents, these are the first argument and ``out``; for others,
    all arguments.
    """
    if not writes(node, root):
        return ()
    found: list[fx.Node] = []
    for place, name in _written_parameters(node.target):
        argument = node.args[place] if place < len(node.args) else node.kwargs.get(name)
        fx.node.map_arg(argument, found.append)
    if found:
        return found
    is_known = (
        node.op == "call_module"
        or node.target in _WRITING
        or hasattr(torch.ops.aten, name_of(node).strip("_"))
    )
    fx.node.map_arg((first_argument(node), node.kwargs.get("out")), found.append)
    return found if is_known and found else node.all_input_nodes


@functools.cache
def _written_parameters(target: Any) -> tuple[tuple[int, str], ...]:
    """Return position and name of the arguments that an operation writes into.

    Empty if its schema is not known.
    """
    target = getattr(target, "_opoverload", target)  # an operation of torch.library.custom_op
    if not isinstance(target, torch._ops.OpOverload):
        return ()
    found = []
    for place, argument in enumerate(target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append((place, argument.name))
    return tuple(found)


def shared_argument(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """Return the argument with which the result of a call may share memory; None if there is none.

    A result that is not known to be new may share memory with the first argument.
    """
    first = first_argument(node)
    is_call = node.op in ("call_function", "call_method", "call_module")
    if not is_call or not isinstance(first, fx.Node):
        return None
    return None if not writes(node, root) and _makes_new(node, root) else first


def first_argument(node: fx.Node) -> Any:
    """Return the first argument of a call, given by position or by torch's name for it.

    None if the call has none.

    >>> x = fx.Graph().placeholder("x")
    >>> call = x.graph.call_function
    >>> by_position, by_name = call(torch.relu, (x,)), call(torch.relu, (), {"input": x})
    >>> first_argument(by_position) is first_argument(by_name) is x
    True
    """
    return node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))


def _makes_new(node: fx.Node, root: nn.Module) -> bool:
    """Tell whether the result of a call is known to be a new tensor."""
    if node.op == "call_module":
        # a module with parameters computes with them
        return next(root.get_submodule(str(node.target)).parameters(), None) is not None
    if _calls_operator(node):
        return node.target is not operator.getitem
    return _op_makes_new(name_of(node))


def _calls_operator(node: fx.Node) -> bool:
    """Tell whether a node calls a function of :mod:`operator`."""
    return node.op == "call_function" and getattr(operator, name_of(node), None) is node.target


@functools.cache
def _op_makes_new(name: str) -> bool:
    """Tell whether an ATen operation of this name exists and returns new memory by its schemas."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or has_trait(name, Trait.MAY_RETURN_ARGUMENT):
        return False
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    results = [entry for schema in schemas if not schema.is_mutable for entry in schema.returns]
    return not any(entry.alias_info for entry in results)


def name_of(node: fx.Node, root: nn.Module | None = None) -> str:
    """Return the name of the method, function or kind of module that a node calls.

    The name of a module's class is in lower case: ``flatten`` for a method, a function and a
    module.

    Parameters
    ----------
    node:
        A node of a graph.
    root:
        The module of the graph. Without it, a call of a module has the name ``""``.
    """
    if node.op == "call_module":
        if root is None:
            return ""
        return _torch_class(root.get_submodule(str(node.target))).__name__.lower()
    if isinstance(node.target, torch._ops.OpOverload):
        return name_of_op(node.target)
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _torch_class(module: nn.Module) -> type:
    """Return the class of ``torch.nn`` to which a module belongs.

    A parametrization makes a subclass with another name.
    """
    for kind in type(module).__mro__:
        if kind is not nn.Module and kind.__module__.startswith("torch.nn.modules."):
            return kind
    return type(module)


def _reads_values(node: fx.Node) -> bool:
    """Tell whether a call reads the values of a tensor, not only its shape, dtype or device."""
    name = name_of(node)
    return name != "getattr" and not has_trait(name, Trait.READS_KIND | Trait.READS_SIZES)


def squeezes_all(node: fx.Node) -> bool:
    """Tell whether a call is a ``squeeze()`` that drops all axes of size 1, maybe the batch."""
    return name_of(node) == "squeeze" and len(node.args) + len(node.kwargs) == 1


def node_of(value: Any) -> fx.Node | None:
    """Return the node of a traced value; None for other values."""
    return getattr(value, "fx_node", None)


def computes_call(node: fx.Node | None, *call: Any) -> bool:
    """Tell whether a node computes a given call.

    A node that comes from ``+=`` or the like of that call's result counts, too.

    Parameters
    ----------
    node:
        The node, or None.
    *call:
        The target and the arguments of the call.
    """
    while node is not None and node.target in _WRITING:
        node = cast(fx.Node, node.args[0])
    return node is not None and (node.target, *node.args) == call


class Memory:
    """The nodes of a graph that share memory.

    Parameters
    ----------
    graph:
        The graph in its present state.
    root:
        The module of the graph.

    Attributes
    ----------
    base:
        For each node, the node that owns the memory it may use.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        nodes = list(graph.nodes)
        self._place = {node: place for place, node in enumerate(nodes)}
        self._writes: list[tuple[int, fx.Node]] = []  # places of calls, and what they write into
        self._last_read: dict[fx.Node, int] = {}  # places of calls
        self._source = {node: shared_argument(node, root) for node in nodes}
        self.base: dict[fx.Node, fx.Node] = {}
        self._families: dict[fx.Node, list[fx.Node]] = {}
        for place, node in enumerate(nodes):
            self._writes += [(place, to) for to in written_arguments(node, root)]
            readers = filter(_reads_values, node.users)
            self._last_read[node] = max(map(self._place.__getitem__, readers), default=-1)
            source = self._source[node]
            base = self.base[node] = node if source is None else self.base[source]
            self._families.setdefault(base, []).append(node)

    def roots(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yield a node and the nodes whose memory it may use, the nearest first."""
        above: fx.Node | None = node
        while above is not None:
            yield above
            above = self._source[above]

    def changing(self) -> set[fx.Node]:
        """Return the nodes whose memory is overwritten somewhere in the graph.

        If one of them reads a parameter or buffer, all nodes that read the same one are included.
        """
        nodes = {node for _, to in self._writes for node in self.roots(to)}
        stored = {node.target for node in nodes if node.op == "get_attr"}
        reads = [node for node in self._source if node.op == "get_attr"]
        return nodes | {node for node in reads if node.target in stored}

    def written_after(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that may be written into after a node has run."""
        return [to for place, to in self._writes if place > self._place[node]]

    def must_stay_view(self, view: fx.Node) -> bool:
        """Tell whether a view must stay a view.

        It must if the view or the memory it views is written to, and the other is read afterwards.
        """
        base = self.base[view]
        later = [(place, to) for place, to in self._writes if place > self._place[view]]
        writes_to_base = [(place, to) for place, to in later if self.base[to] is base]
        if not writes_to_base:
            return False
        through = {node for node in self._families[base] if view in self.roots(node)}
        beside = set(self._families[base]) - through
        outlives = base.op in ("placeholder", "get_attr")
        for place, to in writes_to_base:
            others = beside if to in through else through
            is_read = any(self._last_read[other] > place for other in others)
            if is_read or (outlives and to in through):
                return True
        return False


class Snapshot:
    """Saved values of tensors, to see later whether these have changed."""

    def __init__(self) -> None:
        self._taken: list[tuple[Tensor, Tensor, str]] = []

    def take(self, tensor: Tensor, what: str) -> None:
        """Save the values of a tensor.

        Parameters
        ----------
        tensor:
            The tensor; ignored if it is on the meta device.
        what:
            What :meth:`changed` returns if the tensor has changed.
        """
        if not tensor.is_meta:
            self._taken.append((tensor, tensor.detach().clone(), what))

    def shares_memory_with(self, tensor: Tensor) -> bool:
        """Tell whether a tensor shares memory with a saved one."""
        address = tensor.untyped_storage().data_ptr()
        saved = [taken.untyped_storage().data_ptr() for taken, _, _ in self._taken]
        return address != 0 and address in saved

    def changed(self) -> str | None:
        """Return the ``what`` of the first tensor that has changed; None if there is none."""
        for tensor, before, what in self._taken:
            # nan counts as equal to nan
            same = (tensor == before) | ((tensor != tensor) & (before != before))
            if not bool(same.all()):
                return what
        return None


class UndoWrites:
    """Undoes what runs write into tensors, such as a forward that clamps its weights.

    A tensor is saved only when it is written.

    Parameters
    ----------
    tensors:
        The tensors to restore, by name.

    Attributes
    ----------
    written:
        The names of the tensors that were written so far.

    Examples
    --------
    >>> weight = torch.ones(2)
    >>> undone = UndoWrites({"weight": weight})
    >>> with undone.undoing():
    ...     print(weight.mul_(3))
    tensor([3., 3.])
    >>> weight, undone.written
    (tensor([1., 1.]), {'weight'})
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors: dict[int, list[tuple[str, Tensor]]] = {}  # by the address of their memory
        for name, tensor in tensors.items():
            self._tensors.setdefault(_memory_of(tensor), []).append((name, tensor))
        self._tensors.pop(0, None)
        self._saved: dict[int, list[Tensor]] = {}
        self.written: set[str] = set()

    @contextmanager
    def undoing(self) -> Iterator[None]:
        """Undo on exit what a run inside this context writes."""
        try:
            with self.watching():
                yield
        finally:
            for memory, values in self._saved.items():
                for (_, tensor), value in zip(self._tensors[memory], values, strict=True):
                    tensor.data.copy_(value)
            self._saved = {}

    def watching(self) -> DispatchMode:
        """Return a mode that sees the operations where other modes are turned off.

        It is for use inside of :meth:`undoing`.
        """
        return _Writes(self)

    def save(self, tensor: Tensor) -> None:
        """Save a tensor, and those that share its memory, before it is written."""
        memory = _memory_of(tensor)
        if memory in self._tensors and memory not in self._saved:
            self._saved[memory] = [saved.detach().clone() for _, saved in self._tensors[memory]]
            self.written |= {name for name, _ in self._tensors[memory]}


class _Writes(DispatchMode):
    """A dispatch mode that saves tensors before an operation writes into them."""

    def __init__(self, undone: UndoWrites) -> None:
        super().__init__()
        self.undone = undone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for place, name in _written_parameters(func):
            for tensor in tensors_of(args[place] if place < len(args) else kwargs.get(name)):
                self.undone.save(tensor)
        return func(*args, **kwargs)


def _memory_of(tensor: Tensor) -> int:
    """Return the address of a tensor's memory.

    0 if it has no memory that could be written here: a tensor without data, for example.
    """
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.layout is not torch.strided:
        return 0
    return tensor.untyped_storage().data_ptr()
