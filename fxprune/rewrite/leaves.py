"""What modules of torch.nn remember about their sizes: it follows from the new shapes of their parameters and inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

__all__ = ["resize"]


def resize(module: nn.Module, old_input: Any, new_input: Any, new_output: list[int] | None) -> None:
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
        weight: Tensor = module.weight
        channels = new_input.shape[new_input.dim() - weight.dim() + 1]
        if isinstance(module, _ConvTransposeNd):
            depthwise = module.in_channels == module.groups
            module.groups = channels if depthwise else module.groups
            module.out_channels = weight.shape[1] * module.groups
        else:
            module.groups = channels // weight.shape[1]
            module.out_channels = weight.shape[0]
        module.in_channels = channels
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _NormBase):
        if new_input.dim() > 1:
            module.num_features = new_input.shape[1]
    elif isinstance(module, nn.GroupNorm):
        if module.num_groups == module.num_channels:
            module.num_groups = new_input.shape[1]
        module.num_channels = new_input.shape[1]
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(new_input.shape[-len(module.normalized_shape) :])
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.Unflatten) and new_output is not None and isinstance(module.dim, int):
        dim = module.dim % old_input.dim()
        sizes = list(module.unflattened_size)
        new = new_output[dim : dim + len(sizes)]
        module.unflattened_size = tuple(old if old == -1 else n for old, n in zip(sizes, new, strict=True))  # type: ignore[assignment]
