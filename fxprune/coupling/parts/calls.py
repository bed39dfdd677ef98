"""Calls of chosen modules of a private copy of a model go elsewhere."""

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
from fxprune.common.process_lock import TURN
from fxprune.trace.user_code import ElsewhereError

__all__ = ["in_one_thread", "intercepted", "unwatched", "without_function_modes"]

Instead = Callable[[str, Callable[[], Any], Any, Any], Any]


@contextmanager
def intercepted(root: nn.Module, paths: Collection[str], instead: Instead) -> Iterator[None]:
    """Calls of the modules at these paths, the outermost ones, go to ``instead(path, call, args,
    kwargs)``.

    ``call()`` makes the call; where ``NotImplemented`` is given back the module's own Python runs,
    and its calls are looked at.

    For a while each of these modules has a ``forward`` of its own, so no other module, and no
    other thread, notices. ``root`` must be a copy that nobody else calls. Hooks of these modules
    run, as for every call.
    """
    watch = _Watch(instead)
    named = reversed(list(root.named_modules(remove_duplicate=False)))
    modules = IdentityMap((module, name) for name, module in named if name in paths)
    before = [(module, vars(module).get("forward")) for module in modules]
    for module, path in modules.items():
        vars(module)["forward"] = watch.over(path, module.forward)
    try:
        yield
    finally:
        for module, own in before:
            if own is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = own


class _Watch:
    def __init__(self, instead: Instead) -> None:
        self.instead = instead
        self.thread = threading.get_ident()
        self.inside = False

    def over(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
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


class _Elsewhere(TorchFunctionMode):
    """Refuses what another thread does to tensors for the one that follows a model."""

    def __init__(self, thread: int) -> None:
        super().__init__()
        self.thread = thread

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if tensors_in(args, kwargs or {}):
            raise ElsewhereError.at(self.thread)
        return func(*args, **(kwargs or {}))


@contextmanager
def in_one_thread() -> Iterator[None]:
    """Refuse threads that the model starts, and functions that it hands to pools, once they
    compute with tensors.

    Raises
    ------
    ElsewhereError
    """
    mine, found = threading.get_ident(), list[ElsewhereError]()

    def refusing(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def refuse(*args: Any, **kwargs: Any) -> Any:
            try:
                with _Elsewhere(mine):
                    return call(*args, **kwargs)
            except ElsewhereError as error:
                found.append(error)
                raise

        return refuse

    def begin(self: threading.Thread) -> None:
        if threading.get_ident() == mine:
            vars(self)["run"] = refusing(self.run)
        start(self)

    def hand_on(
        self: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        return submit(
            self,
            refusing(function) if threading.get_ident() == mine else function,
            *args,
            **kwargs,
        )

    with TURN:
        start, submit = threading.Thread.start, ThreadPoolExecutor.submit
        threading.Thread.start, ThreadPoolExecutor.submit = begin, hand_on  # type: ignore[method-assign, assignment]
        try:
            yield
        except Exception as error:
            if found:
                raise found[0] from error
            raise
        finally:
            threading.Thread.start, ThreadPoolExecutor.submit = start, submit  # type: ignore[method-assign]
    if found:
        raise found[0]


@contextmanager
def without_function_modes() -> Iterator[None]:
    """Without what looks at the functions that the model calls."""
    with ExitStack() as stack:
        for _ in _get_current_function_mode_stack():
            stack.enter_context(_pop_mode_temporarily())
        yield


@contextmanager
def unwatched() -> Iterator[None]:
    """Without what looks at the functions and the operations of a run: how a part is traced is
    none of it.
    """
    with _disable_current_modes(), without_function_modes():
        yield
