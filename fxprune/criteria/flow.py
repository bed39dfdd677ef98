"""Flow: the part of what each layer gives that comes from each unit that it reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.common.arrays import Floats
from fxprune.common.contents import tensors_of
from fxprune.coupling import Coupling
from fxprune.criteria.contractions import (
    ContractionWatcher,
    RanContraction,
    WeightForm,
    weight_form,
)
from fxprune.criteria.meter import labels_on, unit_means
from fxprune.criteria.views import at_least_float32, sums_per_label
from fxprune.labels import Array
from fxprune.ops import bind

__all__ = ["FlowWatcher"]


_NO_VARIANCE = 1e-6
"""Share of an output's mean square that its variance has at least, against divisions by 0."""


class FlowWatcher(ContractionWatcher):
    """Sums, by unit, of the unit's share in what its readers give.

    Parameters
    ----------
    coupling:
        The analysis.
    own_statistics:
        Whether each batch normalisation takes the statistics of the batch, as in training. Noise
        needs it: running statistics belong to the data that the network was trained on.

    Attributes
    ----------
    total:
        For each label, the sum over samples and readers of the share; shape (labels,).
    """

    def __init__(self, coupling: Coupling, *, own_statistics: bool) -> None:
        super().__init__(coupling, own_statistics=own_statistics)
        self.total = np.zeros(coupling.context.units.count)
        self._energy = np.zeros(0)

    def before(self, node: fx.Node, read: Sequence[tuple[Tensor, Array]], size: int) -> None:
        """Keep the mean square of each unit that a node reads.

        Two operands that hold the same units are multiplied (queries and keys), so their mean
        squares are, too.
        """
        self._energy = np.zeros(len(self.total))
        for value, labels in read:
            units, means = unit_means(at_least_float32(value).square(), labels)
            before = self._energy[units]
            self._energy[units] = np.where(before > 0, before * means, means)

    def after(self, node: fx.Node, ran: Sequence[RanContraction], size: int) -> None:
        """Add each unit's share in what a node gives."""
        served = np.zeros(len(self.total), dtype=bool)
        energy = np.nan_to_num(self._energy)
        for each in ran:
            form = weight_form(self.coupling, each.labelled)
            if form is None:
                energy *= self._squared_weights(each)
                continue
            for labels, shares in _shares_by_field(self.coupling, each, form):
                np.add.at(self.total, labels, size * shares)
                served[labels] = True
        passed_on = labels_on(self.coupling, tensors_of(node.meta.get("val")))
        energy[served], energy[passed_on] = 0.0, 0.0  # attention passes its values on
        if energy.any():  # a reader of another form: shares in the mean square of what it reads
            self.total += size * energy / energy.sum()

    def _squared_weights(self, ran: RanContraction) -> Floats:
        """Return for each label the sum of squares of the weights that a contraction reads there.

        Labels on no weight get 1.
        """
        sums = np.zeros(len(self.total))
        labelled = bind(ran.labelled.func, ran.labelled.args, ran.labelled.kwargs)
        for traced, value in zip(tensors_of(labelled), tensors_of(ran.given), strict=True):
            if self.coupling.context.is_from_weights(traced):
                for labels in self.coupling.labels(traced):
                    if labels.size > 1:
                        squares = sums_per_label(at_least_float32(value).square(), labels)
                        np.add.at(sums, labels.ravel(), squares)
        return np.where(sums > 0, sums, 1.0)


def _shares_by_field(
    coupling: Coupling, ran: RanContraction, form: WeightForm
) -> Iterator[tuple[Array, Floats]]:
    """Yield the labels of the units that a contraction reads, and their shares in its result.

    Parameters
    ----------
    coupling:
        The analysis.
    ran:
        The contraction.
    form:
        How it reads its weight.
    """
    shares = _shares(ran, form)
    labelled = bind(ran.labelled.func, ran.labelled.args, ran.labelled.kwargs)
    for labels in coupling.labels(labelled[form.weight]):
        if labels.shape[form.summed] > 1:
            yield labels.ravel(), sums_per_label(shares, labels)


def _shares(ran: RanContraction, form: WeightForm) -> Tensor:
    r"""Return the share of each element of the weight in what a contraction gives.

    .. math:: s_w = \frac{1}{|O|} \frac{w^2 \, \mathrm{E}[x_w^2]}{\mathrm{Var}(y_o)}

    :math:`o` is the output that the element contributes to, and :math:`x_w` what it multiplies;
    mean and variance go over samples and positions. A contraction is linear in its weight. So
    these products are the derivatives of the contraction of all squares, times the squared
    weights, whatever the operation is (strides, groups, padding and transposition included).

    Parameters
    ----------
    ran:
        The contraction.
    form:
        How it reads its weight.

    Returns
    -------
    Tensor
        Shares, in the shape of the weight.
    """
    given, out = dict(ran.given), at_least_float32(ran.out)
    with torch.enable_grad():
        for name, value in given.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                given[name] = at_least_float32(value.detach()).square()
        squares = given[form.weight].requires_grad_()
        energy = ran.labelled.func(**given)
    others = [d for d in range(out.dim()) if d != out.dim() + form.channel]
    variance = out.var(others, unbiased=False, keepdim=True)
    mean = energy.detach().mean(others, keepdim=True)
    divisor = variance + _NO_VARIANCE * mean
    weights = torch.where(divisor > 0, 1 / divisor, 0.0) / out.numel()
    (slope,) = torch.autograd.grad(energy, squares, weights.expand_as(energy))
    return (slope * squares.detach()).nan_to_num(0.0, 0.0, 0.0)
