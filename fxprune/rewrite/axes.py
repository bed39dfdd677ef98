"""Rules that derive what is known of an axis of a result from the axes of its operands.

There is one rule for each kind of op (:class:`~fxprune.ops.Axes`). A rule takes the extents of the
graph, a node and an axis of its result, and returns an :class:`Extent`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fxprune.common.dispatch import META
from fxprune.common.reshape import reshape_blocks
from fxprune.ops import Axes, row_or_empty
from fxprune.trace import execute
from fxprune.trace.aliasing import name_of, squeezes_all

if TYPE_CHECKING:
    from fxprune.rewrite.extents import Extents

__all__ = ["RULES", "Extent", "argument", "first_operand", "of_operands"]


class Extent(IntEnum):
    """What is known of the size of an axis, for inputs of any size. A larger value says more."""

    UNKNOWN = 0
    """Nothing is known."""
    SHARE = 1
    """Its size in the smaller model is always the same share of its size in the original."""
    FIXED = 2
    """Its size is the same for every input."""


def _first(extents: Extents, node: fx.Node, axis: int) -> Extent:
    """Return the extent of the same axis of the first operand, if both have the same size."""
    first, value = first_operand(node), node.meta["val"]
    old = None if first is None else first.meta["val"]
    if (
        not isinstance(old, Tensor)
        or old.dim() != value.dim()
        or old.shape[axis] != value.shape[axis]
    ):
        return Extent.UNKNOWN
    return extents.of(first, axis)


def of_operands(extents: Extents, node: fx.Node, axis: int) -> Extent:
    """Return the extent of an axis of an elementwise result.

    The axis is the same in every operand that has it with a size above 1, so the best answer of
    all operands holds.
    """
    rank, best = node.meta["val"].dim(), Extent.UNKNOWN
    # The last operand comes first: it is often a short branch that is added to a long stream.
    for operand in reversed(node.all_input_nodes):
        value = operand.meta["val"]
        operand_axis = axis - rank + value.dim() if isinstance(value, Tensor) else -1
        if operand_axis >= 0 and value.shape[operand_axis] > 1:
            best = max(best, extents.of(operand, operand_axis))
            if best is Extent.FIXED:
                break
    return best


def _reshaped(extents: Extents, node: fx.Node, axis: int) -> Extent:
    """Return the extent of an axis of a reshaped tensor.

    The axis is the product of some axes of the operand, or a factor of them.
    """
    first, value = first_operand(node), node.meta["val"]
    if squeezes_all(node):
        return Extent.UNKNOWN  # which axes remain depends on the batch size
    given = _sizes_given(node)
    if len(given) == value.dim() and given[axis] != -1 and extents.is_constant(given[axis]):
        return Extent.FIXED
    if first is None or not isinstance(first.meta["val"], Tensor):
        return Extent.UNKNOWN
    old = first.meta["val"]
    for before, after in reshape_blocks(old.shape, value.shape):
        if axis in after:
            sources = [extents.of(first, d) for d in before]
            if Extent.UNKNOWN in sources:
                return Extent.UNKNOWN
            if len(after) == 1:
                # An axis of size 1 may be larger for another input. It is then merged with the
                # axes beside it, so the result is fixed only if there is no such axis.
                fixed = all(s is Extent.FIXED for s in sources) and extents.has_no_hidden_axis(
                    first, old
                )
                return Extent.FIXED if fixed else Extent.SHARE
            return Extent.SHARE if extents.has_equal_shares(value, axis) else Extent.UNKNOWN
    return Extent.UNKNOWN


def _permuted(extents: Extents, node: fx.Node, axis: int) -> Extent:
    """Return the extent of the operand's axis that is moved to ``axis``."""
    first = first_operand(node)
    dims = _permutation(extents.root, node, node.meta["val"].dim())
    return Extent.UNKNOWN if first is None or dims is None else extents.of(first, dims[axis])


def _joined(extents: Extents, node: fx.Node, axis: int) -> Extent:
    """Return the extent of an axis of tensors that are concatenated along ``dim``."""
    parts = argument(node, 0, "tensors", ())
    dim = argument(node, 1, "dim", 0)
    if not isinstance(parts, (tuple, list)) or not isinstance(dim, int):
        return Extent.UNKNOWN
    value = node.meta["val"]
    nodes = [p for p in parts if isinstance(p, fx.Node) and p.meta["val"].dim() == value.dim()]
    if axis != dim % value.dim():
        return max((extents.of(node, axis) for node in nodes), default=Extent.UNKNOWN)
    if len(nodes) != len(parts):
        return Extent.UNKNOWN
    found = min(extents.of(node, axis) for node in nodes)
    # the sum is a fixed share only if all parts have the same share
    if found is Extent.SHARE and not _have_equal_shares(extents, nodes, axis):
        return Extent.UNKNOWN
    return found


