"""Correctors: functions that correct literal arguments for the smaller model.

Some numbers among an op's arguments, such as sizes and positions, are right only for the
original's sizes. A corrector is a column of the table. It takes the numbers of the new graph, the
call, and the call's result in the original. It returns the arguments that change, by name, or
another call. All other numbers stay (:mod:`fxprune.rewrite.numbers`).
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from fxprune.common.reshape import reshape_blocks
from fxprune.errors import RewriteError
from fxprune.ops.calls import NewCall, OpCall
from fxprune.ops.dims import split_dim
from fxprune.ops.smaller import NewNumbers, SurvivorCounts

__all__ = [
    "attention_literals",
    "channel_shuffle_literals",
    "convolution_literals",
    "group_norm_literals",
    "index_literal",
    "last_norm_literals",
    "narrow_literals",
    "pad_literals",
    "padding",
    "repeat_interleave_literals",
    "repeat_literals",
    "roll_literals",
    "select_literals",
    "shuffled_groups",
    "sizes_literals",
    "slices_literals",
    "split_literals",
    "unflatten_literals",
]

Change: TypeAlias = dict[str, Any] | NewCall
"""The arguments that change, by name, or another call."""


def _new_sizes(numbers: NewNumbers, call: OpCall, value: Any, given: Any, first: int = 0) -> Any:
    """Return the sizes of a result's axes in the smaller model, from axis ``first`` on.

    ``value`` is the result in the original, and ``given`` the sizes that the node passes.
    """
    wanted = numbers.survivors.shape(value)
    # a list of sizes that the model computed
    if isinstance(given, fx.Node) and not isinstance(given.meta["val"], int):
        if list(numbers.new_value(given)) != wanted[first : first + len(given.meta["val"])]:
            raise RewriteError(
                f"the sizes that node {call.node.name!r} is given are computed as one",
                call.node.name,
            )
        return numbers.new_node(given)
    out = []
    for axis, entry in enumerate(given if isinstance(given, (tuple, list)) else [given], first):
        if isinstance(entry, fx.Node):
            lost = wanted[axis] != value.shape[axis]
            even = (
                not lost
                or numbers.extents.is_known(call.node, axis)
                or numbers.extents.has_equal_shares(value, axis)
            )
            out.append(numbers.new_size(entry, value.shape[axis], wanted[axis], even=even))
        else:
            out.append(entry if entry == -1 else wanted[axis])
    return out


def _scaled(numbers: NewNumbers, entry: Any, wanted: int) -> Any:
    """Return a new number of groups or repetitions, which follows from sizes."""
    return numbers.new_size(entry, numbers.old_value(entry), wanted)


def sizes_literals(numbers: NewNumbers, call: OpCall, value: Any) -> Change:
    """Correct the sizes of ``view``, ``expand``, ``zeros`` and similar ops."""
    name = "size" if "size" in call.given else "shape"
    if name not in call.given:  # x.view(dtype)
        return {}
    given = call.given[name]
    if call.name in ("view", "reshape", "_unsafe_view") and isinstance(given, (tuple, list)):
        _hold_layout(numbers, call, value, given)
    return {name: _new_sizes(numbers, call, value, given)}


def _hold_layout(
    numbers: NewNumbers, call: OpCall, value: Tensor, given: Sequence[Any], start: int = 0
) -> None:
    """Make the graph check axes whose size decides how literal sizes divide the channels.

    A size of the result is open if it is -1 or follows from the input. Literals before an open
    size take positions from the front, literals behind it from the back. They take whole channels,
    or the same part of each channel, only while the axes that they take from keep the example's
    sizes. With other sizes the open axis would mix channels with other positions.

    ``given`` are the sizes of the result's axes from ``start`` on.
    """
    x, old = call.given["self"], call.ran["self"]
    new_shape = numbers.survivors.shape(old)
    if new_shape == list(old.shape):
        return
    for ins, outs in reshape_blocks(old.shape, value.shape):
        lost = [d for d in ins if new_shape[d] != old.shape[d]]
        sizes = [given[d - start] if start <= d < start + len(given) else None for d in outs]
        is_literal = [isinstance(size, int) and size != -1 for size in sizes]
        held: list[int] = []
        if all(is_literal):
            held = ins if -1 in given else []
        elif lost and any(is_literal):
            held = _divided_axes(numbers, call, value, (ins, outs), lost, is_literal)
        for d in dict.fromkeys(held):
            numbers.hold_positions(x, d)


def _divided_axes(
    numbers: NewNumbers,
    call: OpCall,
    value: Tensor,
    block: tuple[list[int], list[int]],
    lost: list[int],
    is_literal: list[bool],
) -> list[int]:
    """Return the axes of a reshape's operand whose sizes decide what its literal sizes take.

    ``block`` has the axes of the operand and of the result, ``lost`` the operand's axes that
    shrink, and ``is_literal`` tells which sizes of the result are literals.
    """
    ins, outs = block
    first = is_literal.index(False)
    last = len(is_literal) - 1 - is_literal[::-1].index(False)
    has_literal_between = any(is_literal[first:last])
    held = [d for d in ins if d < lost[-1]] if first or has_literal_between else []
    fixed = 1
    for d in reversed(ins):
        if not numbers.extents.is_fixed(call.given["self"], d):
            break
        fixed *= call.ran["self"].shape[d]
    behind = math.prod(value.shape[d] for d in outs[last + 1 :])
    if has_literal_between or fixed % behind:
        held += [d for d in ins if d >= lost[0]]
    return held


def unflatten_literals(numbers: NewNumbers, call: OpCall, value: Any) -> Change:
    """Correct the sizes of ``unflatten``."""
    start, given = call.ran["dim"] % call.ran["self"].dim(), call.given["sizes"]
    if isinstance(given, (tuple, list)):
        _hold_layout(numbers, call, value, given, start)
    return {"sizes": _new_sizes(numbers, call, value, given, start)}


def repeat_literals(numbers: NewNumbers, call: OpCall, value: Any) -> Change:
    """Correct the numbers of repetitions of ``repeat`` and ``tile``."""
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


def repeat_interleave_literals(numbers: NewNumbers, call: OpCall, value: Any) -> Change:
    """Correct the number of repetitions of ``repeat_interleave``."""
    if (
        call.ran.get("dim") is None
        or not isinstance(call.ran["repeats"], int)
        or "output_size" in call.given
    ):
        return {}
    axis = call.ran["dim"] % value.dim()
    before, after = (numbers.survivors.shape(tensor)[axis] for tensor in (call.ran["self"], value))
    return {"repeats": _scaled(numbers, call.given["repeats"], after // before)}


def split_literals(numbers: NewNumbers, call: OpCall, value: Any) -> Change:
    """Replace an op like ``split`` by a ``torch.split`` with the surviving size of each part."""
    tensor = call.ran["self"]
    axis = split_dim(call.name, call.ran)
    if numbers.survivors.rows(tensor, axis) is None:
        return {}
    bounds = [a for name, a in call.given.items() if name not in ("self", "dim")]
    numbers.hold_positions(call.given["self"], axis, *bounds)
    ends = [0]
    for part in value:
        ends.append(ends[-1] + part.shape[axis])
    sizes = [_survivors_between(numbers, tensor, axis, a, b) for a, b in itertools.pairwise(ends)]
    # a negative dim stays negative, because axes before it may be dropped
    dim = call.given.get("dim", axis)
    new_dim = axis - tensor.dim() if isinstance(dim, int) and dim < 0 else axis
    return torch.split, (call.given["self"], sizes, new_dim), {}


def narrow_literals(numbers: NewNumbers, call: OpCall, value: Any) -> Change:
    """Correct start and length of ``narrow``."""
    tensor = call.ran["self"]
    axis, first = call.ran["dim"] % tensor.dim(), call.ran["start"]
    if isinstance(first, Tensor) or numbers.survivors.rows(tensor, axis) is None:
        return {}
    numbers.hold_positions(call.given["self"], axis, call.given["start"], call.given["length"])
    first %= tensor.shape[axis]
    count = _survivors_between(numbers, tensor, axis, first, first + call.ran["length"])
    return {"start": _survivors_between(numbers, tensor, axis, 0, first), "length": count}


def slices_literals(numbers: NewNumbers, call: OpCall, value: Any) -> Change:
    """Correct start and end of ``slice``."""
    part = slice(*(call.given.get(name) for name in ("start", "end", "step")))
    axis = call.ran["dim"] % call.ran["self"].dim()
    new = index_literal(numbers, call.given["self"], axis, part)
    bounds = {"start": new.start, "end": new.stop}
    return {name: bound for name, bound in bounds.items() if name in call.given}


def select_literals(numbers: NewNumbers, call: OpCall, value: Any) -> Change:
    """Correct the index of ``select``."""
    axis = call.ran["dim"] % call.ran["self"].dim()
    return {"index": _new_position(numbers, call.given["self"], axis, call.given["index"])}


def index_literal(numbers: NewNumbers, x: fx.Node, axis: int, part: Any) -> Any:
    """Return the index of one axis in the smaller model.

    Parameters
    ----------
    numbers:
        The numbers of the new graph.
    x:
        The indexed tensor.
    axis:
        The axis.
    part:
        Its index in the original: a slice, an integer, or anything else, which stays.
    """
    if isinstance(part, slice):
        return _new_slice(numbers, x, axis, part)
    old = numbers.old_value(part)
    if isinstance(old, int) and not isinstance(old, bool):
        return _new_position(numbers, x, axis, part)
    return part


def _new_slice(numbers: NewNumbers, x: fx.Node, axis: int, part: slice) -> slice:
    """Return the slice of an axis that takes the survivors of the original's slice."""
    tensor = numbers.old_value(x)
    if numbers.survivors.rows(tensor, axis) is None:
        return part
    bounds = (numbers.old_value(bound) for bound in (part.start, part.stop, part.step))
    start, stop, step = slice(*bounds).indices(tensor.shape[axis])
    if step != 1 or part.start is not None or part.stop is not None:
        numbers.hold_positions(x, axis, part.start, part.stop)
    if step != 1:
        return part
    new_start = new_stop = None
    if part.start is not None:
        new_start = _survivors_between(numbers, tensor, axis, 0, start)
    if part.stop is not None:
        new_stop = _survivors_between(numbers, tensor, axis, 0, max(start, stop))
    return slice(new_start, new_stop, part.step)


