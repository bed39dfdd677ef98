"""Runs one node of a graph, and code in which torch does what it does outside of tracing."""

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
    "NoDraws",
    "Only",
    "execute",
    "sources",
    "unseen",
    "zeros_like_meta",
]


def execute(root: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """What a node of a graph over ``root`` gives for these arguments."""
    target: Any = node.target
    if node.op == "call_function":
        return None if target in BOUNDS else target(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    if node.op == "call_module":
        module: Any = root  # past Module.__getattr__, which is slow
        for name in target.split("."):
            module = module._modules[name]
        return module(*args, **kwargs)
    return operator.attrgetter(target)(root)


def unseen(method: Any) -> Any:
    """A method in which torch's functions do what they do outside of tracing."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return method(*args, **kwargs)

    return call


class ModeReadError(Exception):
    """A leaf function branches on ``training``: it has to stay whole."""


class DrawsError(Exception):
    """A call without stand-ins among its arguments draws random numbers."""


class NoDraws(DispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise DrawsError
        return func(*args, **(kwargs or {}))


class Only(nn.Module):
    """A tree with one module in it, at a path of its own."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__()
        *above, name = path.split(".")
        place: nn.Module = self
        for own in above:
            place._modules[own] = nn.Module()
            place = cast(nn.Module, place._modules[own])
        place._modules[name] = module


def sources(node: fx.Node) -> Iterator[fx.Node]:
    """A node and all nodes that its value follows from."""
    seen, waiting = {node}, [node]
    while waiting:
        own = waiting.pop()
        yield own
        waiting += [above for above in own.all_input_nodes if above not in seen]
        seen.update(own.all_input_nodes)


def zeros_like_meta(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor
