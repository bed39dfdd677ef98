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
from enum import IntEnum
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from fxprune.labels import Array
from fxprune.memory import name_of, squeezes_all
from fxprune.rewrite.survivors import Survivors
from fxprune.shapes import META, holds_tensors, reshape_blocks
from fxprune.trace import execute

__all__ = ["Extent", "Extents", "axes_read"]


class Extent(IntEnum):
    """What is known of an axis: nothing; that it is a fixed share of the original's; that it is
    the same for every input.
    """

    UNKNOWN = 0
    SHARE = 1
    FIXED = 2


class Extents:
    """Answers for the nodes of a traced graph.

    Parameters
    ----------
    survivors:
        What is left of each tensor for the example.
    root:
        The module of the traced graph.
    """

    def __init__(self, survivors: Survivors, root: nn.Module) -> None:
        self.survivors, self.root = survivors, root
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
            _first_operand(source)
            if isinstance(source, fx.Node) and not isinstance(source.meta["val"], Tensor)
            else None
        )
        if first is None or not isinstance(first.meta["val"], Tensor):
            return None
        name, rank = name_of(cast(fx.Node, source)), first.meta["val"].dim()
        dim = _argument(
            cast(fx.Node, source), 1 if name == "unbind" else 2, "dim", _CUT.get(name, 0)
        )
        return (first, dim % rank) if isinstance(dim, int) else None

    def constant(self, number: Any) -> bool:
        """Whether a number is the same for every input."""
        if not isinstance(number, fx.Node):
            return not isinstance(number, (tuple, list)) or all(map(self.constant, number))
        read = axes_read(number)
        if read is not None:
            return all(self.of(read[0], axis) is Extent.FIXED for axis in read[1])
        inputs = number.all_input_nodes
        return bool(inputs) and all(
            not holds_tensors(n.meta["val"]) and self.constant(n) for n in inputs
        )

    def _find(self, node: fx.Node, axis: int) -> Extent:
        if node.op == "get_attr":
            return Extent.FIXED
        value, name = node.meta["val"], self._name(node)
        if node.op == "placeholder" or not isinstance(value, Tensor):
            return Extent.UNKNOWN
        if node.target is operator.getitem and not isinstance(node.args[0].meta["val"], Tensor):
            return self._of_part(node.args[0], value, axis)
        width = self._width(node, name)
        if width is not None and axis == width:
            return Extent.FIXED
        rule = _RULES.get(name)
        if rule is not None:
            return rule(self, node, axis)
        # convolutions, poolings: what lies before what they slide over
        if width is not None or name[-2:] in ("1d", "2d", "3d"):
            space = int(name[-2]) if name[-2:] in ("1d", "2d", "3d") else 1
            return (
                self._of(node, value, axis)
                if axis < value.dim() - space - (width is not None)
                else Extent.UNKNOWN
            )
        return self._of_operands(node, axis) if _is_pointwise(name) else Extent.UNKNOWN

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
        if not all(self._nothing_hidden(operand, operand.meta["val"]) for operand in operands):
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

    def _name(self, node: fx.Node) -> str:
        name = str(node.args[1]) if node.target is getattr else name_of(node, self.root)
        if node.op == "call_module" and isinstance(
            self.root.get_submodule(str(node.target)), _ConvNd
        ):
            return name.removeprefix("lazy").replace("transpose", "")
        return _ALIASES.get(name, name)

    def _width(self, node: fx.Node, name: str) -> int | None:
        """The axis whose size a layer's weight gives."""
        if name in ("linear", "embedding"):
            return node.meta["val"].dim() - 1
        if name.startswith("conv") and name[-2:] in ("1d", "2d", "3d"):
            return node.meta["val"].dim() - int(name[-2]) - 1
        return None

    def _of(self, node: fx.Node, value: Tensor, axis: int) -> Extent:
        """The same axis of the first operand, where that has it, at the same size."""
        first = _first_operand(node)
        old = None if first is None else first.meta["val"]
        if (
            not isinstance(old, Tensor)
            or old.dim() != value.dim()
            or old.shape[axis] != value.shape[axis]
        ):
            return Extent.UNKNOWN
        return self.of(first, axis)

    def _of_operands(self, node: fx.Node, axis: int) -> Extent:
        """An axis of what is computed element by element: that of any operand that has it."""
        rank, best = node.meta["val"].dim(), Extent.UNKNOWN
        # a branch, before the stream that it is added to
        for operand in reversed(node.all_input_nodes):
            value = operand.meta["val"]
            own = axis - rank + value.dim() if isinstance(value, Tensor) else -1
            if own >= 0 and value.shape[own] > 1:
                best = max(best, self.of(operand, own))
                if best is Extent.FIXED:
                    break
        return best

    def _of_part(self, source: fx.Node, value: Tensor, axis: int) -> Extent:
        """An axis of one of several results: of ``split`` and its kind."""
        if name_of(source) not in (
            "split",
            "chunk",
            "unsafe_chunk",
            "unsafe_split",
            "split_with_sizes",
            "tensor_split",
        ):
            return Extent.UNKNOWN
        first = _first_operand(source)
        if first is None or first.meta["val"].dim() != value.dim():
            return Extent.UNKNOWN
        found = self.of(first, axis)
        dim = _argument(source, 2, "dim", 0)
        along = isinstance(dim, int) and axis == dim % value.dim()
        return found if not along or found is Extent.FIXED else Extent.UNKNOWN

    def _same(self, node: fx.Node, axis: int) -> Extent:
        return self._of(node, node.meta["val"], axis)

    def _reshaped(self, node: fx.Node, axis: int) -> Extent:
        """An axis of what is laid out anew: the product, or a factor, of the axes that it came
        from.
        """
        first, value = _first_operand(node), node.meta["val"]
        if squeezes_all(node):
            return Extent.UNKNOWN  # which axes are left depends on the batch
        given = _sizes_given(node)
        if len(given) == value.dim() and given[axis] != -1 and self.constant(given[axis]):
            return Extent.FIXED
        if first is None or not isinstance(first.meta["val"], Tensor):
            return Extent.UNKNOWN
        old = first.meta["val"]
        for before, after in reshape_blocks(old.shape, value.shape):
            if axis in after:
                sources = [self.of(first, d) for d in before]
                if Extent.UNKNOWN in sources:
                    return Extent.UNKNOWN
                if len(after) == 1:
                    # Axes of size 1 for the example, which may be larger for another one, go with
                    # those beside them.
                    fixed = all(s is Extent.FIXED for s in sources) and self._nothing_hidden(
                        first, old
                    )
                    return Extent.FIXED if fixed else Extent.SHARE
                return Extent.SHARE if self.even(value, axis) else Extent.UNKNOWN
        return Extent.UNKNOWN

    def _nothing_hidden(self, node: fx.Node, value: Tensor) -> bool:
        return all(
            size > 1 or self.of(node, d) is Extent.FIXED for d, size in enumerate(value.shape)
        )

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

    def _permuted(self, node: fx.Node, axis: int) -> Extent:
        first = _first_operand(node)
        dims = _permutation(self.root, node, node.meta["val"].dim())
        return Extent.UNKNOWN if first is None or dims is None else self.of(first, dims[axis])

    def _joined(self, node: fx.Node, axis: int) -> Extent:
        parts = _argument(node, 0, "tensors", ())
        dim = _argument(node, 1, "dim", 0)
        if not isinstance(parts, (tuple, list)) or not isinstance(dim, int):
            return Extent.UNKNOWN
        value = node.meta["val"]
        whole = [p for p in parts if isinstance(p, fx.Node) and p.meta["val"].dim() == value.dim()]
        if axis != dim % value.dim():
            return max((self.of(p, axis) for p in whole), default=Extent.UNKNOWN)
        if len(whole) != len(parts):
            return Extent.UNKNOWN
        found = min(self.of(p, axis) for p in whole)
        if found is Extent.SHARE:  # shares of the parts are one of the whole where they are equal
            sizes = {
                (p.meta["val"].shape[axis], self.survivors.shape(p.meta["val"])[axis])
                for p in whole
            }
            first, *rest = sizes
            return (
                found
                if all(first[0] * left == size * first[1] for size, left in rest)
                else Extent.UNKNOWN
            )
        return found

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

    def _narrowed(self, node: fx.Node, axis: int) -> Extent:
        first, dim = _first_operand(node), _argument(node, 1, "dim", None)
        if first is None or not isinstance(dim, int):
            return Extent.UNKNOWN
        found = self.of(first, axis)
        bounds = [_argument(node, 2, "start", None), _argument(node, 3, "length", None)]
        fixed = found is Extent.FIXED and self.constant(bounds)
        return found if axis != dim % node.meta["val"].dim() or fixed else Extent.UNKNOWN

    def _stacked(self, node: fx.Node, axis: int) -> Extent:
        parts, dim = _argument(node, 0, "tensors", ()), _argument(node, 1, "dim", 0)
        if not isinstance(parts, (tuple, list)) or not isinstance(dim, int):
            return Extent.UNKNOWN
        along = dim % node.meta["val"].dim()
        return (
            Extent.FIXED
            if axis == along
            else max(self.of(part, axis - (axis > along)) for part in parts)
        )

    def _expanded(self, node: fx.Node, axis: int) -> Extent:
        """An axis that was there, or one of a given size."""
        first, value = _first_operand(node), node.meta["val"]
        if first is None:
            return Extent.UNKNOWN
        old = first.meta["val"]
        own = axis - value.dim() + old.dim()
        if own >= 0 and old.shape[own] == value.shape[axis] > 1:
            return self.of(first, own)
        given = _sizes_given(node)
        return (
            Extent.FIXED
            if len(given) == value.dim() and given[axis] != -1 and self.constant(given[axis])
            else Extent.UNKNOWN
        )

    def _repeated(self, node: fx.Node, axis: int) -> Extent:
        first, value = _first_operand(node), node.meta["val"]
        given = [*_sizes_given(node)]
        # what tile is told may be the last ones alone
        given = [1] * (value.dim() - len(given)) + given
        if first is None or not self.constant(given[axis]):
            return Extent.UNKNOWN
        own = axis - value.dim() + first.meta["val"].dim()
        return self.of(first, own) if own >= 0 else Extent.FIXED

    def _before_space(self, node: fx.Node, axis: int) -> Extent:
        """The batch, or the channels of an image, of which each may make, or be made of, a
        constant number.
        """
        first = _first_operand(node)
        return Extent.UNKNOWN if first is None or axis > 1 else self.of(first, axis)

    def _padded(self, node: fx.Node, axis: int) -> Extent:
        first, amounts = _first_operand(node), _argument(node, 1, "pad", None)
        if first is None or not isinstance(amounts, (tuple, list)):
            return Extent.UNKNOWN
        place = 2 * (node.meta["val"].dim() - 1 - axis)
        own, found = list(amounts[place : place + 2]), self.of(first, axis)
        if not any(isinstance(amount, fx.Node) or amount for amount in own):
            return found
        return found if found is Extent.FIXED and self.constant(own) else Extent.UNKNOWN

    def _selected(self, node: fx.Node, axis: int) -> Extent:
        first, dim = _first_operand(node), _argument(node, 1, "dim", None)
        if first is None or not isinstance(dim, int):
            return Extent.UNKNOWN
        return self.of(first, axis + (axis >= dim % first.meta["val"].dim()))

    def _reduced(self, node: fx.Node, axis: int) -> Extent:
        first, dim = _first_operand(node), _argument(node, 1, "dim", None)
        if first is None:
            return Extent.UNKNOWN
        rank = first.meta["val"].dim()
        if rank == node.meta["val"].dim():
            return self._same(node, axis)
        dims = [dim] if isinstance(dim, int) else dim
        if not isinstance(dims, (tuple, list)) or not all(isinstance(d, int) for d in dims):
            return Extent.UNKNOWN
        gone = {d % rank for d in dims}
        left = [d for d in range(rank) if d not in gone]
        return (
            self.of(first, left[axis]) if len(left) == node.meta["val"].dim() else Extent.UNKNOWN
        )

    def _multiplied(self, node: fx.Node, axis: int) -> Extent:
        rank = node.meta["val"].dim()
        first, second = [*node.args, *node.kwargs.values(), None, None][:2]
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
            return Extent.UNKNOWN
        if min(first.meta["val"].dim(), second.meta["val"].dim()) < 2:
            return Extent.UNKNOWN
        if axis >= rank - 2:
            source, own = (first, -2) if axis == rank - 2 else (second, -1)
            return self.of(source, own + source.meta["val"].dim())
        return self._of_operands(node, axis)

    def _attended(self, node: fx.Node, axis: int) -> Extent:
        query, value = _argument(node, 0, "query", None), _argument(node, 2, "value", None)
        source = value if axis == node.meta["val"].dim() - 1 else query
        return self.of(source, axis) if isinstance(source, fx.Node) else Extent.UNKNOWN


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
        dim = _argument(number, 1, "dim", None)
        return (tensor, [dim % rank]) if type(dim) is int else None
    if name in ("len", "__len__"):
        return tensor, [0]
    return (tensor, range(rank)) if name in ("numel", "nelement", "nbytes") else None


