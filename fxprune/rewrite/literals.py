"""Numbers in the graph that were true for the original's sizes, corrected from the labels of the node that they feed.

Each corrector belongs to a spelling in Python (``view``, ``x[:, a:b]``, ``F.layer_norm``), not to a model. It returns the node's
new arguments. Other numbers are the original's (:mod:`fxprune.rewrite.numbers`).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.errors import RewriteError
from fxprune.rewrite.extents import Extent
from fxprune.rewrite.numbers import Numbers
from fxprune.rewrite.survivors import Survivors

__all__ = ["correct", "name_of"]

Arguments = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""Target, positional and keyword arguments of a node of the new graph."""


_TABLE: dict[str, Callable[[Numbers, fx.Node, Any], Arguments]] = {}


def corrects(*names: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        for name in names:
            _TABLE[name] = function
        return function

    return register


def name_of(node: fx.Node) -> str:
    """The spelling of a call: ``view``, ``getitem``, ``layer_norm``."""
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", str(node.target)) if node.op == "call_function" else ""


def correct(numbers: Numbers, node: fx.Node) -> Arguments:
    """The arguments of a node, right for the smaller model; nodes of the original's graph stay where nothing is to be corrected."""
    handler = _TABLE.get(name_of(node))
    return handler(numbers, node, node.meta["val"]) if handler else (node.target, node.args, node.kwargs)


def _sizes(numbers: Numbers, node: fx.Node, value: Any, given: Sequence[Any], first: int = 0) -> list[Any]:
    """The sizes of a result's axes, from the axis ``first`` on."""
    wanted = numbers.survivors.shape(value)
    out = []
    for axis, entry in enumerate(given, first):
        if isinstance(entry, fx.Node):
            lost = wanted[axis] != value.shape[axis]
            even = not lost or numbers.extents.of(node, axis) is not Extent.UNKNOWN or numbers.extents.even(value, axis)
            out.append(numbers.sized(entry, value.shape[axis], wanted[axis], even=even))
        else:
            out.append(entry if entry == -1 else wanted[axis])
    return out


def _scaled(numbers: Numbers, entry: Any, wanted: int) -> Any:
    """A number that goes with sizes and is none itself: of groups, of repetitions."""
    return numbers.sized(entry, numbers.old(entry), wanted)


def _spread(args: Sequence[Any]) -> tuple[list[Any], bool]:
    """Sizes given one by one or as one sequence."""
    if len(args) == 1 and isinstance(args[0], (tuple, list)):
        return list(args[0]), True
    return list(args), False


@corrects("view", "reshape", "expand", "broadcast_to", "new_zeros", "new_ones", "new_full", "new_empty", "unsafe_view")
def _result_size(numbers: Numbers, node: fx.Node, value: Any) -> Arguments:
    name = name_of(node)
    key = "size" if "size" in node.kwargs else "shape" if "shape" in node.kwargs else None
    if key is not None:
        given: Any = node.kwargs[key]
        return node.target, node.args, {**node.kwargs, key: _sizes(numbers, node, value, given)}
    if len(node.args) > 1 and isinstance(node.args[1], torch.dtype):
        return node.target, node.args, node.kwargs
    tail = 1 if name == "new_full" else 0
    sizes, packed = _spread(node.args[1 : len(node.args) - tail])
    if len(sizes) != value.dim():
        return node.target, node.args, node.kwargs
    new = _sizes(numbers, node, value, sizes)
    return node.target, (node.args[0], *([tuple(new)] if packed else new), *node.args[len(node.args) - tail :]), node.kwargs


@corrects("zeros", "ones", "empty", "full", "rand", "randn")
def _factory_size(numbers: Numbers, node: fx.Node, value: Any) -> Arguments:
    if "size" in node.kwargs:
        given: Any = node.kwargs["size"]
        return node.target, node.args, {**node.kwargs, "size": _sizes(numbers, node, value, given)}
    tail = 1 if name_of(node) == "full" and len(node.args) > 1 else 0
    sizes, packed = _spread(node.args[: len(node.args) - tail])
    if len(sizes) != value.dim():
        return node.target, node.args, node.kwargs
    new = _sizes(numbers, node, value, sizes)
    return node.target, (*([tuple(new)] if packed else new), *node.args[len(node.args) - tail :]), node.kwargs


@corrects("unflatten")
def _unflatten(numbers: Numbers, node: fx.Node, value: Any) -> Arguments:
    x, dim, sizes = _arguments(node, ("input", "dim", "sizes"))
    start = numbers.old(dim) % numbers.old(x).dim()
    return node.target, (x, dim, _sizes(numbers, node, value, sizes, start)), {}


@corrects("repeat", "tile")
def _repeat(numbers: Numbers, node: fx.Node, value: Any) -> Arguments:
    x = node.args[0]
    times, packed = _spread(node.args[1:])
    before, after = numbers.survivors.shape(numbers.old(x)), numbers.survivors.shape(value)
    lead = len(after) - len(before)
    if len(times) != len(after):
        return node.target, node.args, node.kwargs
    wanted = [n // (before[d - lead] if d >= lead else 1) for d, n in enumerate(after)]
    new = [_scaled(numbers, entry, want) for entry, want in zip(times, wanted, strict=True)]
    return node.target, (x, *([tuple(new)] if packed else new)), node.kwargs


@corrects("repeat_interleave")
def _repeat_interleave(numbers: Numbers, node: fx.Node, value: Any) -> Arguments:
    given = {**dict(zip(("input", "repeats", "dim"), node.args, strict=False)), **node.kwargs}
    if given.get("dim") is None or not isinstance(numbers.old(given["repeats"]), int) or "output_size" in given:
        return node.target, node.args, node.kwargs
    axis = numbers.old(given["dim"]) % value.dim()
    before, after = (numbers.survivors.shape(tensor)[axis] for tensor in (numbers.old(given["input"]), value))
    times = _scaled(numbers, given["repeats"], after // before)
    return node.target, (given["input"], times), {"dim": given["dim"]}


@corrects("split", "chunk", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split")
def _split(numbers: Numbers, node: fx.Node, value: Any) -> Arguments:
    x = node.args[0]
    default = 0
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", default)
    tensor = numbers.old(x)
    axis = numbers.old(dim) % tensor.dim()
    if numbers.survivors.rows(tensor, axis) is None:
        return node.target, node.args, node.kwargs
    numbers.hold_positions(x, axis, node.args[1:2], node.kwargs)  # type: ignore[arg-type]
    ends = [0]
    for part in value:
        ends.append(ends[-1] + part.shape[axis])
    sizes = [_count(numbers, tensor, axis, a, b) for a, b in itertools.pairwise(ends)]
    return torch.split, (x, sizes, dim), {}


@corrects("narrow")
def _narrow(numbers: Numbers, node: fx.Node, value: Any) -> Arguments:
    x, dim, start, length = _arguments(node, ("input", "dim", "start", "length"))
    tensor = numbers.old(x)
    axis, first = numbers.old(dim) % tensor.dim(), numbers.old(start)
    if numbers.survivors.rows(tensor, axis) is None:
        return node.target, node.args, node.kwargs
    numbers.hold_positions(x, axis, start, length)
    first %= tensor.shape[axis]
    count = _count(numbers, tensor, axis, first, first + numbers.old(length))
    return node.target, (x, dim, _count(numbers, tensor, axis, 0, first), count), {}


@corrects("select")
def _select(numbers: Numbers, node: fx.Node, value: Any) -> Arguments:
    x, dim, index = _arguments(node, ("input", "dim", "index"))
    tensor = numbers.old(x)
    axis = numbers.old(dim) % tensor.dim()
    return node.target, (x, dim, _position(numbers, x, axis, index)), {}


@corrects("getitem", "setitem")
def _item(numbers: Numbers, node: fx.Node, value: Any) -> Arguments:
    x: Any = node.args[0]
    index, tensor = node.args[1], numbers.old(x)
    if not isinstance(tensor, Tensor):
        return node.target, node.args, node.kwargs
    parts = list(index) if isinstance(index, (tuple, list)) else [index]
    used = sum(1 for p in parts if p is not None and p is not Ellipsis)
    axis = 0
    new: list[Any] = []
    for part in parts:
        if part is Ellipsis:
            axis += tensor.dim() - used
            new.append(part)
            continue
        if part is None:
            new.append(part)
            continue
        new.append(_index(numbers, x, axis, part))
        axis += 1
    packed = tuple(new) if isinstance(index, (tuple, list)) else new[0]
    return node.target, (x, packed, *node.args[2:]), node.kwargs


def _index(numbers: Numbers, x: fx.Node, axis: int, part: Any) -> Any:
    tensor = numbers.old(x)
    if isinstance(part, slice):
        if numbers.survivors.rows(tensor, axis) is None:
            return part
        size = tensor.shape[axis]
        start, stop, step = slice(*(numbers.old(p) for p in (part.start, part.stop, part.step))).indices(size)
        if step != 1:
            return part
        if part.start is not None or part.stop is not None:
            numbers.hold_positions(x, axis, part.start, part.stop)
        left = None if part.start is None else _count(numbers, tensor, axis, 0, start)
        right = None if part.stop is None else _count(numbers, tensor, axis, 0, max(start, stop))
        return slice(left, right, part.step)
    if isinstance(numbers.old(part), int) and not isinstance(numbers.old(part), bool):
        return _position(numbers, x, axis, part)
    return part


def _position(numbers: Numbers, x: fx.Node, axis: int, index: Any) -> Any:
    tensor = numbers.old(x)
    if numbers.survivors.rows(tensor, axis) is None:
        return index
    numbers.hold_positions(x, axis, index)
    return _count(numbers, tensor, axis, 0, numbers.old(index) % tensor.shape[axis])


@corrects("roll")
def _roll(numbers: Numbers, node: fx.Node, value: Any) -> Arguments:
    x, shifts, dims = _arguments(node, ("input", "shifts", "dims"))
    tensor = numbers.old(x)
    several = isinstance(shifts, (tuple, list))
    pairs = list(zip(shifts, dims, strict=True)) if several else [(shifts, dims[0] if isinstance(dims, (tuple, list)) else dims)]
    new = []
    for shift, dim in pairs:
        if dim is None:
            return node.target, node.args, node.kwargs
        axis = numbers.old(dim) % tensor.dim()
        if numbers.survivors.rows(tensor, axis) is None:
            new.append(shift)
        else:
            numbers.hold_positions(x, axis, shift)
            size = tensor.shape[axis]
            new.append(_count(numbers, tensor, axis, (size - numbers.old(shift)) % size, size) if numbers.old(shift) % size else 0)
    return node.target, (x, tuple(new) if several else new[0], dims), {}


@corrects("pad")
def _pad(numbers: Numbers, node: fx.Node, value: Any) -> Arguments:
    given: tuple[Any, ...] = node.args if len(node.args) > 1 else (node.args[0], node.kwargs["pad"])
    x, amounts, *rest = given
    tensor = numbers.old(x)
    new = list(amounts)
    for i in range(len(amounts) // 2):
        axis = tensor.dim() - 1 - i
        before, after = numbers.old(amounts[2 * i]), numbers.old(amounts[2 * i + 1])
        if (before or after) and numbers.survivors.rows(value, axis) is not None:
            numbers.hold_positions(x, axis, *amounts[2 * i : 2 * i + 2])
            size = value.shape[axis]
            new[2 * i] = _count(numbers, value, axis, 0, before)
            new[2 * i + 1] = _count(numbers, value, axis, size - after, size)
    return node.target, (x, new, *rest), {k: v for k, v in node.kwargs.items() if k != "pad"}


@corrects("layer_norm", "rms_norm")
def _normalized_shape(numbers: Numbers, node: fx.Node, value: Any) -> Arguments:
    given: tuple[Any, ...] = node.args if len(node.args) > 1 else (node.args[0], node.kwargs["normalized_shape"])
    x, shape, *rest = given
    return (
        node.target,
        (x, _sizes(numbers, node, value, shape, value.dim() - len(shape)), *rest),
        {k: v for k, v in node.kwargs.items() if k != "normalized_shape"},
    )


@corrects("group_norm")
def _num_groups(numbers: Numbers, node: fx.Node, value: Any) -> Arguments:
    x, groups, *rest = node.args if len(node.args) > 1 else (node.args[0], node.kwargs["num_groups"])
    if numbers.old(groups) == numbers.old(x).shape[1]:
        groups = _scaled(numbers, groups, numbers.survivors.shape(numbers.old(x))[1])
    return node.target, (x, groups, *rest), {k: v for k, v in node.kwargs.items() if k != "num_groups"}


@corrects(*(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)))
def _groups(numbers: Numbers, node: fx.Node, value: Any) -> Arguments:
    transposed, position = "transpose" in name_of(node), 6  # groups is the seventh argument of both
    groups = node.args[position] if len(node.args) > position else node.kwargs.get("groups", 1)
    if numbers.old(groups) == 1:
        return node.target, node.args, node.kwargs
    x, w = numbers.old(node.args[0]), numbers.old(node.args[1] if len(node.args) > 1 else node.kwargs["weight"])
    channels = numbers.survivors.shape(x)[x.dim() - w.dim() + 1]
    if transposed:
        new = channels if numbers.old(groups) == w.shape[0] else numbers.old(groups)
    else:
        new = channels // numbers.survivors.shape(w)[1]
    fixed = _scaled(numbers, groups, new)
    if len(node.args) > position:
        return node.target, (*node.args[:position], fixed, *node.args[position + 1 :]), node.kwargs
    return node.target, node.args, {**node.kwargs, "groups": fixed}


@corrects("channel_shuffle")
def _channel_shuffle(numbers: Numbers, node: fx.Node, value: Any) -> Arguments:
    x, groups = _arguments(node, ("input", "groups"))
    return node.target, (x, shuffled_groups(numbers.survivors, numbers.old(x), numbers.old(groups))), {}


def shuffled_groups(survivors: Survivors, tensor: Tensor, groups: int) -> int:
    """In how many groups the survivors of a channel axis are to be shuffled: whole groups may have gone, or a part of each."""
    rows = survivors.rows(tensor, 1)
    if rows is None:
        return groups
    split = rows.all(axis=0).reshape(groups, -1)
    whole = split.all(axis=1) | ~split.any(axis=1)
    return int(split.any(axis=1).sum()) if whole.all() else groups


@corrects("pixel_shuffle", "flatten", "size", "getattr")
def _nothing(numbers: Numbers, node: fx.Node, value: Any) -> Arguments:
    return node.target, node.args, node.kwargs


@corrects("scaled_dot_product_attention")
def _scale(numbers: Numbers, node: fx.Node, value: Any) -> Arguments:
    query = node.args[0] if node.args else node.kwargs["query"]
    tensor: Tensor = numbers.old(query)
    if node.kwargs.get("scale") is None and numbers.survivors.shape(tensor)[-1] != tensor.shape[-1]:
        width = numbers.size(query, tensor.dim() - 1)  # type: ignore[arg-type]
        scale, given = tensor.shape[-1] ** -0.5, isinstance(width, fx.Node)
        scale = numbers.create("call_function", operator.pow, (width, -0.5), {}, scale) if given else scale
        return node.target, node.args, {**node.kwargs, "scale": scale}
    return node.target, node.args, node.kwargs


def _count(numbers: Numbers, tensor: Tensor, axis: int, start: int, stop: int) -> int:
    count = numbers.survivors.count(tensor, axis, start, stop)
    return stop - start if count is None else count


def _arguments(node: fx.Node, names: Sequence[str]) -> list[Any]:
    """Positional or keyword arguments of a call, by the names they have in PyTorch's documentation."""
    values = list(node.args)
    for name in names[len(values) :]:
        if name not in node.kwargs:
            if name == "dims":
                values.append(None)
                continue
            raise RewriteError(f"node {node.name!r} ({name_of(node)}) has no argument {name!r}", node.name)
        values.append(node.kwargs[name])
    return values
