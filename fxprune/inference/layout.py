"""Channels-last order: weights are stored in it, and graphs are changed to accept it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from fxprune.common.random_state import seeded
from fxprune.errors import ModelError
from fxprune.ops import Trait, has_trait
from fxprune.trace import execute
from fxprune.trace.aliasing import Memory, name_of

__all__ = ["LAYOUTS", "lay_out", "take_any_layout"]

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The channels-last format by the number of dimensions of images and videos.

Weights of convolutions over them have the same number of dimensions.
"""


def lay_out(model: nn.Module) -> None:
    """Store weights of convolutions over images and volumes in channels-last order, in place."""
    for module in model.modules():
        # None if a hook computes the weight
        weight = module._parameters.get("weight") if isinstance(module, _ConvNd) else None
        if weight is not None and weight.dim() in LAYOUTS:
            weight.data = weight.data.contiguous(memory_format=LAYOUTS[weight.dim()])


def take_any_layout(root: fx.GraphModule, memory: Memory, channels_last: bool) -> None:
    """Change a graph in place so that it computes the same on channels-last tensors.

    Parameters
    ----------
    root:
        The graph and its module.
    memory:
        The nodes that share memory in it.
    channels_last:
        Whether the model will get channels-last tensors.

    Raises
    ------
    ModelError
        If the graph takes a view of memory that is written to later; the view would be a copy
        then.
    """
    for node in root.graph.nodes:
        if not has_trait(name_of(node, root), Trait.BY_LAYOUT):
            if channels_last and _needs_contiguous(root, node):
                _make_contiguous(node)
        elif memory.must_stay_view(node):
            if channels_last and memory.base[node].op != "get_attr":
                raise ModelError(
                    f"{node.name!r} looks at memory that is written to later, and channels-last "
                    "it would be a copy. Deploy with channels_last=False, or write that line "
                    "without an operation in place."
                )
        elif node.target == "view":
            _make_reshape(node)


def _make_reshape(node: fx.Node) -> None:
    """Replace ``view`` by ``reshape``, unless it is a view as another dtype."""
    if any(isinstance(size, torch.dtype) for size in (*node.args, *node.kwargs.values())):
        return
    node.target = "reshape"
    node.kwargs = {"shape" if name == "size" else name: node.kwargs[name] for name in node.kwargs}


def _needs_contiguous(root: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether an operation fails on channels-last tensors, but not on contiguous ones.

    Some operations that torch composes of others do. The operation is tried on zeros. Tensors
    without data would not do, because torch's rules for these import its compiler at their first
    call.
    """
    ranks = [operand.meta.get("rank") for operand in node.all_input_nodes]
    is_call = node.op in ("call_function", "call_method")
    if not is_call or None in ranks or LAYOUTS.keys().isdisjoint(ranks):
        return False
    return not _runs(root, node, LAYOUTS) and _runs(root, node, {})


def _runs(root: fx.GraphModule, node: fx.Node, layouts: Mapping[int, torch.memory_format]) -> bool:
    """Tell whether an operation runs on zeros in the given layouts, by the number of dimensions.

    Tensors with another number of dimensions are contiguous.
    """

    def zeros(operand: fx.Node) -> Tensor:
        """Return zeros for an operand."""
        rank = operand.meta["rank"]
        layout = layouts.get(rank, torch.contiguous_format)
        return torch.zeros([2] * rank, device="cpu").contiguous(memory_format=layout)

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), zeros)
    try:
        with seeded(0), torch.inference_mode():
            execute(root, node, args, kwargs)
    except Exception:  # the operation may raise any error
        return False
    return True


def _make_contiguous(node: fx.Node) -> None:
    """Make the operands of a node contiguous."""
    for operand in node.all_input_nodes:
        if operand.meta["rank"] in LAYOUTS:
            with node.graph.inserting_before(node):
                contiguous: Any = node.graph.call_method("contiguous", (operand,))
            contiguous.meta = dict(operand.meta)
            node.replace_input_with(operand, contiguous)
