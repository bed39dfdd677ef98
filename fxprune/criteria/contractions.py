"""Contractions of a traced graph that run on data: matrix products, convolutions, attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fxprune.common.dispatch import DispatchMode
from fxprune.coupling import Coupling
from fxprune.coupling.propagation import is_seen_whole
from fxprune.criteria.meter import Watcher
from fxprune.ops import Contraction, bind
from fxprune.ops.convolution import is_convolution
from fxprune.ops.macs import op_macs
from fxprune.trace import Trace

__all__ = [
    "ContractionWatcher",
    "RanContraction",
    "WeightForm",
    "WholeOpsMode",
    "weight_form",
    "with_statistics_of_batch",
]


@dataclass(frozen=True)
class RanContraction:
    """A contraction of the labelled run, and the same on data.

    Attributes
    ----------
    labelled:
        The contraction in the labelled run.
    given:
        The arguments on data, by name.
    out:
        The result on data.
    macs:
        The multiply-accumulates on data.
    """

    labelled: Contraction
    given: dict[str, Any]
    out: Any
    macs: int


class ContractionWatcher(Watcher):
    """Runs of traced graphs that look at the contractions of each node.

    Parameters
    ----------
    coupling:
        The analysis.
    own_statistics:
        Whether each batch normalisation takes the statistics of the batch, as in training.
    """

    def __init__(self, coupling: Coupling, *, own_statistics: bool = False) -> None:
        super().__init__(coupling)
        self.coupling, self._own_statistics = coupling, own_statistics
        self._contractions: dict[str, list[Contraction]] = {}
        for ran in coupling.contractions:
            self._contractions.setdefault(ran.node, []).append(ran)

    @contextmanager
    def around(self, trace: Trace, node: fx.Node, size: int) -> Iterator[None]:
        """Run a node, and look at its contractions."""
        mode = _ContractionMode(self._own_statistics)
        with torch._C._AutoDispatchBelowAutograd(), mode:
            yield
        expected = self._contractions.get(trace.prefix + node.name, [])
        ran: list[RanContraction] = []
        # a part that the labelled run calls repeatedly has its contractions as many times
        times = len(expected) // max(len(mode.calls), 1)
        if [each.func for each in expected] == [call.func for call in mode.calls] * times:
            for each, call in zip(expected, mode.calls, strict=False):
                ran.append(RanContraction(each, call.given, call.out, call.macs))
        self.after(node, ran, size)

    def after(self, node: fx.Node, ran: Sequence[RanContraction], size: int) -> None:
        """Look at the contractions that a node has run.

        Parameters
        ----------
        node:
            The node.
        ran:
            Its contractions; empty if other ones ran than in the labelled run.
        size:
            Number of samples in the batch.
        """


class WholeOpsMode(DispatchMode):
    """A mode that looks at operations as the analysis sees them, composite ones whole.

    Enter it together with ``torch._C._AutoDispatchBelowAutograd()``.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_seen_whole(func):
            return self.run(func, args, kwargs)
        with self:
            return func.decompose(*args, **kwargs)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation and return its result."""
        return func(*args, **kwargs)


class _Call(NamedTuple):
    """An operation with its arguments by name, its result and its multiply-accumulates."""

    func: Any
    given: dict[str, Any]
    out: Any
    macs: int


class _ContractionMode(WholeOpsMode):
    """A mode that keeps the contractions that run.

    Parameters
    ----------
    own_statistics:
        Whether batch normalisations take the statistics of their batch.

    Attributes
    ----------
    calls:
        The contractions.
    """

    def __init__(self, own_statistics: bool) -> None:
        super().__init__()
        self.own_statistics = own_statistics
        self.calls: list[_Call] = []

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, and keep it if it is a contraction."""
        if self.own_statistics:
            args, kwargs = with_statistics_of_batch(func, args, kwargs)
        out = super().run(func, args, kwargs)
        macs = op_macs(func, args, kwargs, out)
        if macs:
            self.calls.append(_Call(func, bind(func, args, kwargs), out, macs))
        return out


def with_statistics_of_batch(
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


@dataclass(frozen=True)
class WeightForm:
    """How a contraction of activations with a weight reads both.

    Attributes
    ----------
    weight, data:
        The names of the arguments that are the weight and the activations.
    summed:
        The dimension of the weight that is summed up.
    read:
        The dimension of the activations that is summed up, counted from the end.
    channel:
        The dimension of the result that holds the outputs, counted from the end.
    outputs:
        The dimension of the weight that holds the outputs, or those of one group.
    """

    weight: str
    data: str
    summed: int
    read: int
    channel: int
    outputs: int

    def along_outputs(self, values: Tensor, weight: Tensor) -> Tensor:
        """Return one value per output, shape (outputs,), in a shape that fits the weight's.

        Parameters
        ----------
        values:
            One value for each output.
        weight:
            The weight.
        """
        size = weight.shape[self.outputs]
        form = [1] * weight.dim()
        form[self.outputs] = size
        if len(values) == size:
            return values.reshape(form)
        # The weight of a transposed convolution holds the outputs of one group. Its inputs are
        # those of all groups, one group after the other.
        groups = len(values) // size
        form[self.summed] = weight.shape[self.summed]
        each = values.reshape(groups, size).repeat_interleave(form[self.summed] // groups, 0)
        return each.reshape(form)


def weight_form(coupling: Coupling, ran: Contraction) -> WeightForm | None:
    """Return how a contraction reads its weight; None if no single operand is a weight.

    Parameters
    ----------
    coupling:
        The analysis.
    ran:
        The contraction in the labelled run.
    """
    if not isinstance(ran.out, Tensor):  # a recurrent layer, whose weights are not its operands
        return None
    given = bind(ran.func, ran.args, ran.kwargs)
    wide = [name for name, value in given.items() if isinstance(value, Tensor) and value.dim() > 1]
    # addends come first in operations such as addmm, so that the operands are the last two
    operands = [name for name in wide if name != "bias"][-2:]
    of_weights = [name for name in operands if coupling.context.is_from_weights(given[name])]
    if len(operands) != 2 or len(of_weights) != 1:
        return None
    (name,) = of_weights
    (data,) = [other for other in operands if other != name]
    weight = given[name]
    if is_convolution(ran.func):
        transposed = given.get("transposed", "output_padding" in given)
        channel = 1 - weight.dim()
        summed, outputs = (0, 1) if transposed else (1, 0)
        return WeightForm(name, data, summed, channel, channel, outputs)
    if name == "weight":  # as in linear: (outputs, inputs)
        return WeightForm(name, data, 1, -1, -1, 0) if weight.dim() == 2 else None
    last = weight.dim() - 1
    if name == operands[1]:
        return WeightForm(name, data, last - 1, -1, -1, last)
    return WeightForm(name, data, last, -2, -2, last - 1)
