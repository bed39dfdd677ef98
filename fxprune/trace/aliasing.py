"""Which calls write into a tensor, and which results share memory with what they were made of.

A graph is a list of calls in order. As long as none writes, it says all; where one does, whoever
looks at the same memory under another name sees it too.
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
from fxprune.ops import Trait, has, name_of_op

__all__ = [
    "AUGMENTED",
    "Memory",
    "Snapshot",
    "Undone",
    "first_of",
    "is_again",
    "name_of",
    "node_of",
    "shares",
    "squeezes_all",
    "writes",
    "written",
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
"""The functions of :mod:`operator` behind ``x += y`` and its kind that write into ``x`` if it is a
tensor.
"""

_WRITING = frozenset(
    {*(getattr(operator, name) for name in AUGMENTED), operator.setitem, operator.delitem}
)


def writes(node: fx.Node, root: nn.Module | None = None) -> bool:
    """Whether a call may change an argument: an operator's name says so, a trailing underscore,
    ``inplace`` or ``out``.

    Parameters
    ----------
    root:
        The module of the graph; without it, calls of modules are not looked at.

    Examples
    --------
    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> functions = torch.add, operator.iadd, torch.relu_, operator.invert
    >>> [writes(graph.call_function(function, (x, x))) for function in functions]
    [False, True, True, False]
    """
    if node.op == "call_module":
        return root is not None and bool(
            getattr(root.get_submodule(str(node.target)), "inplace", False)
        )
    if node.op not in ("call_function", "call_method"):
        return False
    into = node.kwargs.get("inplace") or node.kwargs.get("out") is not None
    if into or node.target in _WRITING or _places(node.target):
        return True
    name = name_of(node)
    if _of_operator(node):
        return False  # is_ and and_ end like add_, but for another reason
    if name.startswith("__") and name.endswith("__"):
        return name[2:-2] in AUGMENTED or name == "__setitem__"
    return name.endswith("_")


def written(node: fx.Node, root: nn.Module | None = None) -> Sequence[fx.Node]:
    """What a call may write into: of an operation that torch documents the first argument and
    ``out``, else any argument.
    """
    if not writes(node, root):
        return ()
    places: list[fx.Node] = []
    for place, name in _places(node.target):
        fx.node.map_arg(
            node.args[place] if place < len(node.args) else node.kwargs.get(name), places.append
        )
    if places:
        return places
    known = (
        node.op == "call_module"
        or node.target in _WRITING
        or hasattr(torch.ops.aten, name_of(node).strip("_"))
    )
    fx.node.map_arg((first_of(node), node.kwargs.get("out")), places.append)
    return places if known and places else node.all_input_nodes


@functools.cache
def _places(target: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an operation writes into, where its schema is
    known.
    """
    target = getattr(target, "_opoverload", target)  # what torch.library.custom_op gives
    if not isinstance(target, torch._ops.OpOverload):
        return ()
    arguments = enumerate(target._schema.arguments)
    return tuple(
        (i, own.name)
        for i, own in arguments
        if own.alias_info is not None and own.alias_info.is_write
    )


def shares(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """The argument of a call of whose memory its result may be, if there is one: what is not known
    to be new may be shared.
    """
    first = first_of(node)
    if node.op not in ("call_function", "call_method", "call_module") or not isinstance(
        first, fx.Node
    ):
        return None
    return None if not writes(node, root) and _makes_new(node, root) else first


def first_of(node: fx.Node) -> Any:
    """The first argument of a call, by position or by the name that torch gives it; None if it has
    none.

    >>> x = fx.Graph().placeholder("x")
    >>> call = x.graph.call_function
    >>> first_of(call(torch.relu, (x,))) is first_of(call(torch.relu, (), {"input": x})) is x
    True
    """
    return node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))


def _makes_new(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        # it computes with them
        return next(root.get_submodule(str(node.target)).parameters(), None) is not None
    if _of_operator(node):
        return node.target is not operator.getitem
    return _op_makes_new(name_of(node))


def _of_operator(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(operator, name_of(node), None) is node.target


@functools.cache
def _op_makes_new(name: str) -> bool:
    """Whether there is an ATen operation of that name, and its schemas say that what it returns is
    not its arguments' memory.
    """
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or has(name, Trait.MAY_GIVE_BACK):
        return False
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    return not any(
        entry.alias_info for schema in schemas if not schema.is_mutable for entry in schema.returns
    )


def name_of(node: fx.Node, root: nn.Module | None = None) -> str:
    """The name of the method or function that a node calls, or of the kind of module: ``flatten``
    for all three.
    """
    if node.op == "call_module":
        return (
            ""
            if root is None
            else _torch_class(root.get_submodule(str(node.target))).__name__.lower()
        )
    if isinstance(node.target, torch._ops.OpOverload):
        return name_of_op(node.target)
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _torch_class(module: nn.Module) -> type:
    """The class of ``torch.nn`` that a module is of: a parametrization makes a subclass, with
    another name.
    """
    kinds = (
        kind
        for kind in type(module).__mro__
        if kind is not nn.Module and kind.__module__.startswith("torch.nn.modules.")
    )
    return next(kinds, type(module))


def _reads_values(node: fx.Node) -> bool:
    """Whether a call reads what a tensor holds, not only what it is."""
    name = name_of(node)
    return name != "getattr" and not has(name, Trait.ASKS | Trait.ASKS_SIZES)


def squeezes_all(node: fx.Node) -> bool:
    """Whether it is a ``squeeze()`` that drops each axis of size 1, a batch of one as well."""
    return name_of(node) == "squeeze" and len(node.args) + len(node.kwargs) == 1


def node_of(value: Any) -> fx.Node | None:
    """The node whose value something stands for while a model is traced; None for what is no
    stand-in.
    """
    return getattr(value, "fx_node", None)


def is_again(node: fx.Node | None, *call: Any) -> bool:
    """Whether a node is what ``(target, *args)`` gives, under the name that it got from ``+=`` or
    its kind.
    """
    while node is not None and node.target in _WRITING:
        node = cast(fx.Node, node.args[0])
    return node is not None and (node.target, *node.args) == call


class Memory:
    """Who shares memory with whom in a graph as it is now.

    Parameters
    ----------
    root:
        The module of the graph.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        nodes = list(graph.nodes)
        self._writing = [
            (place, to) for place, node in enumerate(nodes) for to in written(node, root)
        ]
        self._source = {node: shares(node, root) for node in nodes}
        # of each node the one whose memory it may be, and that is nobody else's
        self.base: dict[fx.Node, fx.Node] = {}
        self._families: dict[fx.Node, list[fx.Node]] = {}
        for node, source in self._source.items():
            base = self.base[node] = node if source is None else self.base[source]
            self._families.setdefault(base, []).append(node)
        self._place = {node: place for place, node in enumerate(nodes)}
        self._last_read = {
            node: max(
                (self._place[user] for user in node.users if _reads_values(user)),
                default=-1,
            )
            for node in nodes
        }

    def roots(self, node: fx.Node) -> Iterator[fx.Node]:
        """A node, and the nodes of whose memory it may be, the nearest first."""
        above: fx.Node | None = node
        while above is not None:
            yield above
            above = self._source[above]

    def changing(self) -> set[fx.Node]:
        """Nodes of whose memory, under whatever name, something is overwritten; all that read the
        same parameter or buffer.
        """
        nodes = {node for _, to in self._writing for node in self.roots(to)}
        stored = {node.target for node in nodes if node.op == "get_attr"}
        return nodes | {
            node for node in self._source if node.op == "get_attr" and node.target in stored
        }

    def written_after(self, node: fx.Node) -> list[fx.Node]:
        """What may be written into after a node has run."""
        return [to for place, to in self._writing if place > self._place[node]]

    def changed_behind(self, view: fx.Node) -> bool:
        """Whether a view has to stay one: it or what it looks at is written to, and the other is
        read afterwards.
        """
        base = self.base[view]
        writing = [
            (place, to)
            for place, to in self._writing
            if place > self._place[view] and self.base[to] is base
        ]
        if not writing:
            return False
        through = {node for node in self._families[base] if view in self.roots(node)}
        beside = set(self._families[base]) - through
        outlives = base.op in ("placeholder", "get_attr")
        for place, to in writing:
            others = beside if to in through else through
            if (outlives and to in through) or any(
                self._last_read[other] > place for other in others
            ):
                return True
        return False


class Snapshot:
    """Values of tensors, to see later whether they still have them."""

    def __init__(self) -> None:
        self._taken: list[tuple[Tensor, Tensor, str]] = []

    def take(self, tensor: Tensor, what: str) -> None:
        """``what`` is told of a tensor that has changed."""
        if not tensor.is_meta:
            self._taken.append((tensor, tensor.detach().clone(), what))

    def shares_memory_with(self, tensor: Tensor) -> bool:
        """Whether a tensor is, or looks at, one of these."""
        own = tensor.untyped_storage().data_ptr()
        return own != 0 and any(
            own == held.untyped_storage().data_ptr() for held, _, _ in self._taken
        )

    def changed(self) -> str | None:
        """What was said of a tensor that is not what it was."""
        for tensor, before, what in self._taken:
            # a nan is one still
            same = (tensor == before) | ((tensor != tensor) & (before != before))
            if not bool(same.all()):
                return what
        return None


class Undone:
    """Takes back what runs write into tensors, a forward that clamps its weights, say; saves those
    alone that are written.

    Attributes
    ----------
    written:
        The names of tensors that were written so far.

    Examples
    --------
    >>> weight = torch.ones(2)
    >>> undone = Undone({"weight": weight})
    >>> with undone.afterwards():
    ...     print(weight.mul_(3))
    tensor([3., 3.])
    >>> weight, undone.written
    (tensor([1., 1.]), {'weight'})
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors: dict[int, list[tuple[str, Tensor]]] = {}  # by the place of their memory
        for name, tensor in tensors.items():
            self._tensors.setdefault(_memory_of(tensor), []).append((name, tensor))
        self._tensors.pop(0, None)
        self._saved: dict[int, list[Tensor]] = {}
        self.written: set[str] = set()

    @contextmanager
    def afterwards(self) -> Iterator[None]:
        """A run inside may write."""
        try:
            with self.watching():
                yield
        finally:
            for memory, values in self._saved.items():
                for (_, tensor), value in zip(self._tensors[memory], values, strict=True):
                    tensor.data.copy_(value)
            self._saved = {}

    def watching(self) -> DispatchMode:
        """What has to see operations where those that look on are turned off, inside of
        :meth:`afterwards`.
        """
        return _Writes(self)

    def save(self, tensor: Tensor) -> None:
        """Said of a tensor before it is written."""
        memory = _memory_of(tensor)
        if memory in self._tensors and memory not in self._saved:
            self._saved[memory] = [own.detach().clone() for _, own in self._tensors[memory]]
            self.written |= {name for name, _ in self._tensors[memory]}


class _Writes(DispatchMode):
    def __init__(self, undone: Undone) -> None:
        super().__init__()
        self.undone = undone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for place, name in _places(func):
            for tensor in tensors_of(args[place] if place < len(args) else kwargs.get(name)):
                self.undone.save(tensor)
        return func(*args, **kwargs)


def _memory_of(tensor: Tensor) -> int:
    """Where a tensor's memory lies; 0: it is none that could be written here, that of a tensor
    without data, say.
    """
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.layout is not torch.strided:
        return 0
    return tensor.untyped_storage().data_ptr()
