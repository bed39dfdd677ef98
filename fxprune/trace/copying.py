"""Copies of Python objects in which some objects are replaced by others."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fxprune.common.contents import slots_of
from fxprune.common.identity import (
    IdentitySet,
    Memo,
    drop_from_memo,
    from_memo,
    in_memo,
    memo_of,
    to_memo,
)
from fxprune.trace.containers import CONTAINERS, COPIED_SEQUENCES, MAPPINGS, layout_of

__all__ = ["HOOKS", "HOOKS_CALLED", "copy_hooks", "copy_rebound", "is_filled", "rebind_hooks"]


def copy_rebound(value: Any, memo: Memo) -> Any:
    """Copy a value like ``copy.deepcopy``, and rebind functions in it, too.

    Functions, methods and partials are copied only if they refer to objects in ``memo``, through
    their closures or default arguments, for example. Otherwise they stay the same object, so what
    a closure collects is still collected there.

    Parameters
    ----------
    value:
        What to copy.
    memo:
        The objects to replace, and what replaces them (see :mod:`fxprune.common.identity`).

    Examples
    --------
    >>> one, other = [1], [2]
    >>> def reader(held):
    ...     return lambda: held[0]
    >>> held = copy_rebound({"read": reader(one)}, memo_of([(one, other)]))
    >>> held["read"](), copy_rebound(len, {}) is len
    (2, True)
    """
    if in_memo(memo, value):
        return from_memo(memo, value)
    kind = type(value)
    if kind in (types.FunctionType, types.MethodType, functools.partial):
        return _copied_callable(value, memo)
    if kind is weakref.ref:
        target = value()
        is_replaced = target is not None and in_memo(memo, target)
        return weakref.ref(from_memo(memo, target)) if is_replaced else value
    if kind in COPIED_SEQUENCES or kind in MAPPINGS:
        return _copied_container(value, memo)
    # for example what a hook has kept from a step of training
    if isinstance(value, Tensor) and value.grad_fn is not None:
        return to_memo(memo, value, value.detach().clone())
    return _deepcopied(value, memo)


def _copied_callable(value: Any, memo: Memo) -> Any:
    """Copy a partial, or a function or method that leads to replaced objects."""
    kind = type(value)
    if kind is functools.partial:
        args = [copy_rebound(item, memo) for item in value.args]
        keywords = {name: copy_rebound(item, memo) for name, item in value.keywords.items()}
        return functools.partial(copy_rebound(value.func, memo), *args, **keywords)
    if not _refers(value, memo):
        return value
    if kind is types.FunctionType:
        return _copied_function(value, memo)
    return types.MethodType(copy_rebound(value.__func__, memo), copy_rebound(value.__self__, memo))


def _copied_container(value: Any, memo: Memo) -> Any:
    """Copy a built-in container and what it holds.

    A list or dict is registered before its entries are copied, because it may hold itself.
    """
    kind: Any = type(value)
    made: Any
    if kind is list:
        made = to_memo(memo, value, kind())
        made.extend(copy_rebound(item, memo) for item in value)
        return made
    if kind in MAPPINGS:
        made = to_memo(memo, value, kind())
        made.update(
            (copy_rebound(key, memo), copy_rebound(item, memo)) for key, item in value.items()
        )
        return made
    return kind(copy_rebound(item, memo) for item in value)


def _deepcopied(value: Any, memo: Memo) -> Any:
    """Copy a value with ``copy.deepcopy``, even if a class refuses to be copied.

    What cannot be copied (a lock, a module object, a stream) is shared with the original.
    Iterators are not, because reading one changes it for all; nor are objects that refer to
    replaced ones.
    """
    trial = dict(memo)  # a failed copy leaves entries here
    try:
        made = copy.deepcopy(value, trial)
    except Exception as error:
        shared = filter(_is_shared, _reached(value))
        trial = memo | memo_of((item, item) for item in shared)
        try:
            made = copy.deepcopy(value, trial)
        except Exception:
            return _rebuilt(value, memo, error)
    kept = from_memo(trial, trial, [])  # the list in which deepcopy keeps the originals alive
    drop_from_memo(trial, trial)
    memo.update(trial)
    to_memo(memo, memo, from_memo(memo, memo, [])).extend(kept)
    return made


def _rebuilt(value: Any, memo: Memo, error: Exception) -> Any:
    """Copy an object by copying what Python holds in it, without its ``__deepcopy__``.

    If the object were shared, changes would be seen by all. What it holds outside of Python (a
    handle, a connection) is shared.

    Parameters
    ----------
    value:
        An object that ``copy.deepcopy`` cannot copy.
    error:
        The error of ``copy.deepcopy``.

    Raises
    ------
    Exception
        ``error``, if a copy would release a shared resource when it is deleted, or if an object
        that has to be shared refers to replaced objects, iterators or tensors.
    """
    layout = layout_of(value)
    if layout is None:
        has_state = any(isinstance(item, (Iterator, Tensor)) for item in _reached(value))
        if has_state or _refers(value, memo):
            raise error
        return value
    if hasattr(type(value), "__del__"):
        raise error
    made = _new_of_layout(value, layout, memo)
    for name, item in slots_of(value).items():
        object.__setattr__(made, name, copy_rebound(item, memo))
    for name, item in getattr(value, "__dict__", {}).items():
        vars(made)[name] = copy_rebound(item, memo)
    return made


def _new_of_layout(value: Any, layout: Any, memo: Memo) -> Any:
    """Create an object of the same class, with copies of what the built-in class holds in it."""
    kind = type(value)
    if layout in (tuple, frozenset):
        items = [copy_rebound(item, memo) for item in layout.__iter__(value)]
        return to_memo(memo, value, layout.__new__(kind, items))
    made = to_memo(memo, value, layout.__new__(kind))
    if layout in MAPPINGS:
        items = [
            (copy_rebound(key, memo), copy_rebound(item, memo))
            for key, item in layout.items(value)
        ]
        layout.update(made, dict(items))
    elif layout in CONTAINERS:
        layout.__init__(made, [copy_rebound(item, memo) for item in layout.__iter__(value)])
    return made


def _is_shared(value: Any) -> bool:
    """Tell whether an object cannot be copied, holds no other object, and may be shared.

    An iterator or a tensor may not.
    """
    if (
        isinstance(value, (Tensor, Iterator))
        or layout_of(value) is not None
        or _objects_held(value)
    ):
        return False
    try:
        copy.deepcopy(value)
    except Exception:  # the class may raise any error
        return True
    return False


HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""Names of the attributes of a module that hold its hooks, by number."""

