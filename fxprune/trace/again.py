"""Trace calls of a model, and compare repeated calls."""

from __future__ import annotations

import gc
import operator
import traceback
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.common.dispatch import holds_tensors
from fxprune.common.random_state import RUNS, undrawn
from fxprune.errors import ChanceError, FxpruneError, TraceError
from fxprune.ops.running import ShapeMode
from fxprune.trace.aliasing import node_of, writes
from fxprune.trace.constants import MADE_FROM_INPUT
from fxprune.trace.context_managers import BOUNDS
from fxprune.trace.decisions import number_decides
from fxprune.trace.lookups import Lookup, unanswered
from fxprune.trace.meta_copy import (
    MetaCopy,
)
from fxprune.trace.module_state import (
    Attributes,
    first_difference,
    follows_inputs,
)
from fxprune.trace.patches import taken_over
from fxprune.trace.reach import Reach, drawing
from fxprune.trace.traced import DRAWS, Trace
from fxprune.trace.tracer import Tracer
from fxprune.trace.user_code import following, takes_functions, user_line

__all__ = [
    "does_the_same",
    "drop_unused_sizes",
    "each_draws",
    "first_other_node",
    "followed_call",
    "nodes_held",
    "on_shapes",
    "with_keys",
]


def with_keys(first: Trace) -> list[Lookup] | None:
    """Return the lookups of a further call that finds the first call's keys in the tables.

    Returns
    -------
    list of Lookup or None
        None if the call fails.
    """
    attributes = Attributes(first.meta_copy.model)
    again = Tracer(first.meta_copy, first.args, first.kwargs, first.training, on_shapes)
    try:
        for table, key in first.filled:
            set.add(table, key) if isinstance(table, set) else dict.__setitem__(table, key, None)
        followed_call(again, first.meta_copy)
    except FxpruneError:
        return None
    finally:
        attributes.restore()
        for table, key in first.filled:
            set.discard(table, key) if isinstance(table, set) else dict.pop(table, key, None)
    return again.lookups


def first_other_node(first: Trace, arguments: tuple[Any, Any]) -> fx.Node | bool | None:
    """Trace another call and return the first node that differs.

    Parameters
    ----------
    first:
        The trace to compare with.
    arguments:
        The other call's ``(args, kwargs)``, on the meta device.

    Returns
    -------
    fx.Node or bool or None
        The node of the first graph where the other graph does something else. None if there is
        none, False if the call fails.
    """
    attributes = Attributes(first.meta_copy.model)
    try:
        other, _ = followed_call(
            Tracer(first.meta_copy, *arguments, first.training, on_shapes), first.meta_copy
        )
    except FxpruneError:
        return False
    finally:
        attributes.restore()
    return first_difference(first.graph, other.graph, first.constants, other.constants)


def on_shapes(node: fx.Node) -> AbstractContextManager[Any]:
    """Return the default context in which a node runs: operations on meta tensors."""
    return ShapeMode()


def followed_call(tracer: Tracer, meta_copy: MetaCopy) -> tuple[Trace, frozenset[str]]:
    """Trace one call.

    Returns
    -------
    result : Trace
        The trace.
    made : frozenset of str
        The names of the constants that the trace has added to the meta copy's module.

    Raises
    ------
    FxpruneError
        If the call cannot be traced. Errors of other classes are converted.
    """
    draws = False
    with torch.no_grad(), taken_over(tracer, meta_copy.model), following(), undrawn() as drawn:
        try:
            graph = tracer.trace()
            if tracer.elsewhere is not None:
                raise tracer.elsewhere
            draws = drawn()
            for node in tracer.left_out:
                if node.users:
                    raise TraceError(number_decides(node))
                graph.erase_node(node)
            place = tracer.made.changed()
            if place is not None:
                raise TraceError(
                    "a tensor is changed after a graph has taken it for a constant (at "
                    f"{place}). {MADE_FROM_INPUT}"
                )
        except FxpruneError:
            raise
        except Exception as error:
            raise _untraceable(error, tracer, meta_copy.model) from error
        finally:
            tracer.close()
            missed = [*unanswered(tracer.lookups, meta_copy.reached.made)]
            filled = meta_copy.reached.keys(_is_stand_in) if missed else []
            left = meta_copy.reached.take_out(_is_stand_in)
    if draws and _draws_again(tracer, meta_copy):
        raise ChanceError(
            DRAWS.format(type(meta_copy.model).__name__, "Python's or NumPy's generator")
        )
    constants = {
        name: meta_copy.real[t] if t in meta_copy.real else t.clone()
        for t, name in tracer.constants.values()
        if name in tracer.constant_targets
    }
    args, kwargs = tracer.example
    nodes = [node for node in map(node_of, left) if node is not None]
    result = Trace(
        graph,
        meta_copy,
        args,
        kwargs,
        tracer.decisions,
        tracer.asked_mode,
        tracer.training,
        constants,
        left=nodes,
    )
    result.missed, result.filled = missed, filled
    drop_unused_sizes(graph)
    return result, frozenset(tracer.made_names)


