"""Trace a whole model, with a second call if the first one changes the model's attributes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, fx

from fxprune.common.hooks import refuse_hooks
from fxprune.common.identity import IdentitySet
from fxprune.inputs import Call
from fxprune.trace.again import (
    drop_unused_sizes,
    first_other_node,
    followed_call,
    nodes_held,
    on_shapes,
    with_keys,
)
from fxprune.trace.caches import forgotten_caches
from fxprune.trace.meta_copy import (
    MetaCopy,
    set_mode,
)
from fxprune.trace.module_state import (
    Attributes,
    assigned,
    carried,
    keep,
)
from fxprune.trace.refusals import (
    refuse_chance,
    refuse_checkpoints,
    refuse_left,
    refuse_memory,
    refuse_state,
)
from fxprune.trace.resized import hold_inputs, hold_ranks
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

    def follow(arguments: tuple[Any, Any]) -> tuple[fx.Graph, dict[str, Tensor]]:
        found, _ = followed_call(Tracer(meta_copy, *arguments, training, on_shapes), meta_copy)
        return found.graph, found.constants

    reach = meta_copy.reached.now()
    with forgotten_caches(
        meta_copy.model,
        reach,
        Call(args, kwargs),
        follow,
        lambda tensor: meta_copy.real.get(tensor, tensor),
    ):
        tracer = Tracer(meta_copy, args, kwargs, training, watch or on_shapes)
        try:
            with reach.watching():
                result, made = followed_call(tracer, meta_copy)
            refuse_left(result.left, meta_copy.model)
            refuse_checkpoints(tracer, meta_copy)
            refuse_hooks(meta_copy.model, below=True)
            changes = [*attributes.changes(made)]
            refuse_memory(result.graph, assigned(changes), meta_copy.model)
            state = carried(changes)
            if state:
                attributes.restore(made)
                keep(state)
                meta_copy.reached.begin_anew()
                refuse_state(result, state)
                result.not_set = tuple(change.path for change in state if change.nodes)
            attributes.restore(made)
            if state:
                meta_copy.reached.begin_anew()
            changes, state = [], []
            _hold_lookups(tracer, result)
            refuse_left(nodes_held(tracer), meta_copy.model)
            refuse_chance(result, reach)
        except BaseException:
            attributes.restore()
            raise
        for hold in (hold_inputs, hold_ranks):
            hold(tracer, lambda other: first_other_node(result, other))
        return result


def _hold_lookups(tracer: Tracer, first: Trace) -> None:
    """Guard the numbers that forward looked up and did not find.

    A number is not guarded if forward fills the table itself: the number is then found in a second
    call, with forward's own keys still in the table.
    """
    missed = first.missed
    if first.filled:
        again = with_keys(first)
        if again is not None and len(again) == len(tracer.lookups):
            pairs = zip(tracer.lookups, again, strict=True)
            known = IdentitySet(own for own, other in pairs if other.answered)
            missed = [own for own in missed if own not in known]
    for own in {own.node: own for own in missed}.values():
        tracer.hold_looked_up(own)
    for node in first.graph.nodes:
        node.meta.pop("looked_up", None)
    drop_unused_sizes(first.graph)
