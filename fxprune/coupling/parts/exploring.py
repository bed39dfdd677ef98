"""Exploration of a model that is not one graph: its parts, and the routes between them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fxprune.common.contents import leaves_of
from fxprune.coupling.parts.calls import intercepted, unwatched
from fxprune.coupling.parts.decisions import inside_a_part
from fxprune.coupling.parts.finder import Finder, shape_of
from fxprune.coupling.parts.routes import Route, Routes, add_ways, routes_of, run_route
from fxprune.coupling.parts.sized import Sized
from fxprune.coupling.parts.straight import is_straight
from fxprune.trace import MetaCopy, trace

__all__ = ["Explored", "decisions_of", "explore"]


@dataclass(frozen=True)
class Explored:
    """The parts of a model, and the routes between them.

    Attributes
    ----------
    parts:
        Paths of the largest submodules that can be traced.
    routes:
        The runs that differ between parts. The first one is that of the example in evaluation
        mode.
    decided:
        The line that makes it impossible to know where Python code goes; empty if all routes are
        known.
    by:
        What that line decides by: "values" or "sizes of inputs".
    untrained:
        Why training mode could not be followed; empty if it was.
    """

    parts: frozenset[str]
    routes: Sequence[Route]
    decided: str
    by: str
    untrained: str


def explore(meta_copy: MetaCopy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Explored:
    """Find the parts and the routes of a model by running it on data.

    It runs on the given call, and for other answers, other sizes and training mode.

    Parameters
    ----------
    meta_copy:
        The model; copies of it with data run.
    args, kwargs:
        The arguments of the call.
    """
    routes = routes_of(meta_copy, args, kwargs)
    found = Finder(meta_copy)
    found.run(args, kwargs, routes.all)
    by = "sizes of inputs" if _add_sized(meta_copy, found, routes, args, kwargs) else "values"
    if routes.taken_out and not routes.decided:
        routes.decided = _decided_by_numbers(meta_copy, found.parts, routes, args, kwargs)
    return Explored(
        found.parts,
        _differing_between_parts(meta_copy, found.parts, routes.all, args, kwargs),
        routes.decided,
        by,
        routes.untrained,
    )


def _add_sized(meta_copy: MetaCopy, found: Finder, routes: Routes, args: Any, kwargs: Any) -> bool:
    """Add the routes for inputs of other sizes, and find the parts that are called there.

    Return whether there may be further routes, so that ``routes.decided`` was set.
    """
    plain, known, decided = [*routes.all], frozenset[str](), False
    while known != found.parts and not routes.decided:
        known, sized = found.parts, Sized(meta_copy, found.parts, args, kwargs)
        for route in plain:
            if not route.answers and not route.finds:
                sized.explore(route)
        del routes.all[len(plain) :]
        for route in sized.routes:
            add_ways(routes, meta_copy, args, kwargs, route)
        if sized.decided:
            routes.decided, decided = sized.decided, True
        if sized.routes:
            found.run(args, kwargs, routes.all)
    return decided


def _decided_by_numbers(
    meta_copy: MetaCopy, parts: frozenset[str], routes: Routes, args: Any, kwargs: Any
) -> str:
    """Return the line that takes out numbers, if they may decide where Python code goes."""
    real = meta_copy.instance()
    for route in {replace(route, answers=()) for route in routes.all}:
        run = functools.partial(run_route, real, args, kwargs, route)
        if not is_straight(real, parts, run):
            return routes.taken_out
    return ""


def _differing_between_parts(
    meta_copy: MetaCopy, parts: frozenset[str], routes: Sequence[Route], args: Any, kwargs: Any
) -> list[Route]:
    """Return one of all routes that do the same between parts.

    Questions that a part asks inside do not count, because the graph of the part asks none.
    """
    real, found = meta_copy.instance(), dict[Any, Route]()
    for route in routes:
        key: Any
        try:
            key = _seen_between_parts(real, parts, route, args, kwargs)
        # Keep a route that fails here: if it fails in the labelled run as well, that run reports
        # it.
        except Exception as error:
            key = error
        found.setdefault(key, route)
    return [*found.values()]


def _seen_between_parts(
    real: nn.Module, parts: frozenset[str], route: Route, args: Any, kwargs: Any
) -> tuple[Any, ...]:
    """Run a route and return what it does between parts: its mode, its questions, its calls."""
    calls: list[Any] = []

    def part(path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        with inside_a_part():
            out = call()
        calls.append((path, *map(_call_key, ((args, kwargs), out))))
        return out

    with intercepted(real, parts, part):
        _, decisions = run_route(real, args, kwargs, route)
    return replace(route, answers=()), tuple(decisions.between), tuple(calls)


def _call_key(value: Any) -> str:
    """Return a key for a nested value: shapes and types of tensors, and other values as text."""
    described = []
    for leaf in leaves_of(value):
        described.append((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf)
    return repr(described)


def decisions_of(
    meta_copy: MetaCopy, found: Explored, args: Any, kwargs: Any
) -> dict[tuple[str, bool], list[str]]:
    """Return what the graph of each part decides by the sizes of this call.

    Parameters
    ----------
    meta_copy:
        The model; a copy of it with data runs.
    found:
        Its parts and routes.
    args, kwargs:
        The arguments of the call.

    Returns
    -------
    dict
        (path of the part, whether for training) -> lines that decide.
    """
    real, decided = meta_copy.instance(), dict[tuple[str, bool], list[str]]()

    def part(path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        if (path, False) not in decided:
            inputs = tree_map(shape_of, (args, kwargs))
            with unwatched():
                traced = trace(meta_copy.part(path), *inputs)
                decided[path, False] = traced.decisions
                if traced.asked_mode:
                    trained = trace(meta_copy.part(path), *inputs, training=True)
                    decided[path, True] = trained.decisions
        return call()

    with intercepted(real, found.parts, part):
        for route in found.routes:
            if not route.is_of_sizes:
                run_route(real, args, kwargs, route)
    return decided
