"""Checkpoints: what forward computes again in the backward pass. A graph computes it once, and
keeps what is read then.

The results are the same, and so are the gradients, as long as nothing overwrites what is kept.
Inside of a checkpoint an operation in place may: all is computed again before it is read.
(Reentrant ones are held to it by torch themselves.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from fxprune.common.contents import tensors_of
from fxprune.ops.running import ShapeMode
from fxprune.trace.aliasing import writes
from fxprune.trace.context_managers import enter, leave
from fxprune.trace.execution import execute
from fxprune.trace.meta_copy import MetaCopy

__all__ = ["overwrites_what_is_kept"]


def overwrites_what_is_kept(graph: fx.Graph, meta_copy: MetaCopy) -> bool:
    """Whether an operation of a graph writes into what another one has kept for its backward pass.

    The graph runs with gradients on tensors without data, whose versions torch counts as it does
    those of others.
    """
    if not any(writes(node, meta_copy.model) for node in graph.nodes):
        return False
    with torch.inference_mode(False), torch.enable_grad(), _trainable(meta_copy), ShapeMode():
        try:
            results = _results(graph, meta_copy)
        except RuntimeError:
            return False  # writing into a parameter, say: the model itself has no gradients
    return any(map(_is_overwritten, _backward_functions(results)))


@contextmanager
def _trainable(meta_copy: MetaCopy) -> Iterator[None]:
    """While the parameters of the meta copy want gradients as those of the model do."""
    asked = [
        own
        for own in meta_copy.tensors.values()
        if isinstance(own, nn.Parameter) and meta_copy.real[own].requires_grad
    ]
    try:
        for own in asked:
            own.requires_grad_(True)
        yield
    finally:
        for own in asked:
            own.requires_grad_(False)


def _results(graph: fx.Graph, meta_copy: MetaCopy) -> list[Tensor]:
    """What comes out, when each node is called."""
    values: dict[fx.Node, Any] = {}
    regions: dict[fx.Node, Any] = {}
    try:
        for node in graph.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values.get(n))
            if node.target is enter:
                regions[node] = enter(*args, **kwargs)
            elif node.target is leave:
                leave(regions.pop(node.args[0]))
            elif node.op == "placeholder":
                values[node] = tree_map_only(Tensor, _as_input, node.meta["val"])
            elif node.op == "output":
                values[node] = args
            else:
                values[node] = execute(meta_copy.model, node, args, kwargs)
    finally:
        for region in reversed(regions.values()):
            leave(region)
    return tensors_of(values[next(iter(reversed(graph.nodes)))])


def _as_input(tensor: Tensor) -> Tensor:
    """An input that another layer has computed, maybe."""
    with torch.no_grad():
        tensor = tensor.clone()
    return (
        tensor.requires_grad_().clone()
        if tensor.is_floating_point() or tensor.is_complex()
        else tensor
    )


def _backward_functions(results: list[Tensor]) -> Iterator[Any]:
    """What autograd would call for tensors, each once."""
    seen: set[Any] = set()
    waiting = [tensor.grad_fn for tensor in results]
    while waiting:
        function = waiting.pop()
        if function is not None and function not in seen:
            seen.add(function)
            yield function
            waiting += [following for following, _ in function.next_functions]


def _is_overwritten(function: Any) -> bool:
    """Whether what a function has kept is not what it was: torch says so where it is asked for
    it.
    """
    try:
        for name in dir(function):
            if name.startswith("_saved_") or name == "saved_tensors":
                getattr(function, name)
    except RuntimeError:
        return True
    return False
