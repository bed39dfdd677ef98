"""Search for the parts of a model: the largest submodules that can be traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from fxprune.common.contents import leaves_of
from fxprune.common.dispatch import META, holds_tensors
from fxprune.common.identity import IdentitySet
from fxprune.coupling.parts.calls import intercepted, paths_with_parameters, unwatched
from fxprune.coupling.parts.memory import place_of
from fxprune.coupling.parts.routes import Route, run_route
from fxprune.errors import FxpruneError
from fxprune.trace import MetaCopy, trace

__all__ = ["Finder", "shape_of"]

_CONSTANT_TYPES = (type(None), bool, int, float, str)
"""Types of arguments that a part may have beside tensors.

The graph of a part raises an error if it is called with another value than the traced one.
"""


class Finder:
    """A search for the largest submodules that can be traced.

    Such a module is called on tensors, has the same graph in every call, and contains no module
    that Python code calls directly as a part.

    Attributes
    ----------
    meta_copy:
        The model.
    python:
        Paths of the modules that were called and stay Python code.
    graphs:
        Path of a part -> its graph, as text.
    """

    def __init__(self, meta_copy: MetaCopy) -> None:
        self.meta_copy = meta_copy
        self.python: set[str] = set()
        self.graphs: dict[str, str] = {}
        # Parts that may have another graph on this route, because it has other sizes: emitted
        # graphs guard their sizes.
        self._guarded: frozenset[str] = frozenset()
        # (path, arguments as text) -> graph as text; None if it cannot be traced
        self._traced: dict[tuple[str, str], str | None] = {}

    @property
    def parts(self) -> frozenset[str]:
        """Paths of the parts found so far."""
        return frozenset(self.graphs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], routes: Sequence[Route]) -> None:
        """Run the model on routes until each module it calls is known to be a part or Python code.

        Parameters
        ----------
        args, kwargs:
            The arguments of the example's call.
        routes:
            The routes.
        """
        real, known = self.meta_copy.instance(), -1
        self._original = {module: _tensors_held(module) for module in real.modules()}
        self._real = real
        everything = paths_with_parameters(real)
        while known != len(self.python):
            known, self.graphs = len(self.python), {}
            with intercepted(real, everything - self.python, self._handle_call):
                for route in routes:
                    self._guarded = self.parts if route.is_of_sizes else frozenset()
                    run_route(real, args, kwargs, route)
            self.python |= self._with_inner_parts()

    def _handle_call(self, path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        """Handle an intercepted call: make it a part if it can be traced, else run its Python."""
        graph = None
        if path not in self.python and self._has_original_tensors(path):
            graph = self._graph(path, args, kwargs)
        if graph is None or not self._is_only_graph(path, graph):
            self.python.add(path)
            self.graphs.pop(path, None)
            return NotImplemented
        out = call()
        # The call may have exchanged tensors of the module; its graph does so, too.
        for module in self._real.get_submodule(path).modules():
            self._original[module] = _tensors_held(module)
        return out

    def _is_only_graph(self, path: str, graph: str) -> bool:
        """Tell whether a module has this graph in every call, or may have several."""
        return self.graphs.setdefault(path, graph) == graph or path in self._guarded

    def _has_original_tensors(self, path: str) -> bool:
        """Tell whether a module has its original tensors.

        It has not if ``torch.func`` or Python code has put others into it, or if the call is
        inside a transform of ``torch.func``.
        """
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return False
        modules = self._real.get_submodule(path).modules()
        return all(_holds_same(_tensors_held(each), self._original[each]) for each in modules)

    def _graph(self, path: str, args: Any, kwargs: Any) -> str | None:
        """Return the graph of a module for a call, as text; None if it cannot be traced."""
        leaves = tree_leaves((args, kwargs))
        others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        if not holds_tensors(leaves) or any(type(leaf) not in _CONSTANT_TYPES for leaf in others):
            return None
        try:
            inputs = tree_map(shape_of, (args, kwargs))
        except Exception:
            # some containers, such as packed sequences, refuse tensors without data
            return None
        leaves, spec = tree_flatten(inputs)
        described = []
        for leaf in leaves:
            described.append((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf)
        key = path, f"{spec} {described!r}"
        if key not in self._traced:
            with unwatched():
                self._traced[key] = self._try_to_trace(path, *inputs)
        return self._traced[key]

    def _try_to_trace(self, path: str, args: Any, kwargs: Any) -> str | None:
        """Trace a module in both modes and return its graph as text; None if that fails."""
        try:
            traced = trace(self.meta_copy.part(path), args, kwargs)
        except FxpruneError:
            return None
        if traced.asked_mode:
            try:
                trace(self.meta_copy.part(path), args, kwargs, training=True)
            except FxpruneError:
                return None  # the graph would do in training what it does in evaluation mode
        for leaf in leaves_of(traced.outputs):
            if not isinstance(leaf, (Tensor, *_CONSTANT_TYPES)):
                return None  # objects of other types may hold tensors
        return str(traced.graph)

    def _with_inner_parts(self) -> set[str]:
        """Return the parts that contain another part.

        Python code calls the inner one directly as well, so they cannot be pruned independently.
        """
        model, found = self.meta_copy.model, set()
        called = IdentitySet(model.get_submodule(path) for path in self.graphs)
        for path in self.graphs:
            outer = model.get_submodule(path)
            if any(inner is not outer and inner in called for inner in outer.modules()):
                found.add(path)
        return found


def shape_of(tensor: Any) -> Any:
    """Return a meta tensor of a tensor's shape, with size 2 in place of 0.

    A size is 0 where the example has nothing, such as no boxes in an image. Other values are
    returned as they are.
    """
    if not isinstance(tensor, Tensor):
        return tensor
    return torch.empty([size or 2 for size in tensor.size()], dtype=tensor.dtype, device=META)


_TensorsHeld = dict[str, tuple[Tensor, Any]]
"""Name of a tensor of a module -> the tensor, and its place in memory."""


def _tensors_held(module: nn.Module) -> _TensorsHeld:
    """Return the tensors that a module holds itself, by name, with their places in memory."""
    tensors: _TensorsHeld = {}
    for name, value in {**vars(module), **module._buffers, **module._parameters}.items():
        if isinstance(value, Tensor):
            tensors[name] = value, place_of(value)
    return tensors


def _holds_same(now: _TensorsHeld, before: _TensorsHeld) -> bool:
    """Tell whether a module holds the same tensors, in the same places, as before."""
    if now.keys() != before.keys():
        return False
    pairs = [(now[name], before[name]) for name in now]
    return all(one[0] is other[0] and one[1] == other[1] for one, other in pairs)
