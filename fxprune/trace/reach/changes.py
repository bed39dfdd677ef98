"""What a call changes among the objects that the code of a model can reach."""

from __future__ import annotations

import collections
import functools
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import (
    CodeType,
)
from typing import Any

import numpy as np
from torch import Tensor, nn

from fxprune.common.contents import iterate_leaves
from fxprune.trace.reach.holders import (
    MISSING,
    content_of,
    has_tensors,
    have_same_value,
    is_plain_name,
    named_contents,
    put_back,
    state_of,
    store_of,
    take_out_of,
)
from fxprune.trace.reach.search import NameSearch

__all__ = ["REPEATED_CALLS", "Entry", "Reach"]


REPEATED_CALLS = 12
"""The number of further calls that must do the same, where calls may differ.

If two ways are equally likely, 12 calls miss one of them in 1 of 4000 cases.
"""


class Reach(NameSearch):
    """The objects and functions that the code of a model's own classes can reach.

    The search follows the names in the code. The state of what it finds is saved, so that a later
    call can be compared with it and undone.

    Parameters
    ----------
    model:
        A copy that is run. The attributes of its modules are searched, too.
    ran:
        Code that was run: only this code is searched. Default: all code.

    Attributes
    ----------
    taken:
        What :meth:`remove_foreign` removed last, by the position of its holder and its name there.
    """

    def __init__(self, model: nn.Module, ran: Collection[CodeType] | None = None) -> None:
        super().__init__(model, ran)
        self.taken: dict[tuple[int, str], Any] = {}
        self._before = [content_of(holder) for holder in self.holders]
        self._begin()

    def _begin(self) -> None:
        """Save the state of generators and caches, and forget which code ran."""
        self._states = [state_of(generator) for generator in self.generators]
        self._misses = [memo.cache_info().misses for memo in self.memos]
        self._code_run: set[CodeType] = set()  # code that ran inside watching()
        self._has_called_outside = False

    # -- what was done

    def begin(self) -> bool:
        """Take the present state as the one to compare with, if the containers are unchanged.

        Returns
        -------
        False if a container or object has changed: the code may then lead elsewhere, and has to be
        searched again.
        """
        if self._has_changed:
            return False
        self._begin()
        return True

    @property
    def may_change(self) -> bool:
        """Whether a call may change something at all, on the model's modules or elsewhere.

        Also true if a call may use a function outside of Python, whose result may differ each
        time.
        """
        has_state = self.generators or self.holders
        return bool(self._sets_attributes or self._has_unseen or self._outside or has_state)

    @property
    def drawn(self) -> bool:
        """Whether the state of a random generator has changed."""
        now = map(state_of, self.generators)
        return not all(map(have_same_value, self._states, now))

    @property
    def may_differ(self) -> bool:
        """Whether the next call may do something else than the last one.

        It may if the last call used a function outside of Python, or changed a container or an
        object.
        """
        return (
            self._has_called_outside
            or (self._has_unseen and Reach(self._model, self._code_run)._has_unseen)
            or self._has_changed
        )

    @property
    def _has_changed(self) -> bool:
        """Whether the content of a container or an object has changed."""
        now = map(content_of, self.holders)
        return not all(map(have_same_value, self._before, now))

    def put_back(self) -> None:
        """Restore the state of all random generators."""
        for generator, before in zip(self.generators, self._states, strict=True):
            if not have_same_value(before, state_of(generator)):
                generator.__setstate__(before)

    def remove_foreign(
        self, is_foreign: Callable[[Any], bool], *, from_lists: bool = True
    ) -> list[Any]:
        """Remove foreign values that a call has put into containers and objects.

        Attributes of modules are left as they are. A function that has cached a result since the
        last comparison loses all its cached results; it can compute them again.

        Parameters
        ----------
        is_foreign:
            Tells whether a value has to be removed.
        from_lists:
            Whether lists, sets and deques are searched, too.

        Returns
        -------
        The foreign values that were found.
        """
        found: list[Any] = []
        self.taken = {}

        def holds(*values: Any) -> bool:
            """Collect the foreign values among some values, and tell whether there are any."""
            foreign = [leaf for leaf in iterate_leaves(values) if is_foreign(leaf)]
            found.extend(foreign)
            return bool(foreign)

        for place, (holder, before) in enumerate(zip(self.holders, self._before, strict=True)):
            is_list = isinstance(holder, (list, set, collections.deque))
            if holder in self._attributes or (is_list and not from_lists):
                continue
            if not have_same_value(before, content_of(holder)):
                for name, value in take_out_of(holder, before, holds).items():
                    self.taken[place, repr(name)] = value
        for memo, misses in zip(self.memos, self._misses, strict=True):
            if memo.cache_info().misses != misses:
                memo.cache_clear()
        return found

    @functools.cached_property
    def entries(self) -> list[Entry]:
        """The entries with plain names in dicts and objects that hold tensors.

        Attributes of modules are left out.
        """
        return [*self._entries()]

    def _entries(self) -> Iterator[Entry]:
        """Yield the entries (see :attr:`entries`)."""
        unnamed = (list, set, collections.deque, np.ndarray)
        for place, (holder, before) in enumerate(zip(self.holders, self._before, strict=True)):
            if holder in self._attributes or isinstance(holder, unnamed):
                continue
            named = named_contents(holder, before)
            for name, value in named.items() if has_tensors(named) else ():
                if is_plain_name(name):
                    yield Entry(self, place, name, value)

    def take_out_tables(self) -> None:
        """Remove tensors that a call on example inputs has put into dicts and objects.

        Such a call runs on other values than the user's. Lists and sets are left as they are,
        because another thread may be adding to them.
        """
        self.remove_foreign(lambda leaf: isinstance(leaf, Tensor), from_lists=False)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record which code runs, and whether it calls functions outside of Python.

        Such a function may return something else at the next call: the time, for example.
        """
        if not (self._outside or self._has_unseen) or self._has_called_outside:
            yield
            return
        names = {function.__name__ for function in self._outside}

        def note(frame: Any, event: str, arg: Any) -> None:
            """Record one event of :func:`sys.setprofile`."""
            if event == "call":
                self._code_run.add(frame.f_code)
            elif event == "c_call" and arg.__name__ in names and arg in self._outside:
                self._has_called_outside |= not self.trusts(frame.f_globals.get("__name__", ""))

        before = sys.getprofile()
        sys.setprofile(note)
        try:
            yield
        finally:
            sys.setprofile(before)

    # -- the search


@dataclass(eq=False)
class Entry:
    """An entry of a dict or an object outside of the model, which can be removed for a while.

    Attributes
    ----------
    reach:
        The search that found it.
    place:
        The position of its holder in that search.
    name:
        Its key or attribute name.
    value:
        Its value when it was found.
    """

    reach: Reach
    place: int
    name: Any
    value: Any

    @property
    def key(self) -> tuple[int, str]:
        """The key of this entry in :attr:`Reach.taken`."""
        return self.place, repr(self.name)

    @property
    def empty_values(self) -> list[Any]:
        """Values that may be there before the entry is filled: in a dict, it may be missing."""
        return [MISSING] if isinstance(self.reach.holders[self.place], dict) else []

    def put(self, value: Any) -> None:
        """Put a value in the entry's place, and take it as the one to compare with."""
        holder = self.reach.holders[self.place]
        content = {} if value is MISSING else {self.name: value}
        put_back(holder, store_of(holder), self.name, content)
        self.reach._before[self.place] = content_of(holder)

    def now(self) -> Any:
        """Return the present value; :data:`MISSING` if there is none."""
        holder = self.reach.holders[self.place]
        return named_contents(holder, content_of(holder)).get(self.name, MISSING)
