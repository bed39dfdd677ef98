"""Weight magnitude of a unit: its own filters and the slices of later layers that depend on it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxprune.coupling import Coupling

__all__ = ["magnitude"]


def magnitude(coupling: Coupling, tensors: Mapping[str, Tensor]) -> npt.NDArray[np.float64]:
    r"""L2 norm of all parameter elements that vanish with a unit: :math:`\sqrt{\sum w^2}`.

    Parameters
    ----------
    coupling:
        The analysis of the model.
    tensors:
        The parameters by name (buffers are not weights; leave them out). Shapes as in the model; any float dtype or device.

    Returns
    -------
    Scores indexed by a unit's representative label; entries that are no unit hold 0.

    References
    ----------
    Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, taken over the coupled slices as in Fang et al., "DepGraph:
    Towards Any Structural Pruning", CVPR 2023.
    """
    scores = np.zeros(coupling.context.units.count)
    for name, tensor in tensors.items():
        fields = coupling.parameter_labels(name)
        if not fields:
            continue
        squares = tensor.detach().to(torch.float64 if tensor.dtype is torch.float64 else torch.float32).square()
        for labels in fields:
            first = next(d for d, size in enumerate(labels.shape) if size > 1)
            rest = [d for d, size in enumerate(labels.shape) if size == 1 and d > first]
            # Leading dimensions first: both sums then run along memory.
            own = squares.sum(list(range(first)), keepdim=True) if first else squares
            own = own.sum(rest, keepdim=True) if rest else own
            weights = own.expand(labels.shape).cpu().numpy().ravel().astype(np.float64)
            scores += np.bincount(labels.ravel(), weights=weights, minlength=len(scores))
    scores[0] = 0
    return np.sqrt(scores)
