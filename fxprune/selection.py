"""Scores and a budget -> which units survive.

One greedy pass over the whole network: the pool whose least unit ranks lowest loses it, costs are brought up to date as widths
shrink, until every budget holds. The order of removals does not depend on the budget, so a smaller budget keeps a subset.

Under a latency budget the greedy choice is then improved by exchanges between pools, each of them a knapsack problem.
"""

from __future__ import annotations

import fnmatch
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxprune.coupling import Coupling, Group
from fxprune.criteria import Ranking
from fxprune.errors import ArgumentError, BudgetError
from fxprune.knapsack import best_options
from fxprune.widths import Polynomial, Pool, kinds_of, lines, macs_of, params_of, pools_of

__all__ = ["Budget", "Cost", "Timed", "keep_count", "select"]

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

_REFRESHES = 512  # how often, at most, costs are brought up to date while a whole network is taken apart
_ROUNDING = 1e-15  # shares are decimals that floats miss: 0.29 of 100 is 29
_EXCHANGES = 8  # rounds of exchanges at most
_STRIDE = 0.05  # of a pool's width: by how much, or twice as much, a round changes it
_REACH = 0.25  # of the greedy choice's width: how far exchanges may lead away from it


@dataclass(frozen=True)
class Budget:
    """What a pruned model may have; every one that is given must hold.

    Attributes
    ----------
    channels:
        Share of units kept: by every group (``scope="group"``) or by all together (``"global"``).
    macs, params:
        Share of multiply-accumulates and of parameters kept, of the whole model, pinned parts included.
    latency:
        Share of the time that the whole model takes.
    layers:
        Glob -> share of units kept, for groups in which a matching module (or parameter) has filters of its own. The last glob that
        matches counts. These groups are left alone otherwise.
    round_to:
        Groups keep a multiple of this many units, where they have as many; all of them where a budget takes nothing.
    min_channels:
        Groups keep at least this many units, where they have as many.
    """

    channels: float | None = None
    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    scope: str = "group"
    layers: Mapping[str, float] = field(default_factory=dict)
    round_to: int = 1
    min_channels: int = 1


def keep_count(size: int, share: float, round_to: int, min_channels: int) -> int:
    """How many of ``size`` units survive: at most the share, a multiple of ``round_to``, never none.

    >>> keep_count(64, 0.5, 1, 1), keep_count(12, 0.5, 8, 1), keep_count(3, 0.1, 1, 1), keep_count(6, 0.5, 8, 1)
    (32, 8, 1, 6)
    """
    if share >= 1:
        return size
    wanted = max(math.floor(size * share + 1e-9), min_channels, 1)
    rounded = wanted // round_to * round_to
    if rounded < min(max(min_channels, 1), size):
        rounded = math.ceil(max(min_channels, 1) / round_to) * round_to
    return min(rounded, size)


class Cost(Protocol):
    """What a model costs, in whole numbers, where so many units of each kind survive (:class:`~fxprune.widths.Kinds`)."""

    def at(self, counts: Counts) -> int:
        """Shape (kinds,) -> the cost."""

    def saved(self, counts: Counts, lost: Counts) -> Counts:
        """By how much it falls when a pool alone loses what ``lost`` says of its kinds; shape (pools,)."""


class Timed(Cost, Protocol):
    """What it takes, and by how many units at a time pools should shrink, so that widths are such as the hardware likes."""

    @property
    def steps(self) -> Sequence[int]: ...


