"""What the code of a model reads and changes beside its tensors: generators, clocks, counters,
what its globals hold.

A graph is one call. What Python computes anew at each call, by its own random numbers, by the time
or by how often it was called, would be a constant there. So all objects that the code can reach by
its names are compared before and after a call; where it may ask outside of Python, or has changed
something, a further call is followed, and has to do the same.
"""

from __future__ import annotations

import collections
import dis
import functools
import inspect
import operator
import random
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FrameType,
    FunctionType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.chance import undrawn
from fxprune.contents import every_leaf, slots_of, tensors_of
from fxprune.references import is_filled

__all__ = ["AGAIN", "MISSING", "Entry", "Reach", "Reached", "drawing", "same", "undrawn_by"]

AGAIN = 12
"""So many further calls have to do the same, where they may differ: of two equally likely ways
both come, but for 1 in 4000.
"""

_CALCULATE = frozenset(
    {
        "builtins",
        "math",
        "cmath",
        "operator",
        "_operator",
        "itertools",
        "functools",
        "_functools",
        "typing",
        "re",
    }
)
_CALCULATE |= {
    "collections",
    "_collections",
    "_collections_abc",
    "abc",
    "enum",
    "copy",
    "dataclasses",
    "types",
    "torch",
    "fxprune",
}
_CALCULATE |= {
    "numpy",
    "_io",
    "io",
    "contextlib",
    "inspect",
    "string",
    "_thread",
    "threading",
    "warnings",
    "_warnings",
    "logging",
}
"""Packages whose functions give the same for the same arguments, or say something and give
nothing.
"""

_PLAIN_TYPES = (type(None), bool, int, float, complex, str, bytes)
_HOLDERS = (list, dict, set, collections.deque)


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
        self._seen: dict[int, Any] = {}  # by id; all are kept alive
        self._names: set[str] = set()
        self._methods: dict[str, list[FunctionType]] = {}  # those that no name has led to yet
        self._waiting: list[Any] = []
        self._holders: list[Any] = []
        self._generators: list[Any] = []
        # containers that are attributes of modules, which :mod:`fxprune.state` compares
        self._attributes: set[int] = set()
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
        self._before = [_content(own) for own in self._holders]
        self._begin()

    def _begin(self) -> None:
        self._states = [_state(own) for own in self._generators]
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
            not same(before, _state(own))
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
            not same(before, _content(own))
            for own, before in zip(self._holders, self._before, strict=True)
        )

    def put_back(self) -> None:
        """Let all generators stand where they stood."""
        for own, before in zip(self._generators, self._states, strict=True):
            if not same(before, _state(own)):
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
                id(own) not in self._attributes
                and (from_lists or not listed)
                and not same(before, _content(own))
            ):
                for name, value in _take_out(own, before, holds).items():
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
            if id(own) in self._attributes or isinstance(
                own, (list, set, collections.deque, np.ndarray)
            ):
                continue
            named = _named(own, before)
            for name, value in named.items() if _has_tensors(named) else ():
                if _is_plain(name):
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
        return package in _CALCULATE or not (
            package in self._own or package in sys.stdlib_module_names or not package
        )

    def _add_module(self, module: nn.Module) -> None:
        self._add_methods(type(module), ("forward",))
        own = [
            value
            for name, value in vars(module).items()
            if type(value) not in _PLAIN_TYPES and name not in _NOT_OF_THE_USER
        ]
        self._waiting += own
        _nested(own, self._attributes)

    def _add_methods(self, kind: type, called: tuple[str, ...] = ()) -> None:
        if id(kind) in self._seen and not called:
            return
        self._seen[id(kind)] = kind
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
        if id(value) in self._seen or isinstance(value, (*_PLAIN_TYPES, Tensor, ModuleType)):
            return
        self._seen[id(value)] = value
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
            _is_function(value) and getattr(value, "__self__", None) is not None
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
        for code in _code_within(function.__code__):
            chains, imported, names, sets, bound, _ = _references(code)
            self._sets |= sets
            self._add_names(names)
            for name, *attributes in chains:
                found = (
                    [cell.cell_contents] if (cell := cells.get(name)) and is_filled(cell) else []
                )
                found += [function.__globals__[name]] if name in function.__globals__ else []
                for own in found:
                    self._waiting += _along(own, attributes)
            for module in imported:
                inside = vars(sys.modules[module]) if module in sys.modules else {}
                self._waiting += [inside[name] for name in names & inside.keys()]
            self._holders += [cells[name] for name in bound["STORE_DEREF"] if name in cells]
            if bound["STORE_GLOBAL"]:
                self._holders.append(_Globals(function.__globals__, bound["STORE_GLOBAL"]))

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
            self._waiting += _no_plain(value)
        elif isinstance(value, _HOLDERS):
            self._holders.append(value)
            self._waiting += _no_plain(
                dict.values(value) if isinstance(value, dict) else _content(value)
            )
        elif isinstance(value, np.ndarray):
            self._holders.append(value)
        elif isinstance(value, SimpleNamespace):
            self._add_holder(value)
        elif (isinstance(value, Iterator) and kind.__module__ in ("builtins", "itertools")) or (
            _is_function(value) and not self._calculates(value)
        ):
            self._unseen = True
        elif not self._calculates(kind):
            self._add_methods(kind)
            if hasattr(value, "__dict__") or slots_of(value):
                self._add_holder(value)
            if _state(value) is not None:
                self._generators.append(value)
            elif isinstance(value, np.random.Generator):
                self._waiting.append(value.bit_generator)

    def _add_holder(self, value: Any) -> None:
        self._holders.append(value)
        self._waiting += _no_plain(_content(value).values())


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
        _put_back(
            holder, _store_of(holder), self.name, {} if value is MISSING else {self.name: value}
        )
        self.reach._before[self.place] = _content(holder)

    def now(self) -> Any:
        """What is there."""
        holder = self.reach._holders[self.place]
        return _named(holder, _content(holder)).get(self.name, MISSING)


