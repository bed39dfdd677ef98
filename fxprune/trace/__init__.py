"""Model and example inputs -> ``torch.fx.GraphModule``, on tensors without data.

Three things make tracing reach models that ``torch.fx.symbolic_trace`` does not:

* a stand-in for a value knows what that is for the example, so Python control flow on shapes runs,
  while the sizes themselves stay
  symbolic in the graph. What was decided is listed, and guarded by an assertion in the graph;
* ``self.training`` is read through the graph, so that dropout and stochastic depth keep both their
  modes;
* functions that libraries mark as leaves are entered, because parameters pass through them.

``meta_copy`` copies the model, ``arguments`` reads the example, ``values`` stand for values,
``tracer`` makes nodes of what is done to them, ``decisions`` names what Python asked them,
``sizes`` and ``resized`` find what C++ asked them, ``takeover`` leads through the tracer what
torch would do without a word to it, and ``lines`` finds the user's line for a message.

The model that runs is a *meta copy*: same structure, parameters on the meta device. The user's
model is never called nor changed.
"""

from __future__ import annotations

import gc
import operator
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.chance import RUNS, undrawn
from fxprune.dispatch import holds_tensors
from fxprune.errors import ChanceError, FxpruneError, TraceError
from fxprune.hooks import refuse_hooks
from fxprune.identity import IdentitySet
from fxprune.memory import node_of, writes
from fxprune.ops.running import ShapeMode
from fxprune.reach import AGAIN, Reach, drawing
from fxprune.regions import BOUNDS
from fxprune.state import (
    AttributeChange,
    Attributes,
    assigned,
    carried,
    first_difference,
    follows_inputs,
    keep,
    same_graph,
)
from fxprune.trace.arguments import example_of
from fxprune.trace.caches import forgotten_caches
from fxprune.trace.checkpoints import overwrites_what_is_kept
from fxprune.trace.decisions import formula, number_decides
from fxprune.trace.lines import following, takes_functions, user_line
from fxprune.trace.lookups import Lookup, unanswered
from fxprune.trace.meta_copy import (
    MetaCopy,
    attribute,
    copy_of,
    meta_copy_of,
    put_tensors,
    set_mode,
)
from fxprune.trace.resized import hold_inputs, hold_ranks
from fxprune.trace.takeover import plain_attention, slow_path, taken_over
from fxprune.trace.tracer import MADE_FROM_INPUT, Tracer, execute, is_leaf
from fxprune.trace.values import SizeTuple

__all__ = [
    "MetaCopy",
    "SizeTuple",
    "Trace",
    "attribute",
    "copy_of",
    "example_of",
    "execute",
    "following",
    "formula",
    "is_leaf",
    "meta_copy_of",
    "plain_attention",
    "put_tensors",
    "set_mode",
    "slow_path",
    "trace",
    "user_line",
]


DRAWS = (
    "forward of this {} draws random numbers from {}, which a graph would hold as constants. "
    "Draw them with torch and hand them on as tensors, or keep that line inside a module of its "
    "own."
)


@dataclass
class Trace:
    """A traced model: the graph, its meta copy, and what tracing had to decide.

    ``graph``'s nodes carry the value they had for the example in ``node.meta["val"]`` (meta
    tensors, ints, tuples). The meta copy is that of the traced module.
    """

    graph: fx.Graph
    meta_copy: MetaCopy
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    decisions: list[str] = field(default_factory=list)
    asked_mode: bool = False
    training: bool = False
    constants: dict[str, Tensor] = field(default_factory=dict)
    # attributes that forward sets to what it computes of inputs, and nothing reads
    not_set: tuple[str, ...] = ()
    # what forward has left outside of its modules
    left: list[fx.Node] = field(default_factory=list)
    missed: list[Lookup] = field(default_factory=list)  # lookups that have found nothing
    # dicts and sets, and keys that forward has put there then
    filled: list[tuple[Any, Any]] = field(default_factory=list)
    path: str = ""  # of the traced module below the model; empty: the model itself

    @property
    def prefix(self) -> str:
        """What tells the nodes of this graph from those of the others, in front of their names."""
        return (f"{self.path}:" if self.path else "") + ("train." if self.training else "")

    @property
    def placeholders(self) -> list[Any]:
        """The example's values in the order of the graph's placeholders."""
        return [*self.args, *self.kwargs.values()]

    @property
    def outputs(self) -> Any:
        """What the graph gave for the example."""
        output = next(iter(reversed(self.graph.nodes)))
        return fx.node.map_arg(output.args[0], lambda node: node.meta["val"])


