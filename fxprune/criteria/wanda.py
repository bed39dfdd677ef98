"""Wanda for units: weights times the norm of what they multiply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from fxprune.calibration import batches_of, check_read
from fxprune.common.arrays import Floats
from fxprune.common.contents import tensors_of
from fxprune.common.public import public
from fxprune.coupling import Coupling, check_coupling
from fxprune.criteria.contractions import ContractionWatcher, RanContraction, weight_form
from fxprune.criteria.meter import labels_on, watch_batch, watching
from fxprune.criteria.readers import Reader, summed_over_processes
from fxprune.criteria.views import at_least_float32, sums_per_label
from fxprune.errors import ArgumentError
from fxprune.labels import Array
from fxprune.ops import Contraction, bind

__all__ = ["Wanda"]


@public
@dataclass(frozen=True)
class Wanda(Reader):
    r"""Weights times the norm of the activations that they multiply, summed over each unit.

    .. math:: \sum_w |w| \, \lVert x_w \rVert_2

    The sum goes over the dependent weights that read the unit, and the norm over samples and
    positions. :math:`x_w` is what the weight multiplies: its input in a matrix product, and what
    lies under its tap in a convolution. Units that no weight reads (queries and keys, which
    multiply each other) are scored by the same sum over their own weights.

    Parameters
    ----------
    loader:
        Batches ``(inputs, ...)``, as for :class:`Activation`. Targets are not read.

    Raises
    ------
    ArgumentError
        As for :class:`Activation`. When scoring, also if no weight of a group is seen to multiply
        anything.

    Notes
    -----
    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, eq.
    1, score single weights and compare them within an output. Here the scores are summed per unit
    and compared within a group; :func:`rank` divides them by the mean of the group.

    Examples
    --------
    >>> import fxprune
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    >>> weights = torch.tensor([[1.], [2.]]), torch.tensor([[1., 3.], [-2., 0.]])
    >>> net.load_state_dict({"0.weight": weights[0], "2.weight": weights[1]})
    <All keys matched successfully>
    >>> coupling = fxprune.analyze(net, torch.zeros(1, 1))
    >>> scores = Wanda([(torch.tensor([[3.], [4.], [-5.]]),)]).scores(coupling, net)
    >>> # the second layer reads 3, 4, 0, of the norm 5, and 6, 8, 0, of the norm 10
    >>> scores[coupling.groups[0].units].tolist()  # (1 + 2) * 5 and 3 * 10
    [15.0, 30.0]
    """

    @public
    def scores(self, coupling: Coupling, model: nn.Module) -> Floats:
        """Compute the score of each label.

        Returns
        -------
        Floats
            Scores of shape (labels,), 0 for labels of no unit.

        Raises
        ------
        ModelError, ArgumentError
            If ``coupling`` is not an analysis of ``model``, or the loader does not fit, or no
            weight of a group is seen to multiply anything.
        """
        check_coupling(coupling, model)
        watcher = _NormWatcher(coupling)
        with watching(coupling, model) as filled:
            for batch in batches_of(self.loader, model, coupling.example):
                watch_batch(watcher, coupling, filled, batch)
        check_read(summed_over_processes(np.array([float(watcher.samples)]))[0])
        scores = np.zeros(coupling.context.units.count)
        by_role = watcher.sums_by_role()
        for group in coupling.groups:
            for sums, is_seen in by_role:  # weights that read the units, then their own
                if is_seen[group.units].any():
                    scores[group.units] = sums[group.units]
                    break
            else:
                raise ArgumentError(
                    f"criterion Wanda: no weight of group {group.name!r} was seen to multiply "
                    "activations. Pass its modules in keep=, or choose another criterion."
                )
        return scores


class _NormWatcher(ContractionWatcher):
    """Runs of traced graphs that collect the squared scores of each weight.

    Attributes
    ----------
    entries:
        For each contraction with a single weight, by its node and its number within the node, what
        it has collected.
    """

    def __init__(self, coupling: Coupling) -> None:
        super().__init__(coupling)
        self.entries: dict[tuple[str, int], _Scored] = {}
        numbers: dict[str, int] = {}
        for ran in coupling.contractions:
            number = numbers.get(ran.node, 0)
            numbers[ran.node] = number + 1
            place = _place_of_weight(coupling, ran)
            if place is not None:
                weight = tensors_of(bind(ran.func, ran.args, ran.kwargs))[place]
                fields = _fields_by_role(coupling, ran, weight)
                self.entries[ran.node, number] = _Scored(place, weight, fields)

    def after(self, node: fx.Node, ran: Sequence[RanContraction], size: int) -> None:
        """Add the squared scores of the weights in the contractions that a node has run."""
        for number, each in enumerate(ran):
            entry = self.entries.get((each.labelled.node, number))
            if entry is not None:
                entry.add(each)

    def sums_by_role(self) -> list[tuple[Floats, npt.NDArray[np.bool_]]]:
        """Return the sums over the weights that read a unit, and those over its own weights.

        Returns
        -------
        list of (Floats, array of bool)
            For each of the two the sum of scores at each label, and whether a weight was seen
            there; shape (labels,) each.
        """
        count = self.coupling.context.units.count
        sums, seen = np.zeros((2, count)), np.zeros((2, count), dtype=bool)
        for entry in self.entries.values():
            scores = entry.scores()
            for role, labels in entry.fields if scores is not None else ():
                np.add.at(sums[role], labels.ravel(), sums_per_label(scores, labels))
                seen[role, labels] = True
        return list(zip(sums, seen, strict=True))


_READ, _OWN = 0, 1  # the roles of units on a weight, in the order of `sums_by_role`


def _place_of_weight(coupling: Coupling, ran: Contraction) -> int | None:
    """Return which operand of a contraction is the weight; None if no single one is."""
    given = bind(ran.func, ran.args, ran.kwargs)
    operands, form = tensors_of(given), weight_form(coupling, ran)
    if form is not None:
        return next(i for i, operand in enumerate(operands) if operand is given[form.weight])
    wide = [i for i, operand in enumerate(operands) if operand.dim() > 1]
    of_weights = [i for i in wide if coupling.context.is_from_weights(operands[i])]
    single = len(wide) == 2 and len(of_weights) == 1 and isinstance(ran.out, Tensor)
    return of_weights[0] if single else None


def _fields_by_role(
    coupling: Coupling, ran: Contraction, weight: Tensor
) -> list[tuple[int, Array]]:
    """Return the labels on a weight, and whether it reads these units or makes them.

    It reads those on the dimension that is summed up. Where that is not known, as in an einsum, it
    reads those that are not on the result.
    """
    form = weight_form(coupling, ran)
    kept = labels_on(coupling, tensors_of(ran.out))
    fields = []
    for labels in coupling.labels(weight):
        if labels.size > 1:
            if form is not None:
                is_read = labels.shape[form.summed] > 1
            else:
                is_read = not np.isin(labels, kept).any()
            fields.append((_READ if is_read else _OWN, labels))
    return fields


@dataclass
class _Scored:
    """The squared scores of the elements of one weight.

    Attributes
    ----------
    place:
        Which operand of its contraction it is.
    weight:
        The weight in the labelled run.
    fields:
        The labels on it, with their roles.
    squares:
        The sum of the squares of each element's products, of the weight's shape; None if the
        contraction has not run.
    """

    place: int
    weight: Tensor
    fields: list[tuple[int, Array]]
    squares: Tensor | None = None

    def add(self, ran: RanContraction) -> None:
        """Add the squares of one run.

        A contraction is linear in its weight. So its derivative by an element, taken of squared
        operands, is the sum of squares of what the element multiplies, whatever the operation is
        (strides, groups, padding and transposition included).
        """
        with torch.enable_grad():
            given = tree_map_only(Tensor, _squared, ran.given)
            weight = tensors_of(given)[self.place].requires_grad_()
            total = ran.labelled.func(**given).sum()
            (slope,) = torch.autograd.grad(total, weight)
        found = slope * weight.detach()
        self.squares = found if self.squares is None else self.squares.add_(found)

    def scores(self) -> Tensor | None:
        """Return the elements' scores over all processes; None if the contraction ran in none."""
        if not summed_over_processes(np.array([float(self.squares is not None)]))[0]:
            return None
        own = torch.zeros(self.weight.shape) if self.squares is None else self.squares
        return torch.from_numpy(summed_over_processes(own.cpu().double().numpy())).sqrt()


def _squared(tensor: Tensor) -> Tensor:
    """Return the square of a floating-point tensor, in float32 at least; others as they are."""
    if not tensor.is_floating_point():
        return tensor
    return at_least_float32(tensor.detach()).square()
