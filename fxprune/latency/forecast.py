"""A forecast of the latency of a model at any widths, from the times of its operations."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd, prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fxprune.common.arrays import Counts, Floats
from fxprune.common.contents import tensors_of
from fxprune.coupling import Coupling
from fxprune.latency.layers import Layer, LayerTensor, Prepare, record
from fxprune.latency.measuring import Setting, batch_of, prepared, running
from fxprune.latency.surface import Surface, grid
from fxprune.latency.table import Table
from fxprune.ops import Contraction
from fxprune.select.kinds import Kinds, Pool, kinds_of, pools_of
from fxprune.select.polynomials import Polynomial, Sizes, Sum, products_of

__all__ = ["Forecast"]


# nanoseconds in a millisecond; forecasts are whole nanoseconds because other costs are whole, too
_NS = 1e6
_MOST_AXES = 3  # upper limit on the axes of a grid
_WIDTH_STEPS = (1, 2, 4, 8, 16, 32)
# the hardware does not like a width that takes this many times as long as the widths around it
_WORSE = 1.05


@dataclass(frozen=True)
class _Axis:
    """Sizes of an operation that shrink in proportion to each other.

    Attributes
    ----------
    base:
        Number of the smallest of these sizes.
    full:
        Value of that size in the dense model.
    step:
        Smallest amount by which that size can shrink. It can be above one, because a dimension of
        several blocks loses one position from each block at once.
    multiples:
        For the number of each size the ratio of its value to that of ``base``.
    """

    base: int
    full: int
    step: int
    multiples: Mapping[int, float]

    @property
    def steps(self) -> int:
        """Number of steps in the full size; the last one to remain may be smaller."""
        return -(-self.full // self.step)

    def sizes(self, left: int) -> dict[int, int]:
        """Return the value of each size if ``left`` steps are left."""
        value = self.full - self.step * (self.steps - left)
        return {number: round(value * multiple) for number, multiple in self.multiples.items()}


@dataclass
class _Alike:
    """Operations that differ only in their widths.

    Attributes
    ----------
    layer:
        One of the operations.
    axes:
        The axes of each operation.
    surface:
        The measured times of all of them; None before they are measured.
    """

    layer: Layer
    axes: list[list[_Axis]] = field(default_factory=list)
    surface: Surface | None = None

    @property
    def widest(self) -> list[_Axis]:
        """The axes of ``layer``, each as long as the longest of all operations."""
        longest = [
            max(axes[place].full for axes in self.axes) for place in range(len(self.axes[0]))
        ]
        return [replace(axis, full=full) for axis, full in zip(self.axes[0], longest, strict=True)]


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
        self._sizes = Sizes(coupling, self.kinds)
        self._contractions: dict[str, list[Contraction]] = defaultdict(list)
        for ran in coupling.contractions:
            self._contractions[ran.node].append(ran)
        self._alike: dict[str, _Alike] = {}
        self._products: list[tuple[float, list[Sum]]] = []
        # factors of contractions and of everything else, and a constant in nanoseconds
        self._factors = (1.0, 1.0, 0.0)
        for tensor in [*coupling.parameters.values(), *_traced(coupling)]:
            self._sizes.dims(tensor)
        self._values = self._sizes.values()
        self._full = self._values(self.full[np.newaxis].astype(np.float64))[0]
        self._lost = self._lost_at_once()
        self._proportional = self._names_of_proportional()
        with running(setting), torch.inference_mode():
            self._idle = self._launch()
            record(
                prepared(model, setting),
                batch_of(example_inputs, setting),
                coupling,
                self._sizes,
                self._see,
            )
            for alike in self._alike.values():
                self._measure(alike)
            self._rest: Polynomial = self._sizes.polynomial(self._products)
            self._numbers = [
                np.array([[axis.base for axis in axes] for axes in alike.axes])
                for alike in self._alike.values()
            ]
            self._pairs = [
                np.nonzero((self._lost[:, numbers] > 0).any(axis=2)) for numbers in self._numbers
            ]
            self.steps: tuple[int, ...] = tuple(map(self._step, range(len(self.pools))))
            """For each pool how many units it should lose at a time, so that its widths suit the
            hardware.
            """
        self.table.save()

    @property
    def full(self) -> Counts:
        """Number of units of each kind in the dense model, shape (kinds,)."""
        return self.kinds.size

    def at(self, counts: Counts) -> int:
        """Return the latency in nanoseconds.

        ``counts`` is the number of surviving units of each kind, shape (kinds,).
        """
        of_contractions, of_others, more = self._factors
        return round(
            of_contractions * self._measured(counts) + of_others * self._rest.at(counts) + more
        )

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
        now = self._values(counts[np.newaxis].astype(np.float64))[0]
        own = self.kinds.pool == np.arange(len(self.pools))[:, np.newaxis]
        then = self._values(counts - lost * own)
        fall = np.zeros(len(self.pools))
        for number, alike in enumerate(self._alike.values()):
            assert alike.surface is not None
            pool, layer = self._pairs[number]
            numbers = self._numbers[number][layer]
            change = alike.surface.at(now[numbers]) - alike.surface.at(
                then[pool[:, np.newaxis], numbers]
            )
            fall += np.bincount(pool, weights=_NS * change, minlength=len(self.pools))
        of_contractions, of_others, _ = self._factors
        return np.rint(of_contractions * fall + of_others * self._rest.saved(counts, lost)).astype(
            np.int64
        )

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
        rows = np.array(
            [[self._measured(counts), self._rest.at(counts), _NS] for counts, _ in known],
            dtype=np.float64,
        )
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

    # -- what ran

    def _launch(self) -> float:
        """Return the time of an operation that does nothing, in milliseconds: its launch."""
        one = torch.zeros(1, device=self.setting.place)
        return self.table.ms("relu of one number", lambda: lambda: torch.relu(one))

    def _see(self, layer: Layer, again: Prepare) -> None:
        """Handle an operation of the dense model.

        A contraction that runs at other widths is kept, to be measured at several widths later.
        Everything else is timed now.
        """
        free, ran = layer.free(), self._contractions.get(layer.node, [])
        if ran and free and self._keep(layer):
            return
        try:
            ms = self.table.ms(layer.description({}), again)
        except RuntimeError:
            # It waits for the GPU, so that a CUDA graph cannot record it. The constant that
            # ``fit`` finds includes its time.
            return
        total = float(sum(one.macs() * one.share for one in ran))
        if not free:
            self._products.append((_NS * ms, []))
        elif total:
            # The time of a contraction that does not run at other widths is proportional to its
            # multiply-accumulates.
            for one in ran:
                self._products += [
                    (_NS * ms * c / total, factors) for c, factors in products_of(one, self._sizes)
                ]
        else:
            self._products.append((_NS * min(ms, self._idle), []))
            nbytes = sum(prod(own.shape) * own.dtype.itemsize for own in layer.operands)
            for own in layer.operands:
                self._products.append(
                    (_NS * max(ms - self._idle, 0.0) / nbytes, self._product(own))
                )

    def _product(self, own: LayerTensor) -> list[Sum]:
        """Return the bytes of a tensor as a product of sizes."""
        rest = prod(n for d, n in enumerate(own.shape) if d not in own.dims) * own.dtype.itemsize
        return [((float(rest), ()),), *(self._sizes.sizes[number] for number in own.dims.values())]

    def _names_of_proportional(self) -> Counts:
        """Return for each size the number of the first size that is proportional to it."""
        rng = np.random.default_rng(0)
        tried = self._values(rng.uniform(0.1, 1.0, (3, len(self.full))) * self.full)
        _, first, inverse = np.unique(
            np.round(tried / self._full, 9), axis=1, return_index=True, return_inverse=True
        )
        return first[inverse.reshape(-1)]

    def _keep(self, layer: Layer) -> bool:
        """Keep a contraction together with those that differ from it only in their widths.

        Return False, and do not keep it, if it has too many axes or does not run at other widths.
        """
        free = layer.free()
        by_name: dict[int, list[int]] = defaultdict(list)
        for number in sorted(free):
            by_name[int(self._proportional[number])].append(number)
        axes = []
        for numbers in by_name.values():
            base = min(numbers, key=free.__getitem__)
            step = max(int(np.gcd.reduce(np.rint(self._lost[:, base]).astype(np.int64))), 1)
            axes.append(
                _Axis(
                    base,
                    free[base],
                    step,
                    {number: free[number] / free[base] for number in numbers},
                )
            )
        if len(axes) > _MOST_AXES:
            return False
        masks = {
            number: -1 - place for place, axis in enumerate(axes) for number in axis.multiples
        }
        key = (
            f"{layer.description(masks)} "
            f"{[[axis.step, *axis.multiples.values()] for axis in axes]}"
        )
        if key not in self._alike:
            fewer = {n: s for axis in axes for n, s in axis.sizes(-(-axis.steps // 2)).items()}
            try:
                layer.prepared(fewer, self.setting.place)()
            except (RuntimeError, ValueError, AttributeError):
                # its arguments contain sizes as plain numbers
                return False
            self._alike[key] = _Alike(layer)
        self._alike[key].axes.append(axes)
        return True

    def _measure(self, alike: _Alike) -> None:
        """Time operations that differ only in their widths on a grid up to the widest of them."""
        widest = alike.widest
        axes = [grid(axis.steps, len(widest)) for axis in widest]
        positions = [
            [axis.sizes(left)[axis.base] for left in own]
            for axis, own in zip(widest, axes, strict=True)
        ]
        steps = [
            dict(zip(own, points, strict=True))
            for own, points in zip(positions, axes, strict=True)
        ]

        def ms(point: tuple[int, ...], again: bool = False) -> float:
            """Return the time at a point of the grid, in milliseconds."""
            return self._left(alike, [own[p] for own, p in zip(steps, point, strict=True)], again)

        alike.surface = Surface(positions, ms, functools.partial(ms, again=True))

    def _left(self, alike: _Alike, left: Sequence[int], again: bool = False) -> float:
        """Return the time in milliseconds if ``left`` has the remaining steps of each axis."""
        sizes = {
            n: s
            for axis, own in zip(alike.widest, left, strict=True)
            for n, s in axis.sizes(own).items()
        }
        return self._ms(alike.layer, sizes, again)

    def _ms(self, layer: Layer, sizes: Mapping[int, int], again: bool = False) -> float:
        """Return the time of an operation at ``sizes``, in milliseconds."""
        return self.table.ms(
            layer.description(sizes),
            lambda: layer.prepared(sizes, self.setting.place),
            again=again,
        )

    # -- at other widths

    def _lost_at_once(self) -> Floats:
        """Return by how much each size falls if a pool loses one unit from each of its blocks.

        The shape is (pools, sizes).
        """
        out = np.zeros((len(self.pools), len(self._full)))
        for number, pool in enumerate(self.pools):
            own = self.kinds.pool == number
            # the average over the kinds of the pool
            one = own * self.full * (pool.blocks / self.full[own].sum())
            out[number] = self._full - self._values((self.full - one)[np.newaxis])[0]
        return np.where(out > 1e-9, out, 0.0)

    def _measured(self, counts: Counts) -> float:
        """Return the total time of the contractions as measured one by one, in nanoseconds."""
        now = self._values(counts[np.newaxis].astype(np.float64))[0]
        total = 0.0
        for alike, numbers in zip(self._alike.values(), self._numbers, strict=True):
            assert alike.surface is not None
            total += float(alike.surface.at(now[numbers]).sum())
        return _NS * total

    def _step(self, number: int) -> int:
        """Return how many units a pool should lose at a time.

        This is the step that suits the slowest operation that depends on the pool.
        """
        heaviest: tuple[float, _Alike, int, _Axis] | None = None
        for alike, bases in zip(self._alike.values(), self._numbers, strict=True):
            assert alike.surface is not None
            every = alike.surface.at(self._full[bases])
            for ms, axes in zip(every.tolist(), alike.axes, strict=True):
                for place, axis in enumerate(axes):
                    if self._lost[number, axis.base] and (heaviest is None or ms > heaviest[0]):
                        heaviest = ms, alike, place, axis
        if heaviest is None:
            return 1
        _, alike, place, axis = heaviest
        liked = self._liked(alike, place)
        at_once = max(round(float(self._lost[number, axis.base]) / axis.step), 1)
        step = liked // gcd(liked, at_once)
        while step > 1 and 2 * step > self.pools[number].width:
            step //= 2
        return step

    def _liked(self, alike: _Alike, place: int) -> int:
        """Return the smallest step along an axis of an operation that suits the hardware.

        A step s suits the hardware if widths that are multiples of s, but not of 2s, take hardly
        longer than a linear interpolation between two widths of a much coarser step.

        Parameters
        ----------
        alike:
            The operations.
        place:
            Index of the axis.

        Returns
        -------
        The step, in steps of the axis.
        """
        full = [axis.steps for axis in alike.widest]
        coarse = 2 * _WIDTH_STEPS[-1]
        while coarse > 2 and full[place] < 2 * coarse:
            coarse //= 2
        top = min(full[place] * 3 // 4 // coarse + 1, full[place] // coarse) * coarse
        if top <= coarse:
            return 1

        def ms(left: int) -> float:
            """Return the time in milliseconds if ``left`` steps of the axis are left."""
            return self._left(alike, [*full[:place], left, *full[place + 1 :]])

        high, low = ms(top), ms(top - coarse)
        for step in _WIDTH_STEPS:
            if 2 * step > coarse:
                break
            between = [
                (ms(top - less), high + (low - high) * less / coarse)
                for less in (step, coarse - step)
            ]
            if sum(taken for taken, _ in between) <= _WORSE * sum(line for _, line in between):
                return step
        return coarse // 2


def _traced(coupling: Coupling) -> Iterator[Tensor]:
    """Yield the tensors that the nodes of all traces return."""
    for trace in coupling.traces:
        for node in trace.graph.nodes:
            yield from tensors_of(node.meta.get("val"))