def trace(
    meta_copy: MetaCopy,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    training: bool = False,
    watch: Callable[[fx.Node], AbstractContextManager[Any]] | None = None,
) -> Trace:
    """Trace the meta copy on meta inputs (see :func:`example_of`) in evaluation mode, or in
    training mode.

    Parameters
    ----------
    watch:
        Called with each node before it runs, for what it is to run under: a dispatch mode that
        executes ATen ops on tensors without data, and may look on. Default:
        :class:`~fxprune.ops.running.ShapeMode`.

    Raises
    ------
    TraceError
        If hooks run around a module, if the model branches on values, if a call leaves behind what
        makes the next one another (:mod:`fxprune.state`), or if its code cannot be followed; the
        message names the line, or the attribute.
    InputError
        If an operation refuses the shapes of the example.
    """
    if any(module.__dict__["training"] is not training for module in meta_copy.model.modules()):
        set_mode(meta_copy.model, training)
    attributes = Attributes(meta_copy.model)

    def follow(arguments: tuple[Any, Any]) -> tuple[fx.Graph, dict[str, Tensor]]:
        found, _ = _follow(Tracer(meta_copy, *arguments, training, _on_shapes), meta_copy)
        return found.graph, found.constants

    reach = meta_copy.reached.now()
    with forgotten_caches(
        meta_copy.model,
        reach,
        (args, kwargs),
        follow,
        lambda tensor: meta_copy.real.get(id(tensor), tensor),
    ):
        tracer = Tracer(meta_copy, args, kwargs, training, watch or _on_shapes)
        try:
            with reach.watching():
                result, made = _follow(tracer, meta_copy)
            _refuse_left(result.left, meta_copy.model)
            _refuse_checkpoints(tracer, meta_copy)
            refuse_hooks(meta_copy.model, below=True)
            changes = [*attributes.changes(made)]
            _refuse_memory(result.graph, assigned(changes), meta_copy.model)
            state = carried(changes)
            if state:
                attributes.restore(made)
                keep(state)
                meta_copy.reached.begin_anew()
                _refuse_state(result, state)
                result.not_set = tuple(change.path for change in state if change.nodes)
            attributes.restore(made)
            if state:
                meta_copy.reached.begin_anew()
            changes, state = [], []
            _hold_lookups(tracer, result)
            _refuse_left(_nodes_held(tracer), meta_copy.model)
            _refuse_chance(result, reach)
        except BaseException:
            attributes.restore()
            raise
        for hold in (hold_inputs, hold_ranks):
            hold(tracer, lambda other: _first_other_node(result, other))
        return result


def _hold_lookups(tracer: Tracer, first: Trace) -> None:
    """Hold a graph to the numbers by which forward has looked something up that was not there, but
    for tables that it fills.
    """
    missed = first.missed
    if first.filled:
        again = _with_keys(first)
        if again is not None and len(again) == len(tracer.lookups):
            pairs = zip(tracer.lookups, again, strict=True)
            known = IdentitySet(own for own, other in pairs if other.answered)
            missed = [own for own in missed if own not in known]
    for own in {own.node: own for own in missed}.values():
        tracer.hold_looked_up(own)
    for node in first.graph.nodes:
        node.meta.pop("looked_up", None)
    _drop_unused_sizes(first.graph)


def _with_keys(first: Trace) -> list[Lookup] | None:
    """What a further call looks up where the keys are still there, of whom none is one of its own;
    None: it fails.
    """
    attributes = Attributes(first.meta_copy.model)
    again = Tracer(first.meta_copy, first.args, first.kwargs, first.training, _on_shapes)
    try:
        for table, key in first.filled:
            set.add(table, key) if isinstance(table, set) else dict.__setitem__(table, key, None)
        _follow(again, first.meta_copy)
    except FxpruneError:
        return None
    finally:
        attributes.restore()
        for table, key in first.filled:
            set.discard(table, key) if isinstance(table, set) else dict.pop(table, key, None)
    return again.lookups


def _first_other_node(first: Trace, arguments: tuple[Any, Any]) -> fx.Node | bool | None:
    """The first node in whose place a trace of another call does something else; None: there is
    none; False: it fails.
    """
    attributes = Attributes(first.meta_copy.model)
    try:
        other, _ = _follow(
            Tracer(first.meta_copy, *arguments, first.training, _on_shapes), first.meta_copy
        )
    except FxpruneError:
        return False
    finally:
        attributes.restore()
    return first_difference(first.graph, other.graph, first.constants, other.constants)