HOOKS_CALLED = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
"""Names of the attributes that say how hooks are called, by the same numbers."""


def copy_hooks(hooks: dict[int, Any], memo: Memo) -> dict[int, Any]:
    """Copy hooks so that they collect into lists, dicts and objects of their own.

    A trial run then changes nothing of the user's.

    Parameters
    ----------
    hooks:
        A module's hooks, by number.
    memo:
        The objects to replace, and what replaces them. Copies are added to it.
    """
    return type(hooks)((key, _hook_apart(hook, memo)) for key, hook in hooks.items())


def _hook_apart(hook: Any, memo: Memo) -> Any:
    """Copy one hook and the containers into which it collects."""
    for container in _collections(hook):
        _copied_apart(container, memo)
    if type(hook) is types.MethodType:
        return types.MethodType(hook.__func__, _copied_apart(hook.__self__, memo))
    return (
        copy_rebound(hook, memo) if type(hook) is types.FunctionType else _copied_apart(hook, memo)
    )


def _copied_apart(value: Any, memo: Memo) -> Any:
    """Copy a container, or an object and the containers in its attributes.

    What the containers hold is not copied, except nested containers.
    """
    if in_memo(memo, value):
        return from_memo(memo, value)
    if type(value) in CONTAINERS:
        made = to_memo(memo, value, copy.copy(value))
        if isinstance(value, dict):
            made.update((key, _copied_apart(item, memo)) for key, item in value.items())
        elif isinstance(value, list):
            made[:] = [_copied_apart(item, memo) for item in value]
        return made
    if hasattr(value, "__dict__") and not isinstance(
        value, (Tensor, nn.Module, type, types.ModuleType, types.FunctionType)
    ):
        made = to_memo(memo, value, copy.copy(value))
        for name, item in vars(value).items():
            is_container = type(item) in CONTAINERS
            new = _copied_apart(item, memo) if is_container else from_memo(memo, item, item)
            vars(made)[name] = new
        return made
    return value


def rebind_hooks(hooks: dict[int, Any], memo: Memo) -> dict[int, Any]:
    """Rebind hooks to the modules in ``memo``; what they collect into stays the same.

    The lists, dicts and sets that a hook holds are shared with the original.

    Parameters
    ----------
    hooks:
        A module's hooks, by number.
    memo:
        The modules to replace, and what replaces them. The containers are added to it.
    """
    for hook in hooks.values():
        memo |= memo_of((container, container) for container in _collections(hook))
    return type(hooks)((key, _rebound(hook, memo)) for key, hook in hooks.items())


def _collections(function: Any) -> list[Any]:
    """Return the lists, dicts and sets that a function holds in its closure and defaults."""
    if type(function) is not types.FunctionType:
        return []
    return [item for item in _objects_held(function) if type(item) in CONTAINERS]


