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
from fxprune.common.random_state import RUNS_TO_CONFIRM_DRAWS, detecting_draws
from fxprune.errors import ChanceError, FxpruneError, TraceError
from fxprune.ops.running import ShapeMode
from fxprune.trace.aliasing import node_of, writes
from fxprune.trace.constants import MADE_FROM_INPUT
from fxprune.trace.context_managers import BOUNDS
from fxprune.trace.decisions import omitted_number_message
from fxprune.trace.lookups import Lookup, missed_lookups
from fxprune.trace.meta_copy import (
    MetaCopy,
)
from fxprune.trace.module_state import (
    Attributes,
    first_difference,
    follows_inputs,
)
from fxprune.trace.patches import torch_patched
from fxprune.trace.reach import Reach, watching_draws
from fxprune.trace.traced import DRAWS, Trace
from fxprune.trace.tracer import Tracer
from fxprune.trace.user_code import following, higher_order_message, user_line

__all__ = [
    "draws_every_time",
    "drop_unused_sizes",
    "first_different_node",
    "live_nodes",
    "lookups_with_keys",
    "repeats_same_graph",
    "shape_mode",
    "trace_call",
]


def lookups_with_keys(first: Trace) -> list[Lookup] | None:
    """Return the lookups of a further call that finds the first call's keys in the tables.

    Returns
    -------
    list of Lookup or None
        None if the call fails.
    """
    attributes = Attributes(first.meta_copy.model)
    again = Tracer(first.meta_copy, first.args, first.kwargs, first.training, shape_mode)
    try:
        for table, key in first.filled_keys:
            set.add(table, key) if isinstance(table, set) else dict.__setitem__(table, key, None)
        trace_call(again, first.meta_copy)
    except FxpruneError:
        return None
    finally:
        attributes.restore()
        for table, key in first.filled_keys:
            set.discard(table, key) if isinstance(table, set) else dict.pop(table, key, None)
    return again.lookups


def first_different_node(first: Trace, arguments: tuple[Any, Any]) -> fx.Node | bool | None:
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
    tracer = Tracer(first.meta_copy, *arguments, first.training, shape_mode)
    try:
        other, _ = trace_call(tracer, first.meta_copy)
    except FxpruneError:
        return False
    finally:
        attributes.restore()
    return first_difference(first.graph, other.graph, first.constants, other.constants)


def shape_mode(node: fx.Node) -> AbstractContextManager[Any]:
    """Return the default context in which a node runs: operations on meta tensors."""
    return ShapeMode()


def trace_call(tracer: Tracer, meta_copy: MetaCopy) -> tuple[Trace, frozenset[str]]:
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
    with (
        torch.no_grad(),
        torch_patched(tracer, meta_copy.model),
        following(),
        detecting_draws() as drawn,
    ):
        try:
            graph = _checked_graph(tracer)
            draws = drawn()
        except FxpruneError:
            raise
        except Exception as error:
            raise _trace_error(error, tracer, meta_copy.model) from error
        finally:
            tracer.close()
            missed, filled, stored = _leftovers(tracer, meta_copy)
    if draws and _draws_again(tracer, meta_copy):
        raise ChanceError(
            DRAWS.format(type(meta_copy.model).__name__, "Python's or NumPy's generator")
        )
    result = Trace(
        graph, meta_copy, *tracer.example, tracer.decisions, tracer.asked_mode, tracer.training
    )
    result.constants = _constants(tracer, meta_copy)
    result.missed_lookups, result.filled_keys, result.stored_nodes = missed, filled, stored
    drop_unused_sizes(graph)
    return result, frozenset(tracer.made_constant_names)


def _checked_graph(tracer: Tracer) -> fx.Graph:
    """Run the trace and return its graph, without the placeholders of omitted arguments.

    Raises
    ------
    TraceError
        If another thread used a stand-in, if the model reads an omitted argument, or if a constant
        of the graph was changed.
    """
    graph = tracer.trace()
    if tracer.other_thread_error is not None:
        raise tracer.other_thread_error
    for node in tracer.omitted:
        if node.users:
            raise TraceError(omitted_number_message(node))
        graph.erase_node(node)
    line = tracer.made_constants.changed()
    if line is not None:
        raise TraceError(
            "a tensor is changed after a graph has taken it for a constant (at "
            f"{line}). {MADE_FROM_INPUT}"
        )
    return graph


