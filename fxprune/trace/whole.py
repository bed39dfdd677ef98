"""Trace a whole model, with a second call if the first one changes the model's attributes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, fx

from fxprune.common.hooks import refuse_hooks
from fxprune.common.identity import IdentitySet
from fxprune.inputs import Call
from fxprune.trace.again import (
    drop_unused_sizes,
    first_different_node,
    live_nodes,
    lookups_with_keys,
    shape_mode,
    trace_call,
)
from fxprune.trace.caches import forgotten_caches
from fxprune.trace.meta_copy import (
    MetaCopy,
    set_mode,
)
from fxprune.trace.module_state import (
    Attributes,
    apply_changes,
    changes_to_next_call,
    traced_paths,
)
from fxprune.trace.reach import Reach
from fxprune.trace.refusals import (
    refuse_chance,
    refuse_checkpoints,
    refuse_memory,
    refuse_state,
    refuse_stored_values,
)
from fxprune.trace.resized import guard_input_sizes, guard_ranks
from fxprune.trace.traced import Trace
from fxprune.trace.tracer import Tracer

__all__ = ["trace"]


def trace(
    meta_copy: MetaCopy,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    training: bool = False,
    watch: Callable[[fx.Node], AbstractContextManager[Any]] | None = None,
) -> Trace:
    """Trace a model on inputs without data.

    Parameters
    ----------
    meta_copy:
        The meta copy of the model.
    args, kwargs:
        The example's arguments, on the meta device (see :func:`example_of`).
    training:
        Whether to trace in training mode instead of evaluation mode.
    watch:
        Called with each node before it runs. It returns the context in which the node runs: a
        dispatch mode that executes ATen operations on meta tensors, and may observe them. Default:
        :class:`~fxprune.ops.running.ShapeMode`.

    Returns
    -------
    Trace
        The graph, and what was learned while tracing.

    Raises
    ------
    TraceError
        If hooks run around a module, if the model branches on values, if a call changes what the
        next call does (see ``module_state``), or if the code cannot be followed. The message names
        the line or the attribute.
    InputError
        If an operation refuses the shapes of the example.
    """
    if any(module.__dict__["training"] is not training for module in meta_copy.model.modules()):
        set_mode(meta_copy.model, training)
    attributes = Attributes(meta_copy.model)
    reach = meta_copy.reached.now()
    follow = functools.partial(_follow, meta_copy, training)
    real = functools.partial(_real, meta_copy)
    with forgotten_caches(meta_copy.model, reach, Call(args, kwargs), follow, real):
        tracer = Tracer(meta_copy, args, kwargs, training, watch or shape_mode)
        result = _checked_trace(tracer, meta_copy, attributes, reach)
        for guard in (guard_input_sizes, guard_ranks):
            guard(tracer, lambda other: first_different_node(result, other))
        return result


def _follow(
    meta_copy: MetaCopy, training: bool, arguments: tuple[Any, Any]
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Trace a call and return its graph and its constants by name."""
    found, _ = trace_call(Tracer(meta_copy, *arguments, training, shape_mode), meta_copy)
    return found.graph, found.constants


def _real(meta_copy: MetaCopy, tensor: Tensor) -> Tensor:
    """Return the tensor of the user's model for one of the meta copy; any other as it is."""
    return meta_copy.real.get(tensor, tensor)


def _checked_trace(
    tracer: Tracer, meta_copy: MetaCopy, attributes: Attributes, reach: Reach
) -> Trace:
    """Trace a call, refuse what a graph cannot do, and restore the attributes of the modules.

    Parameters
    ----------
    tracer:
        The tracer of the call.
    meta_copy:
        The meta copy of the model.
    attributes:
        The attributes of the modules before the call.
    reach:
        What the model's code can reach, as it is before the call.
    """
    try:
        with reach.watching():
            result, made = trace_call(tracer, meta_copy)
        _refuse_effects(tracer, result, attributes, made)
        _guard_lookups(tracer, result)
        refuse_stored_values(live_nodes(tracer), meta_copy.model)
        refuse_chance(result, reach)
    except BaseException:
        attributes.restore()
        raise
    return result


def _refuse_effects(
    tracer: Tracer, result: Trace, attributes: Attributes, made: frozenset[str]
) -> None:
    """Refuse a call with effects that a graph cannot have, and undo its changes to the modules.

    The changes are local to this function, so that no stand-in in them stays alive.

    Parameters
    ----------
    tracer, result:
        The tracer of the call, and its trace.
    attributes:
        The attributes of the modules before the call.
    made:
        The names of the constants that the trace has added, which stay.
    """
    meta_copy = result.meta_copy
    refuse_stored_values(result.stored_nodes, meta_copy.model)
    refuse_checkpoints(tracer, meta_copy)
    refuse_hooks(meta_copy.model, below=True)
    changes = [*attributes.changes(made)]
    refuse_memory(result.graph, traced_paths(changes), meta_copy.model)
    state = changes_to_next_call(changes)
    if state:
        attributes.restore(made)
        apply_changes(state)
        meta_copy.reached.search_again()
        refuse_state(result, state)
        result.not_set = tuple(change.path for change in state if change.nodes)
    attributes.restore(made)
    if state:
        meta_copy.reached.search_again()


def _guard_lookups(tracer: Tracer, first: Trace) -> None:
    """Guard the numbers that forward looked up and did not find.

    A number is not guarded if forward fills the table itself: the number is then found in a second
    call, with forward's own keys still in the table.
    """
    missed = first.missed_lookups
    if first.filled_keys:
        again = lookups_with_keys(first)
        if again is not None and len(again) == len(tracer.lookups):
            pairs = zip(tracer.lookups, again, strict=True)
            found = IdentitySet(lookup for lookup, other in pairs if other.was_compared)
            missed = [lookup for lookup in missed if lookup not in found]
    for lookup in {lookup.node: lookup for lookup in missed}.values():
        tracer.guard_lookup(lookup)
    for node in first.graph.nodes:
        node.meta.pop("looked_up", None)
    drop_unused_sizes(first.graph)
