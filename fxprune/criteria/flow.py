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
from fxprune.criteria.columns import input_rows, is_matrix_product, weight_rows
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


_MOST_MOMENTS = 2**26
"""Upper limit on the moments that the units of one layer take."""

_MOST_COLUMNS = 2**20
"""About how many numbers the moments of one layer are computed from, in one batch."""

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
        inverse = _inverse_variance(ran, form)
        fields = self.coupling.labels(labelled[form.weight])
        fields = [labels for labels in fields if labels.shape[form.summed] > 1]
        known = is_matrix_product(ran.labelled.func, ran.given[form.weight])
        for labels in fields:
            shares = _shares_of_columns(ran, form, labels, inverse) if known else None
            if shares is None:
                shares = self._shares_of_weights(ran, labelled, form, labels, inverse)
            yield shares

    def _shares_of_weights(
        self,
        ran: RanContraction,
        labelled: Mapping[str, Any],
        form: WeightForm,
        labels: Array,
        inverse: Tensor,
    ) -> tuple[Array, Floats]:
        """Return labels and shares as if what different weights give were uncorrelated.

        The multiply-accumulates tell how often each weight is used: all of them equally often.
        """
        squares = at_least_float32(ran.given[form.data]).square()
        energy = np.zeros(len(self.total))
        for read in self.coupling.labels(labelled[form.data]):
            units, means = unit_means(squares, read)
            energy[units] = np.nan_to_num(means)
        weight = at_least_float32(ran.given[form.weight])
        uses = ran.macs / (weight.numel() * ran.out.numel())
        shares = uses * weight.square() * form.along_outputs(inverse, weight)
        units = labels.ravel()
        return units, np.nan_to_num(sums_per_label(shares, labels) * energy[units])

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


def _inverse_variance(ran: RanContraction, form: WeightForm) -> Tensor:
    """Return 1 / variance of each output of a contraction, over samples and positions.

    The result is 0 where there is no variance; shape (outputs,).
    """
    out = at_least_float32(ran.out)
    others = [d for d in range(out.dim()) if d != out.dim() + form.channel]
    mean = out.mean(others, keepdim=True)
    variance = (out - mean).square_().mean(others)  # several times as fast as var()
    divisor = variance + _NO_VARIANCE * (variance + mean.reshape(-1).square())
    return torch.where(divisor > 0, 1 / divisor, 0.0).nan_to_num(0.0, 0.0, 0.0)


def _shares_of_columns(
    ran: RanContraction, form: WeightForm, labels: Array, inverse: Tensor
) -> tuple[Array, Floats] | None:
    r"""Return the labels of the units that a weight reads, and their shares in the result.

    .. math::

       s_u = \frac{1}{|o|} \sum_o \frac{w_{o,u}^T \, \mathrm{E}[x_u x_u^T] \, w_{o,u}}
             {\mathrm{Var}(y_o)}

    :math:`x_u` are the columns of the unit: its values at all positions of the kernel.

    Parameters
    ----------
    ran:
        The contraction.
    form:
        How it reads its weight.
    labels:
        A field of labels on the weight.
    inverse:
        1 / variance of each output, shape (outputs,).

    Returns
    -------
    tuple or None
        Labels and shares, shape (units,) each; None if the units do not all have equally many
        columns, or too many.
    """
    weight = at_least_float32(ran.given[form.weight])
    groups = int(ran.given.get("groups", 1))
    weights = weight_rows(form, weight, groups).flatten(2)
    # all outputs of a group read the same inputs, so one of them has the labels
    on_weight = torch.from_numpy(labels.copy()).expand(weight.shape)
    on_columns = weight_rows(form, on_weight, groups)[:, 0].flatten(1).numpy()
    placed = [_by_unit(row) for row in on_columns]
    shapes = {None if each is None else each[1].shape for each in placed}
    if None in shapes or len(shapes) > 1:
        return None
    found, shares = [], []
    columns = torch.stack([torch.from_numpy(each[1]) for each in placed if each is not None])
    moments = _moments_of_units(ran, form, columns.to(weight.device))
    for number, each in enumerate(placed):
        assert each is not None
        units, place = each
        by_output = inverse.reshape(groups, -1)[number] / len(inverse)
        if place.shape[1] == 1:  # the same, without a copy of the weights
            of_columns = by_output @ weights[number].square()
            share = of_columns[torch.from_numpy(place[:, 0])] * moments[number].flatten()
        else:
            w = weights[number][:, place].transpose(0, 1)  # (units, outputs, columns of a unit)
            share = ((w @ moments[number]) * w).sum(2) @ by_output
        shares.append(share.clamp_min(0).cpu().numpy())
        found.append(units)
    return np.concatenate(found), np.nan_to_num(np.concatenate(shares))


def _by_unit(labels: Array) -> tuple[Array, Array] | None:
    """Return the units among the labels of columns, and which columns each of them has.

    Parameters
    ----------
    labels:
        The label of each column, shape (columns,).

    Returns
    -------
    tuple or None
        Units, shape (units,), and numbers of columns, shape (units, columns of a unit). None if
        not all have equally many, or if their moments would take too much memory.
    """
    units, counts = np.unique(labels[labels > 0], return_counts=True)
    if not len(units) or (counts != counts[0]).any() or counts[0] * labels.size > _MOST_MOMENTS:
        return None
    order = np.argsort(labels, kind="stable")[-int(counts.sum()) :]
    return units, order.reshape(len(units), -1)


def _moments_of_units(ran: RanContraction, form: WeightForm, places: Tensor) -> Tensor:
    """Return the second moments of the columns of each unit.

    Parameters
    ----------
    ran:
        The contraction.
    form:
        How it reads its weight.
    places:
        The columns of each unit, shape (groups, units, columns of a unit).

    Returns
    -------
    Tensor
        Means over samples and positions of the products of two columns of a unit; shape (groups,
        units, columns of a unit, columns of a unit). Of large batches the first samples count.
    """
    x = at_least_float32(ran.given[form.data])
    if x.dim() + form.read > 0:  # the first dimension holds samples
        positions = x[0].numel() // x.shape[form.read]
        x = x[: max(1, _MOST_COLUMNS // max(places.numel() * positions, 1))]
    read = input_rows(form, ran.labelled.func, {**ran.given, form.data: x})
    if places.shape[2] == 1:  # squares are all that is asked for
        squares = torch.linalg.vector_norm(read, dim=1).square() / read.shape[1]
        return torch.stack([squares[g][place] for g, place in enumerate(places)])[..., None]
    every = torch.arange(read.shape[2], device=places.device)
    if all(torch.equal(place.flatten(), every) for place in places):  # nothing has to be moved
        of_units = read.unflatten(2, tuple(places[0].shape))
    else:
        of_units = torch.stack([read[g][:, place] for g, place in enumerate(places)])
    of_units = of_units.movedim(1, -1)  # (groups, units, columns of a unit, positions)
    return of_units @ of_units.mT / read.shape[1]
