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
from fxprune.ops import Trait, has_trait
from fxprune.trace.aliasing import computes_call, name_of, node_of

__all__ = [
    "AttributeChange",
    "Attributes",
    "apply_changes",
    "changes_to_next_call",
    "first_difference",
    "follows_inputs",
    "same_graph",
    "traced_paths",
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
        return not computes_call(node_of(self.after), self.path)

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
        self._before: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = []
        for path, module in root.named_modules():
            stores: tuple[dict[str, Any], ...] = (
                vars(module),
                module._parameters,
                module._buffers,
            )
            for store in stores:
                self._before.append((path, store, dict(store), _copy_containers(store)))

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
                is_container = name in contents
                if old is new and not (is_container and _has_changed(contents[name], new)):
                    continue
                if name in _MODULE_INTERNALS or _are_equal_numbers(old, new):
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
    found: list[Any] = []
    for leaf in tree_leaves(value):
        found += leaf if isinstance(leaf, tuple) else (leaf,)
    return found


_PLAIN_VALUES = frozenset({bool, int, float, str, type(None)})
_COMPARED_CONTAINERS = frozenset({list, dict, set})
_LEAVES = (Tensor, nn.Module, *_PLAIN_VALUES)


def _copy_containers(store: dict[str, Any]) -> dict[str, Any]:
    """Return copies of the containers among the attributes in a dictionary."""
    found = {}
    for name, value in store.items():
        if type(value) in _COMPARED_CONTAINERS:
            found[name] = _copy(value)
    return found


def _copy(value: Any) -> Any:
    """Copy a container and the containers in it."""
    items = value.values() if type(value) is dict else value
    if type(value) is set or all(isinstance(item, _LEAVES) for item in items):
        return value.copy()
    return tree_map(lambda leaf: leaf, value)


def _has_changed(contents: Any, now: Any) -> bool:
    """Tell whether a container holds something else than the copy of its contents."""
    if not now and not contents:
        return False
    if type(now) is set:
        return bool(contents != now)
    before, after = tree_leaves(contents), tree_leaves(now)
    return len(before) != len(after) or not all(map(_are_same, before, after))


def _are_same(one: Any, other: Any) -> bool:
    """Tell whether two leaves are one object, or equal numbers."""
    return one is other or (type(one) in _PLAIN_VALUES and one == other)


def _are_equal_numbers(one: Any, other: Any) -> bool:
    """Tell whether two values are equal numbers or strings of the same type."""
    return type(one) is type(other) and type(one) in _PLAIN_VALUES and one == other


def _refill(container: Any, contents: Any) -> None:
    """Give a container its former contents."""
    container.clear()
    container.extend(contents) if type(container) is list else container.update(contents)


def traced_paths(changes: Iterable[AttributeChange]) -> set[str]:
    """Return the paths of attributes that were set to traced values."""
    return {change.path for change in changes if change.rebound and change.nodes}


def changes_to_next_call(changes: Iterable[AttributeChange]) -> list[AttributeChange]:
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
    if has_trait(name, Trait.READS_SHAPE):
        return ()
    return node.all_input_nodes[: 1 if has_trait(name, Trait.READS_DTYPE) else None]


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


def apply_changes(changes: Iterable[AttributeChange]) -> None:
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
    pairs = zip(ones, theirs, _described(ones), _described(theirs), strict=False)
    for node, counterpart, description, other_description in pairs:
        a, b = constants.get(str(node.target)), others.get(str(counterpart.target))
        if node.op == counterpart.op == "get_attr" and a is not None and b is not None:
            if not _are_equal_constants(a, b):
                return node
        elif description != other_description:
            return node
    return None if len(ones) == len(theirs) else ones[min(len(ones) - 1, len(theirs))]


def _are_equal_constants(one: Tensor, other: Tensor) -> bool:
    """Tell whether two constants are one tensor, or have the same values and dtype."""
    if one is other:
        return True
    if one.is_meta or other.is_meta or one.dtype != other.dtype:
        return False
    return torch.equal(one, other)


def _computing_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes of a graph without guards and without numbers that nothing else reads."""
    idle: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        is_call = node.op in ("call_function", "call_method")
        is_number = is_call and isinstance(node.meta.get("val"), (bool, int, float))
        if node.meta.get("guard") or (is_number and idle.issuperset(node.users)):
            idle.add(node)
    return [node for node in graph.nodes if node not in idle]


def _described(nodes: Sequence[fx.Node]) -> list[str]:
    """Return a description of each node that does not depend on the names of nodes."""
    names = {node: f"%{place}" for place, node in enumerate(nodes)}
    described = []
    for node in nodes:
        arguments = fx.node.map_arg((node.args, node.kwargs), names.__getitem__)
        described.append(repr((node.op, node.target, arguments)))
    return described
