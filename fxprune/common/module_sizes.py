"""Attributes of ``torch.nn`` modules that repeat the sizes of their parameters."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

__all__ = ["current_sizes", "size_attributes"]

_SIZE_ATTRIBUTES: tuple[tuple[type[nn.Module], dict[str, tuple[str, int]]], ...] = (
    (nn.Linear, {"in_features": ("weight", 1), "out_features": ("weight", 0)}),
    (_ConvTransposeNd, {"in_channels": ("weight", 0), "out_channels": ("weight", 1)}),
    (_ConvNd, {"in_channels": ("weight", 1), "out_channels": ("weight", 0)}),
    (_NormBase, {"num_features": ("weight", 0)}),
    (nn.GroupNorm, {"num_channels": ("weight", 0)}),
    (nn.Embedding, {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)}),
    (nn.RNNCellBase, {"input_size": ("weight_ih", 1), "hidden_size": ("weight_hh", 1)}),
    (nn.RNNBase, {"input_size": ("weight_ih_l0", 1), "hidden_size": ("weight_hh_l0", 1)}),
)


def size_attributes(module: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """Yield the attributes of a module that equal the size of a parameter along a dimension.

    Grouped convolutions are left out, because their weights are only as wide as one group.
    Recurrent layers with projections are left out, too.

    Yields
    ------
    (name of the attribute, parameter, dimension of the parameter)
    """
    sizes = next((sizes for kind, sizes in _SIZE_ATTRIBUTES if isinstance(module, kind)), {})
    if getattr(module, "groups", 1) != 1 or getattr(module, "proj_size", 0):
        return
    for name, (parameter, dim) in sizes.items():
        tensor = getattr(module, parameter, None)
        if isinstance(tensor, Tensor) and name in vars(module):
            yield name, tensor, dim


def current_sizes(module: nn.Module) -> dict[str, int]:
    """Return the size attributes that fit the current parameters of a module, by name.

    >>> layer = nn.Linear(4, 3)
    >>> layer.weight = nn.Parameter(layer.weight[:2])
    >>> current_sizes(layer)
    {'in_features': 4, 'out_features': 2}
    >>> depthwise = nn.Conv2d(4, 8, 1, groups=4)
    >>> depthwise.weight = nn.Parameter(depthwise.weight[:4])
    >>> current_sizes(depthwise)
    {'groups': 2, 'in_channels': 2, 'out_channels': 4}
    """
    if (
        isinstance(module, _ConvNd)
        and not isinstance(module, _ConvTransposeNd)
        and module.groups > 1
    ):
        out, each = module.weight.shape[:2]
        groups = (
            module.groups * out // module.out_channels
            if module.groups == module.in_channels
            else module.groups
        )
        return {"groups": groups, "in_channels": groups * each, "out_channels": out}
    return {name: tensor.shape[dim] for name, tensor, dim in size_attributes(module)}
