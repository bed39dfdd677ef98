"""Modules that torch.compile made are taken as the modules that were compiled."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

__all__ = ["Uncompiled", "is_compiled", "plain"]


def is_compiled(module: Any) -> bool:
    """Whether ``torch.compile`` made this module of another one."""
    # Nobody has made one where its class was not imported yet, which takes seconds.
    kind = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    return kind is not None and isinstance(module, kind)


def plain(model: Any) -> Any:
    """The module that was compiled, or the model itself.

    >>> net = nn.Linear(2, 2)
    >>> plain(net) is net
    True
    """
    while is_compiled(model):
        model = model._orig_mod
    return model


class Uncompiled(nn.Module):
    """Stands in a copy of a model for a module that was compiled, under its names: calls what was
    compiled.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._modules["_orig_mod"] = inner  # which may have no attributes yet

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._orig_mod(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_orig_mod"), name)
