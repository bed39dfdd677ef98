"""Which modules of a model are its parts: the largest that can be traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from fxprune.eager.calls import intercepted
from fxprune.errors import FxpruneError
from fxprune.shapes import META, holds_tensors
from fxprune.trace import Twin, trace

__all__ = ["Finder", "shape_of"]


_CONSTANTS = (type(None), bool, int, float, str)
"""What a part may be called with beside tensors: its graph says so where it is called with another one."""


class Finder:
    """Finds the largest modules that can be traced: called on tensors, and every time the same graph."""

    def __init__(self, twin: Twin) -> None:
        self.twin = twin
        self.python: set[str] = set()
        self.graphs: dict[str, str] = {}

    @property
    def parts(self) -> frozenset[str]:
        return frozenset(self.graphs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        real, known = self.twin.instance(), -1
        everything = frozenset(name for name, module in real.named_modules() if name and any(True for _ in module.parameters()))
        while known != len(self.python):
            known = len(self.python)
            with intercepted(real, everything - self.python, self._try), torch.inference_mode():
                own, named = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
                real(*own, **named)

    def _try(self, path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        if not self._traceable(path, args, kwargs):
            self.python.add(path)
            self.graphs.pop(path, None)
            return NotImplemented
        return call()

    def _traceable(self, path: str, args: Any, kwargs: Any) -> bool:
        every = [*args, *kwargs.values()]
        nested = [value for value in every if holds_tensors(value)]
        if not nested or not all(isinstance(leaf, Tensor) for leaf in tree_leaves(nested)):
            return False
        if not all(type(value) in _CONSTANTS for value in every if not holds_tensors(value)):
            return False
        try:
            graph = str(trace(self.twin.part(path), *tree_map(shape_of, (args, kwargs))).graph)
        except FxpruneError:
            return False
        return self.graphs.setdefault(path, graph) == graph


def shape_of(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor):
        return tensor
    return torch.empty(tuple(tensor.size()), dtype=tensor.dtype, device=META)