def _have_equal_shares(extents: Extents, nodes: Sequence[fx.Node], axis: int) -> bool:
    """Tell whether the same share of an axis survives in all of these tensors, for the example."""
    tensors = [node.meta["val"] for node in nodes]
    sizes = {(old.shape[axis], extents.survivors.shape(old)[axis]) for old in tensors}
    (first_size, first_left), *rest = sizes
    return all(first_size * left == size * first_left for size, left in rest)


def _narrowed(extents: Extents, node: fx.Node, axis: int) -> Extent:
    """Return the extent of an axis of a tensor of which ``dim`` is cut to a range."""
    first, dim = first_operand(node), argument(node, 1, "dim", None)
    if first is None or not isinstance(dim, int):
        return Extent.UNKNOWN
    found = extents.of(first, axis)
    bounds = [argument(node, 2, "start", None), argument(node, 3, "length", None)]
    fixed = found is Extent.FIXED and extents.is_constant(bounds)
    return found if axis != dim % node.meta["val"].dim() or fixed else Extent.UNKNOWN


def _stacked(extents: Extents, node: fx.Node, axis: int) -> Extent:
    """Return the extent of an axis of tensors that are stacked along a new axis ``dim``."""
    parts, dim = argument(node, 0, "tensors", ()), argument(node, 1, "dim", 0)
    if not isinstance(parts, (tuple, list)) or not isinstance(dim, int):
        return Extent.UNKNOWN
    along = dim % node.meta["val"].dim()
    return (
        Extent.FIXED
        if axis == along
        else max(extents.of(part, axis - (axis > along)) for part in parts)
    )


def _expanded(extents: Extents, node: fx.Node, axis: int) -> Extent:
    """Return the extent of an axis that is broadcast to a given size, or is left as it is."""
    first, value = first_operand(node), node.meta["val"]
    if first is None:
        return Extent.UNKNOWN
    old = first.meta["val"]
    old_axis = axis - value.dim() + old.dim()
    if old_axis >= 0 and old.shape[old_axis] == value.shape[axis] > 1:
        return extents.of(first, old_axis)
    given = _sizes_given(node)
    return (
        Extent.FIXED
        if len(given) == value.dim() and given[axis] != -1 and extents.is_constant(given[axis])
        else Extent.UNKNOWN
    )


def _repeated(extents: Extents, node: fx.Node, axis: int) -> Extent:
    """Return the extent of an axis that is repeated a given number of times."""
    first, value = first_operand(node), node.meta["val"]
    given = [*_sizes_given(node)]
    # tile accepts fewer numbers than axes: they count for the last axes
    given = [1] * (value.dim() - len(given)) + given
    if first is None or not extents.is_constant(given[axis]):
        return Extent.UNKNOWN
    old_axis = axis - value.dim() + first.meta["val"].dim()
    return extents.of(first, old_axis) if old_axis >= 0 else Extent.FIXED


def _resampled(extents: Extents, node: fx.Node, axis: int) -> Extent:
    """Return the extent of the batch or channel axis of a resampled image.

    Each channel may become, or be made of, a constant number of channels (a pixel shuffle).
    Nothing is known of the other axes.
    """
    first = first_operand(node)
    return Extent.UNKNOWN if first is None or axis > 1 else extents.of(first, axis)


def _padded(extents: Extents, node: fx.Node, axis: int) -> Extent:
    """Return the extent of an axis of a padded tensor."""
    first, amounts = first_operand(node), argument(node, 1, "pad", None)
    if first is None or not isinstance(amounts, (tuple, list)):
        return Extent.UNKNOWN
    place = 2 * (node.meta["val"].dim() - 1 - axis)
    added, found = list(amounts[place : place + 2]), extents.of(first, axis)
    if not any(isinstance(amount, fx.Node) or amount for amount in added):
        return found
    return found if found is Extent.FIXED and extents.is_constant(added) else Extent.UNKNOWN


def _selected(extents: Extents, node: fx.Node, axis: int) -> Extent:
    """Return the extent of an axis that remains when one position of ``dim`` is selected."""
    first, dim = first_operand(node), argument(node, 1, "dim", None)
    if first is None or not isinstance(dim, int):
        return Extent.UNKNOWN
    return extents.of(first, axis + (axis >= dim % first.meta["val"].dim()))