def select(coupling: Coupling, ranking: Ranking, budget: Budget, timed: Timed | None = None) -> dict[str, tuple[int, ...]]:
    """Choose the survivors.

    ``timed`` is what a latency budget counts.

    Returns
    -------
    For each group's name the indices of its surviving units, ascending. In a balanced group every block keeps equally many.

    Raises
    ------
    BudgetError
        If even the smallest model that the analysis allows is above a budget; it says what the least reachable is.
    ArgumentError
        If a glob of ``layers`` matches no group.
    """
    pools = pools_of(coupling)
    order, least = _spared(coupling, pools, [_ascending(pool, ranking.value) for pool in pools])
    least = [max(math.ceil(budget.min_channels / pool.blocks), spared) for pool, spared in zip(pools, least, strict=True)]
    widths, fixed = _given(coupling, pools, budget, least)
    whole = (budget.macs, budget.params, budget.latency, budget.channels if budget.scope == "global" else None)
    if any(share is not None for share in whole):
        descent = _Descent(coupling, pools, order, ranking, budget, widths, fixed, least, timed)
        widths = descent.run()
        if budget.latency is not None:
            widths = descent.exchanged()
    kept: dict[str, list[int]] = {group.name: [] for group in coupling.groups}
    for pool, ascending, width in zip(pools, order, widths, strict=True):
        survivors = np.take_along_axis(pool.units, ascending, axis=1)[:, pool.width - width :]
        kept[coupling.groups[pool.group].name] += survivors.ravel().tolist()
    return {name: tuple(sorted(units)) for name, units in kept.items()}


def _ascending(pool: Pool, value: Floats) -> npt.NDArray[np.int64]:
    """For each block the positions of its units, the least important first; of equals, the last first."""
    return pool.width - 1 - np.argsort(value[pool.labels][:, ::-1], axis=1, kind="stable")


def _spared(
    coupling: Coupling, pools: Sequence[Pool], order: Sequence[npt.NDArray[np.int64]]
) -> tuple[list[npt.NDArray[np.int64]], list[int]]:
    """Let no tensor lose everything: put off units until each row of each tensor has a position whose units are the last to go.

    Units of one block may lie on different tensors (the two halves of a split, layers that share balanced blocks): all of one
    tensor's could be the least important. Returns the order, and how many units every block has to keep at least.
    """
    spared = np.zeros(coupling.context.units.count, dtype=bool)
    spared[0] = True  # no unit: what stays in any case
    height = np.zeros(len(spared), dtype=np.int64)  # how many of its block a unit has behind it in the order
    labels = []
    for pool, ascending in zip(pools, order, strict=True):
        labels.append(np.take_along_axis(pool.labels, ascending, axis=1))
        height[labels[-1]] = np.arange(pool.width)[::-1]
        spared[labels[-1][:, -1]] = True
    known: set[tuple[int, ...]] = set()
    for tensor in _all_tensors(coupling):
        fields = coupling.labels(tensor)
        key = tuple(map(id, fields))
        if not fields or key in known:
            continue
        known.add(key)
        whole = {own.shape.index(own.size) for own in fields if own.size in own.shape and spared[own].any()}
        if len(whole) == len(fields):
            continue  # most of them: one row along each axis
        for _, rows in lines(coupling, fields):
            for row in np.flatnonzero(~np.any(np.all(spared[rows], axis=0), axis=1)):
                units = rows[:, row, height[rows[:, row]].max(axis=0).argmin()]
                spared[units], height[units] = True, 0
    put_off = [np.argsort(spared[own], axis=1, kind="stable") for own in labels]
    late = [np.take_along_axis(ascending, moved, axis=1) for ascending, moved in zip(order, put_off, strict=True)]
    return late, [int(spared[own].sum(axis=1).max()) for own in labels]


def _all_tensors(coupling: Coupling) -> list[Tensor]:
    """The parameters, then what the nodes give."""
    nodes = [node.meta.get("val") for trace in coupling.traces for node in trace.graph.nodes]
    return [*coupling.parameters.values(), *(leaf for leaf in tree_leaves(nodes) if isinstance(leaf, Tensor))]


