"""Finds what code can reach: closures, globals, modules, containers, attributes."""

from __future__ import annotations

import collections
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
from torch import Tensor, nn

from fxprune.common.contents import every_leaf, slots_of
from fxprune.common.identity import IdentitySet
from fxprune.trace.copying import is_filled
from fxprune.trace.reach.holders import (
    HOLDERS,
    MISSING,
    PLAIN_TYPES,
    Globals,
    content_of,
    has_tensors,
    is_plain_name,
    named_contents,
    put_back,
    same,
    state_of,
    store_of,
    take_out_of,
    without_plain,
)
from fxprune.trace.reach.references import (
    CALCULATING,
    NOT_OF_THE_USER,
    code_within,
    followed_along,
    is_function,
    note_nested,
    references_of,
)

__all__ = ["AGAIN", "Entry", "Reach"]


AGAIN = 12
"""So many further calls have to do the same, where they may differ: of two equally likely ways
both come, but for 1 in 4000.
"""


class Reach:
    """The objects and functions that the code of a model's own classes can reach by its names,
    with their state.

    Parameters
    ----------
    model:
        A copy that is run: its attributes are compared, too.
    ran:
        Code that was run: the names of other code lead nowhere. Default: of any code.
    """

    def __init__(self, model: nn.Module, ran: Collection[CodeType] | None = None) -> None:
        self._model, self._ran = model, ran
        self._noted: set[CodeType] = set()  # code that ran while this watched
        self._seen: IdentitySet[Any] = IdentitySet()
        self._names: set[str] = set()
        self._methods: dict[str, list[FunctionType]] = {}  # those that no name has led to yet
        self._waiting: list[Any] = []
        self._holders: list[Any] = []
        self._generators: list[Any] = []
        # containers that are attributes of modules, which ``module_state`` compares
        self._attributes: IdentitySet[Any] = IdentitySet()
        self._memos: list[Any] = []  # functions that remember their results
        self._outside: list[Any] = []  # functions that a profile sees
        self._unseen = False  # functions, and iterators, that it does not
        self._called = False
        self._sets = False
        # what was taken out last: by the number of its holder, and its name there
        self.taken: dict[tuple[int, str], Any] = {}
        self._own = {type(module).__module__.partition(".")[0] for module in model.modules()}
        for module in model.modules():
            if not self._calculates(type(module)):
                self._add_module(module)
        while self._waiting:
            self._take(self._waiting.pop())
        self._before = [content_of(own) for own in self._holders]
        self._begin()

    def _begin(self) -> None:
        self._states = [state_of(own) for own in self._generators]
        self._misses = [memo.cache_info().misses for memo in self._memos]
        self._noted, self._called = set(), False

    # -- what was done

    def begin(self) -> bool:
        """Compare with now instead, unless something leads elsewhere by now: then the code has to
        be looked through anew.
        """
        if self._has_changed:
            return False
        self._begin()
        return True

    @property
    def may_change(self) -> bool:
        """Whether there is anything at all that a call may change, on the model's modules or
        elsewhere, or may ask.
        """
        return bool(
            self._sets or self._unseen or self._outside or self._generators or self._holders
        )

    @property
    def drawn(self) -> bool:
        """Whether a generator stands elsewhere than at first."""
        return any(
            not same(before, state_of(own))
            for own, before in zip(self._generators, self._states, strict=True)
        )

    @property
    def may_differ(self) -> bool:
        """Whether a call has asked outside of Python, or has left something behind, so that the
        next one may do something else.
        """
        return (
            self._called
            or (self._unseen and Reach(self._model, self._noted)._unseen)
            or self._has_changed
        )

    @property
    def _has_changed(self) -> bool:
        return any(
            not same(before, content_of(own))
            for own, before in zip(self._holders, self._before, strict=True)
        )

    def put_back(self) -> None:
        """Let all generators stand where they stood."""
        for own, before in zip(self._generators, self._states, strict=True):
            if not same(before, state_of(own)):
                own.__setstate__(before)

    def take_out(self, is_foreign: Callable[[Any], bool], *, from_lists: bool = True) -> list[Any]:
        """Take out of containers and objects what a call has put there that holds something of
        this kind; returns all such.

        Attributes of modules stay as they are. Functions that have remembered a result since then
        forget all of theirs, which they compute again.
        """
        found: list[Any] = []
        self.taken = {}

        def holds(*values: Any) -> bool:
            foreign = [leaf for leaf in every_leaf(values) if is_foreign(leaf)]
            found.extend(foreign)
            return bool(foreign)

        for place, (own, before) in enumerate(zip(self._holders, self._before, strict=True)):
            listed = isinstance(own, (list, set, collections.deque))
            if (
                own not in self._attributes
                and (from_lists or not listed)
                and not same(before, content_of(own))
            ):
                for name, value in take_out_of(own, before, holds).items():
                    self.taken[place, repr(name)] = value
        for memo, misses in zip(self._memos, self._misses, strict=True):
            if memo.cache_info().misses != misses:
                memo.cache_clear()
        return found

    @functools.cached_property
    def entries(self) -> list[Entry]:
        """What is in dicts and objects that hold tensors, under plain names; attributes of modules
        are left out.
        """
        return [*self._entries()]

    def _entries(self) -> Iterator[Entry]:
        for place, (own, before) in enumerate(zip(self._holders, self._before, strict=True)):
            if own in self._attributes or isinstance(
                own, (list, set, collections.deque, np.ndarray)
            ):
                continue
            named = named_contents(own, before)
            for name, value in named.items() if has_tensors(named) else ():
                if is_plain_name(name):
                    yield Entry(self, place, name, value)

    def take_out_tables(self) -> None:
        """Take out of dicts and objects the tensors that a call has put there, which has run on
        other values than the user's.

        Lists and sets stay as they are: another thread may be adding to them.
        """
        self.take_out(lambda leaf: isinstance(leaf, Tensor), from_lists=False)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note which code runs, and whether functions are called that may ask outside of
        Python.
        """
        if not (self._outside or self._unseen) or self._called:
            yield
            return
        names = {own.__name__ for own in self._outside}

        def note(frame: Any, event: str, arg: Any) -> None:
            if event == "call":
                self._noted.add(frame.f_code)
            elif event == "c_call" and arg.__name__ in names and arg in self._outside:
                self._called |= not self._trusts(frame.f_globals.get("__name__", ""))

        before = sys.getprofile()
        sys.setprofile(note)
        try:
            yield
        finally:
            sys.setprofile(before)

    # -- the walk

    def _calculates(self, own: Any) -> bool:
        """Whether what a module of Python holds gives the same for the same arguments."""
        # a method of C's is of its class
        return self._trusts(getattr(getattr(own, "__objclass__", own), "__module__", None) or "")

    def _trusts(self, module: str) -> bool:
        """Whether the code of a module computes, and no more.

        Of the packages that are neither the model's own nor Python's that is taken for granted:
        their code is not walked.
        """
        package = module.partition(".")[0]
        if module.startswith("numpy.random"):
            return False
        return package in CALCULATING or not (
            package in self._own or package in sys.stdlib_module_names or not package
        )

    def _add_module(self, module: nn.Module) -> None:
        self._add_methods(type(module), ("forward",))
        own = [
            value
            for name, value in vars(module).items()
            if type(value) not in PLAIN_TYPES and name not in NOT_OF_THE_USER
        ]
        self._waiting += own
        note_nested(own, self._attributes)

    def _add_methods(self, kind: type, called: tuple[str, ...] = ()) -> None:
        if kind in self._seen and not called:
            return
        self._seen.add(kind)
        for base in kind.__mro__:
            if not self._calculates(base):
                for name, value in vars(base).items():
                    function = (
                        value.fget
                        if isinstance(value, property)
                        else getattr(value, "__func__", value)
                    )
                    self._waiting += (
                        [function] if isinstance(function, functools._lru_cache_wrapper) else []
                    )
                    if isinstance(function, FunctionType):
                        special = name.startswith("__") and name not in ("__init__", "__new__")
                        if name in self._names or name in called or special:
                            self._waiting.append(function)
                        else:
                            self._methods.setdefault(name, []).append(function)

    def _add_names(self, names: frozenset[str]) -> None:
        for name in names - self._names:
            self._waiting += self._methods.pop(name, ())
        self._names |= names

    def _take(self, value: Any) -> None:
        if value in self._seen or isinstance(value, (*PLAIN_TYPES, Tensor, ModuleType)):
            return
        self._seen.add(value)
        if isinstance(value, FunctionType):
            if not self._calculates(value):
                self._take_function(value)
        elif isinstance(value, MethodType):
            self._waiting += [
                value.__self__,
                *([value.__func__] if isinstance(value.__func__, FunctionType) else []),
            ]
        elif isinstance(value, functools.partial):
            self._waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, type):
            self._take_class(value)
        elif isinstance(
            wrapped := inspect.getattr_static(value, "__wrapped__", None), FunctionType
        ):
            self._waiting.append(wrapped)
            self._memos += [value] if isinstance(value, functools._lru_cache_wrapper) else []
        elif isinstance(value, BuiltinFunctionType) or (
            is_function(value) and getattr(value, "__self__", None) is not None
        ):
            self._take_builtin(value)
        else:
            self._take_object(value)

    def _take_function(self, function: FunctionType) -> None:
        if self._ran is not None and function.__code__ not in self._ran:
            return
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        self._waiting += [
            *(function.__defaults__ or ()),
            *(function.__kwdefaults__ or {}).values(),
        ]
        for code in code_within(function.__code__):
            chains, imported, names, sets, bound, _ = references_of(code)
            self._sets |= sets
            self._add_names(names)
            for name, *attributes in chains:
                found = (
                    [cell.cell_contents] if (cell := cells.get(name)) and is_filled(cell) else []
                )
                found += [function.__globals__[name]] if name in function.__globals__ else []
                for own in found:
                    self._waiting += followed_along(own, attributes)
            for module in imported:
                inside = vars(sys.modules[module]) if module in sys.modules else {}
                self._waiting += [inside[name] for name in names & inside.keys()]
            self._holders += [cells[name] for name in bound["STORE_DEREF"] if name in cells]
            if bound["STORE_GLOBAL"]:
                self._holders.append(Globals(function.__globals__, bound["STORE_GLOBAL"]))

    def _take_class(self, kind: type) -> None:
        if self._calculates(kind) or issubclass(kind, (BaseException, nn.Module)):
            return
        for base in kind.__mro__[:-1]:
            functions = [own for own in vars(base).values() if isinstance(own, FunctionType)]
            self._waiting += functions
            self._unseen |= not functions and not self._calculates(base)
        self._holders.append(kind)

    def _take_builtin(self, function: Any) -> None:
        owner = function.__self__
        if owner is None or isinstance(owner, (ModuleType, type)):
            if not self._calculates(
                function if owner is None or isinstance(owner, ModuleType) else owner
            ):
                self._outside.append(function)
        else:
            self._waiting.append(owner)

    def _take_object(self, value: Any) -> None:
        kind = type(value)
        if isinstance(value, nn.Module):
            return  # of the model, or one beside it
        if isinstance(value, (tuple, frozenset)):
            self._waiting += without_plain(value)
        elif isinstance(value, HOLDERS):
            self._holders.append(value)
            self._waiting += without_plain(
                dict.values(value) if isinstance(value, dict) else content_of(value)
            )
        elif isinstance(value, np.ndarray):
            self._holders.append(value)
        elif isinstance(value, SimpleNamespace):
            self._add_holder(value)
        elif (isinstance(value, Iterator) and kind.__module__ in ("builtins", "itertools")) or (
            is_function(value) and not self._calculates(value)
        ):
            self._unseen = True
        elif not self._calculates(kind):
            self._add_methods(kind)
            if hasattr(value, "__dict__") or slots_of(value):
                self._add_holder(value)
            if state_of(value) is not None:
                self._generators.append(value)
            elif isinstance(value, np.random.Generator):
                self._waiting.append(value.bit_generator)

    def _add_holder(self, value: Any) -> None:
        self._holders.append(value)
        self._waiting += without_plain(content_of(value).values())


@dataclass(eq=False)
class Entry:
    """Something in a dict or an object outside of the model, which can be put away for a while."""

    reach: Reach
    place: int
    name: Any
    value: Any

    @property
    def key(self) -> tuple[int, str]:
        """As it is named in what :meth:`Reach.take_out` has taken."""
        return self.place, repr(self.name)

    @property
    def instead(self) -> list[Any]:
        """What may stand there before it is filled: in a dict nothing."""
        return [MISSING] if isinstance(self.reach._holders[self.place], dict) else []

    def put(self, value: Any) -> None:
        """Put something in its place, which counts as what was there before."""
        holder = self.reach._holders[self.place]
        put_back(
            holder, store_of(holder), self.name, {} if value is MISSING else {self.name: value}
        )
        self.reach._before[self.place] = content_of(holder)

    def now(self) -> Any:
        """What is there."""
        holder = self.reach._holders[self.place]
        return named_contents(holder, content_of(holder)).get(self.name, MISSING)
