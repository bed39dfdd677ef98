"""The runs of a model by which it is learned what its Python does: with other answers, in
training, where something is found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.common.contents import tensors_of
from fxprune.common.dispatch import DispatchMode
from fxprune.common.hooks import in_mode
from fxprune.common.random_state import RUNS, seeded, undrawn
from fxprune.coupling.parts.calls import intercepted
from fxprune.coupling.parts.decisions import Answers, Decisions, followed, ways_of
from fxprune.coupling.parts.questions import CodePlace, Questions
from fxprune.inputs import Call
from fxprune.ops import Trait, has, name_of_op
from fxprune.trace import MetaCopy
from fxprune.trace.module_state import AttributeChange, Attributes
from fxprune.trace.reach import AGAIN, Reach, drawing, same

__all__ = ["Route", "Routes", "add_ways", "routes_of", "run_route"]

CHANCE = "random numbers of Python or NumPy"
EACH_CALL = "a clock, or what an earlier call has left behind"


@dataclass(frozen=True)
class Route:
    """One run of a model.

    Attributes
    ----------
    answers:
        To the first questions about inputs (:mod:`fxprune.coupling.parts.decisions`).
    training:
        Whether the model is in training mode.
    finds:
        Whether something is found wherever the example has nothing: boxes above a threshold, say.
    sizes, call:
        Which other sizes the inputs have, and the call with them.
    turned:
        What is answered at some places to questions about sizes (``questions``).
    """

    answers: Answers = ()
    training: bool = False
    finds: bool = False
    sizes: str = ""
    call: Call | None = field(default=None, compare=False, repr=False)
    turned: tuple[tuple[CodePlace, bool], ...] = ()

    @property
    def is_of_sizes(self) -> bool:
        """Whether it is what the model does for inputs of other sizes."""
        return bool(self.sizes or self.turned)


@dataclass
class Routes:
    """All runs of a model.

    Attributes
    ----------
    all:
        The first is what the model does for the example, in evaluation.
    decided, taken_out:
        As of :class:`fxprune.coupling.parts.decisions.Ways`.
    untrained:
        Why training could not be followed.
    """

    all: list[Route]
    decided: str = ""
    taken_out: str = ""
    untrained: str = ""


def run_route(
    model: nn.Module, args: Any, kwargs: Any, route: Route, *inside: AbstractContextManager[Any]
) -> tuple[Any, Decisions]:
    """What the model, a private copy, returns on this route, run under these contexts."""
    args, kwargs = route.call or (args, kwargs)
    found: list[AbstractContextManager[Any]] = [ChosenSome()] if route.finds else []
    if route.turned:
        questions = Questions([*model.parameters(), *model.buffers()], dict(route.turned))
        inside = (questions, questions.counting(), *inside)
    with _mode(model, route.training):
        return followed(model, args, kwargs, route.answers, *inside, *found)


def routes_of(meta_copy: MetaCopy, args: Any, kwargs: Any) -> Routes:
    """The routes that a model can take.

    A route on which something is found where the example has nothing is one where the model can go
    it. Training is one, unless it needs what the example has not: targets, say.
    """
    for again in range(RUNS):
        with drawing(meta_copy.model) if again else undrawn() as drawn:
            found = _explored(meta_copy, args, kwargs)
            draws = drawn()
        if not draws:
            found.decided = found.decided or _from_call_to_call(meta_copy, args, kwargs)
            return found
    found.decided = found.decided or CHANCE
    return found


def _from_call_to_call(meta_copy: MetaCopy, args: Any, kwargs: Any) -> str:
    """By what a model does something else when it is called again on the same inputs; empty if it
    does the same.
    """
    model = meta_copy.instance()
    reach = Reach(model)
    if not reach.may_change:
        return ""
    paths = {path for path, _ in model.named_modules() if path}
    for route in (Route(), Route(training=True)):

        def called(route: Route = route) -> list[Any]:
            """The calls of modules, in order, and the shapes that they are given."""
            calls: list[Any] = []

            def note(path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
                calls.append((path, [leaf.shape for leaf in tensors_of((args, kwargs))]))
                return NotImplemented

            with seeded(0), intercepted(model, paths, note):
                run_route(model, args, kwargs, route)
            return calls

        first = None
        for _ in range(1 + AGAIN):
            attributes = Attributes(model)
            try:
                with reach.watching():
                    now = called()
                if reach.drawn:
                    return CHANCE
                first = now if first is None else first
                if now != first:
                    return EACH_CALL
                changed = reach.may_differ or any(map(_is_another, attributes.changes()))
            except Exception:
                # it needs in training what the example has not; a way that fails leads nowhere
                changed = False
            finally:
                reach.put_back()
            if not changed:
                break  # it has left nothing behind, or what it found was all there
            reach = Reach(model)
    return ""


def _is_another(change: AttributeChange) -> bool:
    """Whether an attribute has another value, and not only an equal one that was made anew."""
    before = change.before if change.contents is None else change.contents
    return not same(before, change.after)


def _explored(meta_copy: MetaCopy, args: Any, kwargs: Any) -> Routes:
    watch, found = ChosenSome(finds=False), Routes([])
    _add(
        found,
        lambda answers: followed(meta_copy.instance(), args, kwargs, answers, watch)[1],
        Route(),
    )
    for route in (*([Route(finds=True)] if watch.missed else []), Route(training=True)):
        try:
            add_ways(found, meta_copy, args, kwargs, route)
        except Exception as error:
            found.untrained = f"{type(error).__name__}: {error}" if route.training else ""
    return found


def add_ways(routes: Routes, meta_copy: MetaCopy, args: Any, kwargs: Any, route: Route) -> None:
    """Add all ways that a route can go."""
    _add(routes, functools.partial(_decisions, meta_copy, args, kwargs, route), route)


def _decisions(
    meta_copy: MetaCopy, args: Any, kwargs: Any, route: Route, answers: Answers
) -> Decisions:
    return run_route(meta_copy.instance(), args, kwargs, replace(route, answers=answers))[1]


def _add(routes: Routes, decisions: Callable[[Answers], Decisions], like: Route) -> None:
    """Add all ways that a route can go."""
    ways = ways_of(decisions)
    routes.all += [replace(like, answers=answers) for answers in ways.answers]
    routes.decided = routes.decided or ways.decided
    routes.taken_out = routes.taken_out or ways.taken_out


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    in_mode(model, training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


class ChosenSome(DispatchMode):
    """Sees where a mask chooses nothing; with ``finds`` the first two places are chosen there
    instead.

    Attributes
    ----------
    missed:
        How often nothing was chosen of something.
    """

    def __init__(self, finds: bool = True) -> None:
        super().__init__()
        self.finds, self.missed = finds, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = name_of_op(func)
        by_index = has(name, Trait.FINDS_BY_INDEX)
        finds = by_index or has(name, Trait.FINDS)
        if not finds or all(leaf.numel() for leaf in tensors_of(out)):
            return out
        where = int(by_index)
        chosen = args[where] if len(args) > where else None
        if chosen is None:
            return out
        mask, others = (chosen, None) if isinstance(chosen, Tensor) else (chosen[0], chosen[1:])
        if (
            not isinstance(mask, Tensor)
            or not mask.numel()
            or (where and mask.dtype is not torch.bool)
        ):
            return out
        self.missed += 1
        if not self.finds:
            return out
        mask = mask.clone()
        mask.view(-1)[:2] = True
        changed = mask if others is None else [mask, *others]
        return func(*args[:where], changed, *args[where + 1 :], **(kwargs or {}))
