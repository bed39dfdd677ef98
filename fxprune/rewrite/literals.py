"""Numbers in the graph that were true for the original's sizes, corrected from the labels of the
node that they feed.

Each corrector belongs to an ATen op, however it is spelled (:mod:`fxprune.rewrite.calls`), not to
a model. It returns the arguments that are to be others. Other numbers are the original's
(:mod:`fxprune.rewrite.numbers`).
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.errors import RewriteError
from fxprune.memory import name_of
from fxprune.moments import FUNCTIONS
from fxprune.rewrite.calls import Call, NewCall
from fxprune.rewrite.extents import Extent
from fxprune.rewrite.numbers import Numbers
from fxprune.rewrite.survivors import Survivors
from fxprune.rules.movement import split_dim
from fxprune.rules.reduction import correction_of, reduced_dims
from fxprune.shapes import reshape_blocks

__all__ = ["correct", "padding", "shuffled_groups"]

Change = dict[str, Any] | NewCall
"""Arguments by name that are to be others, or another call altogether."""

_TABLE: dict[str, Callable[[Numbers, Call, Any], Change]] = {}


def corrects(*names: str) -> Callable[[Any], Any]:
    """Register a corrector for ATen ops, by their names."""

    def register(function: Any) -> Any:
        for name in names:
            _TABLE[name] = function
        return function

    return register


def correct(
    numbers: Numbers, node: fx.Node, call: Call | None, left: tuple[int, int] | None
) -> NewCall:
    """The arguments of a node, right for the smaller model; nodes of the original's graph stay
    where nothing is to be corrected.

    Parameters
    ----------
    call:
        The ATen op that the node is, if it is one.
    left:
        Of how many elements that a statistic reduces to one how many are left; None if all are, or
        if it is none.
    """
    if name_of(node) in ("getitem", "setitem"):
        return _item(numbers, node)
    if left is not None and node.target in FUNCTIONS.values():
        return _fewer_left(node, left)
    if left is not None and call is not None and call.name in FUNCTIONS:
        return _counting(call, left)
    handler = _TABLE.get(call.name) if call is not None else None
    if call is None or handler is None:
        return node.target, node.args, node.kwargs
    change = handler(numbers, call, node.meta["val"])
    return change if isinstance(change, tuple) else call.with_(change)


def _new_sizes(numbers: Numbers, call: Call, value: Any, given: Any, first: int = 0) -> Any:
    """The sizes of a result's axes, from the axis ``first`` on."""
    wanted = numbers.survivors.shape(value)
    # a list that forward computed
    if isinstance(given, fx.Node) and not isinstance(given.meta["val"], int):
        if list(numbers.new(given)) != wanted[first : first + len(given.meta["val"])]:
            raise RewriteError(
                f"the sizes that node {call.node.name!r} is given are computed as one",
                call.node.name,
            )
        return numbers.now(given)
    out = []
    for axis, entry in enumerate(given if isinstance(given, (tuple, list)) else [given], first):
        if isinstance(entry, fx.Node):
            lost = wanted[axis] != value.shape[axis]
            even = (
                not lost
                or numbers.extents.of(call.node, axis) is not Extent.UNKNOWN
                or numbers.extents.even(value, axis)
            )
            out.append(numbers.sized(entry, value.shape[axis], wanted[axis], even=even))
        else:
            out.append(entry if entry == -1 else wanted[axis])
    return out


def _scaled(numbers: Numbers, entry: Any, wanted: int) -> Any:
    """A number that goes with sizes and is none itself: of groups, of repetitions."""
    return numbers.sized(entry, numbers.old(entry), wanted)


@corrects(
    "view",
    "reshape",
    "_unsafe_view",
    "expand",
    "broadcast_to",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
)
@corrects("zeros", "ones", "empty", "full", "rand", "randn")
def _result_size(numbers: Numbers, call: Call, value: Any) -> Change:
    name = "size" if "size" in call.given else "shape"
    if name not in call.given:  # x.view(dtype)
        return {}
    given = call.given[name]
    if call.name in ("view", "reshape", "_unsafe_view") and isinstance(given, (tuple, list)):
        _hold_layout(numbers, call, value, given)
    return {name: _new_sizes(numbers, call, value, given)}


