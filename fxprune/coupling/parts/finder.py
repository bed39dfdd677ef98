"""Which modules of a model are its parts: the largest that can be traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from fxprune.common.contents import leaves_of
from fxprune.common.dispatch import META, holds_tensors
from fxprune.common.identity import IdentitySet
from fxprune.coupling.parts.calls import intercepted, unwatched
from fxprune.coupling.parts.memory import place_of
from fxprune.coupling.parts.routes import Route, run_route
from fxprune.errors import FxpruneError
from fxprune.trace import MetaCopy, trace

__all__ = ["Finder", "shape_of"]

_CONSTANT_TYPES = (type(None), bool, int, float, str)
"""What a part may be called with beside tensors: its graph says so where it is called with another
one.
"""


class Finder:
    """Finds the largest modules that can be traced: called on tensors, every time the same graph,
    and from outside only.

    Attributes
    ----------
    python:
        Paths of the modules that were called, and that stay Python.
    graphs:
        Path of a part -> its graph, as text.
    """

    def __init__(self, meta_copy: MetaCopy) -> None:
        self.meta_copy = meta_copy
        self.python: set[str] = set()
        self.graphs: dict[str, str] = {}
        # parts whose graph holds for its own sizes: it guards them
        self._settled: frozenset[str] = frozenset()
        # by path and what it is called with; None: it cannot be traced
        self._traced: dict[tuple[str, str], str | None] = {}

    @property
    def parts(self) -> frozenset[str]:
        return frozenset(self.graphs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], routes: Sequence[Route]) -> None:
        """Let the model go each of these routes until all that it calls is a part, or Python."""
        real, known = self.meta_copy.instance(), -1
        self._own = {module: _tensors_held(module) for module in real.modules()}
        self._real = real
        everything = frozenset(
            name
            for name, module in real.named_modules()
            if name and any(True for _ in module.parameters())
        )
        while known != len(self.python):
            known, self.graphs = len(self.python), {}
            with intercepted(real, everything - self.python, self._try):
                for route in routes:
                    self._settled = self.parts if route.is_of_sizes else frozenset()
                    run_route(real, args, kwargs, route)
            self.python |= self._entered()

    def _try(self, path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        graph = (
            self._graph(path, args, kwargs)
            if path not in self.python and self._is_as_given(path)
            else None
        )
        if graph is None or (
            self.graphs.setdefault(path, graph) != graph and path not in self._settled
        ):
            self.python.add(path)
            self.graphs.pop(path, None)
            return NotImplemented
        out = call()
        # what its graph does
        self._own.update(
            {module: _tensors_held(module) for module in self._real.get_submodule(path).modules()}
        )
        return out

    def _is_as_given(self, path: str) -> bool:
        """Whether the module has the tensors that it had: neither ``torch.func`` nor Python has
        put others into it.

        Nor does ``torch.func`` map over them.
        """
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return False
        return all(
            _are_same(_tensors_held(module), self._own[module])
            for module in self._real.get_submodule(path).modules()
        )

    def _graph(self, path: str, args: Any, kwargs: Any) -> str | None:
        leaves = tree_leaves((args, kwargs))
        if not holds_tensors(leaves) or not all(
            isinstance(leaf, Tensor) or type(leaf) in _CONSTANT_TYPES for leaf in leaves
        ):
            return None
        try:
            inputs = tree_map(shape_of, (args, kwargs))
        except Exception:
            # a container that refuses tensors without data, as a packed sequence does
            return None
        leaves, spec = tree_flatten(inputs)
        said = repr(
            [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        )
        key = path, f"{spec} {said}"
        if key not in self._traced:
            with unwatched():
                self._traced[key] = self._try_to_trace(path, *inputs)
        return self._traced[key]

    def _try_to_trace(self, path: str, args: Any, kwargs: Any) -> str | None:
        try:
            traced = trace(self.meta_copy.part(path), args, kwargs)
        except FxpruneError:
            return None
        if traced.asked_mode:
            try:
                trace(self.meta_copy.part(path), args, kwargs, training=True)
            except FxpruneError:
                return None  # a graph would do in training what it does in evaluation
        known = all(
            isinstance(leaf, (Tensor, *_CONSTANT_TYPES)) for leaf in leaves_of(traced.outputs)
        )
        return str(traced.graph) if known else None  # another object may hold tensors

    def _entered(self) -> set[str]:
        """The parts inside of which another part lies: Python calls that one, too, which is as
        wide as Python sees it.
        """
        model, found = self.meta_copy.model, set()
        called = IdentitySet(model.get_submodule(path) for path in self.graphs)
        for path in self.graphs:
            outer = model.get_submodule(path)
            if any(inner is not outer and inner in called for inner in outer.modules()):
                found.add(path)
        return found


def shape_of(tensor: Any) -> Any:
    """A tensor without data for one of the example, which has two of what the example has none of:
    boxes in an image, say.
    """
    if not isinstance(tensor, Tensor):
        return tensor
    return torch.empty([size or 2 for size in tensor.size()], dtype=tensor.dtype, device=META)


def _tensors_held(module: nn.Module) -> dict[str, tuple[Tensor, Any]]:
    """The tensors of a module, and where they lie."""
    named = {**vars(module), **module._buffers, **module._parameters}
    return {
        name: (value, place_of(value))
        for name, value in named.items()
        if isinstance(value, Tensor)
    }


def _are_same(held: dict[str, tuple[Tensor, Any]], own: dict[str, tuple[Tensor, Any]]) -> bool:
    return held.keys() == own.keys() and all(
        tensor is own[name][0] and place == own[name][1] for name, (tensor, place) in held.items()
    )
