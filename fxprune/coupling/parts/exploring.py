"""How a model runs that is no single graph: which modules are its parts, and on which routes its
Python calls them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
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
        Paths of the largest modules that can be traced.
    routes:
        The first is what the model does for the example, in evaluation.
    decided, by:
        The line by which it cannot be known where Python goes, and what that decides by; empty if
        it is known.
    untrained:
        Why training could not be followed.
    """

    parts: frozenset[str]
    routes: Sequence[Route]
    decided: str
    by: str
    untrained: str


def explore(meta_copy: MetaCopy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Explored:
    """Find the parts of a model, and its routes, by running it for real on a call and on what that
    leads to.
    """
    routes = routes_of(meta_copy, args, kwargs)
    found = Finder(meta_copy)
    found.run(args, kwargs, routes.all)
    by = "sizes of inputs" if _add_sized(meta_copy, found, routes, args, kwargs) else "values"
    if routes.taken_out and not routes.decided:
        real = meta_copy.instance()
        plain = {replace(route, answers=()) for route in routes.all}
        if not all(
            is_straight(real, found.parts, functools.partial(run_route, real, args, kwargs, route))
            for route in plain
        ):
            routes.decided = routes.taken_out
    return Explored(
        found.parts,
        _differing_between_parts(meta_copy, found.parts, routes.all, args, kwargs),
        routes.decided,
        by,
        routes.untrained,
    )


def _add_sized(meta_copy: MetaCopy, found: Finder, routes: Routes, args: Any, kwargs: Any) -> bool:
    """Add what the model does for inputs of other sizes, and find the parts that it calls there;
    whether that is not all.
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


def _differing_between_parts(
    meta_copy: MetaCopy, parts: frozenset[str], routes: Sequence[Route], args: Any, kwargs: Any
) -> list[Route]:
    """The routes that differ between parts: what a part asks inside is not asked by its graph."""
    real, found = meta_copy.instance(), dict[Any, Route]()
    for route in routes:
        calls: list[Any] = []

        def part(
            path: str, call: Callable[[], Any], args: Any, kwargs: Any, calls: list[Any] = calls
        ) -> Any:
            with inside_a_part():
                out = call()
            calls.append((path, *map(_call_key, ((args, kwargs), out))))
            return out

        try:
            with intercepted(real, parts, part):
                _, decisions = run_route(real, args, kwargs, route)
        except Exception as error:  # it fails there for good, and says so, or it fails here alone
            found[error] = route
            continue
        found.setdefault(
            (replace(route, answers=()), tuple(decisions.between), tuple(calls)), route
        )
    return [*found.values()]


def _call_key(value: Any) -> str:
    """What tells calls of a part apart: the shapes of tensors, and other values as they are."""
    return repr(
        [
            (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf
            for leaf in leaves_of(value)
        ]
    )


def decisions_of(
    meta_copy: MetaCopy, found: Explored, args: Any, kwargs: Any
) -> dict[tuple[str, bool], list[str]]:
    """What each part decides by the sizes of this call, by its path and for evaluation or
    training.
    """
    real, decided = meta_copy.instance(), dict[tuple[str, bool], list[str]]()

    def part(path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        if (path, False) not in decided:
            inputs = tree_map(shape_of, (args, kwargs))
            with unwatched():
                traced = trace(meta_copy.part(path), *inputs)
                decided[path, False] = traced.decisions
                if traced.asked_mode:
                    decided[path, True] = trace(
                        meta_copy.part(path), *inputs, training=True
                    ).decisions
        return call()

    with intercepted(real, found.parts, part):
        for route in found.routes:
            if not route.is_of_sizes:
                run_route(real, args, kwargs, route)
    return decided