def _hold_layout(
    numbers: Numbers, call: Call, value: Tensor, given: Sequence[Any], start: int = 0
) -> None:
    """Hold what literal sizes take from axes of other sizes: with another one, what is open would
    mix channels with the rest.

    ``given`` are the sizes of the result's axes from ``start`` on. An open one is -1 or follows
    from the input. Literals before it take from the front, those behind it from the back: whole
    channels, or the same part of each, as long as no axis that they take from is of another size.
    """
    x, old = call.given["self"], call.ran["self"]
    left = numbers.survivors.shape(old)
    if left == list(old.shape):
        return
    for ins, outs in reshape_blocks(old.shape, value.shape):
        lost = [d for d in ins if left[d] != old.shape[d]]
        sizes = [given[d - start] if start <= d < start + len(given) else None for d in outs]
        literal = [isinstance(size, int) and size != -1 for size in sizes]
        if all(literal):
            held = ins if -1 in given else []
        elif not lost or not any(literal):
            continue
        else:
            first, last = literal.index(False), len(literal) - 1 - literal[::-1].index(False)
            within = any(literal[first:last])
            held = [d for d in ins if d < lost[-1]] if first or within else []
            fixed = 1
            for d in reversed(ins):
                if numbers.extents.of(x, d) is not Extent.FIXED:
                    break
                fixed *= old.shape[d]
            behind = math.prod(value.shape[d] for d in outs[last + 1 :])
            if within or fixed % behind:
                held += [d for d in ins if d >= lost[0]]
        for d in dict.fromkeys(held):
            numbers.hold_positions(x, d)


@corrects("unflatten")
def _unflatten(numbers: Numbers, call: Call, value: Any) -> Change:
    start, given = call.ran["dim"] % call.ran["self"].dim(), call.given["sizes"]
    if isinstance(given, (tuple, list)):
        _hold_layout(numbers, call, value, given, start)
    return {"sizes": _new_sizes(numbers, call, value, given, start)}