def _sizes_given(node: fx.Node) -> Sequence[Any]:
    """The sizes, one for each axis, that a call of ``view`` or its kind is given."""
    if name_of(node) not in ("view", "reshape", "unsafe_view", "expand", "repeat", "tile"):
        return ()
    named = (
        node.kwargs[key] for key in ("size", "shape", "repeats", "dims") if key in node.kwargs
    )
    given = next(named, node.args[1:])
    return given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given


def _first_operand(node: fx.Node) -> fx.Node | None:
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, fx.Node) else None


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _permutation(root: nn.Module, node: fx.Node, rank: int) -> Sequence[int] | None:
    """For each axis of the result that of the operand: the operation itself moves axes that are
    known by their lengths.
    """
    if len(node.all_input_nodes) != 1:
        return None
    probe = torch.empty(tuple(range(rank)), device=META)
    return list(
        execute(root, node, *fx.node.map_arg((node.args, node.kwargs), lambda _: probe)).shape
    )


def _is_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name.strip("_"), None)
    return packet is not None and any(
        torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads()
    )


# the axes of those that are not told one, where it is not the first
_CUT = {"hsplit": 1, "dsplit": 2}

_ALIASES = {
    **{f"i{name}": name for name in ("add", "sub", "mul", "and", "or", "xor")},
    **dict.fromkeys(("truediv", "itruediv", "floordiv", "mod", "imod", "pow", "ipow"), "div"),
    **dict.fromkeys(("concat", "concatenate"), "cat"),
}

