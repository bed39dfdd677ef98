"""How the size of an axis in the smaller model follows from the original's, for any input size.

The labelled run knows both sizes for the example only. For other inputs they follow from the
structure of the graph: the width of a layer is a constant, and a width that is flattened with a
resolution is always the same share of the original's. Where nothing follows, the extent is
``UNKNOWN``, and the caller has to hold the graph to the example's size.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.common.dispatch import holds_tensors
from fxprune.labels import Array
from fxprune.ops import (
    Axes,
    Kind,
    Op,
    Trait,
    bind,
    exact_row,
    find_row,
    has_trait,
    name_of_op,
    row_or_empty,
)
from fxprune.ops.dims import split_dim
from fxprune.ops.shapes.common import spatial_rank
from fxprune.rewrite.axes import RULES, Extent, argument, first_operand, of_operands
from fxprune.rewrite.survivors import Survivors
from fxprune.trace.aliasing import name_of, squeezes_all

__all__ = ["Extent", "Extents", "axes_read"]

Ran: TypeAlias = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""An op that ran, with its arguments."""


class Extents:
    """What is known of the axes of a traced graph's tensors.

    Parameters
    ----------
    survivors:
        What survives of each tensor, for the example.
    root:
        The module of the traced graph.
    ran:
        Returns the ops that a node ran, with their arguments.
    """

    def __init__(
        self, survivors: Survivors, root: nn.Module, ran: Callable[[fx.Node], Sequence[Ran]]
    ) -> None:
        self.survivors, self.root, self.ran = survivors, root, ran
        self._known: dict[tuple[fx.Node, int], Extent] = {}

    def of(self, node: fx.Node, axis: int) -> Extent:
        """Return what is known of one axis of a node's tensor; ``axis`` is not negative."""
        key = node, axis
        if key not in self._known:
            self._known[key] = Extent.UNKNOWN  # ends a recursion that comes back to this axis
            found = self._find(node, axis) or self._carried(node, axis)
            value = node.meta["val"]
            if found is Extent.UNKNOWN and self.survivors.shape(value)[axis] == value.shape[axis]:
                found = Extent.SHARE  # the share is 1
            self._known[key] = found
        return self._known[key]

    def is_known(self, node: fx.Node, axis: int) -> bool:
        """Tell whether anything is known of an axis."""
        return self.of(node, axis) is not Extent.UNKNOWN

    def is_fixed(self, node: fx.Node, axis: int) -> bool:
        """Tell whether an axis has the same size for every input."""
        return self.of(node, axis) is Extent.FIXED

    def cut_axis(self, condition: Any) -> tuple[fx.Node, int] | None:
        """Return the tensor and the axis that are cut, if a condition compares the part count.

        Parameters
        ----------
        condition:
            The condition of an assertion, such as ``len(x.chunk(3)) == 3``.

        Returns
        -------
        ``(x, 0)`` for this example; None for any other condition.
        """
        if (
            not isinstance(condition, fx.Node)
            or condition.target is not operator.eq
            or not isinstance(condition.args[0], fx.Node)
        ):
            return None
        count = condition.args[0]
        source = count.args[0] if count.target is len else None
        first = (
            first_operand(source)
            if isinstance(source, fx.Node) and not isinstance(source.meta["val"], Tensor)
            else None
        )
        if first is None or not isinstance(first.meta["val"], Tensor):
            return None
        name = name_of(cast(fx.Node, source))
        dim = argument(cast(fx.Node, source), 1 if name == "unbind" else 2, "dim", 0)
        return (first, _cut_dim(name, first, dim)) if isinstance(dim, int) else None

    def is_constant(self, number: Any) -> bool:
        """Tell whether a number, or each number of a list, is the same for every input."""
        if not isinstance(number, fx.Node):
            return not isinstance(number, (tuple, list)) or all(map(self.is_constant, number))
        read = axes_read(number)
        if read is not None:
            return all(self.is_fixed(read[0], axis) for axis in read[1])
        inputs = number.all_input_nodes
        if not inputs or any(holds_tensors(n.meta["val"]) for n in inputs):
            return False
        return all(map(self.is_constant, inputs))

    def _find(self, node: fx.Node, axis: int) -> Extent:
        """Derive the extent of an axis from the op that the node calls."""
        if node.op == "get_attr":
            return Extent.FIXED
        value = node.meta["val"]
        if node.op == "placeholder" or not isinstance(value, Tensor):
            return Extent.UNKNOWN
        if node.target is operator.getitem:
            source = node.args[0]
            part = not isinstance(source.meta["val"], Tensor)
            return self._of_part(source, value, axis) if part else self._indexed(node, axis)
        first = first_operand(node)
        if first is not None and first.meta["val"] is value:
            return self.of(first, axis)
        axes = self._axes(node)
        if axes is not None:
            return RULES[axes](self, node, axis)
        ran = self.ran(node)
        pointwise = len(ran) == 1 and torch.Tag.pointwise in ran[0][0].tags
        return of_operands(self, node, axis) if pointwise else Extent.UNKNOWN

    def _axes(self, node: fx.Node) -> Axes | None:
        """Return how the axes of a call's result follow from those of its operands.

        The op of the call's name decides. If there is none, the op that ran decides, provided that
        the answer does not depend on the names of the call's arguments. None if unknown.
        """
        if node.op != "call_module" and (named := row_or_empty(name_of(node)).axes) in RULES:
            return named
        ran = self.ran(node)
        allowed = _OF_MODULES if node.op == "call_module" else _OF_FUNCTIONS
        last = _row_of(ran[-1]) if ran else None
        if last is None:
            return None
        if len(ran) == 1 or last.axes in (Axes.LAYER, Axes.CONVOLVED):
            return last.axes if last.axes in allowed else None
        return Axes.SAME if all(map(_keeps_axes, ran)) else None

    def channel_of(self, node: fx.Node) -> int:
        """Return the channel axis of a convolution's result."""
        func, args, kwargs = self.ran(node)[-1]
        positions: int = bind(func, args, kwargs)["weight"].dim() - 2
        return int(node.meta["val"].dim()) - positions - 1

    def positions_of(self, node: fx.Node) -> int:
        """Return the number of spatial axes of a pooling."""
        return spatial_rank(self.ran(node)[-1][0])

    def _carried(self, node: fx.Node, axis: int) -> Extent:
        """Derive the extent of an axis from its labels, whatever op the node calls.

        An axis that holds the same units in the same order as an axis of an operand or parameter
        is that axis.

        There are two exceptions, for which nothing is known. If the arguments contain numbers that
        the graph computes, the axis may be a slice that is the whole axis for the example only. If
        an axis has size 1 but may be larger for another input, it may be flattened with this one.
        """
        row, operands = self._units(node.meta["val"], axis), node.all_input_nodes
        if (
            row is None
            or squeezes_all(node)
            or not all(isinstance(operand.meta["val"], Tensor) for operand in operands)
        ):
            return Extent.UNKNOWN
        if not all(self.has_no_hidden_axis(operand, operand.meta["val"]) for operand in operands):
            return Extent.UNKNOWN
        if node.op == "call_module":
            weights = self.root.get_submodule(str(node.target)).parameters()
            if any(self._is_row(row, w, d) for w in weights for d in range(w.dim())):
                return Extent.FIXED
        axes = ((operand, d) for operand in operands for d in range(operand.meta["val"].dim()))
        same = (self.of(n, d) for n, d in axes if self._is_row(row, n.meta["val"], d))
        return max(same, default=Extent.UNKNOWN)

    def _is_row(self, row: Array, tensor: Tensor, axis: int) -> bool:
        """Tell whether an axis of a tensor holds these units, one at each position, in order."""
        return tensor.shape[axis] == len(row) and np.array_equal(self._units(tensor, axis), row)

    def _units(self, tensor: Any, axis: int) -> Array | None:
        """Return the units along an axis, shape (size,), if each position is a unit of its own."""
        for labels, dim, _ in self.survivors.fields(tensor):
            if dim == axis and labels.size == labels.shape[axis]:
                row = labels.reshape(-1)
                if row.all() and len(np.unique(row)) == len(row):
                    return row
        return None

    def _of_part(self, source: fx.Node, value: Tensor, axis: int) -> Extent:
        """Return the extent of an axis of one piece that ``split`` or a similar op gives.

        ``source`` is the node of the op, ``value`` the piece.
        """
        name, first = name_of(source), first_operand(source)
        if row_or_empty(name).axes is not Axes.CUT or first is None:
            return Extent.UNKNOWN
        dim = argument(source, 2, "dim", 0)
        if first.meta["val"].dim() != value.dim() or not isinstance(dim, int):
            return Extent.UNKNOWN
        found = self.of(first, axis)
        along = axis == _cut_dim(name, first, dim)
        return found if not along or found is Extent.FIXED else Extent.UNKNOWN

    def has_no_hidden_axis(self, node: fx.Node, value: Tensor) -> bool:
        """Tell whether no axis of size 1 can have another size for another input."""
        return all(size > 1 or self.is_fixed(node, d) for d, size in enumerate(value.shape))

    def has_equal_shares(self, tensor: Tensor, axis: int) -> bool:
        """Tell whether the survivors of an axis are always the same share of its positions.

        They are if each position belongs to a unit, and all units lie on equally many positions.
        """
        for labels, dim, _ in self.survivors.fields(tensor):
            if dim != axis:
                continue
            rows = labels.swapaxes(axis, -1).reshape(-1, labels.shape[axis])
            if (rows == 0).any():
                return False
            for row in rows:
                _, counts = np.unique(row, return_counts=True)
                if (counts != counts[0]).any():
                    return False
        return True

    def _indexed(self, node: fx.Node, axis: int) -> Extent:
        """Return the extent of an axis of an indexed tensor, such as ``x[0]`` or ``x[:, None]``.

        An axis that is taken whole keeps its extent. A constant slice keeps a fixed one.
        """
        first, index = node.args[0], node.args[1]
        if not isinstance(first, fx.Node) or not isinstance(first.meta["val"], Tensor):
            return Extent.UNKNOWN
        parts = list(index) if isinstance(index, (tuple, list)) else [index]
        if not all(map(self._is_constant_index, parts)):
            return Extent.UNKNOWN
        source, is_cut = _indexed_axes(parts, first.meta["val"].dim())[axis]
        if source is None:
            return Extent.UNKNOWN
        found = self.of(first, source)
        return found if not is_cut or found is Extent.FIXED else Extent.UNKNOWN

    def _is_constant_index(self, part: Any) -> bool:
        """Tell whether an entry of an index is the same for every input, and no tensor."""
        if isinstance(part, slice):
            bounds = (part.start, part.stop, part.step)
            return all(bound is None or self.is_constant(bound) for bound in bounds)
        return part is None or part is Ellipsis or type(part) is int


