"""Runs a traced graph on labels: node by node, so that every fx node is seen as the ATen ops it
executes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune import rules, shapes
from fxprune.contents import tensors_of
from fxprune.errors import RewriteError
from fxprune.macs import op_macs
from fxprune.rules import Context, Contraction, Event
from fxprune.rules.normalisation import FUSED
from fxprune.trace import execute

__all__ = ["LabelMode", "keeps_order", "run_node", "seen_whole", "takes_statistics"]


# Movements whose arguments are numbers of dimensions and sizes along axes of positions: no number
# in them describes a channel.
_IN_ORDER = frozenset(
    {
        "permute",
        "transpose",
        "t",
        "numpy_T",
        "mT",
        "movedim",
        "moveaxis",
        "swapaxes",
        "swapdims",
        "unsqueeze",
    }
    | {"alias", "detach", "clone", "contiguous", "cat", "concat", "concatenate", "stack", "unbind"}
    | {
        f"{kind}_pool{n}d"
        for kind in ("avg", "max", "adaptive_avg", "adaptive_max")
        for n in (1, 2, 3)
    }
)
_WITH_NUMBERS = frozenset({"glu", "group_norm", "layer_norm", "rms_norm"})
"""Ops of the other families that have a size among their arguments, or cut a dimension in
halves.
"""


class LabelMode(shapes.DispatchMode):
    """Sees every ATen op on meta tensors and lets its rule carry the labels on.

    Enter it together with ``torch.inference_mode()``, under which composite ops arrive whole.
    """

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags:
            self.context.writes.add(self.context.node)
        if seen_whole(func):
            self.context.noted = ()
            out = self._execute(func, args, kwargs)
            self.context.carry_causes(
                shapes.tensors_in(args, kwargs), shapes.tensors_in((out,), {})
            )
            if takes_statistics(func) or torch.Tag.nondeterministic_seeded in func.tags:
                self.context.events.append(
                    Event(self.context.node, func, out, self.context.noted, self)
                )
            if self.context.weights is not None:
                _follow_weights(self.context, self.context.weights, func, args, kwargs, out)
            # whose sizes are no numbers
            nested = any(tensor.is_nested for tensor in shapes.tensors_in(args, kwargs))
            if not nested and op_macs(func, args, kwargs, out):
                self.context.contractions.append(
                    Contraction(self.context.node, func, args, kwargs, out)
                )
            return out
        with self:
            return func.decompose(*args, **kwargs)

    def _execute(self, func: Any, args: Any, kwargs: Any) -> Any:
        ctx = self.context
        ctx.ran.setdefault(ctx.node, []).append((func, args, kwargs))
        rule = rules.find(func)
        tensors = shapes.tensors_in(args, kwargs)
        labelled = any(t in ctx.records for t in tensors)
        if not labelled and (
            rule is None or not (rule.family == "creation" or _makes_axes(func, tensors))
        ):
            return shapes.run(func, args, kwargs)
        if not tensors:
            out = (
                shapes.run(func, args, {**kwargs, "device": shapes.META})
                if _makes_floats(kwargs)
                else func(*args, **kwargs)
            )
        else:
            out = shapes.run(func, args, kwargs)
        if rule is None:
            ctx.positional.add(ctx.node)
            for tensor in tensors:
                ctx.pin_all(ctx.fields(tensor), f"{func._schema.name} has no rule")
        elif labelled or out.is_floating_point():
            bound = rules.bind(func, args, kwargs)
            self._follow(rule, func, bound, out)
            if not keeps_order(ctx, func, rule, bound):
                ctx.positional.add(ctx.node)
            if rule.family in ("movement", "resampling") and ctx.node in ctx.positional:
                ctx.moved.add(ctx.node)
        return out

    def _follow(self, rule: rules.Rule, func: Any, bound: dict[str, Any], out: Any) -> None:
        """Let an op's rule say what its result carries."""
        ctx = self.context
        if rule.of_user:
            ctx.trusted.add(func._schema.name)
        try:
            rule.handler(ctx, func, bound, out)
        except Exception as error:
            # A node that is named is tried again without pruning what enters it; who wrote a rule
            # wants to see that it fails.
            node = "" if rule.of_user else ctx.node
            raise RewriteError(
                f"the rule of {func._schema.name} failed at {ctx.node!r}: {error!r}", node
            ) from error


