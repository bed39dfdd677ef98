"""Lookups of traced numbers in dicts and sets.

A key that is not found for the example may be found for another size. A dict asks a key for its
hash and compares it only with the keys of the same hash. If there is one, the comparison is a
decision, which the graph guards. If there is none, nothing is compared, so the number itself is
guarded. It is not if forward itself stores something under the number at that place: then it does
the same for every number.
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
"""A place in a running function: its code, the instruction, and an id of the call."""


@dataclass
class Lookup:
    """A lookup of a number in a dict or set: the number was asked for its hash.

    Attributes
    ----------
    node:
        The node of the number.
    place:
        The instruction that looks the number up.
    line:
        The user's line, for a message.
    made:
        How many results the model's cached functions had computed at that time.
    answered:
        Whether the number was compared with a key of the same hash.
    """

    node: fx.Node
    place: CallPlace
    line: str
    made: int
    answered: bool = False


def at(frame: FrameType) -> CallPlace:
    """Return the instruction that a frame is executing."""
    return frame.f_code, frame.f_lasti, object.__hash__(frame)


def unanswered(lookups: Sequence[Lookup], made: int) -> Iterator[Lookup]:
    """Yield the lookups that have found nothing, as far as is known.

    A lookup is left out in three cases: it stores an entry in a dict; a cached function computed a
    result after it, and stores that result under the number; or it adds a number to a set, either
    as the only number or together with one that was compared.

    Parameters
    ----------
    lookups:
        All lookups, in order.
    made:
        How many results the model's cached functions have computed by now.
    """
    groups = [[*group] for _, group in itertools.groupby(lookups, lambda own: own.place)]
    later = [*(group[0].made for group in groups[1:]), made]
    for group, after in zip(groups, later, strict=False):
        kind = _operation(*group[0].place[:2])
        # a cached function computed the result, and stored it under the number
        remembers = after > group[0].made
        one_entry = kind in _OF_SETS and (len(group) == 1 or any(own.answered for own in group))
        if kind not in _FILLING and not remembers and not one_entry:
            yield from (own for own in group if not own.answered)


_FILLING = frozenset(
    {"STORE_SUBSCR", "BUILD_MAP", "MAP_ADD", "DICT_UPDATE", "DICT_MERGE", "BUILD_CONST_KEY_MAP"}
)
_OF_SETS = frozenset({"BUILD_SET", "SET_ADD", "SET_UPDATE"})


def _operation(code: CodeType, place: int) -> str:
    """Return the name of the bytecode instruction at an offset."""
    return _operations(code).get(place, "")


@functools.lru_cache(maxsize=256)
def _operations(code: CodeType) -> dict[int, str]:
    """Return the names of a function's bytecode instructions, by their offsets."""
    return {step.offset: step.opname for step in dis.get_instructions(code)}
