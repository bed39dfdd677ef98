"""Removal of blocks of inputs from least squares, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fxprune.common.arrays import Floats
from fxprune.errors import ArgumentError
from fxprune.labels import Array

__all__ = ["LayerInputs", "order_of_removal"]


class LayerInputs:
    r"""The inputs of a linear layer, of which some can be removed, unit by unit.

    Removing the inputs B and refitting the weights W to the others changes the outputs by

    .. math:: \operatorname{tr} W_B \left[ (H^{-1})_{B,B} \right]^{-1} W_B^T, \qquad
              W \leftarrow W - W_B \left[ (H^{-1})_{B,B} \right]^{-1} (H^{-1})_{B,:}

    and the inverse by :math:`H^{-1} \leftarrow H^{-1} - (H^{-1})_{:,B} [(H^{-1})_{B,B}]^{-1}
    (H^{-1})_{B,:}`.

    Parameters
    ----------
    name:
        The name of the layer, for messages.
    hessian:
        The second moments of the inputs, shape (inputs, inputs), positive definite.
    weight:
        The weights, shape (outputs, inputs). They are changed.
    units:
        The unit of each input, -1 for none; shape (inputs,).

    Raises
    ------
    ArgumentError
        If ``hessian`` is not positive definite.

    Examples
    --------
    >>> inputs = LayerInputs("layer", torch.tensor([[1., 0.5], [0.5, 1.]]).double(),
    ...     torch.tensor([[2., 1.]]).double(), np.array([0, 1]))
    >>> inputs.costs(2).round(6).tolist()  # w ** 2 * (1 - 0.5 ** 2)
    [3.0, 0.75]
    >>> inputs.remove(1)
    >>> inputs.weight.round(decimals=6).tolist()  # half of the second input is the first
    [[2.5, 0.0]]
    """

    def __init__(self, name: str, hessian: Tensor, weight: Tensor, units: Array) -> None:
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if failed:
            raise ArgumentError(
                f"the data does not say how the inputs of {name!r} vary together: give more "
                "samples, or a larger ridge."
            )
        self.inverse = torch.cholesky_inverse(factor)
        self.weight = weight
        self._columns: dict[int, Tensor] = {}
        for unit in np.unique(units[units >= 0]):
            self._columns[int(unit)] = torch.from_numpy(np.flatnonzero(units == unit))

    def costs(self, units: int) -> Floats:
        """Return what removing each unit costs, shape (units,); 0 for those that are not read."""
        found = np.zeros(units)
        by_size: dict[int, list[int]] = {}
        for unit, columns in self._columns.items():
            by_size.setdefault(len(columns), []).append(unit)
        for alike in by_size.values():
            place = torch.stack([self._columns[unit] for unit in alike])
            blocks = self.inverse[place[:, :, None], place[:, None, :]]
            weights = self.weight[:, place].permute(1, 2, 0)  # (units, inputs, outputs)
            errors = (weights * torch.linalg.solve(blocks, weights)).sum((1, 2))
            found[alike] = errors.clamp_min(0).numpy()
        return found

    def remove(self, unit: int) -> None:
        """Remove a unit, and refit the weights to the other inputs."""
        columns = self._columns.pop(unit, None)
        if columns is None:
            return
        rows = self.inverse[columns]
        solved = torch.linalg.solve(rows[:, columns], rows)
        self.weight -= self.weight[:, columns] @ solved
        self.inverse -= rows.mT @ solved
        self.weight[:, columns] = 0.0


def order_of_removal(layers: Sequence[LayerInputs], units: int) -> Iterator[tuple[int, float]]:
    """Remove units one by one, the cheapest first, and yield each with its cost.

    Parameters
    ----------
    layers:
        The layers that read them. They are changed.
    units:
        The number of units.
    """
    left = np.ones(units, dtype=bool)
    for _ in range(units):
        total = np.where(left, sum(layer.costs(units) for layer in layers), np.inf)
        cheapest = int(total.argmin())
        yield cheapest, float(total[cheapest])
        left[cheapest] = False
        for layer in layers:
            layer.remove(cheapest)
