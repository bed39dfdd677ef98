"""Checkpoints: parts of forward that are computed again in the backward pass.

A graph computes them once, and keeps what the backward pass reads. Results and gradients are the
same, as long as nothing overwrites what is kept. Inside a checkpoint, an operation in place may do
so, because everything is computed again before it is read. (For reentrant checkpoints, torch
itself forbids it.)
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
    """Tell whether an operation of a graph overwrites what another has kept for its backward pass.

    The graph runs with gradients on tensors without data. torch counts the versions of these as it
    does for others.
    """
    if not any(writes(node, meta_copy.model) for node in graph.nodes):
        return False
    with torch.inference_mode(False), torch.enable_grad(), _trainable(meta_copy), ShapeMode():
        try:
            results = _results(graph, meta_copy)
        except RuntimeError:
            return False  # such as a write into a parameter: the model has no gradients, either
    return any(map(_is_overwritten, _backward_functions(results)))


@contextmanager
def _trainable(meta_copy: MetaCopy) -> Iterator[None]:
    """Let parameters of the meta copy require gradients where those of the model do."""
    changed = []
    for tensor in meta_copy.tensors.values():
        if isinstance(tensor, nn.Parameter) and meta_copy.real[tensor].requires_grad:
            changed.append(tensor)
    try:
        for parameter in changed:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(False)


def _results(graph: fx.Graph, meta_copy: MetaCopy) -> list[Tensor]:
    """Run a graph, and return its output tensors."""
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
    """Return a tensor like the output of an earlier layer: it may need gradients."""
    with torch.no_grad():
        tensor = tensor.clone()
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.requires_grad_().clone()
    return tensor


def _backward_functions(results: list[Tensor]) -> Iterator[Any]:
    """Yield each autograd function that the backward pass of some tensors calls."""
    seen: set[Any] = set()
    waiting = [tensor.grad_fn for tensor in results]
    while waiting:
        function = waiting.pop()
        if function is not None and function not in seen:
            seen.add(function)
            yield function
            waiting += [following for following, _ in function.next_functions]


def _is_overwritten(function: Any) -> bool:
    """Tell whether a tensor that an autograd function has kept was overwritten.

    torch raises an error when such a tensor is read.
    """
    try:
        for name in dir(function):
            if name.startswith("_saved_") or name == "saved_tensors":
                getattr(function, name)
    except RuntimeError:
        return True
    return False
