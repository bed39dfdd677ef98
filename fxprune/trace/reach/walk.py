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
    CellType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
from torch import Tensor, nn

from fxprune.common.contents import iterate_leaves, slots_of
from fxprune.common.identity import IdentitySet
from fxprune.trace.copying import is_filled
from fxprune.trace.reach.holders import (
    HOLDERS,
    MISSING,
    PLAIN_TYPES,
    Globals,
    content_of,
    has_tensors,
    have_same_value,
    is_plain_name,
    named_contents,
    put_back,
    state_of,
    store_of,
    take_out_of,
    without_plain,
)
from fxprune.trace.reach.references import (
    COMPUTING_PACKAGES,
    MODULE_ATTRIBUTES,
    add_nested,
    code_within,
    follow_attributes,
    is_function,
    references_of,
)

__all__ = ["REPEATED_CALLS", "Entry", "Reach"]


REPEATED_CALLS = 12
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
        What :meth:`remove_foreign` removed last, by the position of its holder and its name there.
    holders:
        The containers and objects that were found. Attributes of modules are among them.
    generators:
        The random generators and other objects whose state can be set.
    memos:
        The functions that cache their results.
    """

    def __init__(self, model: nn.Module, ran: Collection[CodeType] | None = None) -> None:
        self._model, self._ran = model, ran
        self._code_run: set[CodeType] = set()  # code that ran inside watching()
        self._seen: IdentitySet[Any] = IdentitySet()
        self._names: set[str] = set()
        # methods that no name in the code refers to yet
        self._unnamed_methods: dict[str, list[FunctionType]] = {}
        self._waiting: list[Any] = []
        self.holders: list[Any] = []
        self.generators: list[Any] = []
        # containers in attributes of modules; ``module_state`` compares these
        self._attributes: IdentitySet[Any] = IdentitySet()
        self.memos: list[Any] = []
        self._outside: list[Any] = []  # compiled functions whose calls a profile function sees
        self._has_unseen = False  # whether a profile function does not see some functions
        self._has_called_outside = False
        self._sets_attributes = False
        self.taken: dict[tuple[int, str], Any] = {}
        self._packages = {type(module).__module__.partition(".")[0] for module in model.modules()}
        for module in model.modules():
            if not self._only_computes(type(module)):
                self._add_module(module)
        while self._waiting:
            self._visit(self._waiting.pop())
        self._before = [content_of(holder) for holder in self.holders]
        self._begin()

    def _begin(self) -> None:
        """Save the state of generators and caches, and forget which code ran."""
        self._states = [state_of(generator) for generator in self.generators]
        self._misses = [memo.cache_info().misses for memo in self.memos]
        self._code_run, self._has_called_outside = set(), False

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

    def _only_computes(self, value: Any) -> bool:
        """Tell whether a function or class belongs to a module that only computes."""
        owner = getattr(value, "__objclass__", value)  # the class of a compiled method
        return self.trusts(getattr(owner, "__module__", None) or "")

    def trusts(self, module: str) -> bool:
        """Tell whether the code of a module only computes.

        This is taken for granted of all packages but the model's own and Python's: their code is
        not searched.
        """
        package = module.partition(".")[0]
        if module.startswith("numpy.random"):
            return False
        return package in COMPUTING_PACKAGES or not (
            package in self._packages or package in sys.stdlib_module_names or not package
        )

    def _add_module(self, module: nn.Module) -> None:
        """Search the methods and attributes of a module of the model."""
        self._add_methods(type(module), ("forward",))
        names = [name for name in vars(module) if name not in MODULE_ATTRIBUTES]
        values = without_plain(vars(module)[name] for name in names)
        self._waiting += values
        add_nested(values, self._attributes)

    def _add_methods(self, kind: type, called: tuple[str, ...] = ()) -> None:
        """Search the methods of a class that the code may call.

        These are the special methods, those in ``called``, and those whose name occurs in the
        code. The others wait until their name occurs.
        """
        if kind in self._seen and not called:
            return
        self._seen.add(kind)
        for base in kind.__mro__:
            if not self._only_computes(base):
                for name, value in vars(base).items():
                    self._add_method(name, value, called)

    def _add_method(self, name: str, value: Any, called: tuple[str, ...]) -> None:
        """Search one attribute of a class if it is a method that the code may call."""
        is_property = isinstance(value, property)
        function = value.fget if is_property else getattr(value, "__func__", value)
        if isinstance(function, functools._lru_cache_wrapper):
            self._waiting.append(function)
        elif isinstance(function, FunctionType):
            special = name.startswith("__") and name not in ("__init__", "__new__")
            if name in self._names or name in called or special:
                self._waiting.append(function)
            else:
                self._unnamed_methods.setdefault(name, []).append(function)

    def _add_names(self, names: frozenset[str]) -> None:
        """Search the methods that have these names."""
        for name in names - self._names:
            self._waiting += self._unnamed_methods.pop(name, ())
        self._names |= names

    def _visit(self, value: Any) -> None:
        """Search one value, once."""
        if value in self._seen or isinstance(value, (*PLAIN_TYPES, Tensor, ModuleType)):
            return
        self._seen.add(value)
        if isinstance(value, FunctionType):
            if not self._only_computes(value):
                self._visit_function(value)
        elif isinstance(value, MethodType):
            self._waiting.append(value.__self__)
            if isinstance(value.__func__, FunctionType):
                self._waiting.append(value.__func__)
        elif isinstance(value, functools.partial):
            self._waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, type):
            self._visit_class(value)
        else:
            self._visit_compiled(value)

    def _visit_compiled(self, value: Any) -> None:
        """Search a function of a compiled class, or an object."""
        wrapped = inspect.getattr_static(value, "__wrapped__", None)
        if isinstance(wrapped, FunctionType):
            self._waiting.append(wrapped)
            self.memos += [value] if isinstance(value, functools._lru_cache_wrapper) else []
        elif isinstance(value, BuiltinFunctionType) or (
            is_function(value) and getattr(value, "__self__", None) is not None
        ):
            self._visit_builtin(value)
        else:
            self._visit_object(value)

    def _visit_function(self, function: FunctionType) -> None:
        """Search what the code of a function refers to: defaults, closure, globals and imports."""
        if self._ran is not None and function.__code__ not in self._ran:
            return
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        self._waiting += function.__defaults__ or ()
        self._waiting += (function.__kwdefaults__ or {}).values()
        for code in code_within(function.__code__):
            references = references_of(code)
            self._sets_attributes |= references.sets_attributes
            self._add_names(references.names)
            self._add_chains(references.chains, cells, function.__globals__)
            for module in references.imported:
                inside = vars(sys.modules[module]) if module in sys.modules else {}
                self._waiting += [inside[name] for name in references.names & inside.keys()]
            bound = references.bound
            self.holders += [cells[name] for name in bound["STORE_DEREF"] if name in cells]
            if bound["STORE_GLOBAL"]:
                self.holders.append(Globals(function.__globals__, bound["STORE_GLOBAL"]))

    def _add_chains(
        self, chains: list[list[str]], cells: dict[str, CellType], names: dict[str, Any]
    ) -> None:
        """Search what chains of attributes lead to, which start at closure cells or globals."""
        for name, *attributes in chains:
            cell = cells.get(name)
            if cell and is_filled(cell):
                self._waiting += follow_attributes(cell.cell_contents, attributes)
            if name in names:
                self._waiting += follow_attributes(names[name], attributes)

    def _visit_class(self, kind: type) -> None:
        """Search the methods of a class, whose attributes code can set."""
        if self._only_computes(kind) or issubclass(kind, (BaseException, nn.Module)):
            return
        for base in kind.__mro__[:-1]:
            members = vars(base).values()
            functions = [member for member in members if isinstance(member, FunctionType)]
            self._waiting += functions
            self._has_unseen |= not functions and not self._only_computes(base)
        self.holders.append(kind)

    def _visit_builtin(self, function: Any) -> None:
        """Search a compiled function: the object to which it is bound, or the function itself."""
        owner = function.__self__
        if owner is None or isinstance(owner, (ModuleType, type)):
            if not self._only_computes(owner if isinstance(owner, type) else function):
                self._outside.append(function)
        else:
            self._waiting.append(owner)

    def _visit_object(self, value: Any) -> None:
        """Search an object that is neither a function nor a class."""
        kind = type(value)
        if isinstance(value, nn.Module):
            return  # a module of the model, or one beside it
        if isinstance(value, (tuple, frozenset)):
            self._waiting += without_plain(value)
        elif isinstance(value, HOLDERS):
            self.holders.append(value)
            items = dict.values(value) if isinstance(value, dict) else content_of(value)
            self._waiting += without_plain(items)
        elif isinstance(value, np.ndarray):
            self.holders.append(value)
        elif isinstance(value, SimpleNamespace):
            self._add_holder(value)
        elif (isinstance(value, Iterator) and kind.__module__ in ("builtins", "itertools")) or (
            is_function(value) and not self._only_computes(value)
        ):
            self._has_unseen = True
        elif not self._only_computes(kind):
            self._visit_instance(value)

    def _visit_instance(self, value: Any) -> None:
        """Search an object of a class whose code is searched."""
        self._add_methods(type(value))
        if hasattr(value, "__dict__") or slots_of(value):
            self._add_holder(value)
        if state_of(value) is not None:
            self.generators.append(value)
        elif isinstance(value, np.random.Generator):
            self._waiting.append(value.bit_generator)

    def _add_holder(self, value: Any) -> None:
        """Save the attributes of an object, and search them."""
        self.holders.append(value)
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