MISSING = object()
"""Nothing is there."""


class Reached:
    """What the code of a model and of all modules below can reach: looked through once for all
    calls that change nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found: Reach | None = None

    def now(self) -> Reach:
        """To be compared with after a call of the model, or of a module below."""
        if self._found is None or not self._found.begin():
            self._found = Reach(self._model)
        return self._found

    def trusts(self, module: str) -> bool:
        """Whether the code of a module computes, and no more: what it remembers is its own
        business.
        """
        return self._found is not None and self._found._trusts(module)

    @property
    def made(self) -> int:
        """How many results functions that remember theirs have computed."""
        return (
            0
            if self._found is None
            else sum(memo.cache_info().misses for memo in self._found._memos)
        )

    def keys(self, is_foreign: Callable[[Any], bool]) -> list[tuple[Any, Any]]:
        """The dicts and sets that have keys which hold something of this kind, each with one of
        them.
        """
        found = self._found._holders if self._found is not None else []
        tables = [own for own in found if isinstance(own, (dict, set))]
        return [
            (own, key)
            for own in tables
            for key in _keys(own)
            if any(map(is_foreign, every_leaf(key)))
        ]

    def take_out(self, is_foreign: Callable[[Any], bool]) -> list[Any]:
        """What a call since then has put into containers and objects, taken out (see
        :meth:`Reach.take_out`).
        """
        return [] if self._found is None else self._found.take_out(is_foreign)

    def begin_anew(self) -> None:
        """Look through the code anew: the attributes of the modules are others."""
        self._found = Reach(self._model)


def _keys(table: Any) -> list[Any]:
    return [*(set.__iter__(table) if isinstance(table, set) else dict.keys(table))]


def _nested(values: Iterable[Any], found: set[int]) -> None:
    """Add the ids of the containers among values, and in these."""
    for value in values:
        if type(value) in (list, tuple, dict, set) and id(value) not in found:
            found.add(id(value))
            _nested(value.values() if type(value) is dict else value, found)


def _no_plain(values: Iterable[Any]) -> list[Any]:
    """What may lead on: a table of words, say, has many entries that do not."""
    return [value for value in values if type(value) not in _PLAIN_TYPES]


@contextmanager
def undrawn_by(reached: Reached) -> Iterator[None]:
    """Let a run inside draw and fill tables; what a model's code can reach is as it was
    afterwards.

    See :meth:`Reach.put_back` and :meth:`Reach.take_out_tables`. Contexts of one ``reached``
    follow each other, and are not nested.
    """
    reach = reached.now()
    try:
        yield
    finally:
        reach.put_back()
        reach.take_out_tables()


@contextmanager
def drawing(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """As :func:`~fxprune.chance.undrawn`, of this thread alone: whether something was drawn, and
    what ran here may have done so.

    >>> with drawing(nn.ReLU()) as drawn:
    ...     before, _, after = drawn(), random.random(), drawn()
    >>> before, after
    (False, True)
    """
    watch, before = _DrawWatch(), sys.getprofile()

    def mine() -> bool:
        alone = threading.active_count() == 1
        return (
            alone
            or watch.draws
            or any(own is _NUMPYS for own in Reach(model, watch.seen)._generators)
        )

    with undrawn() as drawn:
        sys.setprofile(watch)
        try:
            yield lambda: mine() and drawn()  # in this order: the latter asks the generators
        finally:
            sys.setprofile(before)


class _DrawWatch:
    """What :func:`sys.setprofile` tells of the functions of one thread."""

    def __init__(self) -> None:
        # a generator's method was called, or code ran that may call one: not all compiled methods
        # are told
        self.draws = False
        self.seen: set[CodeType] = set()

    def __call__(self, frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call":
            self.draws |= _leads_to_generator(called)
        elif event == "call" and not self.draws:
            code = frame.f_code
            if code.co_freevars:
                self.draws |= any(
                    _leads_to_generator(frame.f_locals.get(name)) for name in code.co_freevars
                )
            if code not in self.seen:
                self.seen.add(code)
                self.draws |= _may_draw(frame)


def _is_process_wide(generator: Any) -> bool:
    """Whether it is the one of :mod:`random`, or NumPy's, which belong to the process."""
    return generator is _PYTHONS or generator is _NUMPYS


