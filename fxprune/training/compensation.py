"""Compensation: the effect of removed channels, put into the weights that stay.

When a channel is masked, the next layers lose what it added to them. One part of this is constant,
and a bias can replace it. Another part follows from the remaining channels, and their weights can
replace it. Both parts are measured on calibration data, layer by layer, before any fine-tuning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.calibration import LoaderBatch, batches_of, check_finite, check_read
from fxprune.common.contents import named_tensors
from fxprune.common.public import public
from fxprune.coupling import Coupling
from fxprune.rewrite import Survivors
from fxprune.training.consumers import (
    Consumer,
    check_fits,
    consumers_of,
    lost_mask,
    watching_original,
)

__all__ = ["Compensation", "add_constants", "fold_constants"]


@public
@dataclass(frozen=True)
class Compensation:
    """The modules that compensate for removed channels, and those that cannot.

    Attributes
    ----------
    changed:
        Names of the modules whose weights, bias, following normalisation or statistics were
        changed.
    uncorrected:
        Names of the modules that read removed channels but were left as they were. Where a weight
        is computed by forward, or read by several nodes, it is the name of the node.
    notes:
        Sentences that say where a method was not used as asked for, and why.
    """

    changed: tuple[str, ...]
    uncorrected: tuple[str, ...]
    notes: tuple[str, ...] = ()


def fold_constants(
    coupling: Coupling,
    survivors: Survivors,
    model: nn.Module,
    pruned: nn.Module,
    loader: Iterable[Any],
) -> Compensation:
    r"""Add to each consumer's bias the mean contribution of its removed inputs.

    .. math:: b' = b + \sum_u W_{:,u} \, \mathrm{E}[x_u]

    The mean goes over samples and positions, those at the border of a convolution included, where
    zeros replace some inputs. A consumer is found in the graph, whatever module holds it. One
    without a bias changes the running mean of the batch normalisation that is the only reader of
    its output (:math:`\mu' = \mu - \Delta`). A consumer with neither is left as it is.

    Parameters
    ----------
    coupling:
        The analysis of ``model``.
    survivors:
        The units that survive in ``pruned``.
    model:
        The original, on which the means are measured. It is left as it is.
    pruned:
        The emitted model, changed in place.
    loader:
        Batches ``(inputs, ...)``; targets are not read.

    Returns
    -------
    Compensation
        The modules that were changed, and those that could not be.

    Raises
    ------
    ArgumentError
        If ``pruned`` is not the model of this plan, or the loader gives no batch or values that
        are not finite.
    """
    consumers = consumers_of(coupling, survivors)
    check_fits(coupling, survivors, pruned, consumers)
    batches = batches_of(loader, model, coupling.example)
    done = add_constants(coupling, survivors, model, pruned, consumers, batches)
    return replace(done, uncorrected=(*consumers.others, *done.uncorrected))


def add_constants(
    coupling: Coupling,
    survivors: Survivors,
    model: nn.Module,
    pruned: nn.Module,
    consumers: Mapping[str, Consumer],
    batches: Iterable[LoaderBatch],
) -> Compensation:
    """Do for some consumers what :func:`fold_constants` does for all.

    Parameters
    ----------
    coupling, survivors, model, pruned:
        As for :func:`fold_constants`.
    consumers:
        The consumers by the name of their weight.
    batches:
        The batches.
    """
    constants = _lost_constants(coupling, model, consumers, batches)
    present = named_tensors(pruned)
    changed, uncorrected = [], []
    for weight, consumer in consumers.items():
        if weight not in constants or consumer.constant is None:
            uncorrected.append(consumer.name)
            continue
        name, sign = consumer.constant
        with torch.no_grad():
            kept = survivors.take(coupling.parameters[name], constants[weight])
            present[name] += sign * kept.to(present[name].dtype)
        changed.append(consumer.name)
    return Compensation(tuple(changed), tuple(uncorrected))


def _lost_constants(
    coupling: Coupling,
    model: nn.Module,
    consumers: Mapping[str, Consumer],
    batches: Iterable[LoaderBatch],
) -> dict[str, Tensor]:
    """Return what each consumer's removed inputs add to its outputs on average.

    A contraction is linear, so it is run on these inputs alone.

    Returns
    -------
    dict
        By the name of the weight, the mean over samples and positions of each output channel.
    """
    sums: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()

    def add(consumer: Consumer, given: dict[str, Any], out: Tensor) -> None:
        """Add what the removed inputs of one call give."""
        form, bias = consumer.form, {}
        if consumer.bias:
            bias = {consumer.bias: torch.zeros_like(given[consumer.bias])}
        lost = given[form.data] * lost_mask(consumer, given[form.data])
        given = {**given, form.data: lost, **bias}
        alone = consumer.ran.func(**given).double().movedim(form.channel, -1)
        total = alone.reshape(-1, alone.shape[-1])
        weight = consumer.weight
        sums[weight] = sums.get(weight, 0) + total.sum(0)
        counts[weight] += len(total)

    read = 0
    with watching_original(coupling, model, consumers.values(), add) as run:
        for batch in batches:
            read += 1
            run(batch)
    if consumers:
        check_read(read)
    check_finite(sums.values(), "the mean of what a layer reads")
    return {weight: total / counts[weight] for weight, total in sums.items()}
