"""Flow: the part of what each layer gives that comes from each unit that it reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.common.arrays import Floats
from fxprune.common.contents import tensors_of
from fxprune.common.dispatch import DispatchMode
from fxprune.coupling import Coupling
from fxprune.coupling.propagation import is_seen_whole
from fxprune.criteria.meter import Watcher, labels_on, unit_means
from fxprune.criteria.views import at_least_float32, sums_per_label
from fxprune.labels import Array
from fxprune.ops import Contraction, bind
from fxprune.ops.convolution import is_convolution
from fxprune.ops.macs import op_macs
from fxprune.trace import Trace

__all__ = ["FlowWatcher"]


_NO_VARIANCE = 1e-6
"""Share of an output's mean square that its variance has at least, against divisions by 0."""


class FlowWatcher(Watcher):
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
        super().__init__(coupling)
        self.total = np.zeros(coupling.context.units.count)
        self._coupling, self._own_statistics = coupling, own_statistics
        self._contractions: dict[str, list[Contraction]] = {}
        for ran in coupling.contractions:
            self._contractions.setdefault(ran.node, []).append(ran)
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

    @contextmanager
    def around(self, trace: Trace, node: fx.Node, size: int) -> Iterator[None]:
        """Run a node, and add each unit's share in what it gives."""
        mode = _ContractionMode(self._own_statistics)
        with torch._C._AutoDispatchBelowAutograd(), mode:
            yield
        served = np.zeros(len(self.total), dtype=bool)
        energy = np.nan_to_num(self._energy)
        expected = self._contractions.get(trace.prefix + node.name, [])
        if [ran.func for ran in expected] == [call.func for call in mode.calls]:
            for ran, call in zip(expected, mode.calls, strict=True):
                form = _form_of(self._coupling, ran)
                if form is None:
                    energy *= self._squared_weights(ran, call)
                    continue
                for labels, shares in _shares_by_field(self._coupling, ran, call, form):
                    np.add.at(self.total, labels, size * shares)
                    served[labels] = True
        passed_on = labels_on(self._coupling, tensors_of(node.meta.get("val")))
        energy[served], energy[passed_on] = 0.0, 0.0  # attention passes its values on
        if energy.any():  # a reader of another form: shares in the mean square of what it reads
            self.total += size * energy / energy.sum()

    def _squared_weights(self, ran: Contraction, call: _Call) -> Floats:
        """Return for each label the sum of squares of the weights that a contraction reads there.

        Labels on no weight get 1.
        """
        sums = np.zeros(len(self.total))
        pairs = zip(ran.read, tensors_of((call.args, call.kwargs)), strict=True)
        for labelled, value in pairs:
            if self._coupling.context.is_from_weights(labelled):
                for labels in self._coupling.labels(labelled):
                    if labels.size > 1:
                        squares = sums_per_label(at_least_float32(value).square(), labels)
                        np.add.at(sums, labels.ravel(), squares)
        return np.where(sums > 0, sums, 1.0)


@dataclass(frozen=True)
class _Call:
    """An operation that ran on data, with its arguments and its result."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


class _ContractionMode(DispatchMode):
    """A mode that keeps the contractions that run.

    Parameters
    ----------
    own_statistics:
        Whether batch normalisations take the statistics of their batch.
    """

    def __init__(self, own_statistics: bool) -> None:
        super().__init__()
        self.own_statistics = own_statistics
        self.calls: list[_Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_seen_whole(func):
            with self:
                return func.decompose(*args, **kwargs)
        if self.own_statistics:
            args, kwargs = _with_statistics_of_batch(func, args, kwargs)
        out = func(*args, **kwargs)
        if op_macs(func, args, kwargs, out):
            self.calls.append(_Call(func, args, kwargs, out))
        return out


def _with_statistics_of_batch(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of an operation with which it takes statistics of its batch.

    Operations that keep no running statistics get their own arguments back; so does one whose
    channels have a single value each, because its variance would be 0.
    """
    given = bind(func, args, kwargs)
    if not {"running_mean", "running_var", "training"} <= given.keys():
        return args, kwargs
    x = next(iter(given.values()))
    if x.dim() < 2 or x.numel() <= x.shape[1]:
        return args, kwargs
    return (), given | {"running_mean": None, "running_var": None, "training": True}


