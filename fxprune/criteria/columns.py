"""Columns: the inputs of which each position of a contraction's result is a linear function."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fxprune.criteria.contractions import WeightForm
from fxprune.ops.convolution import is_convolution

__all__ = ["columns", "has_columns"]


def has_columns(func: Any, form: WeightForm, weight: Tensor) -> bool:
    """Tell whether a contraction multiplies all columns of its input with one weight.

    A transposed convolution does not: which weights meet depends on the position. Neither does a
    product with a weight for each sample.

    Parameters
    ----------
    func:
        The contraction.
    form:
        How it reads its weight.
    weight:
        The weight.
    """
    if is_convolution(func):
        return form.summed == 1  # 0 if transposed
    return weight.dim() == 2


def columns(func: Any, given: Mapping[str, Any], form: WeightForm, x: Tensor) -> Tensor:
    """Return the inputs of which each position of the result is a linear function.

    Parameters
    ----------
    func:
        A contraction that :func:`has_columns` accepts.
    given:
        Its arguments, by name.
    form:
        How it reads its weight.
    x:
        The activations that it reads.

    Returns
    -------
    Tensor
        Shape (groups, samples x positions, inputs x kernel).
    """
    if is_convolution(func):
        rows = _patches(x, given[form.weight].shape[2:], given)
        return rows.unflatten(1, (given["groups"], -1)).transpose(0, 1).flatten(2)
    return x.movedim(form.read, -1).reshape(1, -1, x.shape[form.read])


def _patches(x: Tensor, kernel: Sequence[int], given: Mapping[str, Any]) -> Tensor:
    """Return what a convolution reads for each output position.

    Parameters
    ----------
    x:
        The input, shape (samples, channels, ...), or without samples.
    kernel:
        The size of the kernel.
    given:
        The arguments of the convolution, by name.

    Returns
    -------
    Tensor
        Shape (samples x positions, channels, kernel elements).
    """
    dims = len(kernel)
    stride, dilation = (_per_dim(given[name], dims) for name in ("stride", "dilation"))
    if x.dim() == dims + 1:
        x = x[None]
    reach = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    if given["padding"] == "same":
        pads = [(far // 2, far - far // 2) for far in reach]
    elif given["padding"] == "valid":
        pads = [(0, 0)] * dims
    else:
        pads = [(size, size) for size in _per_dim(given["padding"], dims)]
    x = F.pad(x, [side for pair in reversed(pads) for side in pair])
    for dim, far in enumerate(reach):
        x = x.unfold(2 + dim, far + 1, stride[dim])[..., :: dilation[dim]]
    # (samples, channels, positions ..., kernel ...)
    x = x.movedim(1, 1 + dims)
    return x.reshape(-1, x.shape[1 + dims], math.prod(kernel))


def _per_dim(value: Any, dims: int) -> list[int]:
    """Return one number for each dimension; a single number counts for all."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * dims if len(numbers) == 1 else numbers
