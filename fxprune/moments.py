r"""Mean, variance and standard deviation of a tensor without its removed zeros, as if it had them.

If ``forward`` takes a statistic itself (``x.var(1)``) over channels of which some are removed, the
result must be that of the masked original, where these channels are zeros. The emitted graph calls
these functions in place of ``torch.var`` and similar ones. From the mean :math:`m` and the biased
variance :math:`v` of the :math:`n` remaining elements out of :math:`N`, the variance of all is

.. math:: \frac{n v + n (N - n) / N \cdot m^2}{N - \text{correction}}

Like torch's own functions, each is traced as a single call. A second pruning then corrects the
numbers in that call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

__all__ = ["counts_removed", "std", "std_mean", "var", "var_mean"]


def var_mean(
    x: Tensor, dim: list[int], correction: float, keepdim: bool, kept: int, total: int
) -> tuple[Tensor, Tensor]:
    """Return variance and mean over ``dim`` of ``x`` with the removed zeros.

    Parameters
    ----------
    x:
        The remaining elements, of a real floating-point dtype.
    dim:
        The dimensions to reduce.
    correction:
        Subtracted from the number of elements, at most 1: 1 for the sample variance, 0 for the
        population variance.
    keepdim:
        Whether reduced dimensions stay, with size 1.
    kept, total:
        The ratio of remaining elements to all: ``kept`` of ``total``.

    Returns
    -------
    tuple of Tensor
        Variance and mean of all elements, the removed zeros included.

    Examples
    --------
    >>> x = torch.tensor([1.0, 5.0])  # [1.0, 0.0, 5.0, 0.0] without its zeros
    >>> var_mean(x, [0], 1, False, kept=1, total=2)
    (tensor(5.6667), tensor(1.5000))
    >>> torch.var_mean(torch.tensor([1.0, 0.0, 5.0, 0.0]))
    (tensor(5.6667), tensor(1.5000))
    """
    if has_torch_function_unary(x):
        return handle_torch_function(var_mean, (x,), x, dim, correction, keepdim, kept, total)
    share = kept / total
    scale = share * _corrected(x, dim, correction, kept, total)
    variance, mean = torch.var_mean(x, dim, correction=0, keepdim=keepdim)
    return scale * variance + (scale * (1.0 - share)) * mean * mean, share * mean


def std_mean(
    x: Tensor, dim: list[int], correction: float, keepdim: bool, kept: int, total: int
) -> tuple[Tensor, Tensor]:
    """Return standard deviation and mean over ``dim`` of ``x`` with the removed zeros.

    The gradient is 0 where all elements are, as that of ``torch.std``.

    Parameters
    ----------
    x, dim, correction, keepdim, kept, total:
        As for :func:`var_mean`.

    Returns
    -------
    tuple of Tensor
        Standard deviation and mean of all elements, the removed zeros included.

    Examples
    --------
    >>> std_mean(torch.tensor([3.0, 3.0]), [0], 0, False, kept=1, total=2)
    (tensor(1.5000), tensor(1.5000))
    """
    if has_torch_function_unary(x):
        return handle_torch_function(std_mean, (x,), x, dim, correction, keepdim, kept, total)
    share = kept / total
    deviation, mean = torch.std_mean(x, dim, correction=0, keepdim=keepdim)
    parts = torch.stack((share**0.5 * deviation, (share * (1.0 - share)) ** 0.5 * mean))
    deviation = torch.linalg.vector_norm(parts, dim=0)
    if correction != 0:  # the factor is a tensor: torch.export cannot take the root of a size
        deviation = deviation * x.new_full([], _corrected(x, dim, correction, kept, total)).sqrt()
    return deviation, share * mean


def var(
    x: Tensor, dim: list[int], correction: float, keepdim: bool, kept: int, total: int
) -> Tensor:
    """Return the variance over ``dim`` of ``x`` with the removed zeros; see :func:`var_mean`.

    >>> var(torch.tensor([1.0, 5.0]), [0], 0, False, kept=1, total=2)
    tensor(4.2500)
    """
    if has_torch_function_unary(x):
        return handle_torch_function(var, (x,), x, dim, correction, keepdim, kept, total)
    return var_mean(x, dim, correction, keepdim, kept, total)[0]


def std(
    x: Tensor, dim: list[int], correction: float, keepdim: bool, kept: int, total: int
) -> Tensor:
    """Return the standard deviation over ``dim`` of ``x`` with the removed zeros; see
    :func:`std_mean`.

    >>> std(torch.tensor([3.0, 3.0]), [0], 0, False, kept=1, total=2)
    tensor(1.5000)
    """
    if has_torch_function_unary(x):
        return handle_torch_function(std, (x,), x, dim, correction, keepdim, kept, total)
    return std_mean(x, dim, correction, keepdim, kept, total)[0]


def _corrected(x: Tensor, dim: list[int], correction: float, kept: int, total: int) -> float:
    """Return N / (N - correction), where N counts all elements, the removed ones included."""
    if correction == 0:
        return 1.0
    count = 1
    for d in dim:
        count *= x.size(d)
    full = count * total // kept
    return full / (full - correction)


def counts_removed(target: Any) -> bool:
    """Tell whether a node's target is one of these functions."""
    return target in (var, std, var_mean, std_mean)