def _rebound(value: Any, memo: Memo) -> Any:
    """Copy a value if it refers to replaced objects; return the same object otherwise."""
    return copy_rebound(value, memo) if _refers(value, memo) else value


def _copied_function(function: types.FunctionType, memo: Memo) -> types.FunctionType:
    """Copy a function with its closure, default arguments and global names rebound."""
    cells = [(cell, *_cell(cell, memo)) for cell in function.__closure__ or ()]
    closure = tuple(new for _, new, _ in cells) or None
    found = _globals(function, memo)
    replaced = {name: value for name, value in found.items() if _refers(value, memo)}
    names = _Names(function.__globals__) if replaced else function.__globals__
    made = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, closure
    )
    to_memo(memo, function, made)  # first, because its cells may refer to it
    names |= {name: copy_rebound(value, memo) for name, value in replaced.items()}
    made.__module__ = function.__module__
    made.__dict__.update(function.__dict__)
    made.__qualname__ = function.__qualname__
    made.__kwdefaults__ = _rebound(function.__kwdefaults__, memo)
    made.__defaults__ = _rebound(function.__defaults__, memo)
    for cell, new, is_new in cells:
        if is_new and is_filled(cell):
            new.cell_contents = _rebound(cell.cell_contents, memo)
    return made


class _Names(dict[str, Any]):
    """The globals of a copied function: those of the original, except for replaced ones."""

    def __init__(self, real: dict[str, Any]) -> None:
        super().__init__()
        self.real = real

    def __missing__(self, name: str) -> Any:
        return self.real[name]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.real

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a name, as ``dict.get`` does."""
        try:
            return self[name]
        except KeyError:
            return default

    def keys(self) -> Any:
        """Return all names."""
        return {**self.real, **self}.keys()


def _module_globals(names: dict[str, Any]) -> dict[str, Any]:
    """Return the globals of the module in which a function was defined."""
    while isinstance(names, _Names):
        names = names.real
    return names


def _globals(function: types.FunctionType, memo: Memo) -> dict[str, Any]:
    """Return the globals of a function that may lead to replaced objects.

    These are modules and tensors that are replaced, and functions of the same file.
    """
    names, codes, found = function.__globals__, [function.__code__], dict[str, Any]()
    for code in codes:
        codes += [item for item in code.co_consts if isinstance(item, types.CodeType)]
        for name in code.co_names:
            value = names.get(name)
            if isinstance(value, types.FunctionType):
                leads_on = _module_globals(value.__globals__) is _module_globals(names)
            else:
                leads_on = isinstance(value, (nn.Module, Tensor)) and in_memo(memo, value)
            if leads_on:
                found[name] = value
    return found


def _cell(cell: types.CellType, memo: Memo) -> tuple[types.CellType, bool]:
    """Return the copy of a closure cell, and whether it is a new one.

    Functions that share a cell share its copy.
    """
    is_new = not in_memo(memo, cell)
    if is_new:
        to_memo(memo, cell, types.CellType())
    return from_memo(memo, cell), is_new


def is_filled(cell: types.CellType) -> bool:
    """Tell whether a variable of a closure has a value yet."""
    try:
        return cell.cell_contents is cell.cell_contents
    except ValueError:  # the enclosing function has not bound the name yet
        return False


def _refers(value: Any, memo: Memo) -> bool:
    """Tell whether a value leads to an object that is replaced."""
    return any(in_memo(memo, item) for item in _reached(value, memo))


def _reached(value: Any, memo: Memo | None = None) -> Iterator[Any]:
    """Yield the objects to which a value leads, each once.

    Objects in ``memo`` are yielded, but not followed.
    """
    seen: IdentitySet[Any] = IdentitySet()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if item in seen:
            continue
        seen.add(item)  # keeps it alive: each access to a bound method makes a new object
        yield item
        if memo is None:
            waiting += _objects_held(item)
        elif not in_memo(memo, item):
            waiting += _objects_held(item)
            if isinstance(item, types.FunctionType):
                waiting += _globals(item, memo).values()


def _objects_held(value: Any) -> list[Any]:
    """Return the objects that an object holds directly."""
    kind = type(value)
    if kind is types.FunctionType:
        cells = [cell.cell_contents for cell in value.__closure__ or () if is_filled(cell)]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if kind is types.MethodType:
        return [value.__func__, value.__self__]
    if kind is functools.partial:
        return [value.func, *value.args, *value.keywords.values()]
    if kind in MAPPINGS:
        return [*value.keys(), *value.values()]
    if kind in COPIED_SEQUENCES:
        return [*value]
    if kind is weakref.ref:
        return [] if value() is None else [value()]
    if isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
        return []
    return [*getattr(value, "__dict__", {}).values(), *slots_of(value).values()]
