"""Correct the sizes that modules of ``torch.nn`` store as attributes.

They follow from the new shapes of a module's parameters, input and result.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.padding import _ConstantPadNd

from fxprune.ops.literals import padding, shuffled_groups
from fxprune.rewrite.survivors import Survivors

__all__ = ["resize"]


def resize(survivors: Survivors, module: nn.Module, node: fx.Node, value: Any) -> None:
    """Correct, in place, the size attributes of the leaf module that a node calls.

    Parameters
    ----------
    survivors:
        What survives of the original's tensors.
    module:
        The smaller model's module. Its parameters are smaller already, its attributes are not.
    node:
        The original's node that calls it.
    value:
        The result of the call in the original.
    """
    first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    old_input = first.meta["val"] if isinstance(first, fx.Node) else None
    if not isinstance(old_input, Tensor):
        return
    new_input = survivors.shape(old_input)
    new_output = survivors.shape(value) if isinstance(value, Tensor) else None
    # These are plain numbers, so bypass Module.__setattr__, which is slow.
    vars(module).update(_module_sizes(survivors, module, old_input, new_input, new_output))
    if isinstance(module, _ConstantPadNd):
        module.padding = tuple(padding(survivors, value, module.padding))


def _module_sizes(
    survivors: Survivors,
    module: nn.Module,
    old_input: Tensor,
    new_input: list[int],
    new_output: list[int] | None,
) -> dict[str, Any]:
    """Return the size attributes of a module by name; none for a module that stores no size."""
    if isinstance(module, _ConvNd):
        return _convolution_sizes(module, new_input, new_output)
    if isinstance(module, nn.Linear):
        out_features = module.out_features if new_output is None else new_output[-1]
        return {"in_features": new_input[-1], "out_features": out_features}
    if isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)):
        return _norm_sizes(module, new_input)
    if isinstance(module, nn.ChannelShuffle):
        return {"groups": shuffled_groups(survivors, old_input, module.groups)}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": module.weight.numel()}
    if isinstance(module, nn.Embedding):
        return dict(zip(("num_embeddings", "embedding_dim"), module.weight.shape, strict=True))
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return _recurrent_sizes(module, new_input[-1])
    if isinstance(module, nn.Unflatten) and new_output is not None and isinstance(module.dim, int):
        return _unflatten_sizes(module, new_output[module.dim % old_input.dim() :])
    return {}


def _convolution_sizes(
    module: _ConvNd, new_input: list[int], new_output: list[int] | None
) -> dict[str, Any]:
    """Return the size attributes of a convolution."""
    # the channel axis; 0 for an unbatched image
    dim = len(new_input) - len(module.kernel_size) - 1
    return {
        # A group with one input channel goes with it. With several channels in each group,
        # all groups stay and get narrower.
        "groups": new_input[dim] if module.groups == module.in_channels else module.groups,
        "in_channels": new_input[dim],
        "out_channels": module.out_channels if new_output is None else new_output[dim],
    }


def _norm_sizes(module: nn.Module, new_input: list[int]) -> dict[str, Any]:
    """Return the size attributes of a normalisation."""
    if isinstance(module, _NormBase):
        return {"num_features": new_input[1]} if len(new_input) > 1 else {}
    if isinstance(module, nn.GroupNorm):
        groups = new_input[1] if module.num_groups == module.num_channels else module.num_groups
        return {"num_groups": groups, "num_channels": new_input[1]}
    assert isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    return {"normalized_shape": tuple(new_input[-len(module.normalized_shape) :])}


def _unflatten_sizes(module: nn.Unflatten, new_output: list[int]) -> dict[str, Any]:
    """Return the size attribute of an Unflatten; ``new_output`` begins with the first new axis."""
    old_sizes = list(module.unflattened_size)
    sizes = zip(old_sizes, new_output[: len(old_sizes)], strict=True)
    return {"unflattened_size": tuple(old if old == -1 else new for old, new in sizes)}


def _recurrent_sizes(module: nn.RNNBase | nn.RNNCellBase, features: int) -> dict[str, Any]:
    """Return the size attributes of a recurrent module.

    They follow from its weights, which are smaller already: the recurrent weight has shape
    (gates * hidden, size of the output), the projection has shape (projection, hidden).
    """
    weights: dict[str, Any] = module._parameters
    name = "weight_hh_l0" if isinstance(module, nn.RNNBase) else "weight_hh"
    output_size = weights[name].shape[1]
    if getattr(module, "proj_size", 0):
        hidden_size = weights["weight_hr_l0"].shape[1]
        return {"input_size": features, "hidden_size": hidden_size, "proj_size": output_size}
    return {"input_size": features, "hidden_size": output_size}
