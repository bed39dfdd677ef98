"""What a model takes at any widths of its groups, from what its operations take."""

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


_NS = 1e6  # nanoseconds in a millisecond: forecasts are whole numbers, as the other costs are
_MOST_AXES = 3
_WIDTH_STEPS = (1, 2, 4, 8, 16, 32)
# a width that takes this much more than the widths around it is one that the hardware does not
# like
_WORSE = 1.05


@dataclass(frozen=True)
class _Axis:
    """Sizes of an operation that shrink in proportion, counted in steps that they can go down by.

    A dimension of several blocks loses a position from each of them at once.
    """

    base: int  # the smallest of the sizes
    full: int
    step: int
    multiples: Mapping[int, float]  # of it: all of the sizes

    @property
    def steps(self) -> int:
        """How many there are, the last of them left included."""
        return -(-self.full // self.step)

    def sizes(self, left: int) -> dict[int, int]:
        """The sizes where so many steps are left."""
        value = self.full - self.step * (self.steps - left)
        return {number: round(value * multiple) for number, multiple in self.multiples.items()}


@dataclass
class _Alike:
    """Operations that differ in their widths only."""

    layer: Layer  # one of them
    axes: list[list[_Axis]] = field(default_factory=list)  # of each of them
    surface: Surface | None = None

    @property
    def widest(self) -> list[_Axis]:
        """The axes of ``layer``, as long as the longest of all."""
        longest = [
            max(axes[place].full for axes in self.axes) for place in range(len(self.axes[0]))
        ]
        return [replace(axis, full=full) for axis, full in zip(self.axes[0], longest, strict=True)]


class Forecast:
    """Nanoseconds of one call of the deployed model, as a function of how many units of each kind
    survive.

    Contractions (convolutions, matrix products, attention) are measured one by one on a grid of
    their input and output widths together, each kind of layer once, and interpolated. Everything
    else is measured at full width, and taken in proportion to the bytes that it reads and writes.
    What both together miss (what is fused, what caches hold, what starting an operation costs in a
    whole model) is told by whole models: see :meth:`fit`.

    The result has what selection asks of a cost: :meth:`at` and :meth:`saved`, whole numbers.

    Parameters
    ----------
    coupling:
        The analysis.
    model:
        The analysed model with all its channels, deployed.
    example_inputs:
        What it is called with.
    setting:
        Where and how it runs.
    table:
        Where times are looked up and put; None: the one that the setting has on disk.
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
        # of contractions, of everything else, and what comes on top
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
            """For each pool how many units it should lose at a time, so that its widths are such
            as the hardware likes.
            """
        self.table.save()

    @property
    def full(self) -> Counts:
        """How many units of each kind there are."""
        return self.kinds.size

    def at(self, counts: Counts) -> int:
        """Nanoseconds where so many units of each kind survive; shape (kinds,)."""
        of_contractions, of_others, more = self._factors
        return round(
            of_contractions * self._measured(counts) + of_others * self._rest.at(counts) + more
        )

    def saved(self, counts: Counts, lost: Counts) -> npt.NDArray[np.int64]:
        """By how much they fall when a pool alone loses what ``lost`` says of its kinds; shape
        (pools,).
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
        """Set what contractions and everything else count, and what comes on top, by whole models.

        Parameters
        ----------
        known:
            How many units of each kind survive, and the milliseconds measured; the first is the
            dense model, which is met exactly.
        """
        rows = np.array(
            [[self._measured(counts), self._rest.at(counts), _NS] for counts, _ in known],
            dtype=np.float64,
        )
        wanted = np.array([_NS * ms for _, ms in known])
        best: tuple[float, Floats] | None = None
        # the least squares that are not negative, in relative errors
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
        """Milliseconds of an operation that does nothing."""
        one = torch.zeros(1, device=self.setting.place)
        return self.table.ms("relu of one number", lambda: lambda: torch.relu(one))

    def _see(self, layer: Layer, again: Prepare) -> None:
        """Keep a contraction that is to be measured at several widths; time everything else at
        once.
        """
        free, ran = layer.free(), self._contractions.get(layer.node, [])
        if ran and free and self._keep(layer):
            return
        try:
            ms = self.table.ms(layer.description({}), again)
        except RuntimeError:
            # cannot be recorded in a CUDA graph, because it waits for the GPU: what comes on top
            # has it
            return
        total = float(sum(one.macs() * one.share for one in ran))
        if not free:
            self._products.append((_NS * ms, []))
        elif total:
            # a contraction that does not run at other widths as it stands goes in proportion to
            # its work
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
        """The bytes of a tensor, as a product of sizes."""
        rest = prod(n for d, n in enumerate(own.shape) if d not in own.dims) * own.dtype.itemsize
        return [((float(rest), ()),), *(self._sizes.sizes[number] for number in own.dims.values())]

    def _names_of_proportional(self) -> Counts:
        """For each size the number of the first that shrinks in proportion to it."""
        rng = np.random.default_rng(0)
        tried = self._values(rng.uniform(0.1, 1.0, (3, len(self.full))) * self.full)
        _, first, inverse = np.unique(
            np.round(tried / self._full, 9), axis=1, return_index=True, return_inverse=True
        )
        return first[inverse.reshape(-1)]

    def _keep(self, layer: Layer) -> bool:
        """Put a contraction with those that differ from it in their widths only, if it runs at
        other widths.
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
                # sizes stand in it as numbers that do not follow
                return False
            self._alike[key] = _Alike(layer)
        self._alike[key].axes.append(axes)
        return True

    def _measure(self, alike: _Alike) -> None:
        """Time one of them at the widths of a grid that reaches up to the widest."""
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
            return self._left(alike, [own[p] for own, p in zip(steps, point, strict=True)], again)

        alike.surface = Surface(positions, ms, functools.partial(ms, again=True))

    def _left(self, alike: _Alike, left: Sequence[int], again: bool = False) -> float:
        """Milliseconds where so many steps are left of each axis."""
        sizes = {
            n: s
            for axis, own in zip(alike.widest, left, strict=True)
            for n, s in axis.sizes(own).items()
        }
        return self._ms(alike.layer, sizes, again)

    def _ms(self, layer: Layer, sizes: Mapping[int, int], again: bool = False) -> float:
        return self.table.ms(
            layer.description(sizes),
            lambda: layer.prepared(sizes, self.setting.place),
            again=again,
        )

    # -- at other widths

    def _lost_at_once(self) -> Floats:
        """By how much each size falls when a pool loses a unit from each of its blocks; shape
        (pools, sizes).
        """
        out = np.zeros((len(self.pools), len(self._full)))
        for number, pool in enumerate(self.pools):
            own = self.kinds.pool == number
            # on average over its kinds
            one = own * self.full * (pool.blocks / self.full[own].sum())
            out[number] = self._full - self._values((self.full - one)[np.newaxis])[0]
        return np.where(out > 1e-9, out, 0.0)

    def _measured(self, counts: Counts) -> float:
        """Nanoseconds of the contractions, as measured one by one."""
        now = self._values(counts[np.newaxis].astype(np.float64))[0]
        total = 0.0
        for alike, numbers in zip(self._alike.values(), self._numbers, strict=True):
            assert alike.surface is not None
            total += float(alike.surface.at(now[numbers]).sum())
        return _NS * total

    def _step(self, number: int) -> int:
        """By how many units a pool should shrink at a time: what the layer that it matters most to
        was measured to like.
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
        """The step of one of the axes of an operation.

        A step of s is liked where widths that are multiples of s, but not of 2s, take no more than
        what lies between the widths of a much coarser step around them.
        """
        full = [axis.steps for axis in alike.widest]
        coarse = 2 * _WIDTH_STEPS[-1]
        while coarse > 2 and full[place] < 2 * coarse:
            coarse //= 2
        top = min(full[place] * 3 // 4 // coarse + 1, full[place] // coarse) * coarse
        if top <= coarse:
            return 1

        def ms(left: int) -> float:
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
    """What the nodes give."""
    for trace in coupling.traces:
        for node in trace.graph.nodes:
            yield from tensors_of(node.meta.get("val"))