def _reduced(extents: Extents, node: fx.Node, axis: int) -> Extent:
    """Return the extent of an axis that remains when others are reduced."""
    first, dim = first_operand(node), argument(node, 1, "dim", None)
    if first is None:
        return Extent.UNKNOWN
    rank = first.meta["val"].dim()
    if rank == node.meta["val"].dim():
        return _first(extents, node, axis)
    dims = [dim] if isinstance(dim, int) else dim
    if not isinstance(dims, (tuple, list)) or not all(isinstance(d, int) for d in dims):
        return Extent.UNKNOWN
    reduced = {d % rank for d in dims}
    kept = [d for d in range(rank) if d not in reduced]
    return extents.of(first, kept[axis]) if len(kept) == node.meta["val"].dim() else Extent.UNKNOWN


def _multiplied(extents: Extents, node: fx.Node, axis: int) -> Extent:
    """Return the extent of an axis of a matrix product.

    Rows come from the first operand, columns from the second, and the axes before them broadcast.
    """
    rank = node.meta["val"].dim()
    first, second = [*node.args, *node.kwargs.values(), None, None][:2]
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return Extent.UNKNOWN
    if min(first.meta["val"].dim(), second.meta["val"].dim()) < 2:
        return Extent.UNKNOWN
    if axis >= rank - 2:
        source, place = (first, -2) if axis == rank - 2 else (second, -1)
        return extents.of(source, place + source.meta["val"].dim())
    return of_operands(extents, node, axis)


def _attended(extents: Extents, node: fx.Node, axis: int) -> Extent:
    """Return the extent of an axis of attention: the last is the value's, others the query's."""
    query, value = argument(node, 0, "query", None), argument(node, 2, "value", None)
    source = value if axis == node.meta["val"].dim() - 1 else query
    return extents.of(source, axis) if isinstance(source, fx.Node) else Extent.UNKNOWN


def _sizes_given(node: fx.Node) -> Sequence[Any]:
    """Return the sizes that a call of ``view``, ``expand``, ``repeat`` or a similar op is given.

    Other calls have none. There may be fewer entries than axes, and entries may be nodes.
    """
    if row_or_empty(name_of(node)).axes not in (Axes.RESHAPED, Axes.EXPANDED, Axes.REPEATED):
        return ()
    names = [name for name in ("size", "shape", "repeats", "dims") if name in node.kwargs]
    given = node.kwargs[names[0]] if names else node.args[1:]
    return given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given


def first_operand(node: fx.Node) -> fx.Node | None:
    """Return the first argument of a call, or ``input=``, if it is a node."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, fx.Node) else None


def argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    """Return the argument of a call at position ``place``, or else under ``name``."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _permutation(root: nn.Module, node: fx.Node, rank: int) -> Sequence[int] | None:
    """Return, for each axis of the result, the axis of the operand that it is.

    The op is run on a meta tensor whose axis ``d`` has size ``d``: the sizes of the result tell
    where each axis went. None if the node has several operands.
    """
    if len(node.all_input_nodes) != 1:
        return None
    probe = torch.empty(tuple(range(rank)), device=META)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: probe)
    return list(execute(root, node, args, kwargs).shape)


def _convolved(extents: Extents, node: fx.Node, axis: int) -> Extent:
    """Return the extent of an axis of a convolution's result.

    The weight fixes the number of channels. The axes before the channels are those of the input,
    and nothing is known of the spatial axes after them.
    """
    channel = extents.channel_of(node)
    if axis == channel:
        return Extent.FIXED
    return _first(extents, node, axis) if axis < channel else Extent.UNKNOWN


def _pooled(extents: Extents, node: fx.Node, axis: int) -> Extent:
    """Return the extent of an axis of a pooled tensor: only spatial axes change."""
    before = node.meta["val"].dim() - extents.positions_of(node)
    return _first(extents, node, axis) if axis < before else Extent.UNKNOWN


def _of_layer(extents: Extents, node: fx.Node, axis: int) -> Extent:
    """Return the extent of an axis of a linear layer or embedding: the weight fixes the last."""
    last = node.meta["val"].dim() - 1
    return Extent.FIXED if axis == last else _first(extents, node, axis)


# the rule of each kind of op; Axes.CUT has several results and is handled in Extents
RULES: dict[Axes, Callable[[Extents, fx.Node, int], Extent]] = {
    Axes.SAME: _first,
    Axes.RESHAPED: _reshaped,
    Axes.PERMUTED: _permuted,
    Axes.REDUCED: _reduced,
    Axes.SELECTED: _selected,
    Axes.NARROWED: _narrowed,
    Axes.PADDED: _padded,
    Axes.EXPANDED: _expanded,
    Axes.REPEATED: _repeated,
    Axes.JOINED: _joined,
    Axes.STACKED: _stacked,
    Axes.MULTIPLIED: _multiplied,
    Axes.ATTENDED: _attended,
    Axes.LAYER: _of_layer,
    Axes.CONVOLVED: _convolved,
    Axes.POOLED: _pooled,
    Axes.RESAMPLED: _resampled,
}
