"""Training that prepares for pruning: a penalty that pulls whole units towards zero, own and
dependent weights together.
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

    Add it to the loss in a training loop of your own; a unit whose weights have become small costs
    little when it is removed. Wen et al., "Learning Structured Sparsity in Deep Neural Networks",
    NeurIPS 2016, eq. 1, with the coupled weights of a unit as a group, as in Fang et al.,
    "DepGraph", CVPR 2023.

    Parameters
    ----------
    model:
        The model that is trained; its parameters are read at each call.
    coupling:
        Its analysis, from :func:`fxprune.analyze`.

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
        # what is no unit goes to one place more
        place = np.full(coupling.context.units.count, len(units), dtype=np.int64)
        place[units] = np.arange(len(units))
        self.count = len(units)
        self.model = model
        self._shapes = {
            name: coupling.parameters[name].shape
            for name, _ in model.named_parameters()
            if name in coupling.parameters
        }
        # (name of a parameter, dimensions that are summed whole, where each remaining sum goes)
        self._parts: list[tuple[str, list[int], Tensor]] = []
        for name in self._shapes:
            for labels in coupling.parameter_labels(name):
                whole = [d for d, size in enumerate(labels.shape) if size == 1]
                self._parts.append((name, whole, torch.from_numpy(place[labels].ravel())))

    @public
    def __call__(self) -> Tensor:
        """The penalty, a scalar that gradients flow through.

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
        for name, whole, index in self._parts:
            sums = parameters[name].to(squares.dtype).square()
            sums = sums.sum(whole) if whole else sums
            squares = squares.index_add(0, index.to(first.device), sums.reshape(-1))
        # The gradient of the root is infinite at zero, where a unit is gone already.
        return squares[:-1].clamp_min(torch.finfo(squares.dtype).tiny).sqrt().sum()
