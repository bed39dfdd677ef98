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

__all__ = ["guard_input_sizes", "guard_ranks"]

InputAxis = tuple[fx.Node, int]
"""A tensor among the inputs, or an entry of one, and one of its axes."""

Compare = Callable[[tuple[Any, Any]], "fx.Node | bool | None"]
"""A function that traces another call ``(args, kwargs)`` and compares the graphs.

It returns the first node that differs, None if there is none, and False if the call fails.
"""


def guard_input_sizes(tracer: Tracer, compare: Compare) -> None:
    """Guard the input sizes that change the graph.

    Parameters
    ----------
    tracer:
        The tracer of the finished graph.
    compare:
        Traces a call with other sizes and compares (see :data:`Compare`).
    """
    if not tracer.cpp_lines:
        return
    waiting: list[InputAxis] = []
    for place in _unguarded_axes(tracer.graph):
        found = _trace_resized(tracer, [place], compare)
        if found is False:
            waiting.append(place)
        elif isinstance(found, fx.Node):
            tracer.guard_input(*place, _user_line_at(tracer, found))
    if len(waiting) == 1:
        return  # the model takes no other size: of two that must be equal, both would fail
    for place in _still_failing(tracer, waiting, compare):
        tracer.guard_input(*place, next(iter(tracer.cpp_lines.values())))


def guard_ranks(tracer: Tracer, compare: Compare) -> None:
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
    axes = _unguarded_axes(tracer.graph)
    alike: dict[tuple[int, int], list[InputAxis]] = {}
    for axis in axes:
        alike.setdefault(_size_and_dim(axis), []).append(axis)
    # the batch of two inputs, for example, only changes together
    for places in (*alike.values(), *([axis] for axis in axes)):
        other_size = 2 if _size(places[0]) == 1 else 1
        if isinstance(compare(_resized_call(tracer.example, places, other_size)), fx.Node):
            for node in squeezed:
                tracer.guard_rank(node)
            return


def _still_failing(
    tracer: Tracer, places: Sequence[InputAxis], compare: Compare
) -> list[InputAxis]:
    """Return the axes for which no other size is known to give the same graph.

    Axes that fail alone may pass when they change together: two inputs have the same batch size,
    for example. Axes that pass together are left out.
    """
    for alike in (_size_and_dim, _size):
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
        if other in (0, size):
            continue
        found = compare(_resized_call(tracer.example, places, other))
        if found is not False:
            return found
    return False


def _resized_call(call: tuple[Any, Any], places: Sequence[InputAxis], other: int) -> Any:
    """Return the call with the size ``other`` on these axes."""
    dims = {node.meta["val"]: {dim for own, dim in places if own is node} for node, _ in places}

    def resize(tensor: Tensor) -> Tensor:
        changed = dims.get(tensor, ())
        sizes = [other if dim in changed else size for dim, size in enumerate(tensor.shape)]
        return tensor.new_zeros(sizes)

    return tree_map_only(Tensor, resize, call)


def _unguarded_axes(graph: fx.Graph) -> list[InputAxis]:
    """Return the axes of all inputs whose sizes are not guarded."""
    containers: set[fx.Node] = set()
    axes: list[InputAxis] = []
    for node in graph.nodes:
        is_entry = node.target is operator.getitem and node.args[0] in containers
        if node.op != "placeholder" and not is_entry:
            continue
        value = node.meta["val"]
        if isinstance(value, Tensor):
            axes += [(node, dim) for dim in range(value.dim()) if not _is_guarded(node, dim)]
        else:
            containers.add(node)
    return axes


def _is_guarded(node: fx.Node, dim: int) -> bool:
    """Tell whether the size of a tensor's axis is guarded."""
    sizes = [user for user in node.users if user.target == "size" and user.args[1:] == (dim,)]
    for reader in [reader for size in sizes for reader in size.users]:
        compares = reader.target is operator.eq and isinstance(reader.args[1], int)
        if compares and any(user.meta.get("guard") for user in reader.users):
            return True
    return False


def _size(place: InputAxis) -> int:
    """Return the example's size of an axis."""
    return int(place[0].meta["val"].shape[place[1]])


def _size_and_dim(place: InputAxis) -> tuple[int, int]:
    """Return the size and the index of an axis: axes with the same ones may belong together."""
    return _size(place), place[1]


def _user_line_at(tracer: Tracer, node: fx.Node) -> str:
    """Return the user's line of the first C++ operation at this node or after it."""
    for operation, line in tracer.cpp_lines.items():
        if not operation < node:
            return line
    return next(iter(tracer.cpp_lines.values()))