def _given(coupling: Coupling, pools: Sequence[Pool], budget: Budget, least: Sequence[int]) -> tuple[list[int], list[bool]]:
    """The widths to start from, and which of them are settled by a layer's own share."""
    shares = _shares(coupling, budget.layers)
    widths, fixed = [], []
    for pool, at_least in zip(pools, least, strict=True):
        share = shares.get(pool.group)
        fixed.append(share is not None)
        if share is None:
            share = budget.channels if budget.channels is not None and budget.scope == "group" else 1.0
        widths.append(keep_count(pool.width, share, _step(pool, budget), at_least))
    return widths, fixed


def _shares(coupling: Coupling, layers: Mapping[str, float]) -> dict[int, float]:
    shares: dict[int, float] = {}
    owners = [_owners(coupling, group) for group in coupling.groups] if layers else []
    for glob, share in layers.items():
        found = [i for i, names in enumerate(owners) if any(fnmatch.fnmatchcase(name, glob) for name in names)]
        if not found:
            some = ", ".join(dict.fromkeys(name for names in owners[:4] for name in names))
            raise ArgumentError(f"layers: {glob!r} matches no layer whose channels can be pruned. There are: {some}, ...")
        shares.update(dict.fromkeys(found, share))
    return shares


def _owners(coupling: Coupling, group: Group) -> list[str]:
    """Names of the parameters and modules whose own filters are units of a group."""
    own = [axis.parameter for axis in group.axes if coupling.role(axis.parameter, axis.dim) == "own"]
    return [*own, *(name.rpartition(".")[0] for name in own)]


def _step(pool: Pool, budget: Budget) -> int:
    return budget.round_to // math.gcd(budget.round_to, pool.blocks)


