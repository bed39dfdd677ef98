"""Sparsity: a training penalty that pulls whole units towards zero.

Own and dependent weights of a unit shrink together.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.common.public import public
from fxprune.coupling import Coupling, check_coupling
from fxprune.errors import ArgumentError

__all__ = ["GroupSparsity"]


@public
class GroupSparsity:
    r"""Group lasso over the units of a coupling: :math:`\sum_u \sqrt{\sum_{w \in u} w^2}`.

    Add the penalty to the loss in a training loop. Removing a unit whose weights have become small
    costs little accuracy.

    Parameters
    ----------
    model:
        The model that is trained. Its parameters are read at each call.
    coupling:
        Its analysis, from :func:`fxprune.analyze`.

    Raises
    ------
    ModelError, ArgumentError
        If ``coupling`` is not an analysis of ``model``.

    Notes
    -----
    This is eq. 1 of Wen et al., "Learning Structured Sparsity in Deep Neural Networks", NeurIPS
    2016. A group is all coupled weights of a unit, as in Fang et al., "DepGraph: Towards Any
    Structural Pruning", CVPR 2023.

    Examples
    --------
    >>> import fxprune
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> penalty = GroupSparsity(net, fxprune.analyze(net, torch.zeros(1, 3)))
    >>> (net(torch.ones(5, 3)).square().mean() + 1e-3 * penalty()).backward()
    """

    def __init__(self, model: nn.Module, coupling: Coupling) -> None:
        check_coupling(coupling, model)
        units = coupling.units
        # labels of no unit go to one extra place at the end
        place = np.full(coupling.context.units.count, len(units), dtype=np.int64)
        place[units] = np.arange(len(units))
        self.count = len(units)
        self.model = model
        self._shapes: dict[str, torch.Size] = {}
        for name, _ in model.named_parameters():
            if name in coupling.parameters:
                self._shapes[name] = coupling.parameters[name].shape
        # (parameter's name, dimensions to sum over, the place of each remaining sum)
        self._parts: list[tuple[str, list[int], Tensor]] = []
        for name in self._shapes:
            for labels in coupling.parameter_labels(name):
                summed = [d for d, size in enumerate(labels.shape) if size == 1]
                self._parts.append((name, summed, torch.from_numpy(place[labels].ravel())))

    @public
    def __call__(self) -> Tensor:
        """Return the penalty, a scalar through which gradients flow.

        Raises
        ------
        ArgumentError
            If the model's parameters are no longer those that were analysed.
        """
        parameters = dict(self.model.named_parameters())
        for name, shape in self._shapes.items():
            if name not in parameters or parameters[name].shape != shape:
                raise ArgumentError(
                    f"the model no longer has {name!r} of shape {tuple(shape)}, as when it was "
                    "analysed: analyse it again."
                )
        first = parameters[self._parts[0][0]] if self._parts else torch.zeros(())
        squares = torch.zeros(
            self.count + 1,
            dtype=torch.promote_types(first.dtype, torch.float32),
            device=first.device,
        )
        for name, summed, index in self._parts:
            sums = parameters[name].to(squares.dtype).square()
            sums = sums.sum(summed) if summed else sums
            squares = squares.index_add(0, index.to(first.device), sums.reshape(-1))
        # The root has an infinite gradient at zero, so clamp units that are zero already.
        return squares[:-1].clamp_min(torch.finfo(squares.dtype).tiny).sqrt().sum()
