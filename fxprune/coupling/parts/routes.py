"""The runs that show what a model's Python code does.

They differ in the answers to its questions, in the mode, and in whether something is found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.common.contents import tensors_of
from fxprune.common.dispatch import DispatchMode
from fxprune.common.hooks import in_mode
from fxprune.common.random_state import RUNS_TO_CONFIRM_DRAWS, detecting_draws, seeded
from fxprune.coupling.parts.calls import intercepted
from fxprune.coupling.parts.decisions import Answers, Decisions, followed, ways_of
from fxprune.coupling.parts.questions import CodePlace, Questions
from fxprune.inputs import Call
from fxprune.ops import Trait, has_trait, name_of_op
from fxprune.trace import MetaCopy
from fxprune.trace.module_state import AttributeChange, Attributes
from fxprune.trace.reach import REPEATED_CALLS, Reach, have_same_value, watching_draws

__all__ = ["Route", "Routes", "add_ways", "routes_of", "run_route"]

# what a model decides by that changes from call to call
CHANCE = "random numbers of Python or NumPy"
EACH_CALL = "a clock, or what an earlier call has left behind"


@dataclass(frozen=True)
class Route:
    """One run of a model.

    Attributes
    ----------
    answers:
        Answers to the first questions about values (:mod:`fxprune.coupling.parts.decisions`).
    training:
        Whether the model is in training mode.
    finds:
        Whether masks that select nothing for the example select something. An example are boxes
        above a threshold.
    sizes:
        The sizes of inputs that differ from the example's, in words; empty if none do.
    call:
        The call with these sizes; None if it is the example's.
    turned:
        Places of questions about sizes, and the answers to give there
        (:mod:`fxprune.coupling.parts.questions`).
    """

    answers: Answers = ()
    training: bool = False
    finds: bool = False
    sizes: str = ""
    call: Call | None = field(default=None, compare=False, repr=False)
    turned: tuple[tuple[CodePlace, bool], ...] = ()

    @property
    def is_of_sizes(self) -> bool:
        """Whether the run is one for inputs of other sizes."""
        return bool(self.sizes or self.turned)


@dataclass
class Routes:
    """All runs of a model.

    Attributes
    ----------
    all:
        The runs. The first one is that of the example in evaluation mode.
    decided, taken_out:
        See :class:`fxprune.coupling.parts.decisions.Ways`.
    untrained:
        Why training mode could not be followed; empty if it was.
    """

    all: list[Route]
    decided: str = ""
    taken_out: str = ""
    untrained: str = ""


def run_route(
    model: nn.Module, args: Any, kwargs: Any, route: Route, *inside: AbstractContextManager[Any]
) -> tuple[Any, Decisions]:
    """Run a model on a route.

    Parameters
    ----------
    model:
        A private copy of the model.
    args, kwargs:
        The arguments of the example's call.
    route:
        The route.
    inside:
        Contexts in which the model runs.

    Returns
    -------
    tuple
        What the model returns, and the questions about values that it asked.
    """
    args, kwargs = route.call or (args, kwargs)
    found: list[AbstractContextManager[Any]] = [EmptyMasks()] if route.finds else []
    if route.turned:
        questions = Questions([*model.parameters(), *model.buffers()], dict(route.turned))
        inside = (questions, questions.counting(), *inside)
    with in_mode(model, route.training):
        return followed(model, args, kwargs, route.answers, *inside, *found)


def routes_of(meta_copy: MetaCopy, args: Any, kwargs: Any) -> Routes:
    """Find the routes that a model can take for inputs of the example's sizes.

    They include training mode, unless it needs something that the example lacks, such as targets.
    If masks select nothing for the example, they include a run in which these select something,
    unless the model fails there.

    Parameters
    ----------
    meta_copy:
        The model; copies of it with data run.
    args, kwargs:
        The arguments of the example's call.
    """
    for again in range(RUNS_TO_CONFIRM_DRAWS):
        with watching_draws(meta_copy.model) if again else detecting_draws() as drawn:
            found = _explored(meta_copy, args, kwargs)
            draws = drawn()
        if not draws:
            found.decided = found.decided or _from_call_to_call(meta_copy, args, kwargs)
            return found
    found.decided = found.decided or CHANCE
    return found


def _from_call_to_call(meta_copy: MetaCopy, args: Any, kwargs: Any) -> str:
    """Return the reason why a model does something else when it is called again; empty if none.

    It is called again on the same inputs, in both modes. What it does are its calls of modules and
    the shapes that they get.
    """
    repeated = _Repeated(meta_copy.instance(), args, kwargs)
    if not repeated.reach.may_change:
        return ""
    return repeated.differs_by(Route()) or repeated.differs_by(Route(training=True))


class _Repeated:
    """Repeated runs of a model on the same call.

    Attributes
    ----------
    reach:
        What the model's code can reach, as it was before the next run.
    """

    def __init__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.reach = Reach(model)
        self._model, self._args, self._kwargs = model, args, kwargs
        self._paths = {path for path, _ in model.named_modules() if path}

    def differs_by(self, route: Route) -> str:
        """Return the reason why runs on a route differ; empty if they do not."""
        first = None
        for _ in range(1 + REPEATED_CALLS):
            attributes = Attributes(self._model)
            try:
                with self.reach.watching():
                    now = self._calls(route)
                if self.reach.drawn:
                    return CHANCE
                first = now if first is None else first
                if now != first:
                    return EACH_CALL
                changed = self.reach.may_differ or any(map(_is_another, attributes.changes()))
            except Exception:
                # Training mode needs something that the example lacks: there is no such route.
                changed = False
            finally:
                self.reach.put_back()
            if not changed:
                break  # it has left nothing behind that the next call could read
            self.reach = Reach(self._model)
        return ""

    def _calls(self, route: Route) -> list[Any]:
        """Return the calls of modules, in order, with the shapes of their arguments."""
        calls: list[Any] = []

        def note(path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
            calls.append((path, [leaf.shape for leaf in tensors_of((args, kwargs))]))
            return NotImplemented

        with seeded(0), intercepted(self._model, self._paths, note):
            run_route(self._model, self._args, self._kwargs, route)
        return calls


def _is_another(change: AttributeChange) -> bool:
    """Tell whether an attribute's value has changed, rather than been replaced by an equal one."""
    before = change.before if change.contents is None else change.contents
    return not have_same_value(before, change.after)