def _indexed_axes(parts: Sequence[Any], rank: int) -> list[tuple[int | None, bool]]:
    """Return the axis of a tensor that each axis of ``x[parts]`` is, and whether a slice cuts it.

    The axis is None for a new one.

    >>> _indexed_axes([0, None, slice(3)], rank=3)
    [(None, False), (1, True), (2, False)]
    """
    used = sum(1 for part in parts if part is not None and part is not Ellipsis)
    whole = parts if Ellipsis in parts else [*parts, Ellipsis]
    axes: list[tuple[int | None, bool]] = []
    axis = 0
    for part in whole:
        if part is None:
            axes.append((None, False))
        elif part is Ellipsis:
            axes += [(d, False) for d in range(axis, axis + rank - used)]
            axis += rank - used
        else:
            if isinstance(part, slice):
                axes.append((axis, part != slice(None)))
            axis += 1
    return axes


_OF_FUNCTIONS = frozenset({Axes.SAME, Axes.PERMUTED, Axes.POOLED, Axes.RESAMPLED})
"""Rules that need no argument of a function by its name."""
_OF_MODULES = _OF_FUNCTIONS | {Axes.LAYER, Axes.CONVOLVED, Axes.RESHAPED}


def _row_of(ran: Ran) -> Op | None:
    """Return the row of the table of ops for an op that ran."""
    return exact_row(ran[0]) or find_row(ran[0])


