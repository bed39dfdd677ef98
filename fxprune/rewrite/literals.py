"""Correct the arguments of calls that are right for the original's sizes only.

The new arguments follow from the labels of the call's operands and result. There is one corrector
for each ATen op that needs one, however a model calls it (:mod:`fxprune.ops.calls`). The op's row
in the table holds it (:mod:`fxprune.ops.literals`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from fxprune.moments import counts_removed
from fxprune.ops.calls import NewCall, OpCall
from fxprune.ops.dims import correction_of, reduced_dims
from fxprune.ops.literals import index_literal
from fxprune.ops.table import row_or_empty
from fxprune.rewrite.numbers import Numbers
from fxprune.trace.aliasing import name_of

__all__ = ["correct"]


def correct(
    numbers: Numbers, node: fx.Node, call: OpCall | None, share: tuple[int, int] | None
) -> NewCall:
    """Return the call that a node makes in the smaller model.

    Parameters
    ----------
    numbers:
        The numbers of the graph that is written.
    node:
        A node of the original's graph.
    call:
        The ATen op that the node calls, if it is one.
    share:
        How many of how many elements survive for a statistic, with common factors removed. None if
        all survive, or if the node is no statistic.

    Returns
    -------
    Target, positional and keyword arguments. Arguments that need no correction stay nodes of the
    original's graph.
    """
    if name_of(node) in ("getitem", "setitem"):
        return _item(numbers, node)
    if share is not None and counts_removed(node.target):
        return _counting_again(node, share)
    if call is None:
        return node.target, node.args, node.kwargs
    op = row_or_empty(call.name)
    if share is not None and op.counting is not None:
        return _counting(op.counting, call, share)
    if op.corrects is None:
        return node.target, node.args, node.kwargs
    change = op.corrects(numbers, call, node.meta["val"])
    return change if isinstance(change, tuple) else call.with_(change)


def _item(numbers: Numbers, node: fx.Node) -> NewCall:
    """Correct the index of ``x[index]`` or ``x[index] = value``."""
    x: Any = node.args[0]
    given, tensor = node.args[1], numbers.old_value(x)
    if not isinstance(tensor, Tensor):
        return node.target, node.args, node.kwargs
    parts = list(given) if isinstance(given, (tuple, list)) else [given]
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
        new.append(index_literal(numbers, x, axis, part))
        axis += 1
    packed = tuple(new) if isinstance(given, (tuple, list)) else new[0]
    return node.target, (x, packed, *node.args[2:]), node.kwargs


def _counting(function: Callable[..., Any], call: OpCall, share: tuple[int, int]) -> NewCall:
    """Replace a variance or standard deviation by one that counts the removed zeros.

    ``function`` is the one of :mod:`fxprune.moments`.
    """
    dims, keepdim = reduced_dims(call.ran, call.ran["self"])
    correction = float(correction_of(call.ran))
    return function, (call.given["self"], sorted(dims), correction, keepdim, *share), {}


def _counting_again(node: fx.Node, share: tuple[int, int]) -> NewCall:
    """Correct a statistic of :mod:`fxprune.moments` again, for a model that was pruned before."""
    values: tuple[Any, ...] = node.args
    *rest, kept, total = values
    return node.target, (*rest, kept * share[0], total * share[1]), node.kwargs
