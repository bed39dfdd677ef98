"""What modules of torch.nn remember about their sizes: it follows from the new shapes of their parameters and inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from fxprune.rewrite.literals import shuffled_groups
from fxprune.rewrite.survivors import Survivors

__all__ = ["resize"]


def resize(survivors: Survivors, module: nn.Module, old_input: Any, new_input: Any, new_output: list[int] | None) -> None:
    """Correct, in place, the size attributes of a leaf module.

    Parameters
    ----------
    old_input, new_input:
        The first input in the original and in the smaller model (meta tensors).
    new_output:
        The size of the output in the smaller model, if it is one tensor.
    """
    if not isinstance(new_input, Tensor):
        return
    if isinstance(module, _ConvNd):
        dim = new_input.dim() - len(module.kernel_size) - 1  # of the channels; 0 for an unbatched image
        # Groups of one input channel go with it; groups of several keep their number and get narrower.
        module.groups = new_input.shape[dim] if module.groups == module.in_channels else module.groups
        module.in_channels = new_input.shape[dim]
        module.out_channels = module.out_channels if new_output is None else new_output[dim]
    elif isinstance(module, nn.Linear):
        module.in_features = new_input.shape[-1]
        module.out_features = module.out_features if new_output is None else new_output[-1]
    elif isinstance(module, _NormBase):
        if new_input.dim() > 1:
            module.num_features = new_input.shape[1]
    elif isinstance(module, nn.GroupNorm):
        if module.num_groups == module.num_channels:
            module.num_groups = new_input.shape[1]
        module.num_channels = new_input.shape[1]
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(new_input.shape[-len(module.normalized_shape) :])
    elif isinstance(module, nn.ChannelShuffle):
        module.groups = shuffled_groups(survivors, old_input, module.groups)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.Unflatten) and new_output is not None and isinstance(module.dim, int):
        dim = module.dim % old_input.dim()
        sizes = list(module.unflattened_size)
        new = new_output[dim : dim + len(sizes)]
        module.unflattened_size = tuple(old if old == -1 else n for old, n in zip(sizes, new, strict=True))
