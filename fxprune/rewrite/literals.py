"""Numbers in the graph that were true for the original's sizes, corrected from the labels of the node that they feed.

Each corrector belongs to a spelling in Python (``view``, ``x[:, a:b]``, ``F.layer_norm``), not to a model. It returns the node's
new arguments. Numbers that do not describe a size (a scale computed from a width) keep the original's value.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from fxprune.errors import RewriteError
from fxprune.rewrite.survivors import Survivors

__all__ = ["Corrector", "correct", "name_of"]

Arguments = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""Target, positional and keyword arguments of a node of the new graph."""


class Corrector(Protocol):
    """What a corrector may ask of the emission."""

    survivors: Survivors

    def old(self, value: Any) -> Any:
        """The value of an argument (maybe a node of the old graph) in the original."""
        ...

    def new(self, value: Any) -> Any:
        """The value of an argument in the smaller model, as the graph stands."""
        ...

    def sized(self, value: Any, wanted: int) -> Any:
        """The argument, corrected so that its value is ``wanted``."""
        ...


_TABLE: dict[str, Callable[[Corrector, fx.Node, Any], Arguments]] = {}


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


def correct(emission: Corrector, node: fx.Node, value: Any) -> Arguments:
    """The arguments of a node, still in terms of the old graph's nodes, right for the smaller model.

    ``value`` is the node's result in the original.
    """
    handler = _TABLE.get(name_of(node))
    target, args, kwargs = handler(emission, node, value) if handler else (node.target, node.args, node.kwargs)
    if not isinstance(value, (Tensor, tuple, list)) or node.op == "call_module":
        return target, args, kwargs
    if handler is None or name_of(node) in _NUMBERS_TOO:
        args = tuple(_keep_number(emission, a) for a in args)
        kwargs = {k: _keep_number(emission, a) for k, a in kwargs.items()}
    return target, args, kwargs


def _keep_number(emission: Corrector, argument: Any) -> Any:
    """A number that was computed from a size which has changed keeps the original's value."""
    if not isinstance(argument, fx.Node):
        return argument
    before = emission.old(argument)
    if isinstance(before, (int, float)) and not isinstance(before, bool) and before != emission.new(argument):
        return emission.sized(argument, before)  # type: ignore[arg-type]
    return argument


_NUMBERS_TOO: frozenset[str] = frozenset({"mean"})


def _sizes(emission: Corrector, given: Sequence[Any], wanted: Sequence[int]) -> list[Any]:
    return [
        entry if (entry == -1 and not isinstance(entry, fx.Node)) or emission.new(entry) == want else emission.sized(entry, want)
        for entry, want in zip(given, wanted, strict=True)
    ]


def _spread(args: Sequence[Any]) -> tuple[list[Any], bool]:
    """Sizes given one by one or as one sequence."""
    if len(args) == 1 and isinstance(args[0], (tuple, list)):
        return list(args[0]), True
    return list(args), False


@corrects("view", "reshape", "expand", "broadcast_to", "new_zeros", "new_ones", "new_full", "new_empty", "unsafe_view")
def _result_size(emission: Corrector, node: fx.Node, value: Any) -> Arguments:
    name = name_of(node)
    key = "size" if "size" in node.kwargs else "shape" if "shape" in node.kwargs else None
    wanted = emission.survivors.shape(value)
    if key is not None:
        given: Any = node.kwargs[key]
        return node.target, node.args, {**node.kwargs, key: _sizes(emission, list(given), wanted)}
    if len(node.args) > 1 and isinstance(node.args[1], torch.dtype):
        return node.target, node.args, node.kwargs
    tail = 1 if name == "new_full" else 0
    sizes, packed = _spread(node.args[1 : len(node.args) - tail])
    if len(sizes) != len(wanted):
        return node.target, node.args, node.kwargs
    new = _sizes(emission, sizes, wanted)
    return node.target, (node.args[0], *([tuple(new)] if packed else new), *node.args[len(node.args) - tail :]), node.kwargs


@corrects("zeros", "ones", "empty", "full", "rand", "randn")
def _factory_size(emission: Corrector, node: fx.Node, value: Any) -> Arguments:
    wanted = emission.survivors.shape(value)
    if "size" in node.kwargs:
        given: Any = node.kwargs["size"]
        return node.target, node.args, {**node.kwargs, "size": _sizes(emission, list(given), wanted)}
    tail = 1 if name_of(node) == "full" and len(node.args) > 1 else 0
    sizes, packed = _spread(node.args[: len(node.args) - tail])
    if len(sizes) != len(wanted):
        return node.target, node.args, node.kwargs
    new = _sizes(emission, sizes, wanted)
    return node.target, (*([tuple(new)] if packed else new), *node.args[len(node.args) - tail :]), node.kwargs


@corrects("unflatten")
def _unflatten(emission: Corrector, node: fx.Node, value: Any) -> Arguments:
    x, dim, sizes = _arguments(node, ("input", "dim", "sizes"))
    start = emission.old(dim) % emission.old(x).dim()
    wanted = emission.survivors.shape(value)[start : start + len(sizes)]
    return node.target, (x, dim, _sizes(emission, list(sizes), wanted)), {}


