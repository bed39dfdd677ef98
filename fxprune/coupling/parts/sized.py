"""The routes of a model for inputs of other sizes.

Parts guard the sizes with which they were traced. The Python code between them accepts any size.
For another one it may call other parts, or do something else between two parts. So the model is
called with other sizes, and each question about a size is also answered the other way. A run that
does something new is one more route.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from fxprune.common.contents import leaves_of
from fxprune.coupling.parts.calls import intercepted, without_function_modes
from fxprune.coupling.parts.decisions import is_raised
from fxprune.coupling.parts.questions import PART, CodePlace, Questions
from fxprune.coupling.parts.routes import Route, run_route
from fxprune.inputs import Call, batch_size, random
from fxprune.resized import lengths, other_batch, other_sizes, sizes_alone, with_sizes
from fxprune.trace import MetaCopy

__all__ = ["Sized"]

_CALLS = 5  # number of resized calls that the model has to accept
_MOST_SIZES = 16  # upper limit on the number of routes
_NEAR = 12  # upper limit on the number of sizes that are tried near one of the example's
_STILL = 3  # number of sizes in a row without anything new after which the search stops
_WHERE = 2  # upper limit on the number of routes on which a question gets the other answer
_LONGEST = 64  # sizes up to this one are tried, however small the example's
_BATCH = "a batch of"  # beginning of the name of calls with another batch size
_VALUES = "other values"  # name of the call with other values


@dataclass
class _Asked:
    """The questions about sizes that all runs ask at one place.

    Attributes
    ----------
    line:
        The line of code.
    empties:
        Whether every question of the first run that asks there was only whether a number is 0.
    margins:
        Sizes of the inputs, in words -> differences between the numbers and what they were
        compared with.
    answers:
        The answers that were given.
    routes:
        The routes that ask it.
    """

    line: str
    empties: bool
    margins: dict[str, set[float]] = field(default_factory=dict)
    answers: set[bool] = field(default_factory=set)
    routes: list[Route] = field(default_factory=list)

    @property
    def is_of_data(self) -> bool:
        """Whether the numbers depend on values of inputs, like a count of objects."""
        return self.margins.get("") != self.margins.get(_VALUES, self.margins.get(""))

    @property
    def is_free(self) -> bool:
        """Whether the numbers depend on sizes of inputs: the margins differ between sizes.

        They are assumed to depend on them if only one size is known.
        """
        return len(self.margins) == 1 or len({frozenset(own) for own in self.margins.values()}) > 1


class Sized:
    """A search for the routes of a model for inputs of other sizes.

    Parameters
    ----------
    meta_copy:
        The model; copies of it with data run.
    parts:
        Paths of its parts.
    args, kwargs:
        The arguments of the example's call.

    Attributes
    ----------
    routes:
        The routes on which the model does something that it does on no earlier route.
    decided:
        The line that makes it impossible to know where Python code goes; empty if all routes are
        known.
    """

    def __init__(
        self, meta_copy: MetaCopy, parts: Collection[str], args: Any, kwargs: Any
    ) -> None:
        self.meta_copy, self.parts, self.args, self.kwargs = meta_copy, parts, args, kwargs
        self.routes: list[Route] = []
        self.decided = ""
        self._trail: set[Any] = set()
        self._places: set[CodePlace] = set()

    def explore(self, base: Route) -> None:
        """Find the routes for other sizes that start from a route of the example.

        Parameters
        ----------
        base:
            The route: evaluation or training mode.
        """
        known, places, asked = set(self._trail), set(self._places), dict[CodePlace, _Asked]()
        self._visit(base, asked)
        if self._trail == known and self._places == places:
            return  # training mode does the same as evaluation mode
        before = len(self.routes)
        every = (
            call
            for call in _resized_calls(Call(self.args, self.kwargs))
            if self._takes(base, call, asked)
        )
        taken = [*itertools.islice(every, _CALLS)]
        new = [route.sizes.startswith(_BATCH) for route in self.routes[before:]]
        self._go_on(
            base, asked, _near(Call(self.args, self.kwargs), rows=True in new, sizes=False in new)
        )
        tried: set[tuple[CodePlace, bool]] = set()
        while taken and not self.decided:
            open_ = (
                (p, a)
                for p, found in asked.items()
                for a in (False, True)
                if a not in found.answers and found.is_free
            )
            turn = next((turn for turn in open_ if turn not in tried), None)
            if turn is None:
                break
            tried.add(turn)
            if len(self.routes) > _MOST_SIZES or not self._turns(*turn, asked):
                self.decided = asked[turn[0]].line

    def _takes(self, base: Route, sized: tuple[str, Call], asked: dict[CodePlace, _Asked]) -> bool:
        """Run the model on a resized call, and tell whether it accepts it."""
        name, call = sized
        try:
            self._visit(replace(base, sizes=name, call=call), asked)
        except Exception:  # whatever the model raises for a call that it does not accept
            return False
        return True

    def _go_on(
        self,
        base: Route,
        asked: dict[CodePlace, _Asked],
        others: Iterable[Iterator[tuple[str, Call]]],
    ) -> None:
        """Try more sizes until several in a row lead to nothing new.

        A loop over layers, for example, may call one more layer for each further size. If there is
        no end to it, it cannot be known where Python code goes.
        """
        for near in others:
            still, taken, refused, name = 0, 0, 0, ""
            for name, call in itertools.islice(near, _NEAR):
                before = len(self.routes)
                if self._takes(base, (name, call), asked):
                    taken, refused = taken + 1, 0
                    still = still + 1 if len(self.routes) == before else 0
                else:
                    refused += 1
                if max(still, refused) == _STILL:
                    break
            if still < min(_STILL, taken):
                self.decided = self.decided or f"inputs of other sizes, {name}"

    def _turns(self, place: CodePlace, answer: bool, asked: dict[CodePlace, _Asked]) -> bool:
        """Tell whether it is known where an answer to a question leads.

        It is if a run with that answer was followed, or if the model refuses such inputs.
        """
        found, known = asked[place], False
        for route in found.routes[:_WHERE]:
            turned = {**dict(route.turned), place: answer}
            try:
                self._visit(replace(route, turned=tuple(turned.items())), asked)
                return True
            except Exception as error:
                known |= is_raised(error.__traceback__, found.line)
        if known or found.empties:
            return True
        plain = replace(found.routes[0], turned=())
        self._takes(plain, (_VALUES, random(Call(self.args, self.kwargs))), asked)
        if found.is_of_data or answer in found.answers:
            return True
        return any(
            self._takes(plain, call, asked) and answer in found.answers
            for call in self._answering(found)
        )

    def _answering(self, found: _Asked) -> Iterator[tuple[str, Call]]:
        """Yield resized calls for which a question about a size may have the other answer."""
        call = Call(self.args, self.kwargs)
        margins = {int(margin) for own in found.margins.values() for margin in own}
        away = {
            sign * abs(margin) + more
            for margin in margins
            for sign in (-1, 1)
            for more in (-1, 0, 1)
        }
        near = {(abs(by), size + by, size) for size in lengths(call) for by in away - {0}}
        for _, new, size in sorted(near)[:_NEAR]:
            if 0 < new <= max(4 * size, _LONGEST):
                yield f"{new} for {size}", with_sizes(call, {size: new})

    def _visit(self, route: Route, asked: dict[CodePlace, _Asked]) -> None:
        """Run the model on a route, and record what it asks and does."""
        real = self.meta_copy.instance()
        questions = Questions([*real.parameters(), *real.buffers()], dict(route.turned))

        def part(path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
            with without_function_modes():
                out = call()
            questions.step(PART + path, (args, kwargs), out)
            return out

        with intercepted(real, self.parts, part):
            out, _ = run_route(
                real,
                self.args,
                self.kwargs,
                replace(route, turned=()),
                questions,
                questions.counting(),
            )
        questions.finish(leaves_of(out))
        for place, own in questions.asked.items():
            found = asked.setdefault(place, _Asked(own.line, own.empties))
            found.margins.setdefault(route.sizes, set()).update(own.margins)
            found.answers |= own.answers
            found.routes.append(route)
        if route.is_of_sizes and not questions.trail <= self._trail:
            self.routes.append(route)
        self._trail |= questions.trail
        self._places |= set(questions.asked)


def _resized_calls(call: Call) -> Iterator[tuple[str, Call]]:
    """Yield the example with other sizes, and these sizes in words."""
    rows = batch_size(call)
    for wanted in (1, rows + 1):
        batch = other_batch(call, wanted) if wanted != rows else None
        if batch is not None:
            yield f"{_BATCH} {wanted}", batch
    yield from other_sizes(call)
    yield from sizes_alone(call)


def _near(call: Call, rows: bool, sizes: bool) -> Iterator[Iterator[tuple[str, Call]]]:
    """Yield series of resized calls, the nearest sizes first.

    There is one series for the batch size if ``rows``, and one for every other size if ``sizes``.
    """
    if rows and other_batch(call) is not None:
        around = _sizes_near(batch_size(call))
        yield ((f"{_BATCH} {new}", other_batch(call, new) or call) for new in around)
    for size in lengths(call) if sizes else ():
        yield ((f"{new} for {size}", with_sizes(call, {size: new})) for new in _sizes_near(size))


def _sizes_near(size: int) -> Iterator[int]:
    """Yield positive sizes around a size, the nearest first, without end."""
    for away in itertools.count(1):
        yield from (new for new in (size + away, size - away) if new > 0)
