"""Interception of module calls, and protection of a run from other threads and modes."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode_temporarily,
)
from torch.utils._python_dispatch import _disable_current_modes

from fxprune.common.dispatch import tensors_in
from fxprune.common.identity import IdentityMap
from fxprune.common.process_lock import PROCESS_LOCK
from fxprune.trace.user_code import ElsewhereError

__all__ = [
    "in_one_thread",
    "intercepted",
    "paths_with_parameters",
    "unwatched",
    "without_function_modes",
]

Instead = Callable[[str, Callable[[], Any], Any, Any], Any]
"""A function that replaces calls of modules (see :func:`intercepted`)."""


@contextmanager
def intercepted(root: nn.Module, paths: Collection[str], instead: Instead) -> Iterator[None]:
    """Replace the outermost calls of some modules by calls of ``instead``.

    Each of these modules gets a ``forward`` of its own while the context is active, so that no
    other module and no other thread is affected. The hooks of the modules still run.

    Parameters
    ----------
    root:
        The model. It must be a copy that nobody else calls.
    paths:
        Paths of the modules in ``root``.
    instead:
        Called as ``instead(path, call, args, kwargs)``; its result is the result of the call.
        ``call()`` makes the original call, in which no further calls are intercepted. If it
        returns ``NotImplemented``, the module runs, and calls inside it are intercepted.

    Raises
    ------
    ElsewhereError
        If another thread calls one of the modules.
    """
    watch = _Watch(instead)
    named = reversed(list(root.named_modules(remove_duplicate=False)))
    modules = IdentityMap((module, name) for name, module in named if name in paths)
    before = [(module, vars(module).get("forward")) for module in modules]
    for module, path in modules.items():
        vars(module)["forward"] = watch.wrap(path, module.forward)
    try:
        yield
    finally:
        for module, forward in before:
            if forward is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward


def paths_with_parameters(model: nn.Module) -> set[str]:
    """Return the paths of the submodules of a model that have parameters."""
    paths = set()
    for path, module in model.named_modules():
        if path and any(True for _ in module.parameters()):
            paths.add(path)
    return paths


class _Watch:
    """The ``forward`` methods that :func:`intercepted` puts into modules.

    Attributes
    ----------
    instead:
        The function to call instead.
    thread:
        The thread in which modules may be called.
    inside:
        Whether such a call is running, so that calls inside it are not intercepted.
    """

    def __init__(self, instead: Instead) -> None:
        self.instead = instead
        self.thread = threading.get_ident()
        self.inside = False

    def wrap(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that replaces ``forward`` of the module at ``path``."""

        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self.thread:
                raise ElsewhereError.at(self.thread)
            if self.inside:
                return forward(*args, **kwargs)
            self.inside = True
            try:
                out = self.instead(path, lambda: forward(*args, **kwargs), args, kwargs)
            finally:
                self.inside = False
            return forward(*args, **kwargs) if out is NotImplemented else out

        return watched


class _NoTensors(TorchFunctionMode):
    """A mode that raises an error if the code it runs in handles tensors.

    It is active in other threads than the one that runs the model.
    """

    def __init__(self, thread: int) -> None:
        super().__init__()
        self.thread = thread

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if tensors_in(args, kwargs or {}):
            raise ElsewhereError.at(self.thread)
        return func(*args, **(kwargs or {}))


@contextmanager
def in_one_thread() -> Iterator[None]:
    """Raise an error if the model computes with tensors in another thread.

    Threads that the model starts and functions that it submits to thread pools may run as long as
    they handle no tensors.

    Raises
    ------
    ElsewhereError
        At the end of the context, also if the model has caught the error.
    """
    guard = _ThreadGuard()
    with PROCESS_LOCK:
        start, submit = threading.Thread.start, ThreadPoolExecutor.submit
        threading.Thread.start = guard.starting(start)  # type: ignore[method-assign]
        ThreadPoolExecutor.submit = guard.submitting(submit)  # type: ignore[method-assign]
        try:
            yield
        except Exception as error:
            if guard.errors:
                raise guard.errors[0] from error
            raise
        finally:
            threading.Thread.start, ThreadPoolExecutor.submit = start, submit  # type: ignore[method-assign]
    if guard.errors:
        raise guard.errors[0]


class _ThreadGuard:
    """Replacements for the functions that begin threads, for :func:`in_one_thread`.

    Only what the thread that made this object begins is guarded.

    Attributes
    ----------
    errors:
        The errors that were raised in other threads.
    """

    def __init__(self) -> None:
        self.errors: list[ElsewhereError] = []
        self._thread = threading.get_ident()

    def starting(self, start: Callable[..., None]) -> Callable[..., None]:
        """Return a replacement for ``Thread.start``."""

        def begin(thread: threading.Thread) -> None:
            if threading.get_ident() == self._thread:
                vars(thread)["run"] = self._without_tensors(thread.run)
            start(thread)

        return begin

    def submitting(self, submit: Callable[..., Any]) -> Callable[..., Any]:
        """Return a replacement for ``ThreadPoolExecutor.submit``."""

        def submit_guarded(
            pool: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any
        ) -> Any:
            if threading.get_ident() == self._thread:
                function = self._without_tensors(function)
            return submit(pool, function, *args, **kwargs)

        return submit_guarded

    def _without_tensors(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that records and raises an error once it handles tensors."""

        @functools.wraps(call)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                with _NoTensors(self._thread):
                    return call(*args, **kwargs)
            except ElsewhereError as error:
                self.errors.append(error)
                raise

        return guarded


@contextmanager
def without_function_modes() -> Iterator[None]:
    """Turn off the torch-function modes of this thread."""
    with ExitStack() as stack:
        for _ in _get_current_function_mode_stack():
            stack.enter_context(_pop_mode_temporarily())
        yield


@contextmanager
def unwatched() -> Iterator[None]:
    """Turn off all torch-function and dispatch modes of this thread.

    Tracing a part inside a run must not be seen by the modes that observe the run.
    """
    with _disable_current_modes(), without_function_modes():
        yield
