"""How the size of an axis in the smaller model follows from its size in the original, for inputs
of any size.

The labelled run knows both sizes for the example. For other inputs they follow only where the
structure says so: a layer's width is a constant, a width laid out with a resolution is always the
same share of the original's. What is not known here is ``UNKNOWN``, and whoever asks has to hold
the graph to the example's size.
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
from fxprune.ops import Axes, Kind, Op, Trait, bind, find, has, known, name_of_op, own_row
from fxprune.ops.dims import split_dim
from fxprune.ops.shapes.common import spatial_rank
from fxprune.rewrite.axes import RULES, Extent, argument, first_operand, of_operands
from fxprune.rewrite.survivors import Survivors
from fxprune.trace.aliasing import name_of, squeezes_all

__all__ = ["Extent", "Extents", "axes_read"]

Ran: TypeAlias = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""An op that ran, with its arguments."""


class Extents:
    """Answers for the nodes of a traced graph.

    Parameters
    ----------
    survivors:
        What is left of each tensor for the example.
    root:
        The module of the traced graph.
    ran:
        Gives the ops that a node ran.
    """

    def __init__(
        self, survivors: Survivors, root: nn.Module, ran: Callable[[fx.Node], Sequence[Ran]]
    ) -> None:
        self.survivors, self.root, self.ran = survivors, root, ran
        self._known: dict[tuple[fx.Node, int], Extent] = {}

    def of(self, node: fx.Node, axis: int) -> Extent:
        """What is known of one axis of a tensor; ``axis`` is not negative."""
        key = node, axis
        if key not in self._known:
            self._known[key] = Extent.UNKNOWN  # while it is looked for
            found = self._find(node, axis) or self._carried(node, axis)
            value = node.meta["val"]
            if found is Extent.UNKNOWN and self.survivors.shape(value)[axis] == value.shape[axis]:
                found = Extent.SHARE  # all of it
            self._known[key] = found
        return self._known[key]

    def known(self, node: fx.Node, axis: int) -> bool:
        """Whether anything is known of an axis."""
        return self.of(node, axis) is not Extent.UNKNOWN

    def fixed(self, node: fx.Node, axis: int) -> bool:
        """Whether an axis is the same for every input."""
        return self.of(node, axis) is Extent.FIXED

    def counted(self, held: Any) -> tuple[fx.Node, int] | None:
        """The tensor and the axis that are cut, where ``held`` says how many parts that gives;
        None for anything else.
        """
        if (
            not isinstance(held, fx.Node)
            or held.target is not operator.eq
            or not isinstance(held.args[0], fx.Node)
        ):
            return None
        count = held.args[0]
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

    def constant(self, number: Any) -> bool:
        """Whether a number is the same for every input."""
        if not isinstance(number, fx.Node):
            return not isinstance(number, (tuple, list)) or all(map(self.constant, number))
        read = axes_read(number)
        if read is not None:
            return all(self.fixed(read[0], axis) for axis in read[1])
        inputs = number.all_input_nodes
        return bool(inputs) and all(
            not holds_tensors(n.meta["val"]) and self.constant(n) for n in inputs
        )

    def _find(self, node: fx.Node, axis: int) -> Extent:
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
        """How the axes of a call's result follow from those of its operands: as the op of its name
        says, or the one that it runs, if no argument matters.
        """
        if node.op != "call_module" and (named := known(name_of(node)).axes) in RULES:
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
        """The axis of the channels that a convolution gives."""
        func, args, kwargs = self.ran(node)[-1]
        positions: int = bind(func, args, kwargs)["weight"].dim() - 2
        return int(node.meta["val"].dim()) - positions - 1

    def positions_of(self, node: fx.Node) -> int:
        """How many axes of positions a pooling goes over."""
        return spatial_rank(self.ran(node)[-1][0])

    def _carried(self, node: fx.Node, axis: int) -> Extent:
        """An axis that holds, one by one, the units of an operand's axis, or of a parameter's: it
        is that axis.

        Where numbers of the graph are among the arguments, it may be the part of it that is all
        for the example. Where an axis of size 1 may be larger for another input, the two may be
        laid out as one.
        """
        row, operands = self._units(node.meta["val"], axis), node.all_input_nodes
        if (
            row is None
            or squeezes_all(node)
            or not all(isinstance(operand.meta["val"], Tensor) for operand in operands)
        ):
            return Extent.UNKNOWN
        if not all(self.nothing_hidden(operand, operand.meta["val"]) for operand in operands):
            return Extent.UNKNOWN
        if node.op == "call_module":
            own = self.root.get_submodule(str(node.target)).parameters()
            if any(self._is_row(row, tensor, d) for tensor in own for d in range(tensor.dim())):
                return Extent.FIXED
        axes = ((operand, d) for operand in operands for d in range(operand.meta["val"].dim()))
        found = (self.of(own, d) for own, d in axes if self._is_row(row, own.meta["val"], d))
        return max(found, default=Extent.UNKNOWN)

    def _is_row(self, row: Array, tensor: Tensor, axis: int) -> bool:
        return tensor.shape[axis] == len(row) and np.array_equal(self._units(tensor, axis), row)

    def _units(self, tensor: Any, axis: int) -> Array | None:
        """The units along an axis, where each position is one of its own."""
        rows = (
            own.reshape(-1)
            for own, dim, _ in self.survivors.fields(tensor)
            if dim == axis and own.size == own.shape[axis]
        )
        return next((row for row in rows if row.all() and len(np.unique(row)) == len(row)), None)

    def _of_part(self, source: fx.Node, value: Tensor, axis: int) -> Extent:
        """An axis of one of several results: of ``split`` and its kind."""
        name, first = name_of(source), first_operand(source)
        if known(name).axes is not Axes.CUT or first is None:
            return Extent.UNKNOWN
        dim = argument(source, 2, "dim", 0)
        if first.meta["val"].dim() != value.dim() or not isinstance(dim, int):
            return Extent.UNKNOWN
        found = self.of(first, axis)
        along = axis == _cut_dim(name, first, dim)
        return found if not along or found is Extent.FIXED else Extent.UNKNOWN

    def nothing_hidden(self, node: fx.Node, value: Tensor) -> bool:
        return all(size > 1 or self.fixed(node, d) for d, size in enumerate(value.shape))

    def even(self, tensor: Tensor, axis: int) -> bool:
        """Whether every position of an axis may go, and each unit lies on as many: what is left is
        one share of all.
        """
        labels = [own for own, dim, _ in self.survivors.fields(tensor) if dim == axis]
        for own in labels:
            rows = own.swapaxes(axis, -1).reshape(-1, own.shape[axis])
            if (rows == 0).any():
                return False
            for row in rows:
                _, counts = np.unique(row, return_counts=True)
                if (counts != counts[0]).any():
                    return False
        return True

    def _indexed(self, node: fx.Node, axis: int) -> Extent:
        """``x[0]``, ``x[:, None]``: the axes that are taken whole."""
        first, index = node.args[0], node.args[1]
        if not isinstance(first, fx.Node) or not isinstance(first.meta["val"], Tensor):
            return Extent.UNKNOWN
        parts = list(index) if isinstance(index, (tuple, list)) else [index]
        known = all(
            p is None
            or p is Ellipsis
            or type(p) is int
            or (isinstance(p, slice) and self._constant_slice(p))
            for p in parts
        )
        if not known:
            return Extent.UNKNOWN
        rank = first.meta["val"].dim()
        used = sum(1 for p in parts if p is not None and p is not Ellipsis)
        if Ellipsis not in parts:
            parts.append(Ellipsis)
        dims: list[int | None] = []  # for each axis of the result the one that it is, or a part of
        parted = set()
        own = 0
        for part in parts:
            if part is None:
                dims.append(None)
            elif part is Ellipsis:
                dims += range(own, own + rank - used)
                own += rank - used
            else:
                if isinstance(part, slice):
                    parted |= {own} - ({own} if part == slice(None) else set())
                    dims.append(own)
                own += 1
        source = dims[axis]
        if source is None:
            return Extent.UNKNOWN
        found = self.of(first, source)
        return found if source not in parted or found is Extent.FIXED else Extent.UNKNOWN

    def _constant_slice(self, part: slice) -> bool:
        return all(
            bound is None or self.constant(bound) for bound in (part.start, part.stop, part.step)
        )


_OF_FUNCTIONS = frozenset({Axes.SAME, Axes.PERMUTED, Axes.POOLED, Axes.RESAMPLED})
"""What follows whatever the arguments of a function are called."""
_OF_MODULES = _OF_FUNCTIONS | {Axes.LAYER, Axes.CONVOLVED, Axes.RESHAPED}


def _row_of(ran: Ran) -> Op | None:
    return own_row(ran[0]) or find(ran[0])


def _keeps_axes(ran: Ran) -> bool:
    """Whether an op computes element by element, broadcast included, or takes statistics."""
    own = _row_of(ran)
    if own is None or own.macs is not None:
        return False
    grows = has(name_of_op(ran[0]), Trait.GROWS)
    return own.kind in (Kind.COMPUTES, Kind.CREATES) or own.axes is Axes.SAME or grows


def _cut_dim(name: str, tensor: fx.Node, dim: int) -> int:
    return split_dim(name, {"self": tensor.meta["val"], "dim": dim})


def axes_read(number: fx.Node) -> tuple[fx.Node, Sequence[int]] | None:
    """The tensor of which a number is a size, or a product of sizes, and the axes; None for any
    other number.
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
