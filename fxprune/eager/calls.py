"""Calls of chosen modules of a private copy of a model go elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily

__all__ = ["intercepted", "without_function_modes"]

Instead = Callable[[str, Callable[[], Any], Any, Any], Any]


@contextmanager
def intercepted(root: nn.Module, paths: Collection[str], instead: Instead) -> Iterator[None]:
    """Calls of the modules at these paths, the outermost ones, go to ``instead(path, call, args, kwargs)``.

    ``call()`` makes the call; where ``NotImplemented`` is given back the module's own Python runs, and its calls are looked at.

    For a while each of these modules has a ``forward`` of its own, so no other module, and no other thread, notices. ``root`` must
    be a copy that nobody else calls. Hooks of these modules run, as for every call.
    """
    watch = _Watch(instead)
    modules = {id(m): (name, m) for name, m in reversed(list(root.named_modules(remove_duplicate=False))) if name in paths}
    before = [(module, vars(module).get("forward")) for _, module in modules.values()]
    for path, module in modules.values():
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
        self.inside = False

    def over(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return forward(*args, **kwargs)
            self.inside = True
            try:
                out = self.instead(path, lambda: forward(*args, **kwargs), args, kwargs)
            finally:
                self.inside = False
            return forward(*args, **kwargs) if out is NotImplemented else out

        return watched


@contextmanager
def without_function_modes() -> Iterator[None]:
    """Without what looks at the functions that the model calls."""
    with ExitStack() as stack:
        for _ in _get_current_function_mode_stack():
            stack.enter_context(_pop_mode_temporarily())
        yield