@corrects("repeat", "tile")
def _repeat(emission: Corrector, node: fx.Node, value: Any) -> Arguments:
    x = node.args[0]
    times, packed = _spread(node.args[1:])
    before, after = emission.survivors.shape(emission.old(x)), emission.survivors.shape(value)
    lead = len(after) - len(before)
    if len(times) != len(after):
        return node.target, node.args, node.kwargs
    wanted = [n // (before[d - lead] if d >= lead else 1) for d, n in enumerate(after)]
    new = _sizes(emission, times, wanted)
    return node.target, (x, *([tuple(new)] if packed else new)), node.kwargs


@corrects("repeat_interleave")
def _repeat_interleave(emission: Corrector, node: fx.Node, value: Any) -> Arguments:
    given = {**dict(zip(("input", "repeats", "dim"), node.args, strict=False)), **node.kwargs}
    if given.get("dim") is None or not isinstance(emission.old(given["repeats"]), int) or "output_size" in given:
        return node.target, node.args, node.kwargs
    axis = emission.old(given["dim"]) % value.dim()
    before, after = (emission.survivors.shape(tensor)[axis] for tensor in (emission.old(given["input"]), value))
    (times,) = _sizes(emission, [given["repeats"]], [after // before])
    return node.target, (given["input"], times), {"dim": given["dim"]}


@corrects("split", "chunk", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split")
def _split(emission: Corrector, node: fx.Node, value: Any) -> Arguments:
    x = node.args[0]
    default = 0
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", default)
    tensor = emission.old(x)
    axis = emission.old(dim) % tensor.dim()
    if emission.survivors.rows(tensor, axis) is None:
        return node.target, node.args, node.kwargs
    ends = [0]
    for part in value:
        ends.append(ends[-1] + part.shape[axis])
    sizes = [_count(emission, tensor, axis, a, b) for a, b in itertools.pairwise(ends)]
    return torch.split, (x, sizes, dim), {}


@corrects("narrow")
def _narrow(emission: Corrector, node: fx.Node, value: Any) -> Arguments:
    x, dim, start, length = _arguments(node, ("input", "dim", "start", "length"))
    tensor = emission.old(x)
    axis, first = emission.old(dim) % tensor.dim(), emission.old(start)
    if emission.survivors.rows(tensor, axis) is None:
        return node.target, node.args, node.kwargs
    first %= tensor.shape[axis]
    count = _count(emission, tensor, axis, first, first + emission.old(length))
    return node.target, (x, dim, _count(emission, tensor, axis, 0, first), count), {}


@corrects("select")
def _select(emission: Corrector, node: fx.Node, value: Any) -> Arguments:
    x, dim, index = _arguments(node, ("input", "dim", "index"))
    tensor = emission.old(x)
    axis = emission.old(dim) % tensor.dim()
    return node.target, (x, dim, _position(emission, tensor, axis, index)), {}


@corrects("getitem", "setitem")
def _item(emission: Corrector, node: fx.Node, value: Any) -> Arguments:
    x, index = node.args[0], node.args[1]
    tensor = emission.old(x)
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
        new.append(_index(emission, tensor, axis, part))
        axis += 1
    packed = tuple(new) if isinstance(index, (tuple, list)) else new[0]
    return node.target, (x, packed, *node.args[2:]), node.kwargs


def _index(emission: Corrector, tensor: Tensor, axis: int, part: Any) -> Any:
    if isinstance(part, slice):
        if emission.survivors.rows(tensor, axis) is None:
            return part
        size = tensor.shape[axis]
        start, stop, step = slice(*(emission.old(p) for p in (part.start, part.stop, part.step))).indices(size)
        if step != 1:
            return part
        left = None if part.start is None else _count(emission, tensor, axis, 0, start)
        right = None if part.stop is None else _count(emission, tensor, axis, 0, max(start, stop))
        return slice(left, right, part.step)
    if isinstance(emission.old(part), int) and not isinstance(emission.old(part), bool):
        return _position(emission, tensor, axis, part)
    return part


def _position(emission: Corrector, tensor: Tensor, axis: int, index: Any) -> Any:
    if emission.survivors.rows(tensor, axis) is None:
        return index
    return _count(emission, tensor, axis, 0, emission.old(index) % tensor.shape[axis])


@corrects("roll")
def _roll(emission: Corrector, node: fx.Node, value: Any) -> Arguments:
    x, shifts, dims = _arguments(node, ("input", "shifts", "dims"))
    tensor = emission.old(x)
    several = isinstance(shifts, (tuple, list))
    pairs = list(zip(shifts, dims, strict=True)) if several else [(shifts, dims[0] if isinstance(dims, (tuple, list)) else dims)]
    new = []
    for shift, dim in pairs:
        if dim is None:
            return node.target, node.args, node.kwargs
        axis = emission.old(dim) % tensor.dim()
        if emission.survivors.rows(tensor, axis) is None:
            new.append(shift)
        else:
            size = tensor.shape[axis]
            new.append(
                _count(emission, tensor, axis, (size - emission.old(shift)) % size, size) if emission.old(shift) % size else 0
            )
    return node.target, (x, tuple(new) if several else new[0], dims), {}


@corrects("pad")
def _pad(emission: Corrector, node: fx.Node, value: Any) -> Arguments:
    given: tuple[Any, ...] = node.args if len(node.args) > 1 else (node.args[0], node.kwargs["pad"])
    x, amounts, *rest = given
    tensor = emission.old(x)
    new = list(amounts)
    for i in range(len(amounts) // 2):
        axis = tensor.dim() - 1 - i
        before, after = emission.old(amounts[2 * i]), emission.old(amounts[2 * i + 1])
        if (before or after) and emission.survivors.rows(value, axis) is not None:
            size = value.shape[axis]
            new[2 * i] = _count(emission, value, axis, 0, before)
            new[2 * i + 1] = _count(emission, value, axis, size - after, size)
    return node.target, (x, new, *rest), {k: v for k, v in node.kwargs.items() if k != "pad"}


@corrects("layer_norm", "rms_norm")
def _normalized_shape(emission: Corrector, node: fx.Node, value: Any) -> Arguments:
    given: tuple[Any, ...] = node.args if len(node.args) > 1 else (node.args[0], node.kwargs["normalized_shape"])
    x, shape, *rest = given
    wanted = emission.survivors.shape(value)[-len(shape) :]
    return (
        node.target,
        (x, _sizes(emission, list(shape), wanted), *rest),
        {k: v for k, v in node.kwargs.items() if k != "normalized_shape"},
    )


@corrects("group_norm")
def _num_groups(emission: Corrector, node: fx.Node, value: Any) -> Arguments:
    x, groups, *rest = node.args if len(node.args) > 1 else (node.args[0], node.kwargs["num_groups"])
    if emission.old(groups) == emission.old(x).shape[1]:
        groups = emission.sized(groups, emission.survivors.shape(emission.old(x))[1])
    return node.target, (x, groups, *rest), {k: v for k, v in node.kwargs.items() if k != "num_groups"}


@corrects(*(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)))
def _groups(emission: Corrector, node: fx.Node, value: Any) -> Arguments:
    transposed, position = "transpose" in name_of(node), 6  # groups is the seventh argument of both
    groups = node.args[position] if len(node.args) > position else node.kwargs.get("groups", 1)
    if emission.old(groups) == 1:
        return node.target, node.args, node.kwargs
    x, w = emission.old(node.args[0]), emission.old(node.args[1] if len(node.args) > 1 else node.kwargs["weight"])
    channels = emission.survivors.shape(x)[x.dim() - w.dim() + 1]
    if transposed:
        new = channels if emission.old(groups) == w.shape[0] else emission.old(groups)
    else:
        new = channels // emission.survivors.shape(w)[1]
    if emission.new(groups) == new:
        return node.target, node.args, node.kwargs
    fixed = emission.sized(groups, new)
    if len(node.args) > position:
        return node.target, (*node.args[:position], fixed, *node.args[position + 1 :]), node.kwargs
    return node.target, node.args, {**node.kwargs, "groups": fixed}


@corrects("channel_shuffle")
def _channel_shuffle(emission: Corrector, node: fx.Node, value: Any) -> Arguments:
    x, groups = _arguments(node, ("input", "groups"))
    return node.target, (x, shuffled_groups(emission.survivors, emission.old(x), emission.old(groups))), {}


def shuffled_groups(survivors: Survivors, tensor: Tensor, groups: int) -> int:
    """In how many groups the survivors of a channel axis are to be shuffled: whole groups may have gone, or a part of each."""
    rows = survivors.rows(tensor, 1)
    if rows is None:
        return groups
    split = rows.all(axis=0).reshape(groups, -1)
    whole = split.all(axis=1) | ~split.any(axis=1)
    return int(split.any(axis=1).sum()) if whole.all() else groups


@corrects("pixel_shuffle", "flatten", "size", "getattr")
def _nothing(emission: Corrector, node: fx.Node, value: Any) -> Arguments:
    return node.target, node.args, node.kwargs


@corrects("scaled_dot_product_attention")
def _scale(emission: Corrector, node: fx.Node, value: Any) -> Arguments:
    query = emission.old(node.args[0] if node.args else node.kwargs["query"])
    if node.kwargs.get("scale") is None and emission.survivors.shape(query)[-1] != query.shape[-1]:
        return node.target, node.args, {**node.kwargs, "scale": query.shape[-1] ** -0.5}
    if isinstance(node.kwargs.get("scale"), fx.Node):
        return node.target, node.args, {**node.kwargs, "scale": _keep_number(emission, node.kwargs["scale"])}
    return node.target, node.args, node.kwargs


def _count(emission: Corrector, tensor: Tensor, axis: int, start: int, stop: int) -> int:
    count = emission.survivors.count(tensor, axis, start, stop)
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