_RULES: dict[str, Callable[[Extents, fx.Node, int], Extent]] = {
    **dict.fromkeys(
        " ".join(
            (
                "dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout feature_dropout "
                "stochasticdepth identity contiguous",
                "clone detach to float double half type_as relu_ relu6 hardswish hardsigmoid "
                "leakyrelu prelu softmax log_softmax",
                "logsoftmax layer_norm rms_norm group_norm batch_norm instance_norm normalize "
                "layernorm rmsnorm groupnorm",
                "batchnorm1d batchnorm2d batchnorm3d syncbatchnorm instancenorm1d instancenorm2d "
                "instancenorm3d",
                "cumsum roll flip expand_as data zeros_like ones_like empty_like full_like "
                "rand_like randn_like",
            )
        ).split(),
        Extents._same,
    ),
    **dict.fromkeys(
        ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "unsafe_view"),
        Extents._reshaped,
    ),
    **dict.fromkeys(
        [
            "permute",
            "transpose",
            "swapaxes",
            "swapdims",
            "movedim",
            "moveaxis",
            "t",
            "T",
            "mT",
            "adjoint",
        ],
        Extents._permuted,
    ),
    **dict.fromkeys(
        ("mean", "sum", "amax", "amin", "var", "std", "norm", "logsumexp"), Extents._reduced
    ),
    **dict.fromkeys(("matmul", "bmm", "mm"), Extents._multiplied),
    "cat": Extents._joined,
    "stack": Extents._stacked,
    "expand": Extents._expanded,
    **dict.fromkeys(("repeat", "tile"), Extents._repeated),
    "narrow": Extents._narrowed,
    "pad": Extents._padded,
    **dict.fromkeys(
        ("interpolate", "upsample", "pixel_shuffle", "pixel_unshuffle", "pixelshuffle"),
        Extents._before_space,
    ),
    "getitem": Extents._indexed,
    "select": Extents._selected,
    "scaled_dot_product_attention": Extents._attended,
}