def _follow_weights(
    ctx: Context, weights: Context, func: Any, args: Any, kwargs: Any, out: Any
) -> None:
    """Carry the labels of parameters on to what is computed from parameters alone: a product with
    it reads their axes.
    """
    tensors = shapes.tensors_in(args, kwargs)
    if not tensors or not all(map(ctx.of_weights, tensors)):
        return
    for tensor in tensors:
        if tensor not in weights.records:
            known = ctx.records[tensor]
            weights.parameter(tensor, known.name, known.axes)
    rule = rules.find(func)
    if rule is not None:
        rule.handler(weights, func, rules.bind(func, args, kwargs), out)
    for leaf in shapes.tensors_in((out,), {}):
        weights.records.setdefault(leaf, rules.Record(leaf, []))


def keeps_order(ctx: Context, func: Any, rule: rules.Rule, bound: Mapping[str, Any]) -> bool:
    """Whether an op commutes with removal: run on the survivors, with the same arguments, it gives
    the survivors of what it gave.

    It does not where it tells the positions of an axis that can shrink apart, by a size or an
    index.
    """
    name = func._schema.name.removeprefix("aten::").removesuffix("_copy")
    if rule.family in ("movement", "resampling"):
        own = (
            {dim for f in ctx.fields(bound["self"]) for dim in f.dims}
            if isinstance(bound.get("self"), Tensor)
            else set()
        )
        if name in ("constant_pad_nd", "pad"):
            rank = bound["self"].dim()
            return not own & {rank - 1 - i // 2 for i, amount in enumerate(bound["pad"]) if amount}
        if name == "squeeze":  # of a channel axis with one survivor nothing would be left
            dims = bound.get("dim")
            named = (
                own
                if dims is None
                else {d % bound["self"].dim() for d in ([dims] if isinstance(dims, int) else dims)}
            )
            return not own & named
        return name in _IN_ORDER
    if rule.family == "convolution":
        return bool(
            bound["groups"] == 1
            or bound["groups"] == bound["weight"].shape[0] == bound["input"].shape[1]
        )
    return (
        rule.family in ("pointwise", "contraction", "normalisation", "reduction")
        and name not in _WITH_NUMBERS
    )


def seen_whole(func: Any) -> bool:
    """Whether an op is seen as one: it has a rule, or nothing smaller is known of it."""
    return rules.find(func) is not None or not shapes.is_composite(func)


def takes_statistics(func: Any) -> bool:
    """Whether an op takes statistics over the surviving elements only
    (:meth:`fxprune.rules.Context.statistic`).
    """
    return func._schema.name.removeprefix("aten::") in FUSED


def _makes_axes(func: Any, tensors: list[Tensor]) -> bool:
    """Whether an op makes large dimensions of small ones, which shrink with what they meet as
    those of ``zeros`` do.
    """
    return func._schema.name in _MAKING and all(
        t.is_meta and t.is_floating_point() for t in tensors
    )


_MAKING = frozenset(
    f"aten::{name}"
    for name in ("expand", "expand_copy", "broadcast_to", "repeat", "tile", "repeat_interleave")
)


def _makes_floats(kwargs: Mapping[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    return dtype is None or dtype.is_floating_point


def run_node(
    context: Context,
    root: nn.Module,
    node: fx.Node,
    value_of: Callable[[fx.Node], Any],
    prefix: str = "",
) -> Any:
    """Execute one node under labels and return its value.

    Raises
    ------
    RewriteError
        If the node cannot be executed; it carries the node's name.
    """
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    context.node, context.target = prefix + node.name, node.target
    try:
        with LabelMode(context):
            return execute(root, node, args, kwargs)
    except RewriteError:
        raise
    except Exception as error:
        sizes = [tuple(leaf.shape) for leaf in tensors_of((args, kwargs))]
        raise RewriteError(
            f"node {node.name!r} ({node.target}) fails on shapes {sizes}: {error}", node.name
        ) from error