def _leads_to_generator(value: Any) -> bool:
    """Whether it is a method of such a generator, or what leads to NumPy's."""
    return (
        _is_process_wide(getattr(value, "__self__", None))
        or value is np
        or value is np.random
        or _is_process_wide(value)
    )


_PYTHONS: Any = random.random.__self__  # type: ignore[attr-defined]
_NUMPYS: Any = np.random.random.__self__
_METHODS = frozenset(
    name
    for name, value in vars(np.random).items()
    if _is_process_wide(getattr(value, "__self__", None))
)


def _may_draw(frame: FrameType) -> bool:
    """Whether a function reads what leads to NumPy's generator, or, of something unknown, what has
    the name of its methods.
    """
    known = frame.f_globals
    if str(known.get("__name__")).partition(".")[0] in ("fxprune", "numpy", "torch"):
        return False
    chains, imported, _, _, _, attributes = _references(frame.f_code)
    if not _METHODS.isdisjoint(attributes) or any(name.startswith("numpy") for name in imported):
        return True
    return any(
        _leads_to_generator(value)
        for name, *rest in chains
        for value in _along(known.get(name), rest)[-1:]
    )


class _Globals:
    """Some of the names of a module's dictionary."""

    def __init__(self, store: dict[str, Any], names: list[str]) -> None:
        self.store, self.names = store, names


_NOT_OF_THE_USER = frozenset(vars(nn.Module()))


def _is_function(value: Any) -> bool:
    """Whether an object is a function that is compiled, of a kind of its own."""
    return callable(value) and inspect.getattr_static(value, "__qualname__", None) is not None


def _along(value: Any, attributes: list[str]) -> list[Any]:
    """What the longest part of a chain of attributes leads to, and the objects on the way."""
    found = [value]
    for name in attributes:
        if isinstance(value, ModuleType) and name not in vars(value):
            break
        if (
            isinstance(value, (nn.Module, Tensor))
            or hasattr(type(value), "__getattr__")
            or _is_computed(type(value), name)
        ):
            break  # the user's code would run
        try:
            value = getattr(value, name)
        except Exception:
            break
        found.append(value)
    return found[-1:] if isinstance(found[0], (ModuleType, type)) and len(found) > 1 else found


def _is_computed(kind: type, name: str) -> bool:
    own = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
    return isinstance(own, (property, functools.cached_property))


@functools.lru_cache(maxsize=4096)
def _references(
    code: CodeType,
) -> tuple[list[list[str]], list[str], frozenset[str], bool, dict[str, list[str]], list[str]]:
    """Names that a function reads outside of it, each with the attributes that are read of it;
    imports; all names; whether it sets attributes; the names of others' variables that it binds;
    the attributes that are read of other values.
    """
    chains: list[list[str]] = []
    imported: list[str] = []
    others: list[str] = []
    bound: dict[str, list[str]] = {"STORE_GLOBAL": [], "STORE_DEREF": []}  # by how
    sets = follows = False
    for at in dis.get_instructions(code):
        sets |= at.opname == "STORE_ATTR"
        if at.opname in bound:
            bound[at.opname].append(at.argval)
        if at.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF"):
            chains.append([at.argval])
            follows = True
        elif at.opname in ("LOAD_ATTR", "LOAD_METHOD") and follows:
            chains[-1].append(at.argval)
        elif at.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            others.append(at.argval)
        else:
            follows = follows and at.opname == "PUSH_NULL"
            imported += [at.argval] if at.opname == "IMPORT_NAME" else []
    return chains, imported, frozenset(code.co_names), sets, bound, others


