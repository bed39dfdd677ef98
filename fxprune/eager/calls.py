"""Calls of chosen modules of a private copy of a model go elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import nn

__all__ = ["intercepted"]


@contextmanager
def intercepted(
    root: nn.Module, paths: Collection[str], instead: Callable[[str, Callable[[], Any], Any, Any], Any]
) -> Iterator[None]:
    """Calls of the modules at these paths, the outermost ones, go to ``instead(path, call, args, kwargs)``.

    ``call()`` makes the call; where ``NotImplemented`` is given back the module's own Python runs, and its calls are looked at.
    """
    original, inside = nn.Module.__call__, False
    known = {id(module): name for name, module in reversed(list(root.named_modules(remove_duplicate=False))) if name in paths}

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        path = known.get(id(module))
        if inside or path is None:
            return original(module, *args, **kwargs)
        inside = True
        try:
            out = instead(path, lambda: original(module, *args, **kwargs), args, kwargs)
        finally:
            inside = False
        return original(module, *args, **kwargs) if out is NotImplemented else out

    with mock.patch.object(nn.Module, "__call__", call):
        yield
