"""Flow: the part of what each layer gives that comes from each unit that it reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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
        self._reads, self._energy = False, np.zeros(0)

    def before(self, node: fx.Node, read: Sequence[tuple[Tensor, Array]], size: int) -> None:
        """Keep the mean square of each unit that a node reads.

        Two operands that hold the same units are multiplied (queries and keys), so their mean
        squares are, too.
        """
        self._reads = bool(read)
        if not read:
            return
        energy = np.zeros(len(self.total))
        for value, labels in read:
            units, means = unit_means(at_least_float32(value).square(), labels)
            before = energy[units]
            energy[units] = np.where(before > 0, before * means, means)
        self._energy = np.nan_to_num(energy)

    def after(self, node: fx.Node, ran: Sequence[RanContraction], size: int) -> None:
        """Add each unit's share in what a node gives."""
        if not self._reads and not ran:
            return
        served = np.zeros(len(self.total), dtype=bool)
        energy = self._energy if self._reads else np.zeros(len(self.total))
        for each in ran:
            form = weight_form(self.coupling, each.labelled)
            if form is None:
                energy *= self._squared_weights(each)
                continue
            labelled = bind(each.labelled.func, each.labelled.args, each.labelled.kwargs)
            for units, shares in self._read_by(each, labelled, form):
                np.add.at(self.total, units, size * shares)
                served[units] = True
        passed_on = labels_on(self.coupling, tensors_of(node.meta.get("val")))
        energy[served], energy[passed_on] = 0.0, 0.0  # attention passes its values on
        if energy.any():  # a reader of another form: shares in the mean square of what it reads
            self.total += size * energy / energy.sum()

    def _read_by(
        self, ran: RanContraction, labelled: Mapping[str, Any], form: WeightForm
    ) -> Iterator[tuple[Array, Floats]]:
        """Yield the labels of the units that a weight reads, and their shares in the result.

        Parameters
        ----------
        ran:
            The contraction.
        labelled:
            Its arguments in the labelled run, by name.
        form:
            How it reads its weight.
        """
        squares = at_least_float32(ran.given[form.data]).square()
        energy = np.zeros(len(self.total))
        for labels in self.coupling.labels(labelled[form.data]):
            units, means = unit_means(squares, labels)
            energy[units] = np.nan_to_num(means)
        shares = _shares(ran, form)
        for labels in self.coupling.labels(labelled[form.weight]):
            if labels.shape[form.summed] > 1:
                units = labels.ravel()
                yield units, sums_per_label(shares, labels) * energy[units]

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


def _shares(ran: RanContraction, form: WeightForm) -> Tensor:
    r"""Return the share of each weight in what a contraction gives, per mean square of its input.

    .. math:: s_w = \frac{n_w}{|O|} \frac{w^2}{\mathrm{Var}(y_o)}

    :math:`o` is the output channel that the weight contributes to; its variance goes over samples
    and positions. :math:`n_w` is in how many of the :math:`|O|` elements of the result the weight
    is used. The multiply-accumulates tell it for every contraction (strides, groups and
    transposition included): each weight takes part in equally many.

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
    out = at_least_float32(ran.out)
    others = [d for d in range(out.dim()) if d != out.dim() + form.channel]
    mean = out.mean(others, keepdim=True)
    variance = (out - mean).square_().mean(others)  # several times as fast as var()
    divisor = variance + _NO_VARIANCE * (variance + mean.reshape(-1).square())
    inverse = torch.where(divisor > 0, 1 / divisor, 0.0)
    weight = at_least_float32(ran.given[form.weight])
    uses = ran.macs / (weight.numel() * out.numel())
    shares = uses * weight.square() * form.along_outputs(inverse, weight)
    return shares.nan_to_num(0.0, 0.0, 0.0)
