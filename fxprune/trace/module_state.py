"""What forward keeps on its modules for its next call. A graph is one call: it would do the same
each time.

Not all that forward sets is state. What it only stores for somebody to look at changes nothing,
and a table that follows from sizes is computed in the graph, whatever an earlier call has left. So
where an attribute holds something else than before that may matter, forward is followed a second
time, from there: with the same graph again there is no state.
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
    """An attribute that holds something else after forward than before; ``path`` leads to it from
    the root.

    ``contents`` is what a list, dict or set held before, which may itself be there still.
    """

    store: dict[str, Any]
    name: str
    path: str
    before: Any
    contents: Any
    after: Any

    @property
    def rebound(self) -> bool:
        """False for a buffer that ``self.count += 1`` has written into: it is there still."""
        return not is_again(node_of(self.after), self.path)

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes of what was traced of what is there now."""
        return [node for node in map(node_of, _leaves_with_sizes(self.after)) if node is not None]

    def computed(self, of: Callable[[fx.Node], Any]) -> Any:
        """What is there now, with what ``of`` says of a node in the place of what was traced."""

        def value(leaf: Any) -> Any:
            node = node_of(leaf)
            if node is not None:
                return of(node)
            return torch.Size(map(value, leaf)) if isinstance(leaf, tuple) else leaf

        return self.after if type(self.after) is set else tree_map(value, self.after)


class Attributes:
    """The plain attributes, the parameters and the buffers of all modules as they are now, to be
    compared and restored.
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
        """What is different, but for the root's attributes named in ``ignore``."""
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
        """Put everything back."""
        for change in [*self.changes(ignore)]:
            if change.before is _MISSING:
                del change.store[change.name]
                continue
            change.store[change.name] = change.before
            if type(change.before) in _COMPARED_CONTAINERS:
                _refill(change.before, change.contents)


def _leaves_with_sizes(value: Any) -> list[Any]:
    """The leaves of nested containers, the sizes of a tensor among them, which are a tuple of a
    class of its own.
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
    """A copy of a container and of those in it."""
    if type(value) is set or all(
        isinstance(item, _LEAVES) for item in (value.values() if type(value) is dict else value)
    ):
        return value.copy()
    return tree_map(lambda leaf: leaf, value)


def _same_attribute(copied: Any, now: Any) -> bool:
    if type(now) is set:
        return bool(copied == now)
    before, after = tree_leaves(copied), tree_leaves(now)
    return len(before) == len(after) and all(
        a is b or (type(a) in _PLAIN_VALUES and a == b) for a, b in zip(before, after, strict=True)
    )


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    container.extend(contents) if type(container) is list else container.update(contents)


def assigned(changes: Iterable[AttributeChange]) -> set[str]:
    """Paths of what was set to something that was traced."""
    return {change.path for change in changes if change.rebound and change.nodes}


def carried(changes: Iterable[AttributeChange]) -> list[AttributeChange]:
    """Those that may make the next call another one: what depends on the values of inputs, and
    what Python has computed.
    """
    return [change for change in changes if change.rebound and _carries(change.nodes)]


def _carries(nodes: Sequence[fx.Node]) -> bool:
    return not nodes or any(map(follows_inputs, nodes))


def values_read(node: fx.Node) -> Sequence[fx.Node]:
    """The arguments of a call on whose values its result depends: of others it takes the shape,
    the dtype or the device alone.
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
    """Whether a value depends on those of the inputs, and not on their sizes alone."""
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
    """Leave on the modules what the call has left, for another one."""
    for change in changes:
        if change.after is _MISSING:
            change.store.pop(change.name, None)
        else:
            change.store[change.name] = change.computed(lambda node: node.meta["val"])


def same_graph(
    one: fx.Graph, other: fx.Graph, constants: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> bool:
    """Whether two graphs do the same; ``constants`` and ``others`` are theirs by name, which may
    be another one.

    What they hold their sizes to is no part of it: a second call finds in a table by its size what
    the first has put there.
    """
    return first_difference(one, other, constants, others) is None


def first_difference(
    one: fx.Graph, other: fx.Graph, constants: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> fx.Node | None:
    """The first node of a graph in whose place another graph does something else (see
    :func:`same_graph`).
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
    """The nodes of a graph without its guards, and without numbers that nothing else reads."""
    idle: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        number = node.op in ("call_function", "call_method") and isinstance(
            node.meta.get("val"), (bool, int, float)
        )
        if node.meta.get("guard") or (number and idle.issuperset(node.users)):
            idle.add(node)
    return [node for node in graph.nodes if node not in idle]


def _described(nodes: Sequence[fx.Node]) -> list[str]:
    number = {node: f"%{place}" for place, node in enumerate(nodes)}
    return [
        repr((node.op, node.target, fx.node.map_arg((node.args, node.kwargs), number.__getitem__)))
        for node in nodes
    ]
