"""Fused normalisations with statistics over some elements only.

They compute at full width what the pruned model computes. Each function takes the op's arguments
by name and a mask of the surviving elements that broadcasts to the op's input. It returns None if
the op takes no statistics with these arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "batch_norm_over_survivors",
    "group_norm_over_survivors",
    "layer_norm_over_survivors",
    "rms_norm_over_survivors",
]


def _moments(x: Tensor, mask: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, biased variance and count of the masked elements over ``dims``.

    The dimensions stay with size 1.
    """
    weight = mask.to(x.dtype).expand(x.shape)
    count = weight.sum(dims, keepdim=True)
    mean = (x * weight).sum(dims, keepdim=True) / count
    variance = ((x - mean).square() * weight).sum(dims, keepdim=True) / count
    return mean, variance, count


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, form: list[int]) -> Tensor:
    """Apply scale and shift, reshaped to ``form``."""
    x = x if weight is None else x * weight.reshape(form)
    return x if bias is None else x + bias.reshape(form)


def layer_norm_over_survivors(a: dict[str, Any], mask: Tensor) -> Tensor:
    """Apply ``layer_norm`` with statistics over the masked elements."""
    x, shape = a["input"], list(a["normalized_shape"])
    mean, variance, _ = _moments(x, mask, list(range(x.dim() - len(shape), x.dim())))
    return _affine((x - mean) * (variance + a["eps"]).rsqrt(), a["weight"], a["bias"], shape)


def rms_norm_over_survivors(a: dict[str, Any], mask: Tensor) -> Tensor:
    """Apply ``rms_norm`` with the mean square over the masked elements."""
    x, shape = a["input"], list(a["normalized_shape"])
    dims = list(range(x.dim() - len(shape), x.dim()))
    weight = mask.to(x.dtype).expand(x.shape)
    square = (x.square() * weight).sum(dims, keepdim=True) / weight.sum(dims, keepdim=True)
    eps = torch.finfo(x.dtype).eps if a["eps"] is None else a["eps"]
    return _affine(x * (square + eps).rsqrt(), a["weight"], None, shape)


def group_norm_over_survivors(a: dict[str, Any], mask: Tensor) -> Tensor:
    """Apply ``group_norm`` with statistics over the masked channels of each group."""
    x, groups = a["input"], a["num_groups"]
    split = [x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]]
    y = x.reshape(split)
    split_mask = mask.expand(1, x.shape[1], *[1] * (x.dim() - 2)).reshape(
        [1, *split[1:3], *[1] * (x.dim() - 2)]
    )
    mean, variance, _ = _moments(y, split_mask, list(range(2, y.dim())))
    y = ((y - mean) * (variance + a["eps"]).rsqrt()).reshape(x.shape)
    return _affine(y, a["weight"], a["bias"], [1, -1, *[1] * (x.dim() - 2)])


def batch_norm_over_survivors(a: dict[str, Any], mask: Tensor) -> Tensor | None:
    """Apply ``batch_norm`` with statistics over the masked elements.

    Running statistics are updated in place. Return None in evaluation mode, which uses stored
    statistics.
    """
    x = a["input"]
    if not a["training"]:
        return None
    mean, variance, count = _moments(x, mask, [0, *range(2, x.dim())])
    if a["running_mean"] is not None:
        n = count.reshape(-1)
        a["running_mean"].lerp_(mean.reshape(-1), a["momentum"])
        a["running_var"].lerp_(variance.reshape(-1) * n / (n - 1), a["momentum"])
    return _affine(
        (x - mean) * (variance + a["eps"]).rsqrt(),
        a["weight"],
        a["bias"],
        [1, -1, *[1] * (x.dim() - 2)],
    )
