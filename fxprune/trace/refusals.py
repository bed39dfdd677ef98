"""What a graph cannot do, found in one that was traced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx, nn

from fxprune.common.dispatch import holds_tensors
from fxprune.errors import ChanceError, FxpruneError, TraceError
from fxprune.trace.again import does_the_same, each_draws, followed_call, on_shapes
from fxprune.trace.checkpoints import overwrites_what_is_kept
from fxprune.trace.meta_copy import (
    MetaCopy,
)
from fxprune.trace.module_state import (
    AttributeChange,
    Attributes,
    carried,
    follows_inputs,
    same_graph,
)
from fxprune.trace.reach import AGAIN, Reach
from fxprune.trace.traced import DRAWS, Trace
from fxprune.trace.tracer import Tracer

__all__ = ["refuse_chance", "refuse_checkpoints", "refuse_left", "refuse_memory", "refuse_state"]


def refuse_left(left: Iterable[fx.Node], root: nn.Module) -> None:
    """What forward leaves outside of its modules is an effect, which a graph has not; a table that
    follows from sizes is a cache.

    Raises
    ------
    TraceError
        If values are left there that follow from those of the inputs.
    """
    for node in left:
        if follows_inputs(node):
            raise TraceError(
                f"forward of this {type(root).__name__} leaves {node.name!r} outside of its "
                "modules, in a list or a variable say: a graph would not do that. Hand it out as "
                "a result, or keep that line inside a module of its own."
            )


def refuse_checkpoints(tracer: Tracer, meta_copy: MetaCopy) -> None:
    """What a checkpoint computes again before the backward pass reads it, a graph must not have
    overwritten.

    Raises
    ------
    TraceError
        If it has.
    """
    if tracer.checkpoints and overwrites_what_is_kept(tracer.graph, meta_copy):
        raise TraceError(
            "forward writes in place into what the backward pass reads. Its checkpoint (at "
            f"{tracer.checkpoints[0]}) computes that again, which a graph does not. Use an "
            "operation that gives a new tensor."
        )


def refuse_memory(graph: fx.Graph, assigned: set[str], root: nn.Module) -> None:
    """A tensor that forward keeps for its next call is state, which a graph has not; one that only
    lends its size is a cache.

    Raises
    ------
    TraceError
        If values are read that a call before would have set.
    """
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in assigned:
            for user in node.users:
                if holds_tensors(user.meta.get("val")):
                    raise TraceError(
                        f"forward of this {type(root).__name__} reads {node.target!r} and sets "
                        "it for its next call, which a graph cannot do. Hand it in and out as an "
                        "argument, or make it a buffer and write into it in place."
                    )


def refuse_state(first: Trace, state: Sequence[AttributeChange]) -> None:
    """What the first call has left on the modules, where it now is, must not lead to another
    graph.

    Raises
    ------
    TraceError
        If a second call does something else, or leaves something else behind.
    """
    meta_copy, attributes, made = (
        first.meta_copy,
        Attributes(first.meta_copy.model),
        frozenset[str](),
    )
    try:
        second, made = followed_call(
            Tracer(meta_copy, first.args, first.kwargs, first.training, on_shapes), meta_copy
        )
        same = same_graph(first.graph, second.graph, first.constants, second.constants)
        moving = [
            change
            for change in carried(attributes.changes(made))
            if not holds_tensors(change.after)
        ]
    except FxpruneError:
        same, moving = False, []
    finally:
        attributes.restore(made)
    if not same or moving:
        names = ", ".join(sorted(repr(change.path) for change in state))
        raise TraceError(
            f"forward of this {type(meta_copy.model).__name__} does something else when it is "
            f"called again, because it sets {names}: a graph is one call. Hand it in and out as "
            "an argument, or make it a buffer and write into it in place."
        )


def refuse_chance(first: Trace, reach: Reach) -> None:
    """What Python computes anew at each call is no constant of a graph.

    Raises
    ------
    ChanceError
        If a generator of the model's own is drawn from, or if a further call does something else.
    """
    meta_copy = first.meta_copy
    if reach.drawn and each_draws(first):
        reach.put_back()
        raise ChanceError(DRAWS.format(type(meta_copy.model).__name__, "a generator of its own"))
    reach.put_back()
    for _ in range(AGAIN):
        if not reach.may_differ:
            break  # it has left nothing behind, or what it found was all there
        reach = Reach(meta_copy.model)
        with reach.watching():
            same = does_the_same(first)
        if not same:
            raise ChanceError(
                f"forward of this {type(meta_copy.model).__name__} does something else when it is "
                "called again, with the same inputs: by a clock, by random numbers from outside "
                "of torch, or by what an earlier call has left behind outside of its modules. A "
                "graph is one call. Hand it in as an argument, or keep that line inside a module "
                "of its own."
            )
