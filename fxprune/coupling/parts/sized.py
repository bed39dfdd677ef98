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
from fxprune.inputs import Call, batch_size, randomised
from fxprune.resized import lengths, other_batch, other_sizes, replace_sizes, single_axis_sizes
from fxprune.trace import MetaCopy

__all__ = ["Sized"]

_MOST_CALLS = 5  # number of resized calls that the model has to accept
_MOST_SIZES = 16  # upper limit on the number of routes
_MOST_NEAR = 12  # upper limit on the number of sizes that are tried near one of the example's
_NOTHING_NEW = 3  # number of sizes in a row without anything new after which the search stops
_MOST_TURNED = 2  # upper limit on the number of routes on which a question gets the other answer
_LONGEST = 64  # sizes up to this one are tried, however small the example's
_BATCH = "a batch of"  # beginning of the name of calls with another batch size
_OTHER_VALUES = "other values"  # name of the call with other values


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
        return self.margins.get("") != self.margins.get(_OTHER_VALUES, self.margins.get(""))

    @property
    def is_free(self) -> bool:
        """Whether the numbers depend on sizes of inputs: the margins differ between sizes.

        They are assumed to depend on them if only one size is known.
        """
        distinct = {frozenset(margins) for margins in self.margins.values()}
        return len(self.margins) == 1 or len(distinct) > 1


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
        self._run_route(base, asked)
        if self._trail == known and self._places == places:
            return  # training mode does the same as evaluation mode
        call = Call(self.args, self.kwargs)
        before = len(self.routes)
        is_resizable = self._try_some(base, asked, call)
        new = [route.sizes.startswith(_BATCH) for route in self.routes[before:]]
        self._try_near_sizes(base, asked, _near_calls(call, rows=True in new, sizes=False in new))
        if is_resizable:
            self._turn_all(asked)

    def _try_some(self, base: Route, asked: dict[CodePlace, _Asked], call: Call) -> bool:
        """Run the model on resized calls until it has accepted some; tell whether it has."""
        accepted = 0
        for sized in _resized_calls(call):
            accepted += self._accepts(base, sized, asked)
            if accepted == _MOST_CALLS:
                break
        return accepted > 0

    def _turn_all(self, asked: dict[CodePlace, _Asked]) -> None:
        """Answer each question about sizes both ways, also those that only come up then."""
        tried: set[tuple[CodePlace, bool]] = set()
        while not self.decided:
            turn = next((turn for turn in _open_turns(asked) if turn not in tried), None)
            if turn is None:
                break
            tried.add(turn)
            if len(self.routes) > _MOST_SIZES or not self._is_turn_known(*turn, asked):
                self.decided = asked[turn[0]].line

    def _accepts(
        self, base: Route, sized: tuple[str, Call], asked: dict[CodePlace, _Asked]
    ) -> bool:
        """Run the model on a resized call, and tell whether it accepts it."""
        name, call = sized
        try:
            self._run_route(replace(base, sizes=name, call=call), asked)
        except Exception:  # whatever the model raises for a call that it does not accept
            return False
        return True

    def _try_near_sizes(
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
            nothing_new, accepted, refused, name = 0, 0, 0, ""
            for name, call in itertools.islice(near, _MOST_NEAR):
                before = len(self.routes)
                if self._accepts(base, (name, call), asked):
                    accepted, refused = accepted + 1, 0
                    nothing_new = nothing_new + 1 if len(self.routes) == before else 0
                else:
                    refused += 1
                if max(nothing_new, refused) == _NOTHING_NEW:
                    break
            if nothing_new < min(_NOTHING_NEW, accepted):
                self.decided = self.decided or f"inputs of other sizes, {name}"

    def _is_turn_known(
        self, place: CodePlace, answer: bool, asked: dict[CodePlace, _Asked]
    ) -> bool:
        """Tell whether it is known where an answer to a question leads.

        It is if a run with that answer was followed, or if the model refuses such inputs.
        """
        found, known = asked[place], False
        for route in found.routes[:_MOST_TURNED]:
            turned = {**dict(route.turned), place: answer}
            try:
                self._run_route(replace(route, turned=tuple(turned.items())), asked)
                return True
            except Exception as error:
                known |= is_raised(error.__traceback__, found.line)
        if known or found.empties:
            return True
        plain = replace(found.routes[0], turned=())
        self._accepts(plain, (_OTHER_VALUES, randomised(Call(self.args, self.kwargs))), asked)
        if found.is_of_data or answer in found.answers:
            return True
        for sized in self._calls_answering(found):
            if self._accepts(plain, sized, asked) and answer in found.answers:
                return True
        return False

    def _calls_answering(self, found: _Asked) -> Iterator[tuple[str, Call]]:
        """Yield resized calls for which a question about a size may have the other answer."""
        call = Call(self.args, self.kwargs)
        margins = {int(margin) for each in found.margins.values() for margin in each}
        offsets = itertools.product(margins, (-1, 1), (-1, 0, 1))
        away = {sign * abs(margin) + more for margin, sign, more in offsets}
        near = {(abs(by), size + by, size) for size in lengths(call) for by in away - {0}}
        for _, new, size in sorted(near)[:_MOST_NEAR]:
            if 0 < new <= max(4 * size, _LONGEST):
                yield f"{new} for {size}", replace_sizes(call, {size: new})

    def _run_route(self, route: Route, asked: dict[CodePlace, _Asked]) -> None:
        """Run the model on a route, and record what it asks and does."""
        real = self.meta_copy.instance()
        questions = Questions([*real.parameters(), *real.buffers()], dict(route.turned))

        def part(path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
            with without_function_modes():
                out = call()
            questions.step(PART + path, (args, kwargs), out)
            return out

        plain, modes = replace(route, turned=()), (questions, questions.counting())
        with intercepted(real, self.parts, part):
            out, _ = run_route(real, self.args, self.kwargs, plain, *modes)
        questions.finish(leaves_of(out))
        for place, new in questions.asked.items():
            found = asked.setdefault(place, _Asked(new.line, new.empties))
            found.margins.setdefault(route.sizes, set()).update(new.margins)
            found.answers |= new.answers
            found.routes.append(route)
        if route.is_of_sizes and not questions.trail <= self._trail:
            self.routes.append(route)
        self._trail |= questions.trail
        self._places |= set(questions.asked)


def _open_turns(asked: dict[CodePlace, _Asked]) -> Iterator[tuple[CodePlace, bool]]:
    """Yield the places of questions about sizes, and the answers not given there so far."""
    for place, found in asked.items():
        for answer in (False, True):
            if answer not in found.answers and found.is_free:
                yield place, answer


def _resized_calls(call: Call) -> Iterator[tuple[str, Call]]:
    """Yield the example with other sizes, and these sizes in words."""
    rows = batch_size(call)
    for wanted in (1, rows + 1):
        batch = other_batch(call, wanted) if wanted != rows else None
        if batch is not None:
            yield f"{_BATCH} {wanted}", batch
    yield from other_sizes(call)
    yield from single_axis_sizes(call)


def _near_calls(call: Call, rows: bool, sizes: bool) -> Iterator[Iterator[tuple[str, Call]]]:
    """Yield series of resized calls, the nearest sizes first.

    There is one series for the batch size if ``rows``, and one for every other size if ``sizes``.
    """
    if rows and other_batch(call) is not None:
        around = _sizes_near(batch_size(call))
        yield ((f"{_BATCH} {new}", other_batch(call, new) or call) for new in around)
    for size in lengths(call) if sizes else ():
        yield (
            (f"{new} for {size}", replace_sizes(call, {size: new})) for new in _sizes_near(size)
        )


def _sizes_near(size: int) -> Iterator[int]:
    """Yield positive sizes around a size, the nearest first, without end."""
    for away in itertools.count(1):
        yield from (new for new in (size + away, size - away) if new > 0)
