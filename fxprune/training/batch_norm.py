"""Statistics of batch normalisations, estimated again after pruning."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.calibration import LoaderBatch, batches_of, call_model, check_finite, check_read
from fxprune.common.contents import named_tensors, tensors_of
from fxprune.common.identity import IdentityMap
from fxprune.coupling import Coupling
from fxprune.criteria.contractions import WholeOpsMode, with_statistics_of_batch
from fxprune.errors import FxpruneWarning
from fxprune.ops import bind
from fxprune.rewrite import Survivors
from fxprune.training.compensation import Compensation
from fxprune.training.consumers import untouched

__all__ = ["estimate_statistics"]


_HELD_BACK = 4
"""One batch of this many is held back to compare outputs on."""


def estimate_statistics(
    coupling: Coupling,
    survivors: Survivors,
    model: nn.Module,
    pruned: nn.Module,
    loader: Iterable[Any],
) -> Compensation:
    r"""Set the running statistics of each batch normalisation to those of the data.

    .. math:: \mu = \mathrm{E}[x], \qquad
              \sigma^2 = \frac{1}{n - 1} \sum (x - \mu)^2

    Mean and variance are exact over all samples and positions. While they are taken, each
    normalisation uses the statistics of its batch, so every layer reads normalised inputs. A
    normalisation is an operation that reads running statistics, whatever module makes the call.

    The data is tried first, on both models. By how much new statistics change the outputs of the
    original, whose statistics are right, is the error that the data's sources bring in. This error
    and that of the pruned model with new statistics must together be no more than what the pruned
    model has now; otherwise it stays as it is. The errors are relative ones of the outputs, on a
    quarter of the batches, which the statistics are not taken from; a single batch is used for
    both.

    Parameters
    ----------
    coupling:
        The analysis of ``model``.
    survivors:
        The units that survive in ``pruned``; not read.
    model:
        The original. It is left as it is.
    pruned:
        The emitted model. Its buffers are changed in place.
    loader:
        Batches ``(inputs, ...)``; targets are not read. All batches are held in memory.

    Returns
    -------
    Compensation
        The modules whose statistics were set, and those with a single value per channel in each
        batch, which has no variance. ``notes`` says if the data was refused.

    Warns
    -----
    FxpruneWarning
        If the data was refused.

    Raises
    ------
    ArgumentError
        If the loader gives no batch, or values that are not finite.

    Notes
    -----
    Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3, call this PreciseBN.
    """
    batches = list(batches_of(loader, model, coupling.example))
    check_read(len(batches))
    found = _statistics(pruned, batches)
    if not found.sums:
        return Compensation((), found.skipped)
    refusal = _why_refused(model, pruned, batches)
    if refusal:
        warnings.warn(refusal, FxpruneWarning, stacklevel=2)
        return Compensation((), found.names, (refusal,))
    found.write()
    return Compensation(tuple(found.sums), found.skipped)


def _why_refused(model: nn.Module, pruned: nn.Module, batches: Sequence[LoaderBatch]) -> str:
    """Return why the data does not serve, as batches that are held back show; empty if it does."""
    count = max(1, len(batches) // _HELD_BACK)
    read, held = batches[:-count] or batches, batches[-count:]
    wanted = _outputs(model, held)
    before = _error_of_outputs(wanted, _outputs(pruned, held))
    dense, after = (_error_with_statistics(each, read, held, wanted) for each in (model, pruned))
    if dense + after <= before:
        return ""
    return (
        "the statistics of batch normalisations stay as they are: those of this data change the "
        f"outputs of the dense model by {dense:.2g}, relative; the pruned model's error would be "
        f"{after:.2g}, and is {before:.2g}. Give more samples, from more sources."
    )


def _error_with_statistics(
    model: nn.Module,
    read: Sequence[LoaderBatch],
    held: Sequence[LoaderBatch],
    wanted: Sequence[Tensor],
) -> float:
    """Return the relative error of outputs with the statistics of other batches.

    Parameters
    ----------
    model:
        The model. It is left as it is.
    read:
        The batches that the statistics are taken from.
    held:
        The batches that outputs are compared on.
    wanted:
        The outputs to compare with.
    """
    with untouched(model):
        _statistics(model, read).write()
        return _error_of_outputs(wanted, _outputs(model, held))


def _outputs(model: nn.Module, batches: Sequence[LoaderBatch]) -> list[Tensor]:
    """Return the floating-point tensors that a model gives for batches."""
    found: list[Tensor] = []
    with untouched(model), torch.no_grad():
        for batch in batches:
            tensors = tensors_of(call_model(model, batch))
            found += [tensor for tensor in tensors if tensor.is_floating_point()]
    return found


def _error_of_outputs(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Return the relative error of outputs; infinite if they have other shapes."""
    if [tensor.shape for tensor in wanted] != [tensor.shape for tensor in got]:
        return math.inf
    gaps = [(a.double() - b.double()).norm() for a, b in zip(got, wanted, strict=True)]
    gap, size = (math.hypot(*map(float, norms)) for norms in (gaps, [b.norm() for b in wanted]))
    return gap / size if size else math.inf if gap else 0.0


def _statistics(model: nn.Module, batches: Sequence[LoaderBatch]) -> _StatisticsMode:
    """Run a model on batches, and return the mode that has taken statistics.

    Raises
    ------
    ArgumentError
        If they are not finite.
    """
    mode = _StatisticsMode(model)
    for batch in batches:
        with untouched(model), torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), mode:
            call_model(model, batch)
    for name, sums in mode.sums.items():
        check_finite((sums.centre, sums.squares), f"what {name!r} normalises")
    return mode


class _StatisticsMode(WholeOpsMode):
    """A mode in which normalisations use statistics of their batch, and that sums these up.

    Attributes
    ----------
    sums:
        What the inputs of each normalisation sum up to, by the name of the module that holds the
        running mean.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        tensors = named_tensors(model).items()
        self._owners = IdentityMap((tensor, name.rpartition(".")[0]) for name, tensor in tensors)
        self._seen: dict[str, None] = {}
        self.sums: dict[str, _Inputs] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the modules that hold the running means, in the order of the calls."""
        return tuple(self._seen)

    @property
    def skipped(self) -> tuple[str, ...]:
        """Those of ``names`` that have no sums."""
        return tuple(name for name in self._seen if name not in self.sums)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, with the statistics of its batch if it keeps running ones."""
        given = bind(func, args, kwargs)
        mean, variance = given.get("running_mean"), given.get("running_var")
        owner = self._owners.get(mean)
        # one that is in training reads no running statistics
        if owner is None or variance not in self._owners or given.get("training", True):
            return super().run(func, args, kwargs)
        self._seen[owner] = None
        instead = with_statistics_of_batch(func, args, kwargs)
        if instead[1] is kwargs:  # one value for each channel
            return super().run(func, args, kwargs)
        if owner not in self.sums:
            self.sums[owner] = _Inputs(mean, variance)
        self.sums[owner].add(next(iter(given.values())))
        return super().run(func, *instead)

    def write(self) -> None:
        """Write the statistics into the running ones."""
        with torch.no_grad():
            for sums in self.sums.values():
                sums.mean.copy_(sums.centre)
                sums.variance.copy_(sums.squares / (sums.count - 1))


@dataclass
class _Inputs:
    """What the inputs of a normalisation sum up to.

    Attributes
    ----------
    mean, variance:
        The running statistics, shape (channels,).
    count:
        Number of samples times positions.
    centre, squares:
        Mean of the inputs, and the sum of their squared distances from it, shape (channels,).
    """

    mean: Tensor
    variance: Tensor
    count: int = 0
    centre: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """Add the inputs of one call, shape (samples, channels, ...)."""
        rows = x.detach().double().movedim(1, -1).flatten(0, -2)
        centre = rows.mean(0)
        # the sums of two sets of numbers from those of each, without cancellation
        total, apart = self.count + len(rows), centre - self.centre
        self.squares = (
            self.squares
            + (rows - centre).square().sum(0)
            + apart.square() * (self.count * len(rows) / total)
        )
        self.centre = self.centre + apart * (len(rows) / total)
        self.count = total
