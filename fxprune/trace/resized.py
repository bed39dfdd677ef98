"""Find what depends on input sizes unseen, by tracing inputs of other sizes.

Two things do: numbers that C++ computes, and the number of axes that ``squeeze()`` leaves. Where
another size gives another graph, the size is guarded. The first check is only done for graphs that
contain numbers of unknown origin: the rules of ``vmap``, for example, slice, count and combine
before an operation is recorded.
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
"""A tensor among the inputs, or an entry of one, and one of its axes."""

Compare = Callable[[tuple[Any, Any]], "fx.Node | bool | None"]
"""A function that traces another call ``(args, kwargs)`` and compares the graphs.

It returns the first node that differs, None if there is none, and False if the call fails.
"""


def hold_inputs(tracer: Tracer, compare: Compare) -> None:
    """Guard the input sizes that change the graph.

    Parameters
    ----------
    tracer:
        The tracer of the finished graph.
    compare:
        Traces a call with other sizes and compares (see :data:`Compare`).
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
        return  # the model takes no other size: of two that must be equal, both would fail
    for place in _failing_together(tracer, waiting, compare):
        tracer.hold_input(*place, next(iter(tracer.below_lines.values())))


def hold_ranks(tracer: Tracer, compare: Compare) -> None:
    """Guard the number of axes that ``squeeze()`` leaves, if the graph changes with it.

    Parameters
    ----------
    tracer:
        The tracer of the finished graph.
    compare:
        Traces a call with other sizes and compares (see :data:`Compare`).
    """
    squeezed = [node for node in tracer.graph.nodes if squeezes_all(node)]
    if not squeezed:
        return
    free = _free(tracer.graph)
    alike = [
        [place for place in free if _size(place) == size and place[1] == dim]
        for size, dim in dict.fromkeys(map(_key, free))
    ]
    for places in (*alike, *([place] for place in free)):  # the batch of two inputs is the same
        if isinstance(
            compare(_with(tracer.example, places, 2 if _size(places[0]) == 1 else 1)), fx.Node
        ):
            for node in squeezed:
                tracer.hold_rank(node)
            return


def _failing_together(
    tracer: Tracer, places: Sequence[InputAxis], compare: Compare
) -> list[InputAxis]:
    """Return the axes for which no other size is known to give the same graph.

    Axes that fail alone may pass when they change together: two inputs have the same batch size,
    for example. Axes that pass together are left out.
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
    """Compare with a trace that has another size on these axes, the first that the model takes."""
    size = max(map(_size, places))
    for other in (2 * size, 3 * size, size + 1, size // 2, size - 1):
        found = compare(_with(tracer.example, places, other)) if other not in (0, size) else False
        if found is not False:
            return found
    return False


def _with(call: tuple[Any, Any], places: Sequence[InputAxis], other: int) -> Any:
    """Return the call with the size ``other`` on these axes."""
    dims = {node.meta["val"]: {dim for own, dim in places if own is node} for node, _ in places}

    def resized(tensor: Tensor) -> Tensor:
        sizes = [
            other if dim in dims.get(tensor, ()) else size for dim, size in enumerate(tensor.shape)
        ]
        return tensor.new_zeros(sizes)

    return tree_map_only(Tensor, resized, call)


def _free(graph: fx.Graph) -> list[InputAxis]:
    """Return the axes of all inputs whose sizes are not guarded."""
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
    """Tell whether the size of a tensor's axis is guarded."""
    sizes = [user for user in node.users if user.target == "size" and user.args[1:] == (dim,)]
    asked = [
        same
        for size in sizes
        for same in size.users
        if same.target is operator.eq and isinstance(same.args[1], int)
    ]
    return any(user.meta.get("guard") for same in asked for user in same.users)


def _size(place: InputAxis) -> int:
    """Return the example's size of an axis."""
    return int(place[0].meta["val"].shape[place[1]])


def _key(place: InputAxis) -> tuple[int, int]:
    """Return the size and the index of an axis: axes with the same ones may belong together."""
    return _size(place), place[1]


def _user_line_at(tracer: Tracer, node: fx.Node) -> str:
    """Return the user's line of the first C++ operation at this node or after it."""
    later = iter(tracer.below_lines.items())
    return next(
        (line for own, line in later if not own < node), next(iter(tracer.below_lines.values()))
    )
