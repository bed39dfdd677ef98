"""Sums over the weights of each unit, through which gradients flow."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.coupling import Coupling, check_coupling
from fxprune.criteria.views import ROLES
from fxprune.errors import ArgumentError

__all__ = ["UnitSums"]


class UnitSums:
    """Sums over the parameters' elements of each unit of a coupling.

    Parameters
    ----------
    model:
        The model that is trained. Its parameters are read at each call.
    coupling:
        Its analysis.
    roles:
        Which elements count, of :data:`~fxprune.criteria.views.ROLES`.

    Attributes
    ----------
    count:
        Number of units.
    reached:
        Whether each unit has an element that counts, shape (units,).

    Raises
    ------
    ModelError, ArgumentError
        If ``coupling`` is not an analysis of ``model``.

    Examples
    --------
    >>> import fxprune
    >>> net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1))
    >>> sums = UnitSums(net, fxprune.analyze(net, torch.zeros(1, 2)))
    >>> sums(torch.ones_like).tolist()  # two own weights and a dependent one
    [3.0, 3.0, 3.0]
    """

    def __init__(self, model: nn.Module, coupling: Coupling, roles: Iterable[str] = ROLES) -> None:
        check_coupling(coupling, model)
        units, kinds = coupling.units, tuple(roles)
        # labels of no unit go to one extra place at the end
        place = np.full(coupling.context.units.count, len(units), dtype=np.int64)
        place[units] = np.arange(len(units))
        self.count = len(units)
        self.reached = np.zeros(len(units) + 1, dtype=bool)
        self.model = model
        self._shapes: dict[str, torch.Size] = {}
        for name, _ in model.named_parameters():
            if name in coupling.parameters:
                self._shapes[name] = coupling.parameters[name].shape
        # parameter's name -> for each field the dimensions to sum over, and the place of each sum
        self._parts: dict[str, list[tuple[list[int], Tensor]]] = {}
        for name in self._shapes:
            for labels in coupling.parameter_labels(name):
                if coupling.role(name, coupling.shrinking_dim(labels)) in kinds:
                    summed = [d for d, size in enumerate(labels.shape) if size == 1]
                    index = place[labels].ravel()
                    self.reached[index] = True
                    self._parts.setdefault(name, []).append((summed, torch.from_numpy(index)))
        self.reached = self.reached[:-1]

    def __call__(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the sum of ``function(parameter)`` over each unit's elements.

        Parameters
        ----------
        function:
            Works element by element, such as ``torch.square``.

        Returns
        -------
        Tensor
            Sums of shape (units,), in the order of ``coupling.units``, in at least single
            precision.

        Raises
        ------
        ArgumentError
            If the model's parameters are no longer those that were analysed.
        """
        parameters = self._parameters()
        first = next((parameters[name] for name in self._parts), torch.zeros(()))
        dtype = torch.promote_types(first.dtype, torch.float32)
        total = torch.zeros(self.count + 1, dtype=dtype, device=first.device)
        self._move(first.device)
        for name, fields in self._parts.items():
            values = function(parameters[name].to(dtype))
            for summed, index in fields:
                sums = values.sum(summed) if summed else values
                total = total.index_add(0, index, sums.reshape(-1))
        return total[:-1]

    def _move(self, device: torch.device) -> None:
        """Put the places of the sums on a device, once."""
        for fields in self._parts.values():
            fields[:] = [(summed, index.to(device)) for summed, index in fields]

    def _parameters(self) -> dict[str, Tensor]:
        """Return the model's parameters by name, or raise an error if they have changed."""
        parameters = dict(self.model.named_parameters())
        for name, shape in self._shapes.items():
            if name not in parameters or parameters[name].shape != shape:
                raise ArgumentError(
                    f"the model no longer has {name!r} of shape {tuple(shape)}, as when it was "
                    "analysed: analyse it again."
                )
        return parameters