@corrects("repeat", "tile")
def _correct_repeat(numbers: Numbers, call: Call, value: Any) -> Change:
    name = "repeats" if "repeats" in call.given else "dims"
    given = call.given[name]
    times = list(given) if isinstance(given, (tuple, list)) else [given]
    before, after = numbers.survivors.shape(call.ran["self"]), numbers.survivors.shape(value)
    lead = len(after) - len(before)
    if len(times) != len(after):
        return {}
    wanted = [n // (before[d - lead] if d >= lead else 1) for d, n in enumerate(after)]
    return {
        name: [_scaled(numbers, entry, want) for entry, want in zip(times, wanted, strict=True)]
    }


@corrects("repeat_interleave")
def _repeat_interleave(numbers: Numbers, call: Call, value: Any) -> Change:
    if (
        call.ran.get("dim") is None
        or not isinstance(call.ran["repeats"], int)
        or "output_size" in call.given
    ):
        return {}
    axis = call.ran["dim"] % value.dim()
    before, after = (numbers.survivors.shape(tensor)[axis] for tensor in (call.ran["self"], value))
    return {"repeats": _scaled(numbers, call.given["repeats"], after // before)}


@corrects("split", "split_with_sizes", "chunk", "tensor_split", "hsplit", "vsplit", "dsplit")
@corrects("unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk")
def _split(numbers: Numbers, call: Call, value: Any) -> Change:
    tensor = call.ran["self"]
    axis = split_dim(call.name, call.ran)
    if numbers.survivors.rows(tensor, axis) is None:
        return {}
    numbers.hold_positions(
        call.given["self"],
        axis,
        *(a for name, a in call.given.items() if name not in ("self", "dim")),
    )
    ends = [0]
    for part in value:
        ends.append(ends[-1] + part.shape[axis])
    sizes = [_survivors_between(numbers, tensor, axis, a, b) for a, b in itertools.pairwise(ends)]
    said = call.given.get("dim", axis)  # from the end stays so: axes before it may be dropped
    counted = axis - tensor.dim() if isinstance(said, int) and said < 0 else axis
    return torch.split, (call.given["self"], sizes, counted), {}


@corrects("narrow")
def _narrow(numbers: Numbers, call: Call, value: Any) -> Change:
    tensor = call.ran["self"]
    axis, first = call.ran["dim"] % tensor.dim(), call.ran["start"]
    if isinstance(first, Tensor) or numbers.survivors.rows(tensor, axis) is None:
        return {}
    numbers.hold_positions(call.given["self"], axis, call.given["start"], call.given["length"])
    first %= tensor.shape[axis]
    count = _survivors_between(numbers, tensor, axis, first, first + call.ran["length"])
    return {"start": _survivors_between(numbers, tensor, axis, 0, first), "length": count}


@corrects("slice")
def _slice(numbers: Numbers, call: Call, value: Any) -> Change:
    part = slice(*(call.given.get(name) for name in ("start", "end", "step")))
    new = _correct_index(
        numbers, call.given["self"], call.ran["dim"] % call.ran["self"].dim(), part
    )
    return {
        name: bound
        for name, bound in (("start", new.start), ("end", new.stop))
        if name in call.given
    }


@corrects("select")
def _correct_select(numbers: Numbers, call: Call, value: Any) -> Change:
    axis = call.ran["dim"] % call.ran["self"].dim()
    return {"index": _new_position(numbers, call.given["self"], axis, call.given["index"])}


def _item(numbers: Numbers, node: fx.Node) -> NewCall:
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
        new.append(_correct_index(numbers, x, axis, part))
        axis += 1
    packed = tuple(new) if isinstance(index, (tuple, list)) else new[0]
    return node.target, (x, packed, *node.args[2:]), node.kwargs


def _correct_index(numbers: Numbers, x: fx.Node, axis: int, part: Any) -> Any:
    tensor = numbers.old(x)
    if isinstance(part, slice):
        if numbers.survivors.rows(tensor, axis) is None:
            return part
        size = tensor.shape[axis]
        start, stop, step = slice(
            *(numbers.old(p) for p in (part.start, part.stop, part.step))
        ).indices(size)
        if step != 1 or part.start is not None or part.stop is not None:
            numbers.hold_positions(x, axis, part.start, part.stop)
        if step != 1:
            return part
        left = None if part.start is None else _survivors_between(numbers, tensor, axis, 0, start)
        right = (
            None
            if part.stop is None
            else _survivors_between(numbers, tensor, axis, 0, max(start, stop))
        )
        return slice(left, right, part.step)
    if isinstance(numbers.old(part), int) and not isinstance(numbers.old(part), bool):
        return _new_position(numbers, x, axis, part)
    return part


def _new_position(numbers: Numbers, x: fx.Node, axis: int, index: Any) -> Any:
    tensor = numbers.old(x)
    if numbers.survivors.rows(tensor, axis) is None:
        return index
    numbers.hold_positions(x, axis, index)
    return _survivors_between(numbers, tensor, axis, 0, numbers.old(index) % tensor.shape[axis])


@corrects("roll")
def _roll(numbers: Numbers, call: Call, value: Any) -> Change:
    tensor, given = call.ran["self"], call.given["shifts"]
    shifts = list(given) if isinstance(given, (tuple, list)) else [given]
    if len(call.ran["dims"]) != len(shifts):
        return {}
    for i, (shift, dim) in enumerate(zip(call.ran["shifts"], call.ran["dims"], strict=True)):
        axis = dim % tensor.dim()
        if numbers.survivors.rows(tensor, axis) is not None:
            numbers.hold_positions(call.given["self"], axis, shifts[i])
            size = tensor.shape[axis]
            shifts[i] = (
                _survivors_between(numbers, tensor, axis, (size - shift) % size, size)
                if shift % size
                else 0
            )
    return {"shifts": shifts}


@corrects("pad", "constant_pad_nd")
def _correct_pad(numbers: Numbers, call: Call, value: Any) -> Change:
    given, before = call.given["pad"], call.ran["pad"]
    after = padding(numbers.survivors, value, before)
    if after == list(before):
        return {}
    if isinstance(given, fx.Node):
        raise RewriteError(
            f"the paddings that node {call.node.name!r} is given are computed as one",
            call.node.name,
        )
    new = list(given)
    for i in range(len(new) // 2):
        if numbers.survivors.rows(value, value.dim() - 1 - i) is not None and any(
            before[2 * i : 2 * i + 2]
        ):
            numbers.hold_positions(
                call.given["self"], value.dim() - 1 - i, *new[2 * i : 2 * i + 2]
            )
            new[2 * i : 2 * i + 2] = after[2 * i : 2 * i + 2]
    return {"pad": new}


def padding(survivors: Survivors, padded: Tensor, amounts: Sequence[int]) -> list[int]:
    """How much of a padding (as ``F.pad`` has it, the last dimension first) is left; ``padded`` is
    its result in the original.
    """
    new = list(amounts)
    for i in range(len(amounts) // 2):
        axis, (before, after) = padded.dim() - 1 - i, amounts[2 * i : 2 * i + 2]
        size = padded.shape[axis]
        if (before or after) and survivors.rows(padded, axis) is not None:
            new[2 * i : 2 * i + 2] = [
                survivors.count(padded, axis, *span) or 0
                for span in ((0, before), (size - after, size))
            ]
    return new


@corrects("layer_norm", "rms_norm")
def _normalized_shape(numbers: Numbers, call: Call, value: Any) -> Change:
    first = value.dim() - len(call.ran["normalized_shape"])
    return {
        "normalized_shape": _new_sizes(numbers, call, value, call.given["normalized_shape"], first)
    }


@corrects("group_norm")
def _num_groups(numbers: Numbers, call: Call, value: Any) -> Change:
    x = call.ran["input"]
    if call.ran["num_groups"] != x.shape[1]:
        return {}
    return {
        "num_groups": _scaled(numbers, call.given["num_groups"], numbers.survivors.shape(x)[1])
    }


@corrects("convolution", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)))
def _correct_groups(numbers: Numbers, call: Call, value: Any) -> Change:
    x, w, groups = call.ran["input"], call.ran["weight"], call.ran["groups"]
    if groups == 1:
        return {}
    channels = numbers.survivors.shape(x)[x.dim() - w.dim() + 1]
    if call.ran.get("transposed", "transpose" in call.name):
        new = channels if groups == w.shape[0] else groups
    else:
        new = channels // numbers.survivors.shape(w)[1]
    return {"groups": _scaled(numbers, call.given["groups"], new)}


@corrects("channel_shuffle", "native_channel_shuffle")
def _correct_channel_shuffle(numbers: Numbers, call: Call, value: Any) -> Change:
    return {"groups": shuffled_groups(numbers.survivors, call.ran["self"], call.ran["groups"])}


def shuffled_groups(survivors: Survivors, tensor: Tensor, groups: int) -> int:
    """In how many groups the survivors of a channel axis are to be shuffled: whole groups may have
    gone, or a part of each.
    """
    rows = survivors.rows(tensor, 1)
    if rows is None:
        return groups
    split = rows.all(axis=0).reshape(groups, -1)
    whole = split.all(axis=1) | ~split.any(axis=1)
    return int(split.any(axis=1).sum()) if whole.all() else groups


@corrects("scaled_dot_product_attention")
def _scale(numbers: Numbers, call: Call, value: Any) -> Change:
    query, tensor = call.given["query"], call.ran["query"]
    if call.ran["scale"] is not None or numbers.survivors.shape(tensor)[-1] == tensor.shape[-1]:
        return {}
    width, scale = numbers.size(query, tensor.dim() - 1), tensor.shape[-1] ** -0.5
    given = isinstance(width, fx.Node)
    return {
        "scale": numbers.create("call_function", operator.pow, (width, -0.5), {}, scale)
        if given
        else scale
    }


def _counting(call: Call, left: tuple[int, int]) -> NewCall:
    """A variance that counts the zeros that were removed."""
    dims, keepdim = reduced_dims(call.ran, call.ran["self"])
    return (
        FUNCTIONS[call.name],
        (call.given["self"], sorted(dims), float(correction_of(call.ran)), keepdim, *left),
        {},
    )


def _fewer_left(node: fx.Node, left: tuple[int, int]) -> NewCall:
    """A statistic that was corrected before: of what was left then, less is left now."""
    values: tuple[Any, ...] = node.args
    *rest, kept, total = values
    return node.target, (*rest, kept * left[0], total * left[1]), node.kwargs


def _survivors_between(numbers: Numbers, tensor: Tensor, axis: int, start: int, stop: int) -> int:
    count = numbers.survivors.count(tensor, axis, start, stop)
    return stop - start if count is None else count