def _untraceable(error: Exception, tracer: Tracer, model: nn.Module) -> FxpruneError:
    """Return the error to raise for an exception that forward raised, with the user's line."""
    if tracer.elsewhere is not None:
        return tracer.elsewhere
    if takes_functions(error):
        return TraceError(takes_functions(error))
    where = user_line(traceback.extract_tb(error.__traceback__))
    if type(error).__module__.startswith("torch._dynamo"):
        return TraceError(
            f"torch compiles what forward does at {where}, as it does branches and loops on "
            "values (torch.cond, while_loop): a graph cannot follow that. Use torch.where, or "
            "keep that line inside a module of its own."
        )
    return TraceError(
        f"{type(model).__name__} cannot be traced: {type(error).__name__}: {error} (at {where}). "
        "Keep what cannot be traced inside a module of its own, or rewrite that line with tensor "
        "operations."
    )


def _draws_again(tracer: Tracer, meta_copy: MetaCopy) -> bool:
    """Tell whether further traces of the call all draw from Python's or NumPy's generator.

    If only one trace draws, another thread may have drawn the numbers.
    """
    for _ in range(RUNS - 1):
        again = Tracer(meta_copy, *tracer.example, tracer.training, on_shapes)
        with (
            torch.no_grad(),
            taken_over(again, meta_copy.model),
            following(),
            drawing(meta_copy.model) as drawn,
        ):
            try:
                again.trace()
                if not drawn():
                    return False
            except Exception:
                # the first trace succeeded; this one runs on what the first one left behind
                return True
            finally:
                again.close()
                meta_copy.reached.take_out(_is_stand_in)
    return True


def _is_stand_in(value: Any) -> bool:
    """Tell whether a value is a stand-in."""
    return node_of(value) is not None


def nodes_held(tracer: Tracer) -> list[fx.Node]:
    """Return the nodes of traced tensors that are still alive after the trace.

    They are stored where no walk over containers finds them: in a variable of a closure, or on an
    object outside of the model.
    """

    def nodes() -> list[fx.Node]:
        return [tensor.fx_node for own in tracer.stand_ins if (tensor := own()) is not None]

    if any(map(follows_inputs, nodes())):
        gc.collect()  # free those in exceptions that forward has caught, for example
    return nodes()


def each_draws(first: Trace) -> bool:
    """Tell whether further traces of the call all draw from a generator of the model's own.

    If only one trace draws, another thread may have drawn the numbers.
    """
    for _ in range(RUNS - 1):
        reach = Reach(first.meta_copy.model)
        does_the_same(first)
        if not reach.drawn:
            return False
    return True


def does_the_same(first: Trace) -> bool:
    """Tell whether a further call with the same arguments gives the same graph."""
    return first_other_node(first, (first.args, first.kwargs)) is None


def drop_unused_sizes(graph: fx.Graph) -> None:
    """Remove scalars and entries of containers that nothing reads.

    Other tensors stay, because an operation in place may have no reader.
    """
    for node in reversed(list(graph.nodes)):
        if (
            node.op in ("placeholder", "output")
            or node.users
            or node.target is torch._assert
            or node.target in BOUNDS
        ):
            continue
        if node.meta.get("looked_up"):
            continue  # the number may have to be guarded
        scalar = node.op == "get_attr" or not holds_tensors(node.meta.get("val"))
        if _is_entry(node) or (scalar and not writes(node)):
            graph.erase_node(node)


def _is_entry(node: fx.Node) -> bool:
    """Tell whether a node takes an entry out of a tuple, list or dict."""
    return node.target is operator.getitem and not isinstance(node.args[0].meta["val"], Tensor)
