"""Greedy descent to a budget, and exchanges between groups under a latency budget.

One greedy pass goes over the whole network. In each step, the pool whose least important unit
ranks lowest loses it. Costs are recomputed as widths shrink, until every budget holds. The order
of removals does not depend on the budget, so a smaller budget keeps a subset.

Under a latency budget, exchanges between pools then improve the greedy choice. Each round of
exchanges is a knapsack problem.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fxprune.common.arrays import Counts, Floats
from fxprune.coupling import Coupling
from fxprune.criteria import Ranking
from fxprune.errors import BudgetError
from fxprune.select.budget import Budget, keep_count
from fxprune.select.kinds import Kinds, Pool, kinds_of
from fxprune.select.knapsack import best_options
from fxprune.select.polynomials import Polynomial, macs_of, params_of

__all__ = ["Descent", "Timed", "WidthCost", "step_of"]


_REFRESHES = 512  # upper limit on how often costs are recomputed during one descent
_ROUNDING = 1e-15  # floats do not hold shares such as 0.29 exactly: 0.29 of 100 must be 29
_EXCHANGES = 8  # upper limit on the rounds of exchanges, and on the attempts in one round
_STRIDE = 0.05  # share of a pool's width by which one round changes it, once or twice
_REACH = 0.25  # share of the greedy choice's width that exchanges may change it by in total


class WidthCost(Protocol):
    """The cost of a model as a whole number, given how many units of each kind survive.

    The kinds are those of :class:`~fxprune.select.kinds.Kinds`.
    """

    def at(self, counts: Counts) -> int:
        """Return the cost for these numbers of surviving units, shape (kinds,)."""

    def saved(self, counts: Counts, lost: Counts) -> Counts:
        """Return for each pool how much the cost falls if only this pool loses units.

        Parameters
        ----------
        counts:
            How many units of each kind survive before, shape (kinds,).
        lost:
            How many units of each kind its pool loses, shape (kinds,).

        Returns
        -------
        Counts
            The differences, shape (pools,).
        """


class Timed(WidthCost, Protocol):
    """A cost in time that also knows the steps by which pools should shrink.

    The steps lead to widths that the hardware runs well.
    """

    @property
    def steps(self) -> Sequence[int]: ...


def step_of(pool: Pool, budget: Budget) -> int:
    """Return by how many units each block must shrink at a time.

    Then all blocks together keep a multiple of ``round_to``.
    """
    return budget.round_to // math.gcd(budget.round_to, pool.blocks)


class Descent:
    """Removal of one unit after another until the budgets hold.

    Parameters
    ----------
    coupling:
        The analysis.
    pools:
        The pools of its groups.
    order:
        For each pool, the positions of the units of each block, the least important first; shape
        (blocks, width).
    ranking:
        The scores, and the weights of the costs.
    budget:
        The budgets to reach.
    widths:
        The width of each pool to start from.
    fixed:
        For each pool, whether its width stays as it is.
    least:
        For each pool, how many units every block has to keep.
    timed:
        The cost that a latency budget limits; None if there is no such budget.
    """

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
        self.steps = [step_of(pool, budget) for pool in pools]
        if timed is not None:
            self.steps = [
                math.lcm(own, liked) for own, liked in zip(self.steps, timed.steps, strict=True)
            ]
        floors = [
            keep_count(pool.width, 1e-12, step, own)
            for pool, step, own in zip(pools, self.steps, least, strict=True)
        ]
        self.floor = [
            w if still else min(floor, w)
            for floor, w, still in zip(floors, widths, fixed, strict=True)
        ]
        kinds = kinds_of(coupling, pools)
        self.macs, self.params = macs_of(coupling, kinds), params_of(coupling, kinds)
        # the cost of the computation term of CPMC
        self.computation: WidthCost = self.macs if timed is None else timed
        self.first = np.searchsorted(kinds.pool, np.arange(len(pools) + 1)).tolist()
        # by pool: how many units of each kind survive at each width, shape (width + 1, kinds)
        self.survivors: list[npt.NDArray[np.int64]] = []
        # by pool: the mean value over the blocks of the k-th unit that each of them loses
        self.values: list[list[float]] = []
        for number, (pool, ascending) in enumerate(zip(pools, order, strict=True)):
            labels = np.take_along_axis(pool.labels, ascending, axis=1)
            self.values.append(ranking.value[labels].mean(axis=0).tolist())
            start, stop = self.first[number : number + 2]
            # start with the last unit to go, because it survives at width 1
            last = (kinds.of_unit[labels[:, ::-1, np.newaxis]] == np.arange(start, stop)).sum(
                axis=0
            )
            self.survivors.append(
                np.concatenate([np.zeros((1, stop - start), dtype=np.int64), last.cumsum(axis=0)])
            )
        self.full = self._counts([pool.width for pool in pools])
        self.limits = self._limits(kinds)

    def _limits(self, kinds: Kinds) -> list[tuple[str, WidthCost, int]]:
        """Return the name, the cost and the limit of each budget.

        Limits are whole numbers, so that only the share itself is subject to rounding.
        """
        budget = self.budget
        counts = np.array([[0.0, *(0.0 if self.fixed[p] else 1.0 for p in kinds.pool)]])
        shares: list[tuple[str, WidthCost, float | None]] = [
            ("macs", self.macs, budget.macs),
            ("params", self.params, budget.params),
            ("latency", self.computation, budget.latency),
        ]
        if budget.scope == "global":
            shares.append(("channels", Polynomial(kinds, counts, [(1.0, (0,))]), budget.channels))
        return [
            (name, cost, math.floor(share * cost.at(self.full) * (1 + _ROUNDING)))
            for name, cost, share in shares
            if share is not None
        ]

    def run(self) -> list[int]:
        """Remove units until every budget holds.

        Returns
        -------
        list of int
            The width of each pool.

        Raises
        ------
        BudgetError
            If even the smallest model is above a budget.
        """
        # Test this first: by a measured time, the smallest model can be slower than this one.
        if self._holds():
            return self.widths
        self._check()
        self.widths = [
            width if still else _aligned(width, step, floor)
            for width, still, step, floor in zip(
                self.widths, self.fixed, self.steps, self.floor, strict=True
            )
        ]
        removals = sum(
            (width - floor) // step
            for width, floor, step in zip(self.widths, self.floor, self.steps, strict=True)
        )
        batch = max(1, removals // _REFRESHES)
        while not self._holds():
            before = list(self.widths)
            removed = self._batch(batch)
            if self._holds():
                # The budgets were met somewhere in this batch: repeat it one by one.
                self.widths = before
                for pool, width in removed:
                    self.widths[pool] = width
                    if self._holds():
                        break
        return self.widths

    def exchanged(self) -> list[int]:
        """Exchange units between pools while the survivors get more important within the budgets.

        Each round is a knapsack problem (Shen et al., "Structural Pruning via Latency-Saliency
        Knapsack", NeurIPS 2022). Every pool may get slightly wider or narrower, at the cost that
        this change alone has. The true cost of all changes together is computed afterwards. If it
        is above the budget, the round is repeated with less spare time. Exchanges stay near the
        greedy choice. Further away, cheap units would always win against expensive ones, until
        layers are empty.

        Returns
        -------
        list of int
            The width of each pool.
        """
        bounds = [
            (width, width)
            if still
            else (
                max(floor, math.ceil(width * (1 - _REACH))),
                min(pool.width, int(width * (1 + _REACH))),
            )
            for pool, width, still, floor in zip(
                self.pools, self.widths, self.fixed, self.floor, strict=True
            )
        ]
        (time, limit), *_ = [
            (cost, limit) for name, cost, limit in self.limits if name == "latency"
        ]
        for _ in range(_EXCHANGES):
            options = [self._options(pool, *own) for pool, own in enumerate(bounds)]
            worth = [
                [self._worth(pool, width) for width in own] for pool, own in enumerate(options)
            ]
            counts = self._counts(self.widths)
            change = []
            for place in range(max(map(len, options), default=0)):
                there = [own[min(place, len(own) - 1)] for own in options]
                change.append((-time.saved(counts, counts - self._counts(there))).tolist())
            cost = [
                [change[place][pool] for place in range(len(own))]
                for pool, own in enumerate(options)
            ]
            spare, before = float(limit - time.at(counts)), list(self.widths)
            now = self._left(before)
            for _ in range(_EXCHANGES):
                chosen = best_options(worth, cost, spare)
                if chosen is None:
                    break
                self.widths = [own[option] for own, option in zip(options, chosen, strict=True)]
                if self._holds():
                    break
                spare -= 1.1 * max(time.at(self._counts(self.widths)) - limit, abs(limit) / 1000)
            if not self._holds() or self._left(self.widths) <= now:
                self.widths = before
                break
        return self.widths

    def _options(self, pool: int, low: int, high: int) -> list[int]:
        """Return the width of a pool and the nearby widths that are in bounds and on its steps."""
        width, step = self.widths[pool], self.steps[pool]
        stride = max(round(width * _STRIDE / step), 1) * step
        near = {(width + k * stride) // step * step for k in (-2, -1, 1, 2)} | {
            self.pools[pool].width
        }
        return sorted({width, *(own for own in near if low <= own <= high)})

    def _left(self, widths: Sequence[int]) -> float:
        """Return the importance of the survivors of all pools."""
        return sum(self._worth(pool, width) for pool, width in enumerate(widths))

    def _worth(self, pool: int, width: int) -> float:
        """Return the importance of the survivors of one pool."""
        return (
            self.ranking.alpha
            * float(self.blocks[pool])
            * sum(self.values[pool][self.pools[pool].width - width :])
        )

    def _check(self) -> None:
        """Check that the smallest model is within every budget.

        Raises
        ------
        BudgetError
            If it is not; the message names the smallest share that can be reached.
        """
        for name, cost, limit in self.limits:
            least, whole = cost.at(self._counts(self.floor)), cost.at(self.full)
            if least > limit:
                raise BudgetError(
                    f"{name}={getattr(self.budget, name)} cannot be reached: the smallest model "
                    "that the analysis and the other arguments allow has "
                    f"{name}={_rounded_up(least / whole)} ({least:,} of {whole:,}). Raise the "
                    "budget, or see what is pinned with print(fxprune.analyze(model, "
                    "example_inputs)), and what keep=, min_channels= and round_to= hold back."
                )

    def _counts(self, widths: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return how many units of each kind survive at these widths."""
        rows = [table[width] for table, width in zip(self.survivors, widths, strict=True)]
        return np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)

    def _holds(self) -> bool:
        """Tell whether every budget holds at the current widths."""
        counts = self._counts(self.widths)
        return all(cost.at(counts) <= limit for _, cost, limit in self.limits)

    def _next(self, pool: int) -> int:
        """Return the width of a pool after its next loss: the multiple of its step below."""
        return max(
            (self.widths[pool] - 1) // self.steps[pool] * self.steps[pool], self.floor[pool]
        )

    def _batch(self, count: int) -> list[tuple[int, int]]:
        """Remove the ``count`` units of the lowest ranks, at the current costs.

        Returns
        -------
        list of (int, int)
            Each pool that lost units and its new width, in the order of removal.
        """
        offset = self._offsets()
        heap = [
            (self._rank(p, offset), p)
            for p in range(len(self.pools))
            if self.widths[p] > self.floor[p]
        ]
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
        """Return the rank of a pool's next loss: mean value plus the costs' part."""
        gone = self.pools[pool].width - self.widths[pool]
        after = self.pools[pool].width - self._next(pool)
        return self.ranking.alpha * sum(self.values[pool][gone:after]) / (after - gone) + float(
            offset[pool]
        )

    def _offsets(self) -> Floats:
        """Return what the costs add to the rank of each pool's units, at the current widths."""
        out = np.zeros(len(self.pools))
        if not (self.ranking.beta or self.ranking.gamma):
            return out
        counts = self._counts(self.widths)
        after = [self._next(pool) for pool in range(len(self.pools))]
        lost = counts - self._counts(after)
        units = np.maximum(np.array(self.widths, dtype=np.int64) - after, 1) * self.blocks
        for weight, cost in (
            (self.ranking.beta, self.computation),
            (self.ranking.gamma, self.params),
        ):
            if weight:
                # A measured cost may rise at a width that the hardware runs badly. Then nothing
                # is saved.
                each = np.log2(1 + np.maximum(cost.saved(counts, lost), 0) / units)
                out += weight * (1 - each / max(each.max(initial=0.0), np.finfo(np.float64).tiny))
        return out


def _aligned(width: int, step: int, floor: int) -> int:
    """Return the largest multiple of ``step`` up to ``width``, but at least ``floor``."""
    return max(width // step * step, floor)


def _rounded_up(share: float) -> float:
    """Return the share rounded up to four digits.

    An error message names this share, so it must be reachable.

    >>> _rounded_up(0.123401), _rounded_up(0.25), _rounded_up(0.00012)
    (0.1235, 0.25, 0.00012)
    """
    digits = 3 - math.floor(math.log10(share)) if share > 0 else 0
    near = round(share, digits)
    return near if near >= share else round(near + 10.0**-digits, digits)
