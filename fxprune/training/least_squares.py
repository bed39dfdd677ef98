"""Least squares: consumers of removed channels, refitted on the channels that stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxprune.calibration import (
    LoaderBatch,
    batches_of,
    call_model,
    check_dimensions,
    check_finite,
    check_read,
)
from fxprune.coupling import Coupling
from fxprune.criteria.columns import input_rows, is_matrix_product, weight_rows
from fxprune.criteria.ridge import default_ridge
from fxprune.errors import ArgumentError
from fxprune.ops import bind
from fxprune.rewrite import Survivors
from fxprune.training.compensation import Compensation, add_constants
from fxprune.training.consumers import (
    Consumer,
    check_fits,
    consumers_of,
    untouched,
    watching_original,
    watching_pruned,
)

__all__ = ["reconstruct"]


def reconstruct(
    coupling: Coupling,
    survivors: Survivors,
    model: nn.Module,
    pruned: nn.Module,
    loader: Iterable[Any],
    *,
    ridge: float | None = None,
) -> Compensation:
    r"""Refit each consumer on its remaining inputs by least squares.

    .. math:: \min_W \sum \lVert y - W x' \rVert^2 + \lambda \lVert W - W_0 \rVert^2

    ``y`` is the original's output, and ``x'`` is the pruned model's input at the same layer.
    Layers are refitted in the order in which they run, so each gets the inputs that the refitted
    layers before it give. :math:`W_0` are the current weights, bias included. :math:`\lambda` is
    ``ridge`` times the mean square of an input, so weights stay as they are in directions that the
    data does not cover. A consumer is found in the graph, whatever module holds it.

    In a model in parts a consumer may run repeatedly, and the Python around it may run it in
    another way in the pruned model. On such a batch ``x'`` is what remains of the original's
    inputs, so that no calls have to be matched; ``notes`` names what runs in another way.
    Consumers whose weight is no matrix get constants; ``notes`` names them, too.

    Parameters
    ----------
    coupling, survivors, model, pruned, loader:
        As for :func:`fold_constants`. All batches are held in memory. After an error, the
        parameters of ``pruned`` are what they were.
    ridge:
        Weight of the penalty, as a share of the inputs' mean square; at least 0. By default 50
        over the number of samples: the fewer there are, the less they say about other data.

    Returns
    -------
    Compensation
        The modules that were changed, and those that could not be.

    Raises
    ------
    ArgumentError
        If ``pruned`` is not the model of this plan; if the loader gives no batch or values that
        are not finite; if ``ridge`` is too small for the data.

    Notes
    -----
    He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, eq. 4, with
    the selection given.
    """
    batches = list(batches_of(loader, model, coupling.example))
    check_read(len(batches))
    if ridge is None:
        ridge = default_ridge(sum(batch.size for batch in batches))
    consumers = consumers_of(coupling, survivors)
    check_fits(coupling, survivors, pruned, consumers)
    with _as_before(pruned):
        case = _Case(coupling, survivors, model, pruned, batches)
        changed, others, notes = _refit(case, consumers, ridge)
        constants = add_constants(coupling, survivors, model, pruned, others, batches)
    for name in constants.changed:
        notes.append(f"{name}: constants instead of least squares, as its weight is no matrix")
    return Compensation(
        (*changed, *constants.changed), (*consumers.others, *constants.uncorrected), tuple(notes)
    )


@contextmanager
def _as_before(pruned: nn.Module) -> Iterator[None]:
    """Restore the parameters of a model if an error occurs inside the context."""
    before = [(parameter, parameter.detach().clone()) for parameter in pruned.parameters()]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, values in before:
                parameter.copy_(values)
        raise


@dataclass(frozen=True)
class _Case:
    """Two models to compare, and the batches to run them on."""

    coupling: Coupling
    survivors: Survivors
    model: nn.Module
    pruned: nn.Module
    batches: Sequence[LoaderBatch]


def _refit(
    case: _Case, consumers: Mapping[str, Consumer], ridge: float
) -> tuple[list[str], dict[str, Consumer], list[str]]:
    """Refit the consumers one after the other.

    Returns
    -------
    changed:
        Names of the modules that were refitted.
    others:
        The consumers that were not, by the names of their weights.
    notes:
        Sentences about those that were fitted to the original's inputs.
    """
    changed, others, notes = [], {}, []
    parameters = dict(case.pruned.named_parameters())
    for weight, consumer in consumers.items():
        if not is_matrix_product(consumer.ran.func, parameters[weight]):
            others[weight] = consumer
            continue
        sums = _products_of(case, consumer)
        if sums.moment is None or sums.product is None:  # no batch reaches it
            others[weight] = consumer
            continue
        constant = consumer.constant
        bias = parameters[constant[0]] if consumer.bias and constant is not None else None
        _solve(consumer, parameters[weight], bias, sums.moment, sums.product, ridge)
        changed.append(consumer.name)
        if sums.reason:
            notes.append(f"{consumer.name}: fitted to the original's inputs, as {sums.reason}")
    return changed, others, notes


def _solve(
    consumer: Consumer,
    weight: Tensor,
    bias: Tensor | None,
    moment: Tensor,
    product: Tensor,
    ridge: float,
) -> None:
    """Set a weight and a bias to the solution of the penalised least squares.

    Parameters
    ----------
    consumer:
        Where they are read.
    weight, bias:
        The parameters to set, with the values that the penalty pulls to.
    moment, product:
        The sums that :class:`_Products` holds.
    ridge:
        Weight of the penalty, as a share of the inputs' mean square.

    Raises
    ------
    ArgumentError
        If the equations are singular.
    """
    groups = len(moment)
    rows = weight_rows(consumer.form, weight.detach(), groups)
    start = rows.double().flatten(2)
    if bias is None:
        moment, product = moment[:, :-1, :-1], product[:, :-1]
    else:
        constants = bias.detach().double().reshape(groups, -1, 1)
        start = torch.cat([start, constants], dim=2)
    identity = torch.eye(moment.shape[1], dtype=moment.dtype, device=moment.device)
    damping = ridge * moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * identity
    try:
        solved = torch.linalg.solve(moment + damping, product + damping @ start.mT).mT
    except torch.linalg.LinAlgError as error:
        raise ArgumentError(
            f"ridge={ridge}: the data does not determine the weights of {consumer.name!r}. Give "
            "a larger one, or none."
        ) from error
    with torch.no_grad():
        rows.copy_(solved[:, :, : rows[0, 0].numel()].reshape(rows.shape))
        if bias is not None:
            bias.copy_(solved[:, :, -1].reshape(-1))


class _CallMade(NamedTuple):
    """A call of a consumer: its arguments by name, and its result."""

    given: dict[str, Any]
    out: Tensor


class _Products:
    """Sums over all calls, samples and positions of a consumer.

    x is an input that ends with a 1, and y the original's output.

    Attributes
    ----------
    moment, product:
        The sums of x x' and of x y', shapes (groups, inputs + 1, inputs + 1) and
        (groups, inputs + 1, outputs); None before the first call.
    reason:
        Why the original's inputs were taken although the pruned model's were wanted; empty if
        they were not.
    """

    def __init__(self, case: _Case, consumer: Consumer) -> None:
        self.case, self.consumer = case, consumer
        self.moment: Tensor | None = None
        self.product: Tensor | None = None
        self.reason = ""

    def add(self, originals: Sequence[_CallMade], calls: Sequence[_CallMade]) -> None:
        """Add the calls that the original and the pruned model make on a batch."""
        consumer, take = self.consumer, self.case.survivors.take
        labelled = bind(consumer.ran.func, consumer.ran.args, consumer.ran.kwargs)
        targets = []
        for call in originals:
            check_dimensions(f"what {consumer.name!r} gives", call.out, consumer.ran.out)
            targets.append(take(consumer.ran.out, call.out))
        if len(originals) != len(calls):
            self.reason = "the pruned model runs it another number of times"
        elif [y.shape for y in targets] != [call.out.shape for call in calls]:
            self.reason = "the pruned model runs it on other sizes"
        elif len(calls) == 1:
            self._add(calls[0].given, targets[0])
            return
        data = consumer.form.data
        for original, y in zip(originals, targets, strict=True):
            x = take(labelled[data], original.given[data])
            self._add(self._as_pruned(original.given, x, y), y)

    def _as_pruned(self, given: dict[str, Any], x: Tensor, y: Tensor) -> dict[str, Any]:
        """Return the arguments that the pruned consumer would have for inputs of the original."""
        form = self.consumer.form
        weight = self.case.pruned.get_parameter(self.consumer.weight)
        given = {**given, form.data: x, form.weight: weight}
        if "groups" in given:  # the second dimension of a weight holds one group
            channels = x.shape[form.read] if form.summed == 1 else y.shape[form.channel]
            given["groups"] = channels // weight.shape[1]
        return given

    def _add(self, given: dict[str, Any], y: Tensor) -> None:
        """Add the products of one call."""
        rows = input_rows(self.consumer.form, self.consumer.ran.func, given).double()
        x = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2)
        y = y.double().movedim(self.consumer.form.channel, -1)
        y = y.reshape(x.shape[1], len(x), -1).transpose(0, 1)
        self.moment = x.mT @ x if self.moment is None else self.moment + x.mT @ x
        self.product = x.mT @ y if self.product is None else self.product + x.mT @ y


def _products_of(case: _Case, consumer: Consumer) -> _Products:
    """Run both models on all batches, and return the sums of a consumer."""
    sums = _Products(case, consumer)
    calls: list[_CallMade] = []

    def record(_: Consumer, given: dict[str, Any], out: Tensor) -> None:
        """Record a call. Tensors are copied, because forward may write into them later."""
        data = consumer.form.data
        calls.append(_CallMade({**given, data: given[data].clone()}, out.clone()))
        if not case.coupling.parts:
            raise _SeenEnough

    with watching_original(case.coupling, case.model, [consumer], record) as run:
        for batch in case.batches:
            with suppress(_SeenEnough):
                run(batch)
            originals = calls.copy()
            calls.clear()
            watched = watching_pruned(case.pruned, [consumer], record)
            with suppress(_SeenEnough), untouched(case.pruned), watched:
                call_model(case.pruned, batch)
            sums.add(originals, calls)
            calls.clear()
    check_finite((sums.moment, sums.product), f"what {consumer.name!r} reads or gives")
    return sums


class _SeenEnough(BaseException):
    """Signal that ends a run of one graph once it has made the call in question.

    In one graph a consumer runs once. The signal is no ``Exception``, so that the model does not
    handle it as an error.
    """
