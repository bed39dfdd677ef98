"""What has followed from the sizes of inputs without a word, found by traces of inputs of other
sizes: numbers that C++ has computed below Python, and how many axes a ``squeeze()`` leaves.

Where another size makes another graph, the graph is for its own size alone, and says so. That is
asked only of graphs with numbers of unknown origin in them: the rules of ``vmap`` cut, count and
compose before an operation is seen.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from fxprune.trace.aliasing import squeezes_all
from fxprune.trace.tracer import Tracer

__all__ = ["hold_inputs", "hold_ranks"]

InputAxis = tuple[fx.Node, int]
"""An input, or an entry of one, and a dimension of it."""

Compare = Callable[[tuple[Any, Any]], "fx.Node | bool | None"]


def hold_inputs(tracer: Tracer, compare: Compare) -> None:
    """Hold a graph to those sizes of its inputs with which it changes.

    Parameters
    ----------
    compare:
        Traces another call: gives the first node in whose place it has another one, None where
        there is none, False where it fails.
    """
    if not tracer.below_lines:
        return
    waiting: list[InputAxis] = []
    for place in _free(tracer.graph):
        found = _trace_resized(tracer, [place], compare)
        if found is False:
            waiting.append(place)
        elif isinstance(found, fx.Node):
            tracer.hold_input(*place, _user_line_at(tracer, found))
    if len(waiting) == 1:
        return  # the model takes no other size: two that depend on each other both fail alone
    for place in _failing_together(tracer, waiting, compare):
        tracer.hold_input(*place, next(iter(tracer.below_lines.values())))


def hold_ranks(tracer: Tracer, compare: Compare) -> None:
    """Hold a graph to the number of axes that ``squeeze()`` leaves, where it is another graph for
    inputs of which it drops more.
    """
    squeezed = [node for node in tracer.graph.nodes if squeezes_all(node)]
    if not squeezed:
        return
    free = _free(tracer.graph)
    alike = [
        [place for place in free if _size(place) == size and place[1] == dim]
        for size, dim in dict.fromkeys(map(_key, free))
    ]
    for places in (*alike, *([place] for place in free)):  # the batches of two inputs are one
        if isinstance(
            compare(_with(tracer.example, places, 2 if _size(places[0]) == 1 else 1)), fx.Node
        ):
            for node in squeezed:
                tracer.hold_rank(node)
            return


def _failing_together(
    tracer: Tracer, places: Sequence[InputAxis], compare: Compare
) -> list[InputAxis]:
    """Those without which no other size is known to give the same graph: the batches of two
    inputs, say, are one.
    """
    for alike in (_key, _size):
        for key in {alike(place) for place in places}:
            together = [place for place in places if alike(place) == key]
            if len(together) > 1 and _trace_resized(tracer, together, compare) is None:
                places = [place for place in places if place not in together]
    return [*places]


def _trace_resized(
    tracer: Tracer, places: Sequence[InputAxis], compare: Compare
) -> fx.Node | bool | None:
    """What another trace gives with another size of these places: the first one that the model
    takes.
    """
    size = max(map(_size, places))
    for other in (2 * size, 3 * size, size + 1, size // 2, size - 1):
        found = compare(_with(tracer.example, places, other)) if other not in (0, size) else False
        if found is not False:
            return found
    return False


def _with(call: tuple[Any, Any], places: Sequence[InputAxis], other: int) -> Any:
    dims = {node.meta["val"]: {dim for own, dim in places if own is node} for node, _ in places}

    def resized(tensor: Tensor) -> Tensor:
        sizes = [
            other if dim in dims.get(tensor, ()) else size for dim, size in enumerate(tensor.shape)
        ]
        return tensor.new_zeros(sizes)

    return tree_map_only(Tensor, resized, call)


def _free(graph: fx.Graph) -> list[InputAxis]:
    """The dimensions of all inputs that the graph is not held to."""
    containers: set[fx.Node] = set()
    tensors: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "placeholder" or (
            node.target is operator.getitem and node.args[0] in containers
        ):
            tensors.append(node) if isinstance(node.meta["val"], Tensor) else containers.add(node)
    return [
        (node, dim)
        for node in tensors
        for dim in range(node.meta["val"].dim())
        if not _is_held(node, dim)
    ]


def _is_held(node: fx.Node, dim: int) -> bool:
    sizes = [user for user in node.users if user.target == "size" and user.args[1:] == (dim,)]
    asked = [
        same
        for size in sizes
        for same in size.users
        if same.target is operator.eq and isinstance(same.args[1], int)
    ]
    return any(user.meta.get("guard") for same in asked for user in same.users)


def _size(place: InputAxis) -> int:
    return int(place[0].meta["val"].shape[place[1]])


def _key(place: InputAxis) -> tuple[int, int]:
    return _size(place), place[1]


def _user_line_at(tracer: Tracer, node: fx.Node) -> str:
    """The line of what C++ has done there, or next."""
    later = iter(tracer.below_lines.items())
    return next(
        (line for own, line in later if not own < node), next(iter(tracer.below_lines.values()))
    )