def _explored(meta_copy: MetaCopy, args: Any, kwargs: Any) -> Routes:
    """Return the routes of the example, with and without finds, and those of training mode."""
    watch, found = EmptyMasks(finds=False), Routes([])
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
    """Add all ways that a route can take.

    Parameters
    ----------
    routes:
        The routes to add to.
    meta_copy:
        The model; copies of it with data run.
    args, kwargs:
        The arguments of the example's call.
    route:
        The route, without answers.
    """
    _add(routes, functools.partial(_decisions, meta_copy, args, kwargs, route), route)


def _decisions(
    meta_copy: MetaCopy, args: Any, kwargs: Any, route: Route, answers: Answers
) -> Decisions:
    """Run the model on a route with other answers, and return the questions it asks."""
    return run_route(meta_copy.instance(), args, kwargs, replace(route, answers=answers))[1]


def _add(routes: Routes, decisions: Callable[[Answers], Decisions], like: Route) -> None:
    """Add all ways that a route can take; ``decisions`` runs it with given answers."""
    ways = ways_of(decisions)
    routes.all += [replace(like, answers=answers) for answers in ways.answers]
    routes.decided = routes.decided or ways.decided
    routes.taken_out = routes.taken_out or ways.taken_out


class EmptyMasks(DispatchMode):
    """A mode that counts masks that select nothing, and can make them select something.

    Parameters
    ----------
    finds:
        Whether such a mask is replaced by one that selects its first two elements.

    Attributes
    ----------
    missed:
        Number of times that a mask with elements selected none.
    """

    def __init__(self, finds: bool = True) -> None:
        super().__init__()
        self.finds, self.missed = finds, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = name_of_op(func)
        by_index = has_trait(name, Trait.SELECTS_BY_INDEX)
        finds = by_index or has_trait(name, Trait.SELECTS_BY_MASK)
        if not finds or all(leaf.numel() for leaf in tensors_of(out)):
            return out
        position = int(by_index)
        selecting = args[position] if len(args) > position else None
        if selecting is None:
            return out
        is_tensor = isinstance(selecting, Tensor)
        mask, others = (selecting, None) if is_tensor else (selecting[0], selecting[1:])
        if not isinstance(mask, Tensor) or not mask.numel():
            return out
        if by_index and mask.dtype is not torch.bool:
            return out
        self.missed += 1
        if not self.finds:
            return out
        mask = mask.clone()
        mask.view(-1)[:2] = True
        changed = mask if others is None else [mask, *others]
        return func(*args[:position], changed, *args[position + 1 :], **(kwargs or {}))
