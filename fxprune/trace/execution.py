"""Run a node of a graph, and run torch functions without tracing them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fxprune.common.dispatch import DispatchMode
from fxprune.trace.context_managers import BOUNDS

__all__ = [
    "DrawsError",
    "ModeReadError",
    "ModuleAtPath",
    "NoDraws",
    "execute",
    "sources",
    "untraced",
    "with_zeros",
]


def execute(root: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Run one node of a graph.

    Parameters
    ----------
    root:
        The module whose attributes and submodules the graph uses.
    node:
        The node. The bounds of a region (``with torch.no_grad()``) do nothing.
    args, kwargs:
        The values of its arguments.

    Returns
    -------
    object
        The node's value.
    """
    target: Any = node.target
    if node.op == "call_function":
        return None if target in BOUNDS else target(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    if node.op == "call_module":
        module: Any = root  # without Module.__getattr__, which is slow
        for name in target.split("."):
            module = module._modules[name]
        return module(*args, **kwargs)
    return operator.attrgetter(target)(root)


def untraced(method: Any) -> Any:
    """Decorate a method so that torch functions inside it are not traced."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return method(*args, **kwargs)

    return call


class ModeReadError(Exception):
    """A leaf function branches on ``training``, so it has to become one node."""


class DrawsError(Exception):
    """A call without traced arguments draws random numbers."""


class NoDraws(DispatchMode):
    """A mode in which an operation that draws random numbers raises :class:`DrawsError`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise DrawsError
        return func(*args, **(kwargs or {}))


class ModuleAtPath(nn.Module):
    """A module tree that contains one module, at the given path."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__()
        *above, name = path.split(".")
        parent: nn.Module = self
        for parent_name in above:
            parent._modules[parent_name] = nn.Module()
            parent = cast(nn.Module, parent._modules[parent_name])
        parent._modules[name] = module


def sources(node: fx.Node) -> Iterator[fx.Node]:
    """Yield a node and all nodes that its value is computed from."""
    seen, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        yield current
        waiting += [source for source in current.all_input_nodes if source not in seen]
        seen.update(current.all_input_nodes)


def with_zeros(tensor: Tensor) -> Tensor:
    """Return zeros on the CPU for a meta tensor; any other tensor as it is."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor
