"""What a model's Python does between parts for inputs of other sizes.

Parts guard the sizes by which they were traced. Python between them takes any size, and may call
other parts then, or do something else on the way from one to the next. So the model is called with
other sizes, and each question that it asks about one of them is answered the other way; what it
does then, and has not done before, is one more route.
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

_CALLS = 5  # other sizes that are tried
_MOST_SIZES = 16  # routes that are followed
_NEAR = 12  # sizes that are tried near the example's
_STILL = 3  # sizes in a row that lead to nothing new
_WHERE = 2  # routes on which a question is answered the other way
_LONGEST = 64
_BATCH = "a batch of"
_VALUES = "other values"


@dataclass
class _Asked:
    """A question of all runs: by how much its numbers differ, by the sizes of the inputs; the
    answers; the routes that ask it.
    """

    line: str
    empties: bool
    margins: dict[str, set[float]] = field(default_factory=dict)
    answers: set[bool] = field(default_factory=set)
    routes: list[Route] = field(default_factory=list)

    @property
    def is_of_data(self) -> bool:
        """Whether it goes by the values of inputs: how much is found in an image, say."""
        return self.margins.get("") != self.margins.get(_VALUES, self.margins.get(""))

    @property
    def is_free(self) -> bool:
        """Whether it goes by the sizes of inputs: for others its numbers differ by more, or by
        less.
        """
        return len(self.margins) == 1 or len({frozenset(own) for own in self.margins.values()}) > 1


class Sized:
    """The routes that a model can take for inputs of other sizes.

    Attributes
    ----------
    routes:
        Those on which it does what it does on no route before.
    decided:
        The line by which it cannot be known where Python goes; empty if it can.
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
        """Follow what the model does on a route, for other sizes of its inputs."""
        known, places, asked = set(self._trail), set(self._places), dict[CodePlace, _Asked]()
        self._visit(base, asked)
        if self._trail == known and self._places == places:
            return  # training does what evaluation does
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
        name, call = sized
        try:
            self._visit(replace(base, sizes=name, call=call), asked)
        except Exception:  # whatever the model raises for what it does not take
            return False
        return True

    def _go_on(
        self,
        base: Route,
        asked: dict[CodePlace, _Asked],
        others: Iterable[Iterator[tuple[str, Call]]],
    ) -> None:
        """Try more sizes, until several in a row lead to nothing new: a loop over layers, say,
        calls one more for each.
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
        """Whether it is known where the other answer to a question leads: it was followed, or the
        model refuses such inputs.
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
        """Sizes for which a question about one of them may have the other answer."""
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
        """Run the model on a route, and note what it asks and does."""
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
    """The example with other sizes, and in words with which."""
    rows = batch_size(call)
    for wanted in (1, rows + 1):
        batch = other_batch(call, wanted) if wanted != rows else None
        if batch is not None:
            yield f"{_BATCH} {wanted}", batch
    yield from other_sizes(call)
    yield from sizes_alone(call)


def _near(call: Call, rows: bool, sizes: bool) -> Iterator[Iterator[tuple[str, Call]]]:
    """For the rows of the example, and for each of its sizes, calls with others, the nearest
    first.
    """
    if rows and other_batch(call) is not None:
        around = _sizes_near(batch_size(call))
        yield ((f"{_BATCH} {new}", other_batch(call, new) or call) for new in around)
    for size in lengths(call) if sizes else ():
        yield ((f"{new} for {size}", with_sizes(call, {size: new})) for new in _sizes_near(size))


def _sizes_near(size: int) -> Iterator[int]:
    for away in itertools.count(1):
        yield from (new for new in (size + away, size - away) if new > 0)
