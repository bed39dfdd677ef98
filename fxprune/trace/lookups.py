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

__all__ = ["Lookup", "instruction_of", "missed_lookups"]

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
    results_before:
        How many results the model's cached functions had computed at that time.
    was_compared:
        Whether the number was compared with a key of the same hash.
    """

    node: fx.Node
    place: CallPlace
    line: str
    results_before: int
    was_compared: bool = False


def instruction_of(frame: FrameType) -> CallPlace:
    """Return the instruction that a frame is executing."""
    return frame.f_code, frame.f_lasti, object.__hash__(frame)


def missed_lookups(lookups: Sequence[Lookup], results_now: int) -> Iterator[Lookup]:
    """Yield the lookups that have found nothing, as far as is known.

    A lookup is left out in three cases: it stores an entry in a dict; a cached function computed a
    result after it, and stores that result under the number; or it adds a number to a set, either
    as the only number or together with one that was compared.

    Parameters
    ----------
    lookups:
        All lookups, in order.
    results_now:
        How many results the model's cached functions have computed by now.
    """
    groups = [[*group] for _, group in itertools.groupby(lookups, lambda lookup: lookup.place)]
    later = [*(group[0].results_before for group in groups[1:]), results_now]
    for group, results_after in zip(groups, later, strict=False):
        opname = _opname(*group[0].place[:2])
        compared = any(lookup.was_compared for lookup in group)
        # a cached function computed the result, and stored it under the number
        is_cached = results_after > group[0].results_before
        is_one_entry = opname in _SET_OPNAMES and (len(group) == 1 or compared)
        if opname not in _STORING_OPNAMES and not is_cached and not is_one_entry:
            yield from (lookup for lookup in group if not lookup.was_compared)


_STORING_OPNAMES = frozenset(
    {"STORE_SUBSCR", "BUILD_MAP", "MAP_ADD", "DICT_UPDATE", "DICT_MERGE", "BUILD_CONST_KEY_MAP"}
)
_SET_OPNAMES = frozenset({"BUILD_SET", "SET_ADD", "SET_UPDATE"})


def _opname(code: CodeType, offset: int) -> str:
    """Return the name of the bytecode instruction at an offset."""
    return _opnames(code).get(offset, "")


@functools.lru_cache(maxsize=256)
def _opnames(code: CodeType) -> dict[int, str]:
    """Return the names of a function's bytecode instructions, by their offsets."""
    return {instruction.offset: instruction.opname for instruction in dis.get_instructions(code)}