def _on_shapes(node: fx.Node) -> AbstractContextManager[Any]:
    return ShapeMode()


def _follow(tracer: Tracer, meta_copy: MetaCopy) -> tuple[Trace, frozenset[str]]:
    """Trace once; also the names of the constants that the meta copy's module has got by it."""
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
        name: meta_copy.real[id(t)] if id(t) in meta_copy.real else t.clone()
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
    _drop_unused_sizes(graph)
    return result, frozenset(tracer.made_names)


def _untraceable(error: Exception, tracer: Tracer, model: nn.Module) -> FxpruneError:
    """What to say of an error that forward has ended with, with the user's line."""
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
    """Whether other traces of the same call draw, too: numbers of one alone were drawn by another
    thread.
    """
    for _ in range(RUNS - 1):
        again = Tracer(meta_copy, *tracer.example, tracer.training, _on_shapes)
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
                # it runs once more, on what the first left behind; that one succeeded
                return True
            finally:
                again.close()
                meta_copy.reached.take_out(_is_stand_in)
    return True


def _is_stand_in(value: Any) -> bool:
    return node_of(value) is not None


def _refuse_left(left: Iterable[fx.Node], root: nn.Module) -> None:
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


def _nodes_held(tracer: Tracer) -> list[fx.Node]:
    """What is held where no walk over containers finds it: a variable of a closure, an attribute
    of a module beside the model.
    """

    def nodes() -> list[fx.Node]:
        return [tensor.fx_node for own in tracer.stand_ins if (tensor := own()) is not None]

    if any(map(follows_inputs, nodes())):
        gc.collect()  # of exceptions that forward has caught, say
    return nodes()


def _refuse_checkpoints(tracer: Tracer, meta_copy: MetaCopy) -> None:
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


def _refuse_memory(graph: fx.Graph, assigned: set[str], root: nn.Module) -> None:
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


def _refuse_state(first: Trace, state: Sequence[AttributeChange]) -> None:
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
        second, made = _follow(
            Tracer(meta_copy, first.args, first.kwargs, first.training, _on_shapes), meta_copy
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


def _refuse_chance(first: Trace, reach: Reach) -> None:
    """What Python computes anew at each call is no constant of a graph.

    Raises
    ------
    ChanceError
        If a generator of the model's own is drawn from, or if a further call does something else.
    """
    meta_copy = first.meta_copy
    if reach.drawn and _each_draws(first):
        reach.put_back()
        raise ChanceError(DRAWS.format(type(meta_copy.model).__name__, "a generator of its own"))
    reach.put_back()
    for _ in range(AGAIN):
        if not reach.may_differ:
            break  # it has left nothing behind, or what it found was all there
        reach = Reach(meta_copy.model)
        with reach.watching():
            same = _does_the_same(first)
        if not same:
            raise ChanceError(
                f"forward of this {type(meta_copy.model).__name__} does something else when it is "
                "called again, with the same inputs: by a clock, by random numbers from outside "
                "of torch, or by what an earlier call has left behind outside of its modules. A "
                "graph is one call. Hand it in as an argument, or keep that line inside a module "
                "of its own."
            )


def _each_draws(first: Trace) -> bool:
    """Whether other traces of the same call draw, too: numbers of one alone were drawn by another
    thread.
    """
    for _ in range(RUNS - 1):
        reach = Reach(first.meta_copy.model)
        _does_the_same(first)
        if not reach.drawn:
            return False
    return True


def _does_the_same(first: Trace) -> bool:
    """Whether a further call is the same graph."""
    return _first_other_node(first, (first.args, first.kwargs)) is None


def _drop_unused_sizes(graph: fx.Graph) -> None:
    """Remove scalars and entries of containers that nobody reads; other tensors stay: an operation
    in place may have no reader.
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
            continue  # the graph may have to be held to it
        scalar = node.op == "get_attr" or not holds_tensors(node.meta.get("val"))
        if _is_entry(node) or (scalar and not writes(node)):
            graph.erase_node(node)


def _is_entry(node: fx.Node) -> bool:
    """Whether a node takes an entry out of a tuple, list or dict."""
    return node.target is operator.getitem and not isinstance(node.args[0].meta["val"], Tensor)
