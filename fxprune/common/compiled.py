"""Access to the original modules behind those that ``torch.compile`` made."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

__all__ = ["Uncompiled", "is_compiled", "uncompiled"]


def is_compiled(module: Any) -> bool:
    """Tell whether ``torch.compile`` made this module from another one."""
    # Do not import the class here: the import takes seconds. Until somebody has imported it, no
    # such module exists.
    kind = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    return kind is not None and isinstance(module, kind)


def uncompiled(model: Any) -> Any:
    """Return the original of a compiled module; other modules are returned unchanged.

    >>> net = nn.Linear(2, 2)
    >>> uncompiled(net) is net
    True
    """
    while is_compiled(model):
        model = model._orig_mod
    return model


class Uncompiled(nn.Module):
    """Replacement of a compiled module in a copy of a model; it calls the original module.

    The original is registered as ``_orig_mod``, as in a compiled module, so that the names of
    parameters and submodules stay the same.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._modules["_orig_mod"] = inner  # set directly: it may have no attributes yet

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the original module."""
        return self._orig_mod(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_orig_mod"), name)
