"""Numbers by which forward looks something up: in a table, or a set. What is not found for the
example may be for another size.

A dict asks for the hash of a key, and compares it with those keys alone that have the same. Where
it finds the number, the tracer is asked whether it is that one, and the graph is held to the
answer. Where it finds none, nobody asks anything: so the graph is held to the number, unless
forward fills the table itself, and by that number: then it does for each what it does for this
one.
"""

from __future__ import annotations

import dis
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType

from torch import fx

__all__ = ["Lookup", "at", "unanswered"]

CallPlace = tuple[CodeType, int, int]
"""An instruction of a function, and which call of that function it is."""


@dataclass
class Lookup:
    """A number was asked for its hash.

    Attributes
    ----------
    node:
        The number.
    place:
        The instruction that looks up.
    line:
        It, for a message.
    made:
        How often functions that remember their results had computed one by then.
    answered:
        Whether the number was compared with a key that has the same hash.
    """

    node: fx.Node
    place: CallPlace
    line: str
    made: int
    answered: bool = False


def at(frame: FrameType) -> CallPlace:
    """The instruction that a function is at."""
    return frame.f_code, frame.f_lasti, object.__hash__(frame)


def unanswered(lookups: Sequence[Lookup], made: int) -> Iterator[Lookup]:
    """The lookups that have found nothing, for all that is known.

    Parameters
    ----------
    made:
        How often functions that remember their results have computed one by now.
    """
    groups = [[*group] for _, group in itertools.groupby(lookups, lambda own: own.place)]
    later = [*(group[0].made for group in groups[1:]), made]
    for group, after in zip(groups, later, strict=False):
        kind = _operation(*group[0].place[:2])
        # a function that computes a result which it does not remember yet
        remembers = after > group[0].made
        one_entry = kind in _OF_SETS and (len(group) == 1 or any(own.answered for own in group))
        if kind not in _FILLING and not remembers and not one_entry:
            yield from (own for own in group if not own.answered)


_FILLING = frozenset(
    {"STORE_SUBSCR", "BUILD_MAP", "MAP_ADD", "DICT_UPDATE", "DICT_MERGE", "BUILD_CONST_KEY_MAP"}
)
_OF_SETS = frozenset({"BUILD_SET", "SET_ADD", "SET_UPDATE"})


def _operation(code: CodeType, place: int) -> str:
    return _operations(code).get(place, "")


@functools.lru_cache(maxsize=256)
def _operations(code: CodeType) -> dict[int, str]:
    return {step.offset: step.opname for step in dis.get_instructions(code)}
