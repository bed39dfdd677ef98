"""Propagation of labels through ATen operations.

A node of a graph is seen as the ATen operations that it executes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune import ops
from fxprune.common import dispatch
from fxprune.common.contents import tensors_of
from fxprune.errors import RewriteError
from fxprune.ops import Context, Contraction, Event, Kind
from fxprune.ops.macs import op_macs
from fxprune.ops.running import run
from fxprune.trace import execute

__all__ = ["LabelMode", "is_seen_whole", "keeps_order", "run_node", "takes_statistics"]


class LabelMode(dispatch.DispatchMode):
    """A dispatch mode that intercepts every ATen op and propagates labels by the op's rule.

    Enter it together with ``torch.inference_mode()``, under which composite ops arrive whole.

    Parameters
    ----------
    context:
        Holds the labels and records what ran.
    """

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags:
            self.context.found.writes.add(self.context.node)
        if is_seen_whole(func):
            self.context.found.current_statistic = ()
            out = self._execute(func, args, kwargs)
            self.context.note_causes(
                dispatch.tensors_in(args, kwargs), dispatch.tensors_in((out,), {})
            )
            if takes_statistics(func) or torch.Tag.nondeterministic_seeded in func.tags:
                self.context.found.events.append(
                    Event(self.context.node, func, out, self.context.found.current_statistic, self)
                )
            if self.context.weights is not None:
                _follow_weights(self.context, self.context.weights, func, args, kwargs, out)
            # the sizes of nested tensors are no numbers
            nested = any(tensor.is_nested for tensor in dispatch.tensors_in(args, kwargs))
            if not nested and op_macs(func, args, kwargs, out):
                self.context.found.contractions.append(
                    Contraction(self.context.node, func, args, kwargs, out)
                )
            return out
        with self:
            return func.decompose(*args, **kwargs)

    def _execute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op, label its result by its rule, and return the result.

        Labels of operands are pinned if the op has no rule.
        """
        ctx = self.context
        ctx.found.ran.setdefault(ctx.node, []).append((func, args, kwargs))
        row = ops.find_row(func)
        tensors = dispatch.tensors_in(args, kwargs)
        labelled = any(t in ctx.records for t in tensors)
        makes_labels = row is not None and (row.kind is Kind.CREATES or _makes_axes(func, tensors))
        if not labelled and not makes_labels:
            return run(func, args, kwargs)
        out = run(func, args, kwargs) if tensors else _create(func, args, kwargs)
        if row is None:
            ctx.found.positional.add(ctx.node)
            for tensor in tensors:
                ctx.pin_all(ctx.fields(tensor), f"{func._schema.name} has no rule")
        elif labelled or out.is_floating_point():
            self._label_result(row, func, ops.bind(func, args, kwargs), out)
        return out

    def _label_result(self, row: ops.Op, func: Any, bound: dict[str, Any], out: Any) -> None:
        """Label the result of an op, and note whether the op tells positions apart."""
        ctx = self.context
        self._follow(row, func, bound, out)
        if not keeps_order(ctx, row, bound):
            ctx.found.positional.add(ctx.node)
        if row.kind is Kind.MOVES and ctx.node in ctx.found.positional:
            ctx.found.moved.add(ctx.node)

    def _follow(self, row: ops.Op, func: Any, bound: dict[str, Any], out: Any) -> None:
        """Label the result of an op by its rule."""
        ctx = self.context
        if row.of_user:
            ctx.found.custom_rules.add(func._schema.name)
        try:
            row.follow(ctx, func, bound, out)
        except Exception as error:
            # An error that names a node makes the caller try again with the node's operands
            # pinned. The author of a rule has to see it fail, so then no node is named.
            node = "" if row.of_user else ctx.node
            raise RewriteError(
                f"the rule of {func._schema.name} failed at {ctx.node!r}: {error!r}", node
            ) from error


def _create(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an op that makes a tensor from none: without data if that is of floating point."""
    if _makes_floats(kwargs):
        return run(func, args, {**kwargs, "device": dispatch.META})
    return func(*args, **kwargs)


def _follow_weights(
    ctx: Context, weights: Context, func: Any, args: Any, kwargs: Any, out: Any
) -> None:
    """Propagate the labels of parameters to results computed from parameters alone.

    A product with such a result reads the parameters' axes.
    """
    tensors = dispatch.tensors_in(args, kwargs)
    if not tensors or not all(map(ctx.is_from_weights, tensors)):
        return
    for tensor in tensors:
        if tensor not in weights.records:
            known = ctx.records[tensor]
            weights.parameter(tensor, known.name, known.axes)
    row = ops.find_row(func)
    if row is not None:
        row.follow(weights, func, ops.bind(func, args, kwargs), out)
    for leaf in dispatch.tensors_in((out,), {}):
        weights.records.setdefault(leaf, ops.Record(leaf, []))


def keeps_order(ctx: Context, row: ops.Op, bound: Mapping[str, Any]) -> bool:
    """Tell whether an op commutes with removal (see :attr:`fxprune.ops.Op.in_order`).

    Parameters
    ----------
    ctx:
        The labels.
    row:
        The op's row in the table of operations.
    bound:
        The arguments of the call, by name.
    """
    return row.in_order if isinstance(row.in_order, bool) else row.in_order(ctx, bound)


def is_seen_whole(func: Any) -> bool:
    """Tell whether an op is followed as it is, not decomposed.

    That is so if it has a rule, or cannot be decomposed.
    """
    return ops.find_row(func) is not None or not dispatch.is_composite(func)


def takes_statistics(func: Any) -> bool:
    """Tell whether an op takes statistics over the surviving elements only.

    See :meth:`fxprune.ops.Context.statistic`.
    """
    row = ops.exact_row(func)
    return row is not None and row.survivors is not None


def _makes_axes(func: Any, tensors: list[Tensor]) -> bool:
    """Tell whether an op makes large dimensions from small ones.

    Like those of ``zeros``, they shrink with whatever they meet.
    """
    if not ops.has_trait(ops.name_of_op(func), ops.Trait.GROWS):
        return False
    return all(tensor.is_meta and tensor.is_floating_point() for tensor in tensors)


def _makes_floats(kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a call that creates a tensor makes a floating-point one."""
    dtype = kwargs.get("dtype")
    return dtype is None or dtype.is_floating_point


def run_node(
    context: Context,
    root: nn.Module,
    node: fx.Node,
    value_of: Callable[[fx.Node], Any],
    prefix: str = "",
) -> Any:
    """Execute one node, propagate labels through it, and return its value.

    Parameters
    ----------
    context:
        Holds the labels.
    root:
        The module of the graph.
    node:
        The node.
    value_of:
        Gives the value of each node that is an argument.
    prefix:
        Goes before the node's name in what is recorded.

    Raises
    ------
    RewriteError
        If the node cannot be executed; it carries the node's name.
    """
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    try:
        with context.at(prefix + node.name, target=node.target), LabelMode(context):
            return execute(root, node, args, kwargs)
    except RewriteError:
        raise
    except Exception as error:
        sizes = [tuple(leaf.shape) for leaf in tensors_of((args, kwargs))]
        raise RewriteError(
            f"node {node.name!r} ({node.target}) fails on shapes {sizes}: {error}", node.name
        ) from error
