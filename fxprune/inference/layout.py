"""Channels-last: weights are laid out so, and what a graph does has to take it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from fxprune.common.random_state import seeded
from fxprune.errors import ModelError
from fxprune.ops import Trait, has
from fxprune.trace import execute
from fxprune.trace.aliasing import Memory, name_of

__all__ = ["LAYOUTS", "lay_out", "take_any_layout"]

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""By the number of dimensions of images and videos, and of the weights of convolutions over
them.
"""


def lay_out(model: nn.Module) -> None:
    """Bring weights of convolutions over images and volumes into channels-last order, in place."""
    for module in model.modules():
        # none where a hook computes it
        weight = module._parameters.get("weight") if isinstance(module, _ConvNd) else None
        if weight is not None and weight.dim() in LAYOUTS:
            weight.data = weight.data.contiguous(memory_format=LAYOUTS[weight.dim()])


def take_any_layout(root: fx.GraphModule, memory: Memory, channels_last: bool) -> None:
    """Let a graph do the same on what was contiguous and is channels-last now, in place.

    Raises
    ------
    ModelError
        If it looks at memory that is written to later, which would be a copy then.
    """
    for node in root.graph.nodes:
        if not has(name_of(node, root), Trait.BY_LAYOUT):
            if channels_last and _needs_contiguous(root, node):
                _make_contiguous(node)
        elif memory.changed_behind(node):
            if channels_last and memory.base[node].op != "get_attr":
                raise ModelError(
                    f"{node.name!r} looks at memory that is written to later, and channels-last "
                    "it would be a copy. Deploy with channels_last=False, or write that line "
                    "without an operation in place."
                )
        elif node.target == "view" and not any(
            isinstance(size, torch.dtype) for size in (*node.args, *node.kwargs.values())
        ):
            node.target = "reshape"
            node.kwargs = {
                "shape" if name == "size" else name: size for name, size in node.kwargs.items()
            }


def _needs_contiguous(root: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an operation fails on what lies channels-last, as some that torch makes of others
    do: it is tried on zeros.

    Tensors without data would not do: torch's rules for these import its compiler at their first
    call.
    """
    ranks = [operand.meta.get("rank") for operand in node.all_input_nodes]
    if (
        node.op not in ("call_function", "call_method")
        or None in ranks
        or LAYOUTS.keys().isdisjoint(ranks)
    ):
        return False

    def runs(channels_last: bool) -> bool:
        def probe(operand: fx.Node) -> Tensor:
            rank = operand.meta["rank"]
            layout = LAYOUTS.get(rank) if channels_last else None
            return torch.zeros([2] * rank, device="cpu").contiguous(
                memory_format=layout or torch.contiguous_format
            )

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), probe)
        try:
            with seeded(0), torch.inference_mode():
                execute(root, node, args, kwargs)
        except Exception:  # whatever it refuses
            return False
        return True

    return not runs(channels_last=True) and runs(channels_last=False)


def _make_contiguous(node: fx.Node) -> None:
    for operand in node.all_input_nodes:
        if operand.meta["rank"] in LAYOUTS:
            with node.graph.inserting_before(node):
                laid: Any = node.graph.call_method("contiguous", (operand,))
            laid.meta = dict(operand.meta)
            node.replace_input_with(operand, laid)