def _leftovers(
    tracer: Tracer, meta_copy: MetaCopy
) -> tuple[list[Lookup], list[tuple[Any, Any]], list[fx.Node]]:
    """Remove what the call has stored outside of the modules.

    Returns
    -------
    missed : list of Lookup
        The lookups that found nothing.
    filled : list of (dict or set, key)
        The tables with a key that forward has stored there, if there are missed lookups.
    stored : list of fx.Node
        The nodes of the stored values.
    """
    missed = [*missed_lookups(tracer.lookups, meta_copy.reached.cache_misses)]
    filled = meta_copy.reached.foreign_keys(_is_stand_in) if missed else []
    removed = meta_copy.reached.remove_foreign(_is_stand_in)
    nodes = [node for node in map(node_of, removed) if node is not None]
    return missed, filled, nodes


def _constants(tracer: Tracer, meta_copy: MetaCopy) -> dict[str, Tensor]:
    """Return the constants that the graph reads, by name, with their data."""
    constants = {}
    for tensor, name in tracer.constants.values():
        if name in tracer.constant_targets:
            is_models = tensor in meta_copy.real
            constants[name] = meta_copy.real[tensor] if is_models else tensor.clone()
    return constants


def _trace_error(error: Exception, tracer: Tracer, model: nn.Module) -> FxpruneError:
    """Return the error to raise for an exception that forward raised, with the user's line."""
    if tracer.other_thread_error is not None:
        return tracer.other_thread_error
    if higher_order_message(error):
        return TraceError(higher_order_message(error))
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
    for _ in range(RUNS_TO_CONFIRM_DRAWS - 1):
        again = Tracer(meta_copy, *tracer.example, tracer.training, shape_mode)
        with (
            torch.no_grad(),
            torch_patched(again, meta_copy.model),
            following(),
            watching_draws(meta_copy.model) as drawn,
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
                meta_copy.reached.remove_foreign(_is_stand_in)
    return True


def _is_stand_in(value: Any) -> bool:
    """Tell whether a value is a stand-in."""
    return node_of(value) is not None


def live_nodes(tracer: Tracer) -> list[fx.Node]:
    """Return the nodes of traced tensors that are still alive after the trace.

    They are stored where no walk over containers finds them: in a variable of a closure, or on an
    object outside of the model.
    """

    if any(map(follows_inputs, _stand_in_nodes(tracer))):
        gc.collect()  # free those in exceptions that forward has caught, for example
    return _stand_in_nodes(tracer)


def _stand_in_nodes(tracer: Tracer) -> list[fx.Node]:
    """Return the nodes of the traced tensors that are alive."""
    tensors = [reference() for reference in tracer.stand_ins]
    return [tensor.fx_node for tensor in tensors if tensor is not None]


def draws_every_time(first: Trace) -> bool:
    """Tell whether further traces of the call all draw from a generator of the model's own.

    If only one trace draws, another thread may have drawn the numbers.
    """
    for _ in range(RUNS_TO_CONFIRM_DRAWS - 1):
        reach = Reach(first.meta_copy.model)
        repeats_same_graph(first)
        if not reach.drawn:
            return False
    return True


def repeats_same_graph(first: Trace) -> bool:
    """Tell whether a further call with the same arguments gives the same graph."""
    return first_different_node(first, (first.args, first.kwargs)) is None


def drop_unused_sizes(graph: fx.Graph) -> None:
    """Remove scalars and entries of containers that nothing reads.

    Other tensors stay, because an operation in place may have no reader.
    """
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        if node.target is torch._assert or node.target in BOUNDS:
            continue
        if node.meta.get("looked_up"):
            continue  # the number may have to be guarded
        is_scalar = node.op == "get_attr" or not holds_tensors(node.meta.get("val"))
        if _is_entry(node) or (is_scalar and not writes(node)):
            graph.erase_node(node)


def _is_entry(node: fx.Node) -> bool:
    """Tell whether a node takes an entry out of a tuple, list or dict."""
    return node.target is operator.getitem and not isinstance(node.args[0].meta["val"], Tensor)