def _keeps_axes(ran: Ran) -> bool:
    """Tell whether an op leaves axes as they are: elementwise ops, broadcasts, statistics."""
    op = _row_of(ran)
    if op is None or op.macs is not None:
        return False
    grows = has_trait(name_of_op(ran[0]), Trait.GROWS)
    return op.kind in (Kind.COMPUTES, Kind.CREATES) or op.axes is Axes.SAME or grows


def _cut_dim(name: str, tensor: fx.Node, dim: int) -> int:
    """Return the axis along which ``split`` or a similar op cuts a tensor."""
    return split_dim(name, {"self": tensor.meta["val"], "dim": dim})


def axes_read(number: fx.Node) -> tuple[fx.Node, Sequence[int]] | None:
    """Return the tensor and the axes whose sizes a number is: one size, or a product of sizes.

    None for any other number.

    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> x.meta["val"] = torch.zeros(2, 3)
    >>> axes_read(graph.call_method("size", (x, -1)))
    (x, [1])
    """
    if number.op not in ("call_function", "call_method") or not number.args:
        return None
    tensor, name = number.args[0], name_of(number)
    if not isinstance(tensor, fx.Node) or not isinstance(tensor.meta["val"], Tensor):
        return None
    rank = tensor.meta["val"].dim()
    if name == "getattr":
        name = str(number.args[1])
    if name == "size":
        dim = argument(number, 1, "dim", None)
        return (tensor, [dim % rank]) if type(dim) is int else None
    if name in ("len", "__len__"):
        return tensor, [0]
    return (tensor, range(rank)) if name in ("numel", "nelement", "nbytes") else None