class _Descent:
    """Removes unit after unit until the budgets hold."""

    def __init__(
        self,
        coupling: Coupling,
        pools: Sequence[Pool],
        order: Sequence[npt.NDArray[np.int64]],
        ranking: Ranking,
        budget: Budget,
        widths: Sequence[int],
        fixed: Sequence[bool],
        least: Sequence[int],
        timed: Timed | None = None,
    ) -> None:
        self.pools, self.budget, self.ranking = pools, budget, ranking
        self.widths, self.fixed = list(widths), fixed
        self.blocks = np.array([pool.blocks for pool in pools], dtype=np.int64)
        self.steps = [_step(pool, budget) for pool in pools]
        if timed is not None:
            self.steps = [math.lcm(own, liked) for own, liked in zip(self.steps, timed.steps, strict=True)]
        floors = [keep_count(pool.width, 1e-12, step, own) for pool, step, own in zip(pools, self.steps, least, strict=True)]
        self.floor = [w if still else min(floor, w) for floor, w, still in zip(floors, widths, fixed, strict=True)]
        kinds = kinds_of(coupling, pools)
        self.macs, self.params = macs_of(coupling, kinds), params_of(coupling, kinds)
        self.computation: Cost = self.macs if timed is None else timed  # what the cost term of CPMC counts
        self.first = np.searchsorted(kinds.pool, np.arange(len(pools) + 1)).tolist()
        self.survivors: list[npt.NDArray[np.int64]] = []  # by pool, shape (width + 1, kinds): how many there are at each width
        # by pool: the value of the k-th unit to go, the mean over the blocks, which lose one each
        self.values: list[list[float]] = []
        for number, (pool, ascending) in enumerate(zip(pools, order, strict=True)):
            labels = np.take_along_axis(pool.labels, ascending, axis=1)
            self.values.append(ranking.value[labels].mean(axis=0).tolist())
            start, stop = self.first[number : number + 2]
            last = (kinds.of_unit[labels[:, ::-1, np.newaxis]] == np.arange(start, stop)).sum(axis=0)  # the last to go first
            self.survivors.append(np.concatenate([np.zeros((1, stop - start), dtype=np.int64), last.cumsum(axis=0)]))
        # (what is limited, its polynomial, its limit); whole numbers, so that nothing is lost to rounding but the share's own.
        self.full = self._counts([pool.width for pool in pools])
        self.limits: list[tuple[str, Cost, int]] = []
        counted = Polynomial(kinds, np.array([[0.0, *(0.0 if fixed[p] else 1.0 for p in kinds.pool)]]), [(1.0, (0,))])
        shares: list[tuple[str, Cost, float | None]] = [
            ("macs", self.macs, budget.macs),
            ("params", self.params, budget.params),
            ("latency", self.computation, budget.latency),
            ("channels", counted, budget.channels if budget.scope == "global" else None),
        ]
        for name, cost, share in shares:
            if share is not None:
                self.limits.append((name, cost, math.floor(share * cost.at(self.full) * (1 + _ROUNDING))))

    def run(self) -> list[int]:
        self._check()
        if self._holds():
            return self.widths
        self.widths = [
            width if still else _aligned(width, step, floor)
            for width, still, step, floor in zip(self.widths, self.fixed, self.steps, self.floor, strict=True)
        ]
        removals = sum((width - floor) // step for width, floor, step in zip(self.widths, self.floor, self.steps, strict=True))
        batch = max(1, removals // _REFRESHES)
        while not self._holds():
            before = list(self.widths)
            removed = self._batch(batch)
            if self._holds():
                # Somewhere in this batch the budgets were met: go through it again, one by one.
                self.widths = before
                for pool, width in removed:
                    self.widths[pool] = width
                    if self._holds():
                        break
        return self.widths

    def exchanged(self) -> list[int]:
        """Pools trade units, as long as what survives is worth more within the same budgets.

        Each round is a knapsack problem: every pool may get wider or narrower by a little, for the time that this alone costs or
        saves (Shen et al., "Structural Pruning via Latency-Saliency Knapsack", NeurIPS 2022). What it costs together is looked at
        afterwards, and where that is too much the round is played again with less to share out. Exchanges stay near the greedy
        choice: further away a unit that is cheap would always win against one that is dear, until layers are empty.
        """
        bounds = [
            (width, width) if still else (max(floor, math.ceil(width * (1 - _REACH))), min(pool.width, int(width * (1 + _REACH))))
            for pool, width, still, floor in zip(self.pools, self.widths, self.fixed, self.floor, strict=True)
        ]
        (time, limit), *_ = [(cost, limit) for name, cost, limit in self.limits if name == "latency"]
        for _ in range(_EXCHANGES):
            options = [self._options(pool, *own) for pool, own in enumerate(bounds)]
            worth = [[self._worth(pool, width) for width in own] for pool, own in enumerate(options)]
            counts = self._counts(self.widths)
            change = []
            for place in range(max(map(len, options), default=0)):
                there = [own[min(place, len(own) - 1)] for own in options]
                change.append((-time.saved(counts, counts - self._counts(there))).tolist())
            cost = [[change[place][pool] for place in range(len(own))] for pool, own in enumerate(options)]
            spare, before = float(limit - time.at(counts)), list(self.widths)
            now = sum(own[widths.index(width)] for own, widths, width in zip(worth, options, before, strict=True))
            for _ in range(_EXCHANGES):
                chosen = best_options(worth, cost, spare)
                if chosen is None:
                    break
                self.widths = [own[option] for own, option in zip(options, chosen, strict=True)]
                if self._holds():
                    break
                spare -= 1.1 * max(time.at(self._counts(self.widths)) - limit, abs(limit) / 1000)
            then = sum(self._worth(pool, width) for pool, width in enumerate(self.widths))
            if not self._holds() or then <= now:
                self.widths = before
                break
        return self.widths

    def _options(self, pool: int, low: int, high: int) -> list[int]:
        """The width of a pool, and those near it, in reach and on its steps."""
        width, step = self.widths[pool], self.steps[pool]
        stride = max(round(width * _STRIDE / step), 1) * step
        near = {(width + k * stride) // step * step for k in (-2, -1, 1, 2)} | {self.pools[pool].width}
        return sorted({width, *(own for own in near if low <= own <= high)})

    def _worth(self, pool: int, width: int) -> float:
        """The importance of what is left of a pool."""
        return self.ranking.alpha * float(self.blocks[pool]) * sum(self.values[pool][self.pools[pool].width - width :])

    def _check(self) -> None:
        for name, polynomial, limit in self.limits:
            least, whole = polynomial.at(self._counts(self.floor)), polynomial.at(self.full)
            if least > limit:
                raise BudgetError(
                    f"{name}={getattr(self.budget, name)} cannot be reached: the smallest model that the analysis and the other "
                    f"arguments allow has {name}={_rounded_up(least / whole)} ({least:,} of {whole:,}). Raise the budget, or see "
                    "what is pinned with print(fxprune.analyze(model, example_inputs)), and what keep=, min_channels= and "
                    "round_to= hold back."
                )

    def _counts(self, widths: Sequence[int]) -> npt.NDArray[np.int64]:
        """How many units of each kind survive at these widths."""
        rows = [table[width] for table, width in zip(self.survivors, widths, strict=True)]
        return np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)

    def _holds(self) -> bool:
        counts = self._counts(self.widths)
        return all(polynomial.at(counts) <= limit for _, polynomial, limit in self.limits)

    def _next(self, pool: int) -> int:
        """The width of a pool after its next loss: the multiple of its step below."""
        return max((self.widths[pool] - 1) // self.steps[pool] * self.steps[pool], self.floor[pool])

    def _batch(self, count: int) -> list[tuple[int, int]]:
        """Take the ``count`` lowest ranks at the costs of now; returns (pool, its new width) in order."""
        offset = self._offsets()
        heap = [(self._rank(p, offset), p) for p in range(len(self.pools)) if self.widths[p] > self.floor[p]]
        heapq.heapify(heap)
        removals: list[tuple[int, int]] = []
        while heap and len(removals) < count:
            _, pool = heapq.heappop(heap)
            self.widths[pool] = self._next(pool)
            removals.append((pool, self.widths[pool]))
            if self.widths[pool] > self.floor[pool]:
                heapq.heappush(heap, (self._rank(pool, offset), pool))
        return removals

    def _rank(self, pool: int, offset: Floats) -> float:
        gone = self.pools[pool].width - self.widths[pool]
        after = self.pools[pool].width - self._next(pool)
        return self.ranking.alpha * sum(self.values[pool][gone:after]) / (after - gone) + float(offset[pool])

    def _offsets(self) -> Floats:
        """What the two costs add to the rank of every unit of a pool, at the widths of now."""
        out = np.zeros(len(self.pools))
        if not (self.ranking.beta or self.ranking.gamma):
            return out
        counts = self._counts(self.widths)
        after = [self._next(pool) for pool in range(len(self.pools))]
        lost = counts - self._counts(after)
        units = np.maximum(np.array(self.widths, dtype=np.int64) - after, 1) * self.blocks
        for weight, polynomial in ((self.ranking.beta, self.computation), (self.ranking.gamma, self.params)):
            if weight:
                # A measured cost may rise where a width that the hardware likes less is reached: that saves nothing.
                cost = np.log2(1 + np.maximum(polynomial.saved(counts, lost), 0) / units)
                out += weight * (1 - cost / max(cost.max(initial=0.0), np.finfo(np.float64).tiny))
        return out


def _aligned(width: int, step: int, floor: int) -> int:
    """The largest multiple of a step that a width reaches, or the floor where that is higher."""
    return max(width // step * step, floor)


def _rounded_up(share: float) -> float:
    """A share of four digits that is no smaller: what an error names must be reachable.

    >>> _rounded_up(0.123401), _rounded_up(0.25), _rounded_up(0.00012)
    (0.1235, 0.25, 0.00012)
    """
    digits = 3 - math.floor(math.log10(share)) if share > 0 else 0
    near = round(share, digits)
    return near if near >= share else round(near + 10.0**-digits, digits)