def _shares_by_field(
    coupling: Coupling, ran: Contraction, call: _Call, form: _Form
) -> Iterator[tuple[Array, Floats]]:
    """Yield the labels of the units that a contraction reads, and their shares in its result.

    Parameters
    ----------
    coupling:
        The analysis.
    ran:
        The contraction in the labelled run.
    call:
        The same on data.
    form:
        How it reads its weight.
    """
    shares = _shares(call, form)
    for labels in coupling.labels(bind(ran.func, ran.args, ran.kwargs)[form.weight]):
        if labels.shape[form.summed] > 1:
            yield labels.ravel(), sums_per_label(shares, labels)


@dataclass(frozen=True)
class _Form:
    """How a contraction reads its weight.

    Attributes
    ----------
    weight:
        The name of the argument that is the weight.
    summed:
        The dimension of the weight that is summed up.
    channel:
        The dimension of the result that holds the outputs, counted from the end.
    """

    weight: str
    summed: int
    channel: int


def _form_of(coupling: Coupling, ran: Contraction) -> _Form | None:
    """Return how a contraction reads its weight; None if no single operand is a weight."""
    given = bind(ran.func, ran.args, ran.kwargs)
    wide = [name for name, value in given.items() if isinstance(value, Tensor) and value.dim() > 1]
    # addends come first in operations such as addmm, so that the operands are the last two
    operands = [name for name in wide if name != "bias"][-2:]
    of_weights = [name for name in operands if coupling.context.is_from_weights(given[name])]
    if len(operands) != 2 or len(of_weights) != 1:
        return None
    (name,) = of_weights
    weight = given[name]
    if is_convolution(ran.func):
        transposed = given.get("transposed", "output_padding" in given)
        return _Form(name, 0 if transposed else 1, 1 - weight.dim())
    if name == "weight":  # as in linear: (outputs, inputs)
        return _Form(name, 1, -1) if weight.dim() == 2 else None
    last = weight.dim() - 1
    return _Form(name, last - 1, -1) if name == operands[1] else _Form(name, last, -2)


def _shares(call: _Call, form: _Form) -> Tensor:
    r"""Return the share of each element of the weight in what a contraction gives.

    .. math:: s_w = \frac{1}{|O|} \frac{w^2 \, \mathrm{E}[x_w^2]}{\mathrm{Var}(y_o)}

    :math:`o` is the output that the element contributes to, and :math:`x_w` what it multiplies;
    mean and variance go over samples and positions. A contraction is linear in its weight. So
    these products are the derivatives of the contraction of all squares, times the squared
    weights, whatever the operation is (strides, groups, padding and transposition included).

    Parameters
    ----------
    call:
        The contraction on data.
    form:
        How it reads its weight.

    Returns
    -------
    Tensor
        Shares, in the shape of the weight.
    """
    given = bind(call.func, call.args, call.kwargs)
    out = at_least_float32(call.out)
    with torch.enable_grad():
        for name, value in given.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                given[name] = at_least_float32(value.detach()).square()
        squares = given[form.weight].requires_grad_()
        energy = call.func(**given)
    others = [d for d in range(out.dim()) if d != out.dim() + form.channel]
    variance = out.var(others, unbiased=False, keepdim=True)
    mean = energy.detach().mean(others, keepdim=True)
    divisor = variance + _NO_VARIANCE * mean
    weights = torch.where(divisor > 0, 1 / divisor, 0.0) / out.numel()
    (slope,) = torch.autograd.grad(energy, squares, weights.expand_as(energy))
    return (slope * squares.detach()).nan_to_num(0.0, 0.0, 0.0)
