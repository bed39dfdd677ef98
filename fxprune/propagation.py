"""Runs a traced graph on labels: node by node, so that every fx node is seen as the ATen ops it executes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxprune import rules, shapes
from fxprune.errors import RewriteError
from fxprune.macs import op_macs
from fxprune.rules import Context, Contraction
from fxprune.trace import execute

__all__ = ["IN_ORDER", "LabelMode", "run_node", "seen_whole"]


# Movements that keep survivors in order whatever is removed: nothing in them is a number that describes a position.
IN_ORDER = frozenset(
    {"permute", "transpose", "t", "numpy_T", "mT", "movedim", "swapaxes", "unsqueeze", "squeeze", "alias", "detach", "clone"}
    | {"contiguous", "expand", "expand_as", "cat", "stack", "unbind", "constant_pad_nd", "pad"}
    | {f"{kind}_pool{n}d" for kind in ("avg", "max", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)}
)


class LabelMode(TorchDispatchMode):
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
            out = self._execute(func, args, kwargs)
            if self.context.weights is not None:
                _follow_weights(self.context, self.context.weights, func, args, kwargs, out)
            if op_macs(func, args, kwargs, out):
                self.context.contractions.append(Contraction(self.context.node, func, args, kwargs, out))
            return out
        with self:
            return func.decompose(*args, **kwargs)

    def _execute(self, func: Any, args: Any, kwargs: Any) -> Any:
        ctx = self.context
        rule = rules.find(func)
        tensors = shapes.tensors_in(args, kwargs)
        labelled = any(t in ctx.records for t in tensors)
        if not labelled and (rule is None or rule.family != "creation"):
            return shapes.run(func, args, kwargs)
        if not tensors:
            out = shapes.run(func, args, {**kwargs, "device": shapes.META}) if _makes_floats(kwargs) else func(*args, **kwargs)
        else:
            out = shapes.run(func, args, kwargs)
        if rule is None:
            ctx.positional.add(ctx.node)
            for tensor in tensors:
                ctx.pin_all(ctx.fields(tensor), f"{func._schema.name} has no rule")
        elif labelled or out.is_floating_point():
            bound = rules.bind(func, args, kwargs)
            self._follow(rule, func, bound, out)
            _note_positions(ctx, func, rule, bound)
        return out

    def _follow(self, rule: rules.Rule, func: Any, bound: dict[str, Any], out: Any) -> None:
        """Let an op's rule say what its result carries."""
        ctx = self.context
        if rule.of_user:
            ctx.trusted.add(func._schema.name)
        try:
            rule.handler(ctx, func, bound, out)
        except Exception as error:
            # A node that is named is tried again without pruning what enters it; who wrote a rule wants to see that it fails.
            node = "" if rule.of_user else ctx.node
            raise RewriteError(f"the rule of {func._schema.name} failed at {ctx.node!r}: {error!r}", node) from error


def _follow_weights(ctx: Context, weights: Context, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Carry the labels of parameters on to what is computed from parameters alone: a product with it reads their axes."""
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


def _note_positions(ctx: Context, func: Any, rule: rules.Rule, bound: Mapping[str, Any]) -> None:
    """Note the nodes in which an op tells the positions of an axis apart, by a size or an index.

    All other ops commute with removal: run on the survivors, they give the survivors of what they gave before.
    """
    name = func._schema.name.removeprefix("aten::")
    if rule.family in ("movement", "resampling"):
        if name in IN_ORDER:
            return
        ctx.moved.add(ctx.node)
    elif rule.family == "convolution":
        if bound["groups"] == 1 or bound["groups"] == bound["weight"].shape[0] == bound["input"].shape[1]:
            return
    elif rule.family in ("pointwise", "contraction", "normalisation", "reduction") and name not in ("glu", "group_norm"):
        return
    ctx.positional.add(ctx.node)


def seen_whole(func: Any) -> bool:
    """Whether an op is seen as one: it has a rule, or nothing smaller is known of it."""
    return rules.find(func) is not None or not _composite(func)


@functools.cache
def _composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def _makes_floats(kwargs: Mapping[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    return dtype is None or dtype.is_floating_point


def run_node(context: Context, root: nn.Module, node: fx.Node, value_of: Callable[[fx.Node], Any], prefix: str = "") -> Any:
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
        sizes = [tuple(leaf.shape) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        raise RewriteError(f"node {node.name!r} ({node.target}) fails on shapes {sizes}: {error}", node.name) from error