def _code_within(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_within(constant)


def _take_out(holder: Any, before: Any, holds: Callable[..., bool]) -> dict[Any, Any]:
    """Take entries out that hold something; what a dict or an object held in their places is put
    back.

    Returns what was taken out of a dict or an object, by its name there.
    """
    if isinstance(holder, (list, collections.deque)):
        known = {id(value) for value in before}
        for place in reversed(range(len(holder))):  # others may append meanwhile
            if id(holder[place]) not in known and holds(holder[place]):
                del holder[place]
    elif isinstance(holder, set):
        for value in [
            value for key, value in _content(holder).items() if key not in before and holds(value)
        ]:
            holder.discard(value)
    elif not isinstance(holder, np.ndarray):
        was, now, store = (
            _named(holder, before),
            _named(holder, _content(holder)),
            _store_of(holder),
        )
        changed = [name for name, value in now.items() if value is not was.get(name, was)]
        foreign = [name for name in changed if holds(name, now[name])]
        if foreign and not isinstance(holder, dict):
            foreign = changed  # what belongs to a table, its size, say
        for name in foreign:
            _put_back(holder, store, name, was)
        return {name: now[name] for name in foreign}
    return {}


def _named(holder: Any, content: Any) -> dict[Any, Any]:
    """What a dict or an object held, by name."""
    half = len(content) // 2
    return (
        dict(zip(content[:half], content[half:], strict=True))
        if isinstance(holder, dict)
        else content
    )


def _store_of(holder: Any) -> dict[Any, Any] | None:
    return (
        holder.store
        if isinstance(holder, _Globals)
        else holder
        if isinstance(holder, dict)
        else None
    )


def _has_tensors(named: dict[Any, Any]) -> bool:
    return bool(tensors_of(_no_plain(named.values())))


def _is_plain(name: Any) -> bool:
    return isinstance(name, (*_PLAIN_TYPES, torch.dtype)) or (
        isinstance(name, tuple) and all(map(_is_plain, name))
    )


def _put_back(holder: Any, store: dict[Any, Any] | None, name: Any, was: dict[Any, Any]) -> None:
    # past what a class of the user's makes of it; the dictionary of a class cannot be written into
    if store is None:
        kind: Any = type if isinstance(holder, type) else object
        kind.__setattr__(holder, name, was[name]) if name in was else kind.__delattr__(
            holder, name
        )
    elif name in was:
        store[name] = was[name]
    else:
        store.pop(name, None)


def _content(holder: Any) -> Any:
    """What a container or an object holds now, as it can be compared later."""
    if isinstance(holder, _Globals):
        return {name: holder.store[name] for name in holder.names if name in holder.store}
    if isinstance(holder, np.ndarray):
        return holder.copy()
    # as Python keeps it, whatever its class makes of it: the user's code must not run
    if isinstance(holder, dict):
        return [*dict.keys(holder), *dict.values(holder)]
    if isinstance(holder, set):
        return {id(item): item for item in set.__iter__(holder)}
    if isinstance(holder, list):
        return [*list.__iter__(holder)]
    if isinstance(holder, collections.deque):
        return [*collections.deque.__iter__(holder)]
    if isinstance(holder, CellType):
        return {"cell_contents": holder.cell_contents} if is_filled(holder) else {}
    return {
        **getattr(holder, "__dict__", {}),
        **({} if isinstance(holder, type) else slots_of(holder)),
    }


def _state(value: Any) -> Any:
    """The state of an object that changes by being asked, whose class is compiled; None: it has
    none that can be set.
    """
    if not hasattr(type(value), "__setstate__"):
        return None
    try:
        made = value.__reduce_ex__(2)
    except Exception:
        return None
    return made[2] if isinstance(made, tuple) and len(made) > 2 else None


def same(one: Any, other: Any) -> bool:
    """Whether two values hold the same: numbers and tensors by what they are, objects that are
    neither only if they are one.
    """
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return one.shape == other.shape and bool((one == other).all())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and (
            all(map(operator.is_, one, other)) or all(map(same, one, other))
        )
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return False
        pairs = [(value, other[key]) for key, value in one.items()]
        return all(a is b for a, b in pairs) or all(same(*pair) for pair in pairs)
    if type(one) is Tensor:
        return (
            _has_values(one)
            and _has_values(other)
            and one.dtype is other.dtype
            and torch.equal(one, other)
        )
    return isinstance(one, _PLAIN_TYPES) and one == other


def _has_values(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized
