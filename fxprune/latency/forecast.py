"""A forecast of the latency of a model at any widths, from the times of its operations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import gcd, prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fxprune.common.arrays import Counts, Floats
from fxprune.common.contents import tensors_of
from fxprune.coupling import Coupling
from fxprune.latency.families import LayerFamily, ScaledSizes
from fxprune.latency.layers import Layer, LayerTensor, Prepare, record
from fxprune.latency.measuring import apply_setting, make_batch, prepare_model
from fxprune.latency.setting import Setting
from fxprune.latency.table import Table
from fxprune.ops import Contraction
from fxprune.select.kinds import Kinds, Pool, kinds_of, pools_of
from fxprune.select.polynomials import Polynomial, Sizes, Sum, products_of

__all__ = ["Forecast"]

# nanoseconds in a millisecond; forecasts are whole nanoseconds because other costs are whole, too
_NS = 1e6
_MOST_AXES = 3  # upper limit on the axes of a grid


class Forecast:
    """The latency of a deployed model as a function of how many units of each kind survive.

    Contractions (convolutions, matrix products, attention) are measured on a grid of their input
    and output widths and interpolated. Contractions that differ only in their widths share a grid.
    All other operations are measured at full width, and their time is proportional to the bytes
    that they read and write. The sum is not the latency of a whole model, because of fused
    operations, caches and the cost of starting operations. :meth:`fit` corrects it by measured
    models.

    Selection uses the forecast as a cost: :meth:`at` and :meth:`saved` return whole nanoseconds.

    Parameters
    ----------
    coupling:
        The analysis of the model.
    model:
        The analysed model with all its channels, deployed.
    example_inputs:
        Inputs of the model.
    setting:
        Where and how the model runs.
    table:
        Table of measured times, which is extended. None: the table of the setting on disk.
    """

    def __init__(
        self,
        coupling: Coupling,
        model: nn.Module,
        example_inputs: Any,
        setting: Setting,
        table: Table | None = None,
    ) -> None:
        self.setting, self.table = setting, table or Table(setting)
        self.pools: tuple[Pool, ...] = pools_of(coupling)
        self.kinds: Kinds = kinds_of(coupling, self.pools)
        # factors of contractions and of everything else, and a constant in nanoseconds
        self._factors = (1.0, 1.0, 0.0)
        self._widths = _Widths(coupling, self.kinds, self.pools)
        self._families: dict[str, LayerFamily] = {}
        self._products: list[tuple[float, list[Sum]]] = []
        with apply_setting(setting), torch.inference_mode():
            self._measure_operations(coupling, model, example_inputs)
            self._rest: Polynomial = self._widths.sizes.polynomial(self._products)
            self._numbers = [family.numbers for family in self._families.values()]
            self._pairs = [self._widths.affected(numbers) for numbers in self._numbers]
            self.steps: tuple[int, ...] = tuple(map(self._step, range(len(self.pools))))
            """For each pool how many units it should lose at a time to suit the hardware."""
        self.table.save()

    @property
    def full(self) -> Counts:
        """Number of units of each kind in the dense model, shape (kinds,)."""
        return self.kinds.size

    def at(self, counts: Counts) -> int:
        """Return the latency in nanoseconds.

        ``counts`` is the number of surviving units of each kind, shape (kinds,).
        """
        of_contractions, of_others, constant = self._factors
        contractions, others = self._contraction_ns(counts), self._rest.at(counts)
        return round(of_contractions * contractions + of_others * others + constant)

    def saved(self, counts: Counts, lost: Counts) -> npt.NDArray[np.int64]:
        """Return for each pool by how much the latency falls if that pool alone loses units.

        Parameters
        ----------
        counts:
            Number of surviving units of each kind, shape (kinds,).
        lost:
            Number of units of each kind that its pool loses, shape (kinds,).

        Returns
        -------
        Nanoseconds, shape (pools,).
        """
        before = self._widths.at(counts)
        is_of_pool = self.kinds.pool == np.arange(len(self.pools))[:, np.newaxis]
        after = self._widths.values(counts - lost * is_of_pool)  # shape (pools, sizes)
        contractions = np.zeros(len(self.pools))
        for index, family in enumerate(self._families.values()):
            pool, operation = self._pairs[index]
            numbers = self._numbers[index][operation]
            change = family.at(before[numbers]) - family.at(after[pool[:, np.newaxis], numbers])
            contractions += np.bincount(pool, weights=_NS * change, minlength=len(self.pools))
        of_contractions, of_others, _ = self._factors
        others = self._rest.saved(counts, lost)
        return np.rint(of_contractions * contractions + of_others * others).astype(np.int64)

    def fit(self, known: Sequence[tuple[Counts, float]]) -> None:
        """Fit the forecast to measured latencies of whole models.

        This sets three numbers that are not negative: a factor of the time of contractions, a
        factor of the time of everything else, and a constant.

        Parameters
        ----------
        known:
            For each measured model the number of surviving units of each kind, shape (kinds,), and
            its latency in milliseconds. The first is the dense model; the forecast for it becomes
            exact.
        """
        parts = [(self._contraction_ns(counts), self._rest.at(counts), _NS) for counts, _ in known]
        rows = np.array(parts, dtype=np.float64)
        wanted = np.array([_NS * ms for _, ms in known])
        best: tuple[float, Floats] | None = None
        # non-negative least squares of relative errors: try all useful sets of non-zero factors
        for used in ((0, 1, 2), (0, 1), (0, 2), (1, 2), (0,)):
            if len(used) > len(known):
                continue
            factors = np.zeros(3)
            factors[list(used)] = np.linalg.lstsq(
                rows[:, used] / wanted[:, None], np.ones(len(wanted)), rcond=None
            )[0]
            error = float(np.square(rows @ factors / wanted - 1).sum())
            if (factors >= 0).all() and (best is None or error < best[0] - 1e-12):
                best = error, factors
        assert best is not None
        factors = best[1] * (wanted[0] / (rows[0] @ best[1]))
        self._factors = (float(factors[0]), float(factors[1]), float(factors[2] * _NS))

    # -- operations of the dense model

    def _measure_operations(
        self, coupling: Coupling, model: nn.Module, example_inputs: Any
    ) -> None:
        """Run the dense model, and measure all of its operations."""
        contractions: dict[str, list[Contraction]] = defaultdict(list)
        for contraction in coupling.contractions:
            contractions[contraction.node].append(contraction)
        launch_ms = self._launch_ms()

        def handle(layer: Layer, prepare: Prepare) -> None:
            """Put a contraction into a family; time any other operation now."""
            of_layer = contractions.get(layer.node, [])
            if not (of_layer and layer.dense_sizes() and self._join_family(layer)):
                self._time_at_full_width(layer, prepare, of_layer, launch_ms)

        inputs = make_batch(example_inputs, self.setting)
        record(prepare_model(model, self.setting), inputs, coupling, self._widths.sizes, handle)
        for family in self._families.values():
            family.measure()

    def _launch_ms(self) -> float:
        """Return the time of an operation that does nothing, in milliseconds."""
        one = torch.zeros(1, device=self.setting.place)
        return self.table.ms("relu of one number", lambda: lambda: torch.relu(one))

    def _time_at_full_width(
        self,
        layer: Layer,
        prepare: Prepare,
        contractions: Sequence[Contraction],
        launch_ms: float,
    ) -> None:
        """Time an operation at full width, and spread its time over products of sizes."""
        try:
            ms = self.table.ms(layer.description({}), prepare)
        except RuntimeError:
            # It waits for the GPU, so that a CUDA graph cannot record it. The constant that
            # ``fit`` finds includes its time.
            return
        self._products += self._products_of(layer, contractions, ms, min(ms, launch_ms))

    def _products_of(
        self, layer: Layer, contractions: Sequence[Contraction], ms: float, launch_ms: float
    ) -> list[tuple[float, list[Sum]]]:
        """Return the time of an operation in nanoseconds as a sum of products of sizes.

        The time of contractions is proportional to their multiply-accumulates. The time of other
        operations, beyond their launch, is proportional to the bytes that they read and write.
        """
        macs = float(sum(each.macs() * each.share for each in contractions))
        if not layer.dense_sizes():
            return [(_NS * ms, [])]
        products: list[tuple[float, list[Sum]]] = []
        if macs:
            for contraction in contractions:
                for coefficient, factors in products_of(contraction, self._widths.sizes):
                    products.append((_NS * ms * coefficient / macs, factors))
            return products
        products.append((_NS * launch_ms, []))
        nbytes = sum(prod(each.shape) * each.dtype.itemsize for each in layer.operands)
        for operand in layer.operands:
            products.append((_NS * (ms - launch_ms) / nbytes, self._bytes_of(operand)))
        return products

    def _bytes_of(self, operand: LayerTensor) -> list[Sum]:
        """Return the bytes of a tensor as a product of sizes."""
        fixed = [size for dim, size in enumerate(operand.shape) if dim not in operand.dims]
        constant = float(prod(fixed) * operand.dtype.itemsize)
        return [((constant, ()),), *(self._widths.sizes.sizes[n] for n in operand.dims.values())]

    def _join_family(self, layer: Layer) -> bool:
        """Put a contraction into the family of those that differ from it only in their widths.

        Return False, and do nothing, if it has too many axes or does not run at other widths.
        """
        axes = self._axes_of(layer)
        if len(axes) > _MOST_AXES:
            return False
        key = _family_key(layer, axes)
        if key not in self._families:
            family = LayerFamily(layer, self.table, self.setting.place)
            half: dict[int, int] = {}
            for axis in axes:
                half.update(axis.sizes(-(-axis.steps // 2)))
            try:
                layer.prepared(half, self.setting.place)()
            except (RuntimeError, ValueError, AttributeError):
                return False  # its arguments contain sizes as plain numbers
            self._families[key] = family
        self._families[key].axes.append(axes)
        return True

    def _axes_of(self, layer: Layer) -> list[ScaledSizes]:
        """Return the axes of an operation: its sizes, grouped by which are proportional."""
        sizes = layer.dense_sizes()
        proportional: dict[int, list[int]] = defaultdict(list)
        for number in sorted(sizes):
            proportional[int(self._widths.first_proportional[number])].append(number)
        axes = []
        for numbers in proportional.values():
            base = min(numbers, key=sizes.__getitem__)
            losses = np.rint(self._widths.losses[:, base]).astype(np.int64)
            step = max(int(np.gcd.reduce(losses)), 1)
            multiples = {number: sizes[number] / sizes[base] for number in numbers}
            axes.append(ScaledSizes(base, sizes[base], step, multiples))
        return axes

    # -- other widths

    def _contraction_ns(self, counts: Counts) -> float:
        """Return the total time of the contractions as measured one by one, in nanoseconds."""
        sizes = self._widths.at(counts)
        ms = 0.0
        for family, numbers in zip(self._families.values(), self._numbers, strict=True):
            ms += float(family.at(sizes[numbers]).sum())
        return _NS * ms

    def _step(self, number: int) -> int:
        """Return how many units a pool should lose at a time.

        This is the step that suits the slowest operation that depends on the pool.
        """
        slowest = self._slowest_axis(number)
        if slowest is None:
            return 1
        family, place, axis = slowest
        preferred = family.preferred_step(place)
        steps_per_unit = max(round(float(self._widths.losses[number, axis.base]) / axis.step), 1)
        step = preferred // gcd(preferred, steps_per_unit)
        while step > 1 and 2 * step > self.pools[number].width:
            step //= 2
        return step

    def _slowest_axis(self, number: int) -> tuple[LayerFamily, int, ScaledSizes] | None:
        """Return the slowest operation at full width that depends on a pool.

        Returns
        -------
        The family of the operation, and the index and the axis that depend on the pool. None if no
        operation depends on it.
        """
        slowest, most_ms = None, 0.0
        for family, bases in zip(self._families.values(), self._numbers, strict=True):
            times = family.at(self._widths.full[bases]).tolist()
            for ms, axes in zip(times, family.axes, strict=True):
                for place, axis in enumerate(axes):
                    depends = self._widths.losses[number, axis.base] > 0
                    if depends and (slowest is None or ms > most_ms):
                        slowest, most_ms = (family, place, axis), ms
        return slowest


class _Widths:
    """The sizes of all dimensions as functions of how many units of each kind survive.

    Attributes
    ----------
    sizes:
        The sizes, each with a number.
    values:
        Returns all sizes, shape (n, sizes), for n rows of numbers of survivors, shape (n, kinds).
    full:
        The sizes in the dense model, shape (sizes,).
    losses:
        By how much each size falls if a pool loses one unit from each of its blocks, shape (pools,
        sizes).
    first_proportional:
        For each size the number of the first size that is proportional to it, shape (sizes,).
    """

    def __init__(self, coupling: Coupling, kinds: Kinds, pools: Sequence[Pool]) -> None:
        self.sizes = Sizes(coupling, kinds)
        for tensor in [*coupling.parameters.values(), *_traced_tensors(coupling)]:
            self.sizes.dims(tensor)  # gives the sizes of the tensor their numbers
        self.values = self.sizes.values()
        self.full = self.at(kinds.size)
        self.losses = self._losses(kinds, pools)
        self.first_proportional = self._first_proportional(kinds)

    def at(self, counts: Counts) -> Floats:
        """Return all sizes if ``counts`` units of each kind survive, shape (sizes,)."""
        return self.values(counts[np.newaxis].astype(np.float64))[0]

    def affected(self, numbers: Counts) -> tuple[Counts, ...]:
        """Return which pools narrow which operations of a family.

        ``numbers`` are the numbers of the sizes of each operation, shape (operations, axes). The
        result has the indices of pools and of operations, pair by pair.
        """
        return np.nonzero((self.losses[:, numbers] > 0).any(axis=2))

    def _losses(self, kinds: Kinds, pools: Sequence[Pool]) -> Floats:
        """Return by how much each size falls if a pool loses one unit from each of its blocks."""
        losses = np.zeros((len(pools), len(self.full)))
        for number, pool in enumerate(pools):
            is_of_pool = kinds.pool == number
            # the average over the kinds of the pool
            lost = is_of_pool * kinds.size * (pool.blocks / kinds.size[is_of_pool].sum())
            losses[number] = self.full - self.values((kinds.size - lost)[np.newaxis])[0]
        return np.where(losses > 1e-9, losses, 0.0)

    def _first_proportional(self, kinds: Kinds) -> Counts:
        """Return for each size the number of the first size that is proportional to it."""
        rng = np.random.default_rng(0)
        values = self.values(rng.uniform(0.1, 1.0, (3, len(kinds.size))) * kinds.size)
        shares = np.round(values / self.full, 9)
        _, first, inverse = np.unique(shares, axis=1, return_index=True, return_inverse=True)
        return first[inverse.reshape(-1)]


def _family_key(layer: Layer, axes: Sequence[ScaledSizes]) -> str:
    """Return a text that is equal for operations that differ only in their widths."""
    placeholders: dict[int, int] = {}
    for place, axis in enumerate(axes):
        placeholders.update(dict.fromkeys(axis.multiples, -1 - place))
    ratios = [[axis.step, *axis.multiples.values()] for axis in axes]
    return f"{layer.description(placeholders)} {ratios}"


def _traced_tensors(coupling: Coupling) -> Iterator[Tensor]:
    """Yield the tensors that the nodes of all traces return."""
    for trace in coupling.traces:
        for node in trace.graph.nodes:
            yield from tensors_of(node.meta.get("val"))
