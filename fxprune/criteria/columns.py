"""Contractions as matrix products: the inputs of each output position as a row of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fxprune.criteria.contractions import WeightForm
from fxprune.ops.convolution import is_convolution

__all__ = ["input_rows", "is_matrix_product", "weight_rows"]


def is_matrix_product(func: Any, weight: Tensor) -> bool:
    """Tell whether a contraction multiplies rows of inputs by one matrix, or by one per group."""
    return is_convolution(func) or weight.dim() == 2


def weight_rows(form: WeightForm, weight: Tensor, groups: int) -> Tensor:
    """Return a view of a weight by groups and outputs.

    Parameters
    ----------
    form:
        How the contraction reads the weight.
    weight:
        The weight.
    groups:
        The number of groups of the convolution; 1 for other contractions.

    Returns
    -------
    Tensor
        Shape (groups, outputs of a group, inputs of a group, ...); further dimensions are those
        of the kernel.
    """
    grouped = weight.unflatten(0, (groups, -1))
    return grouped if form.summed == 1 else grouped.transpose(1, 2)


def input_rows(form: WeightForm, func: Any, given: Mapping[str, Any]) -> Tensor:
    """Return the inputs of which each output position is a linear function.

    Parameters
    ----------
    form:
        How the contraction reads its operands.
    func:
        The operation.
    given:
        Its arguments on data, by name.

    Returns
    -------
    Tensor
        Shape (groups, samples x positions, inputs of a group x kernel). A product of these rows
        and those of :func:`weight_rows` is the result, without the bias.
    """
    x: Tensor = given[form.data]
    if not is_convolution(func):
        x = x.movedim(form.read, -1)
        return x.reshape(1, -1, x.shape[-1])
    kernel = given[form.weight].shape[2:]
    x = x if x.dim() == len(kernel) + 2 else x[None]
    patches = _patches(x, kernel, given) if form.summed == 1 else _sources(x, kernel, given)
    return patches.unflatten(1, (given["groups"], -1)).transpose(0, 1).flatten(2)


def _patches(x: Tensor, kernel: Sequence[int], given: Mapping[str, Any]) -> Tensor:
    """Return what a convolution reads for each output position.

    Parameters
    ----------
    x:
        The input, shape (samples, channels, ...).
    kernel:
        The size of the kernel.
    given:
        The arguments of the convolution, by name.

    Returns
    -------
    Tensor
        Shape (samples x positions, channels, kernel elements).
    """
    stride, dilation = (_per_dim(given[name], kernel) for name in ("stride", "dilation"))
    reach = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    if given["padding"] == "same":
        pads = [(far // 2, far - far // 2) for far in reach]
    elif given["padding"] == "valid":
        pads = [(0, 0) for _ in kernel]
    else:
        pads = [(size, size) for size in _per_dim(given["padding"], kernel)]
    return _unfolded(_zero_padded(x, pads), reach, stride, dilation)


def _sources(x: Tensor, kernel: Sequence[int], given: Mapping[str, Any]) -> Tensor:
    """Return what a transposed convolution reads for each output position.

    It is a convolution with the reversed kernel over the input with ``stride - 1`` zeros between
    its elements. Parameters and result are as for :func:`_patches`.
    """
    names = ("stride", "dilation", "padding", "output_padding")
    stride, dilation, padding, more = (_per_dim(given[name], kernel) for name in names)
    sizes = [step * (size - 1) + 1 for step, size in zip(stride, x.shape[2:], strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    spread[(..., *(slice(None, None, step) for step in stride))] = x
    reach = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    pads = []
    for far, size, extra in zip(reach, padding, more, strict=True):
        pads.append((far - size, far - size + extra))
    windows = _unfolded(_zero_padded(spread, pads), reach, [1] * len(kernel), dilation)
    # the kernel's elements are its last dimension, and reversing all of them reverses each
    return windows.flip(-1)


def _zero_padded(x: Tensor, pads: Sequence[tuple[int, int]]) -> Tensor:
    """Return an input with zeros before and after each dimension of the kernel."""
    return F.pad(x, [side for pair in reversed(pads) for side in pair])


def _unfolded(
    x: Tensor, reach: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Return the windows of a padded input, shape (samples x positions, channels, elements).

    ``reach`` is the distance between the first and the last element of the kernel, by dimension.
    """
    dims = len(reach)
    for dim, far in enumerate(reach):
        x = x.unfold(2 + dim, far + 1, stride[dim])[..., :: dilation[dim]]
    # (samples, channels, positions ..., kernel ...)
    x = x.movedim(1, 1 + dims)
    return x.reshape(-1, x.shape[1 + dims], math.prod(x.shape[2 + dims :]))


def _per_dim(value: Any, kernel: Sequence[int]) -> list[int]:
    """Return one number for each dimension of a kernel; a single number counts for all."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * len(kernel) if len(numbers) == 1 else numbers
