"""Checks of a traced graph for effects that a graph cannot have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx, nn

from fxprune.common.dispatch import holds_tensors
from fxprune.errors import ChanceError, FxpruneError, TraceError
from fxprune.trace.again import draws_every_time, repeats_same_graph, shape_mode, trace_call
from fxprune.trace.checkpoints import overwrites_what_is_kept
from fxprune.trace.meta_copy import (
    MetaCopy,
)
from fxprune.trace.module_state import (
    AttributeChange,
    Attributes,
    changes_to_next_call,
    follows_inputs,
    same_graph,
)
from fxprune.trace.reach import REPEATED_CALLS, Reach
from fxprune.trace.traced import DRAWS, Trace
from fxprune.trace.tracer import Tracer

__all__ = [
    "refuse_chance",
    "refuse_checkpoints",
    "refuse_memory",
    "refuse_state",
    "refuse_stored_values",
]


def refuse_stored_values(left: Iterable[fx.Node], root: nn.Module) -> None:
    """Refuse a forward that stores values outside of its modules: that is a side effect.

    Values that depend on sizes only are allowed: they are a cache.

    Parameters
    ----------
    left:
        The nodes whose values forward has stored.
    root:
        The traced module, for the message.

    Raises
    ------
    TraceError
        If a stored value depends on the values of the inputs.
    """
    for node in left:
        if follows_inputs(node):
            raise TraceError(
                f"forward of this {type(root).__name__} leaves {node.name!r} outside of its "
                "modules, in a list or a variable say: a graph would not do that. Hand it out as "
                "a result, or keep that line inside a module of its own."
            )


def refuse_checkpoints(tracer: Tracer, meta_copy: MetaCopy) -> None:
    """Refuse a checkpoint whose values the graph overwrites before the backward pass reads them.

    The checkpoint computes these values again; a graph does not.

    Raises
    ------
    TraceError
    """
    if tracer.checkpoints and overwrites_what_is_kept(tracer.graph, meta_copy):
        raise TraceError(
            "forward writes in place into what the backward pass reads. Its checkpoint (at "
            f"{tracer.checkpoints[0]}) computes that again, which a graph does not. Use an "
            "operation that gives a new tensor."
        )


def refuse_memory(graph: fx.Graph, assigned: set[str], root: nn.Module) -> None:
    """Refuse a forward that reads a tensor which it sets for its next call: that is state.

    A tensor of which only the size is read is allowed: it is a cache.

    Parameters
    ----------
    graph:
        The traced graph.
    assigned:
        Paths of the attributes that forward sets to traced values.
    root:
        The traced module, for the message.

    Raises
    ------
    TraceError
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
    """Trace a second call and refuse the model if it differs from the first.

    The second call starts from the attributes that the first call has set on the modules.

    Parameters
    ----------
    first:
        The trace of the first call.
    state:
        The attributes that the first call has set, now on the modules.

    Raises
    ------
    TraceError
        If the second graph differs, or if the second call changes an attribute again.
    """
    if not _is_second_call_same(first):
        names = ", ".join(sorted(repr(change.path) for change in state))
        raise TraceError(
            f"forward of this {type(first.meta_copy.model).__name__} does something else when it "
            f"is called again, because it sets {names}: a graph is one call. Hand it in and out "
            "as an argument, or make it a buffer and write into it in place."
        )


def _is_second_call_same(first: Trace) -> bool:
    """Tell whether a further call gives the same graph and leaves no other state behind."""
    meta_copy = first.meta_copy
    attributes, made = Attributes(meta_copy.model), frozenset[str]()
    tracer = Tracer(meta_copy, first.args, first.kwargs, first.training, shape_mode)
    try:
        second, made = trace_call(tracer, meta_copy)
        if not same_graph(first.graph, second.graph, first.constants, second.constants):
            return False
        changes = changes_to_next_call(attributes.changes(made))
        return all(holds_tensors(change.after) for change in changes)
    except FxpruneError:
        return False
    finally:
        attributes.restore(made)


def refuse_chance(first: Trace, reach: Reach) -> None:
    """Refuse a model whose Python code computes something else at each call.

    Parameters
    ----------
    first:
        The trace of the first call.
    reach:
        What the model's code can reach, as it was before the first call.

    Raises
    ------
    ChanceError
        If the model draws from a generator of its own, or if a further call gives another graph.
    """
    meta_copy = first.meta_copy
    if reach.drawn and draws_every_time(first):
        reach.put_back()
        raise ChanceError(DRAWS.format(type(meta_copy.model).__name__, "a generator of its own"))
    reach.put_back()
    for _ in range(REPEATED_CALLS):
        if not reach.may_differ:
            break  # the call asked nothing outside of Python and left nothing behind
        reach = Reach(meta_copy.model)
        with reach.watching():
            same = repeats_same_graph(first)
        if not same:
            raise ChanceError(
                f"forward of this {type(meta_copy.model).__name__} does something else when it is "
                "called again, with the same inputs: by a clock, by random numbers from outside "
                "of torch, or by what an earlier call has left behind outside of its modules. A "
                "graph is one call. Hand it in as an argument, or keep that line inside a module "
                "of its own."
            )
