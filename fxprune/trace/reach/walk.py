"""A search for what code can reach: closures, globals, modules, containers and attributes."""

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
"""The number of further calls that must do the same, where calls may differ.

If two ways are equally likely, 12 calls miss one of them in 1 of 4000 cases.
"""


class Reach:
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
        What :meth:`take_out` removed last, by the position of its holder and its name there.
    """

    def __init__(self, model: nn.Module, ran: Collection[CodeType] | None = None) -> None:
        self._model, self._ran = model, ran
        self._noted: set[CodeType] = set()  # code that ran inside watching()
        self._seen: IdentitySet[Any] = IdentitySet()
        self._names: set[str] = set()
        self._methods: dict[str, list[FunctionType]] = {}  # methods that no name refers to yet
        self._waiting: list[Any] = []
        self._holders: list[Any] = []
        self._generators: list[Any] = []
        # containers in attributes of modules; ``module_state`` compares these
        self._attributes: IdentitySet[Any] = IdentitySet()
        self._memos: list[Any] = []  # functions that cache their results
        self._outside: list[Any] = []  # compiled functions whose calls a profile function sees
        self._unseen = False  # whether there are functions or iterators that it does not see
        self._called = False
        self._sets = False
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
        """Save the state of generators and caches, and forget which code ran."""
        self._states = [state_of(own) for own in self._generators]
        self._misses = [memo.cache_info().misses for memo in self._memos]
        self._noted, self._called = set(), False

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
        return bool(
            self._sets or self._unseen or self._outside or self._generators or self._holders
        )

    @property
    def drawn(self) -> bool:
        """Whether the state of a random generator has changed."""
        return any(
            not same(before, state_of(own))
            for own, before in zip(self._generators, self._states, strict=True)
        )

    @property
    def may_differ(self) -> bool:
        """Whether the next call may do something else than the last one.

        It may if the last call used a function outside of Python, or changed a container or an
        object.
        """
        return (
            self._called
            or (self._unseen and Reach(self._model, self._noted)._unseen)
            or self._has_changed
        )

    @property
    def _has_changed(self) -> bool:
        """Whether the content of a container or an object has changed."""
        return any(
            not same(before, content_of(own))
            for own, before in zip(self._holders, self._before, strict=True)
        )

    def put_back(self) -> None:
        """Restore the state of all random generators."""
        for own, before in zip(self._generators, self._states, strict=True):
            if not same(before, state_of(own)):
                own.__setstate__(before)

    def take_out(self, is_foreign: Callable[[Any], bool], *, from_lists: bool = True) -> list[Any]:
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
        """The entries with plain names in dicts and objects that hold tensors.

        Attributes of modules are left out.
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
        """Remove tensors that a call on example inputs has put into dicts and objects.

        Such a call runs on other values than the user's. Lists and sets are left as they are,
        because another thread may be adding to them.
        """
        self.take_out(lambda leaf: isinstance(leaf, Tensor), from_lists=False)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record which code runs, and whether it calls functions outside of Python.

        Such a function may return something else at the next call: the time, for example.
        """
        if not (self._outside or self._unseen) or self._called:
            yield
            return
        names = {own.__name__ for own in self._outside}

        def note(frame: Any, event: str, arg: Any) -> None:
            """Record one event of :func:`sys.setprofile`."""
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
        """Tell whether a function or class belongs to a module that only computes."""
        # a compiled method has its module at its class
        return self._trusts(getattr(getattr(own, "__objclass__", own), "__module__", None) or "")

    def _trusts(self, module: str) -> bool:
        """Tell whether the code of a module only computes.

        This is taken for granted of all packages but the model's own and Python's: their code is
        not searched.
        """
        package = module.partition(".")[0]
        if module.startswith("numpy.random"):
            return False
        return package in CALCULATING or not (
            package in self._own or package in sys.stdlib_module_names or not package
        )

    def _add_module(self, module: nn.Module) -> None:
        """Search the methods and attributes of a module of the model."""
        self._add_methods(type(module), ("forward",))
        own = [
            value
            for name, value in vars(module).items()
            if type(value) not in PLAIN_TYPES and name not in NOT_OF_THE_USER
        ]
        self._waiting += own
        note_nested(own, self._attributes)

    def _add_methods(self, kind: type, called: tuple[str, ...] = ()) -> None:
        """Search the methods of a class that the code may call.

        These are the special methods, those in ``called``, and those whose name occurs in the
        code. The others wait until their name occurs.
        """
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
        """Search the methods that have these names."""
        for name in names - self._names:
            self._waiting += self._methods.pop(name, ())
        self._names |= names

    def _take(self, value: Any) -> None:
        """Search one value, once."""
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
        """Search what the code of a function refers to: defaults, closure, globals and imports."""
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
        """Search the methods of a class, whose attributes code can set."""
        if self._calculates(kind) or issubclass(kind, (BaseException, nn.Module)):
            return
        for base in kind.__mro__[:-1]:
            functions = [own for own in vars(base).values() if isinstance(own, FunctionType)]
            self._waiting += functions
            self._unseen |= not functions and not self._calculates(base)
        self._holders.append(kind)

    def _take_builtin(self, function: Any) -> None:
        """Search a compiled function: the object to which it is bound, or the function itself."""
        owner = function.__self__
        if owner is None or isinstance(owner, (ModuleType, type)):
            if not self._calculates(
                function if owner is None or isinstance(owner, ModuleType) else owner
            ):
                self._outside.append(function)
        else:
            self._waiting.append(owner)

    def _take_object(self, value: Any) -> None:
        """Search an object that is neither a function nor a class."""
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
        """Save the attributes of an object, and search them."""
        self._holders.append(value)
        self._waiting += without_plain(content_of(value).values())


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
    def instead(self) -> list[Any]:
        """Values that may be there before the entry is filled: in a dict, it may be missing."""
        return [MISSING] if isinstance(self.reach._holders[self.place], dict) else []

    def put(self, value: Any) -> None:
        """Put a value in the entry's place, and take it as the one to compare with."""
        holder = self.reach._holders[self.place]
        put_back(
            holder, store_of(holder), self.name, {} if value is MISSING else {self.name: value}
        )
        self.reach._before[self.place] = content_of(holder)

    def now(self) -> Any:
        """Return the present value; :data:`MISSING` if there is none."""
        holder = self.reach._holders[self.place]
        return named_contents(holder, content_of(holder)).get(self.name, MISSING)
