"""The search for what the code of a model can reach."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Collection, Iterator
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

from fxprune.common.contents import slots_of
from fxprune.common.identity import IdentitySet
from fxprune.trace.copying import is_filled
from fxprune.trace.reach.holders import (
    HOLDERS,
    PLAIN_TYPES,
    Globals,
    content_of,
    state_of,
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

__all__ = ["NameSearch"]


class NameSearch:
    """A search that follows the names in the code of a model's own classes.

    Parameters
    ----------
    model:
        A copy that is run. The attributes of its modules are searched, too.
    ran:
        Code that was run: only this code is searched. Default: all code.

    Attributes
    ----------
    holders:
        The containers and objects that were found. Attributes of modules are among them.
    generators:
        The random generators and other objects whose state can be set.
    memos:
        The functions that cache their results.
    """

    def __init__(self, model: nn.Module, ran: Collection[CodeType] | None = None) -> None:
        self._model, self._ran = model, ran
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
        self._sets_attributes = False
        self._packages = {type(module).__module__.partition(".")[0] for module in model.modules()}
        for module in model.modules():
            if not self._only_computes(type(module)):
                self._add_module(module)
        while self._waiting:
            self._visit(self._waiting.pop())

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
        is_installed = bool(package) and package not in sys.stdlib_module_names
        return package in COMPUTING_PACKAGES or (is_installed and package not in self._packages)

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
