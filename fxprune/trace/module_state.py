"""State that forward keeps on its modules for the next call.

A graph is one call, which does the same each time, so a model with state cannot be traced. Not
every attribute that forward sets is state. A value that nobody reads changes nothing, and a table
that follows from sizes is computed in the graph, whatever an earlier call has left. So if an
attribute that may matter has changed, forward is traced a second time from there. If the graph is
the same, there is no state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from fxprune.common.dispatch import holds_tensors
from fxprune.ops import Trait, has
from fxprune.trace.aliasing import is_again, name_of, node_of

__all__ = [
    "AttributeChange",
    "Attributes",
    "assigned",
    "carried",
    "first_difference",
    "follows_inputs",
    "keep",
    "same_graph",
    "values_read",
]

_MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"}
_MISSING = object()


@dataclass(frozen=True)
class AttributeChange:
    """An attribute whose value after forward differs from the value before.

    Attributes
    ----------
    store:
        The dictionary that holds the attribute.
    name:
        Its name there.
    path:
        Its path from the root.
    before:
        Its value before forward.
    contents:
        What a list, dict or set held before, because it may itself have been changed.
    after:
        Its value after forward.
    """

    store: dict[str, Any]
    name: str
    path: str
    before: Any
    contents: Any
    after: Any

    @property
    def rebound(self) -> bool:
        """Whether the attribute is another object.

        False for a buffer that ``self.count += 1`` has written into.
        """
        return not is_again(node_of(self.after), self.path)

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes of traced values in the new value."""
        return [node for node in map(node_of, _leaves_with_sizes(self.after)) if node is not None]

    def computed(self, of: Callable[[fx.Node], Any]) -> Any:
        """Return the new value with traced values replaced.

        Parameters
        ----------
        of:
            Returns the replacement for a node.
        """

        def value(leaf: Any) -> Any:
            """Replace a traced value, or the traced sizes in a tuple."""
            node = node_of(leaf)
            if node is not None:
                return of(node)
            return torch.Size(map(value, leaf)) if isinstance(leaf, tuple) else leaf

        return self.after if type(self.after) is set else tree_map(value, self.after)


class Attributes:
    """The attributes, parameters and buffers of all modules, saved for comparison and restoring.

    Parameters
    ----------
    root:
        The model.
    """

    def __init__(self, root: nn.Module) -> None:
        self._before = [
            (
                path,
                store,
                dict(store),
                {
                    name: _copy(value)
                    for name, value in store.items()
                    if type(value) in _COMPARED_CONTAINERS
                },
            )
            for path, module in root.named_modules()
            for store in (vars(module), module._parameters, module._buffers)
        ]

    def changes(self, ignore: Iterable[str] = ()) -> Iterator[AttributeChange]:
        """Yield the attributes that have changed.

        Parameters
        ----------
        ignore:
            Paths of attributes to leave out.
        """
        ignored = {*ignore}
        for path, store, before, contents in self._before:
            for name in [*store.keys() | before.keys()]:
                old, new = before.get(name, _MISSING), store.get(name, _MISSING)
                if old is new and (
                    name not in contents
                    or not (new or contents[name])
                    or _same_attribute(contents[name], new)
                ):
                    continue
                if name in _MODULE_INTERNALS or (
                    type(old) is type(new) and type(old) in _PLAIN_VALUES and old == new
                ):
                    continue
                full = f"{path}.{name}".removeprefix(".")
                if full not in ignored:
                    after = _copy(new) if type(new) in _COMPARED_CONTAINERS else new
                    yield AttributeChange(store, name, full, old, contents.get(name), after)

    def restore(self, ignore: Iterable[str] = ()) -> None:
        """Restore all attributes that have changed.

        Parameters
        ----------
        ignore:
            Paths of attributes to leave out.
        """
        for change in [*self.changes(ignore)]:
            if change.before is _MISSING:
                del change.store[change.name]
                continue
            change.store[change.name] = change.before
            if type(change.before) in _COMPARED_CONTAINERS:
                _refill(change.before, change.contents)


def _leaves_with_sizes(value: Any) -> list[Any]:
    """Return the leaves of nested containers.

    A tensor's traced sizes are a tuple of a class of their own, and are returned one by one.
    """
    return [
        own
        for leaf in tree_leaves(value)
        for own in (leaf if isinstance(leaf, tuple) else (leaf,))
    ]


_PLAIN_VALUES = frozenset({bool, int, float, str, type(None)})
_COMPARED_CONTAINERS = frozenset({list, dict, set})
_LEAVES = (Tensor, nn.Module, *_PLAIN_VALUES)


def _copy(value: Any) -> Any:
    """Copy a container and the containers in it."""
    if type(value) is set or all(
        isinstance(item, _LEAVES) for item in (value.values() if type(value) is dict else value)
    ):
        return value.copy()
    return tree_map(lambda leaf: leaf, value)


def _same_attribute(copied: Any, now: Any) -> bool:
    """Tell whether a container still holds what it held when it was copied."""
    if type(now) is set:
        return bool(copied == now)
    before, after = tree_leaves(copied), tree_leaves(now)
    return len(before) == len(after) and all(
        a is b or (type(a) in _PLAIN_VALUES and a == b) for a, b in zip(before, after, strict=True)
    )


def _refill(container: Any, contents: Any) -> None:
    """Give a container its former contents."""
    container.clear()
    container.extend(contents) if type(container) is list else container.update(contents)


def assigned(changes: Iterable[AttributeChange]) -> set[str]:
    """Return the paths of attributes that were set to traced values."""
    return {change.path for change in changes if change.rebound and change.nodes}


def carried(changes: Iterable[AttributeChange]) -> list[AttributeChange]:
    """Return the changes that may make the next call another one.

    These are values that depend on the values of inputs, and values that Python has computed.
    """
    return [change for change in changes if change.rebound and _carries(change.nodes)]


def _carries(nodes: Sequence[fx.Node]) -> bool:
    """Tell whether a new value with these nodes may change the next call."""
    return not nodes or any(map(follows_inputs, nodes))


def values_read(node: fx.Node) -> Sequence[fx.Node]:
    """Return the arguments of a call on whose values its result depends.

    Of other arguments it reads the shape, the dtype or the device only.
    """
    name = name_of(node)
    return (
        ()
        if has(name, Trait.READS_SHAPE)
        else node.all_input_nodes[:1]
        if has(name, Trait.READS_DTYPE)
        else node.all_input_nodes
    )


def follows_inputs(node: fx.Node) -> bool:
    """Tell whether a node depends on the values of inputs, not only on their sizes."""
    seen, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node in seen or not holds_tensors(node.meta.get("val")):
            continue
        if node.op == "placeholder":
            return True
        seen.add(node)
        waiting.extend(values_read(node))
    return False


def keep(changes: Iterable[AttributeChange]) -> None:
    """Set changed attributes on the modules for a further call, with traced values replaced."""
    for change in changes:
        if change.after is _MISSING:
            change.store.pop(change.name, None)
        else:
            change.store[change.name] = change.computed(lambda node: node.meta["val"])


def same_graph(
    one: fx.Graph, other: fx.Graph, constants: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> bool:
    """Tell whether two graphs do the same.

    Checks of sizes are left out: a second call finds in a table what the first has put there.

    Parameters
    ----------
    one, other:
        The graphs.
    constants, others:
        Their constants by name. A constant may have another name in the other graph.
    """
    return first_difference(one, other, constants, others) is None


def first_difference(
    one: fx.Graph, other: fx.Graph, constants: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> fx.Node | None:
    """Return the first node of a graph that differs from its counterpart in another graph.

    None if the graphs do the same (see :func:`same_graph` for the parameters).
    """
    ones, theirs = _computing_nodes(one), _computing_nodes(other)
    for left, right, line, another in zip(
        ones, theirs, _described(ones), _described(theirs), strict=False
    ):
        a, b = constants.get(str(left.target)), others.get(str(right.target))
        if left.op == right.op == "get_attr" and a is not None and b is not None:
            if a is not b and (
                a.is_meta or b.is_meta or a.dtype != b.dtype or not torch.equal(a, b)
            ):
                return left
        elif line != another:
            return left
    return None if len(ones) == len(theirs) else ones[min(len(ones) - 1, len(theirs))]


def _computing_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes of a graph without guards and without numbers that nothing else reads."""
    idle: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        number = node.op in ("call_function", "call_method") and isinstance(
            node.meta.get("val"), (bool, int, float)
        )
        if node.meta.get("guard") or (number and idle.issuperset(node.users)):
            idle.add(node)
    return [node for node in graph.nodes if node not in idle]


def _described(nodes: Sequence[fx.Node]) -> list[str]:
    """Return a description of each node that does not depend on the names of nodes."""
    number = {node: f"%{place}" for place, node in enumerate(nodes)}
    return [
        repr((node.op, node.target, fx.node.map_arg((node.args, node.kwargs), number.__getitem__)))
        for node in nodes
    ]