def _new_position(numbers: NewNumbers, x: fx.Node, axis: int, index: Any) -> Any:
    """Return the index of a position among the survivors of an axis."""
    tensor = numbers.old_value(x)
    if numbers.survivors.rows(tensor, axis) is None:
        return index
    numbers.hold_positions(x, axis, index)
    return _survivors_between(
        numbers, tensor, axis, 0, numbers.old_value(index) % tensor.shape[axis]
    )


def roll_literals(numbers: NewNumbers, call: OpCall, value: Any) -> Change:
    """Correct the shifts of ``roll`` to the number of survivors that wrap around."""
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


def pad_literals(numbers: NewNumbers, call: OpCall, value: Any) -> Change:
    """Correct the amounts of ``pad`` on axes that shrink."""
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


def padding(survivors: SurvivorCounts, padded: Tensor, amounts: Sequence[int]) -> list[int]:
    """Return the surviving amounts of a padding.

    Parameters
    ----------
    survivors:
        The surviving elements of the original's tensors.
    padded:
        The result of the padding in the original.
    amounts:
        The original's amounts in pairs, for the last dimension first, as ``F.pad`` takes them.
    """
    new = list(amounts)
    for i in range(len(amounts) // 2):
        axis, (before, after) = padded.dim() - 1 - i, amounts[2 * i : 2 * i + 2]
        size = padded.shape[axis]
        if (before or after) and survivors.rows(padded, axis) is not None:
            spans = ((0, before), (size - after, size))
            new[2 * i : 2 * i + 2] = [survivors.count(padded, axis, *span) or 0 for span in spans]
    return new


def last_norm_literals(numbers: NewNumbers, call: OpCall, value: Any) -> Change:
    """Correct the normalized shape of ``layer_norm`` and ``rms_norm``."""
    first = value.dim() - len(call.ran["normalized_shape"])
    return {
        "normalized_shape": _new_sizes(numbers, call, value, call.given["normalized_shape"], first)
    }


def group_norm_literals(numbers: NewNumbers, call: OpCall, value: Any) -> Change:
    """Correct the number of groups of a ``group_norm`` with one group per channel."""
    x = call.ran["input"]
    if call.ran["num_groups"] != x.shape[1]:
        return {}
    channels = numbers.survivors.shape(x)[1]
    return {"num_groups": _scaled(numbers, call.given["num_groups"], channels)}


def convolution_literals(numbers: NewNumbers, call: OpCall, value: Any) -> Change:
    """Correct the number of groups of a convolution."""
    x, w, groups = call.ran["input"], call.ran["weight"], call.ran["groups"]
    if groups == 1:
        return {}
    channels = numbers.survivors.shape(x)[x.dim() - w.dim() + 1]
    if call.ran.get("transposed", "transpose" in call.name):
        new = channels if groups == w.shape[0] else groups
    else:
        new = channels // numbers.survivors.shape(w)[1]
    return {"groups": _scaled(numbers, call.given["groups"], new)}


def channel_shuffle_literals(numbers: NewNumbers, call: OpCall, value: Any) -> Change:
    """Correct the number of groups of ``channel_shuffle``."""
    return {"groups": shuffled_groups(numbers.survivors, call.ran["self"], call.ran["groups"])}


def shuffled_groups(survivors: SurvivorCounts, tensor: Tensor, groups: int) -> int:
    """Return the number of groups in which the survivors of the channel axis are shuffled.

    Either whole groups are removed, which leaves fewer groups, or a part of each group, which
    leaves their number.

    Parameters
    ----------
    survivors:
        The surviving elements of the original's tensors.
    tensor:
        The shuffled tensor in the original, with channels on axis 1.
    groups:
        The original's number of groups.
    """
    rows = survivors.rows(tensor, 1)
    if rows is None:
        return groups
    split = rows.all(axis=0).reshape(groups, -1)
    is_whole = split.all(axis=1) | ~split.any(axis=1)  # kept or removed as a whole
    return int(split.any(axis=1).sum()) if is_whole.all() else groups


def attention_literals(numbers: NewNumbers, call: OpCall, value: Any) -> Change:
    """Set the scale of attention to the original's, which follows from the original's width."""
    query, tensor = call.given["query"], call.ran["query"]
    if call.ran["scale"] is not None or numbers.survivors.shape(tensor)[-1] == tensor.shape[-1]:
        return {}
    width, scale = numbers.original_size(query, tensor.dim() - 1), tensor.shape[-1] ** -0.5
    if isinstance(width, fx.Node):
        scale = numbers.create("call_function", operator.pow, (width, -0.5), {}, scale)
    return {"scale": scale}


def _survivors_between(
    numbers: NewNumbers, tensor: Tensor, axis: int, start: int, stop: int
) -> int:
    """Return how many positions in ``start:stop`` of an axis survive."""
    count = numbers.survivors.count(tensor, axis, start, stop)
    return stop - start if count is None else count
