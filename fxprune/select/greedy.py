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

import numpy as np
import numpy.typing as npt

from fxprune.common.arrays import Floats
from fxprune.coupling import Coupling
from fxprune.criteria import Ranking
from fxprune.errors import BudgetError
from fxprune.select.budget import Budget, keep_count
from fxprune.select.costs import TimeCost, WidthCost
from fxprune.select.kinds import Kinds, Pool, kinds_of
from fxprune.select.knapsack import best_options
from fxprune.select.polynomials import Polynomial, macs_of, params_of

__all__ = ["Descent", "ordered_labels", "step_of"]


_REFRESHES = 512  # upper limit on how often costs are recomputed during one descent
_ROUNDING = 1e-15  # floats do not hold shares such as 0.29 exactly: 0.29 of 100 must be 29
_EXCHANGES = 8  # upper limit on the rounds of exchanges, and on the attempts in one round
_STRIDE = 0.05  # share of a pool's width by which one round changes it, once or twice
_REACH = 0.25  # share of the greedy choice's width that exchanges may change it by in total


def step_of(pool: Pool, budget: Budget) -> int:
    """Return by how many units each block must shrink at a time.

    Then all blocks together keep a multiple of ``round_to``.
    """
    return budget.round_to // math.gcd(budget.round_to, pool.blocks)


def ordered_labels(
    pools: Sequence[Pool], order: Sequence[npt.NDArray[np.int64]]
) -> list[npt.NDArray[np.int64]]:
    """Return the labels of each pool in the order of removal.

    Parameters
    ----------
    pools:
        The pools.
    order:
        For each pool, the positions of the units of each block, the least important first; shape
        (blocks, width).

    Returns
    -------
    list of Array
        For each pool the labels, shape (blocks, width).
    """
    pairs = zip(pools, order, strict=True)
    return [np.take_along_axis(pool.labels, ascending, axis=1) for pool, ascending in pairs]


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

    Attributes
    ----------
    widths:
        The current width of each pool.
    blocks, steps, floor:
        For each pool: the number of its blocks, by how many units each of them shrinks at a time,
        and the smallest width.
    macs, params:
        The multiply-accumulates and the parameters as functions of the widths.
    computation:
        The cost of the computation term of CPMC.
    values:
        For each pool the mean value over the blocks of the k-th unit that each of them loses.
    survivors:
        For each pool how many units of each kind survive at each width, shape (width + 1, kinds).
    full:
        How many units of each kind there are, shape (kinds,).
    limits:
        The name, the cost and the limit of each budget.
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
        timed: TimeCost | None = None,
    ) -> None:
        self.pools, self.budget, self.ranking = pools, budget, ranking
        self.widths, self.fixed = list(widths), fixed
        self.blocks = np.array([pool.blocks for pool in pools], dtype=np.int64)
        self.steps = _shrinking_steps(pools, budget, timed)
        self.floor = self._floors(least)
        kinds = kinds_of(coupling, pools)
        self.macs, self.params = macs_of(coupling, kinds), params_of(coupling, kinds)
        self.computation: WidthCost = self.macs if timed is None else timed
        labels = ordered_labels(pools, order)
        self.values = [ranking.value[units].mean(axis=0).tolist() for units in labels]
        self.survivors = _survivors(labels, kinds)
        self.full = self._counts([pool.width for pool in pools])
        self.limits = self._limits(kinds)

    def _floors(self, least: Sequence[int]) -> list[int]:
        """Return the smallest width that each pool may have."""
        floors = []
        for number, (pool, at_least) in enumerate(zip(self.pools, least, strict=True)):
            floor = keep_count(pool.width, 1e-12, self.steps[number], at_least)
            width = self.widths[number]
            floors.append(width if self.fixed[number] else min(floor, width))
        return floors

    def _limits(self, kinds: Kinds) -> list[tuple[str, WidthCost, int]]:
        """Return the name, the cost and the limit of each budget.

        Limits are whole numbers, so that only the share itself is subject to rounding.
        """
        budget = self.budget
        shares: list[tuple[str, WidthCost, float | None]] = [
            ("macs", self.macs, budget.macs),
            ("params", self.params, budget.params),
            ("latency", self.computation, budget.latency),
        ]
        if budget.scope == "global":
            counts = np.array([[0.0, *(0.0 if self.fixed[p] else 1.0 for p in kinds.pool)]])
            shares.append(("channels", Polynomial(kinds, counts, [(1.0, (0,))]), budget.channels))
        limits = []
        for name, cost, share in shares:
            if share is not None:
                limit = math.floor(share * cost.at(self.full) * (1 + _ROUNDING))
                limits.append((name, cost, limit))
        return limits

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
        if self._is_within_limits():
            return self.widths
        self._check_reachable()
        self._align_widths()
        removals = 0
        for width, floor, step in zip(self.widths, self.floor, self.steps, strict=True):
            removals += (width - floor) // step
        batch = max(1, removals // _REFRESHES)
        while not self._is_within_limits():
            before = list(self.widths)
            removed = self._remove_batch(batch)
            if self._is_within_limits():
                self._repeat_until_within_limits(before, removed)
        return self.widths

    def _align_widths(self) -> None:
        """Reduce each width that is not fixed to a multiple of its step, or to its floor."""
        for pool, (step, floor) in enumerate(zip(self.steps, self.floor, strict=True)):
            if not self.fixed[pool]:
                self.widths[pool] = max(self.widths[pool] // step * step, floor)

    def _repeat_until_within_limits(
        self, before: list[int], removed: Sequence[tuple[int, int]]
    ) -> None:
        """Repeat a batch of removals one by one, and stop where the budgets hold.

        Parameters
        ----------
        before:
            The widths before the batch.
        removed:
            The removals, as :meth:`_remove_batch` returns them.
        """
        self.widths = before
        for pool, width in removed:
            self.widths[pool] = width
            if self._is_within_limits():
                break

    def exchange(self) -> list[int]:
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
        bounds = self._exchange_bounds()
        for _ in range(_EXCHANGES):
            before = list(self.widths)
            self._choose([self._options(pool, *within) for pool, within in enumerate(bounds)])
            improved = self._total_worth(self.widths) > self._total_worth(before)
            if not self._is_within_limits() or not improved:
                self.widths = before
                break
        return self.widths

    def _exchange_bounds(self) -> list[tuple[int, int]]:
        """Return the smallest and the largest width that exchanges may give each pool."""
        bounds = []
        for number, (pool, width) in enumerate(zip(self.pools, self.widths, strict=True)):
            if self.fixed[number]:
                bounds.append((width, width))
            else:
                low = max(self.floor[number], math.ceil(width * (1 - _REACH)))
                bounds.append((low, min(pool.width, int(width * (1 + _REACH)))))
        return bounds

    def _choose(self, options: Sequence[Sequence[int]]) -> None:
        """Set the widths to the options of the largest worth that are within the budgets.

        If there are none, the widths may be above the budgets afterwards.

        Parameters
        ----------
        options:
            The widths that each pool may get.
        """
        time, limit = next((cost, most) for name, cost, most in self.limits if name == "latency")
        worth = [[self._worth(pool, w) for w in widths] for pool, widths in enumerate(options)]
        changes = self._changes(time, options)
        spare = float(limit - time.at(self._counts(self.widths)))
        for _ in range(_EXCHANGES):
            chosen = best_options(worth, changes, spare)
            if chosen is None:
                return
            self.widths = [widths[k] for widths, k in zip(options, chosen, strict=True)]
            if self._is_within_limits():
                return
            spare -= 1.1 * max(time.at(self._counts(self.widths)) - limit, abs(limit) / 1000)

    def _changes(self, cost: WidthCost, options: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return by how much the cost rises if one pool alone gets each of its options."""
        counts = self._counts(self.widths)
        changes: list[list[float]] = [[] for _ in options]
        for place in range(max(map(len, options), default=0)):
            widths = [choices[min(place, len(choices) - 1)] for choices in options]
            rise = (-cost.saved(counts, counts - self._counts(widths))).tolist()
            for pool, choices in enumerate(options):
                if place < len(choices):
                    changes[pool].append(rise[pool])
        return changes

    def _options(self, pool: int, low: int, high: int) -> list[int]:
        """Return the width of a pool and the nearby widths that are in bounds and on its steps."""
        width, step = self.widths[pool], self.steps[pool]
        stride = max(round(width * _STRIDE / step), 1) * step
        near = {(width + k * stride) // step * step for k in (-2, -1, 1, 2)}
        near.add(self.pools[pool].width)
        return sorted({width, *(other for other in near if low <= other <= high)})

    def _total_worth(self, widths: Sequence[int]) -> float:
        """Return the importance of the survivors of all pools."""
        return sum(self._worth(pool, width) for pool, width in enumerate(widths))

    def _worth(self, pool: int, width: int) -> float:
        """Return the importance of the survivors of one pool."""
        survivors = self.values[pool][self.pools[pool].width - width :]
        return self.ranking.alpha * float(self.blocks[pool]) * sum(survivors)

    def _check_reachable(self) -> None:
        """Check that the smallest model is within every budget.

        Raises
        ------
        BudgetError
            If it is not; the message names the smallest share that can be reached.
        """
        for name, cost, limit in self.limits:
            least, full = cost.at(self._counts(self.floor)), cost.at(self.full)
            if least > limit:
                raise BudgetError(
                    f"{name}={getattr(self.budget, name)} cannot be reached: the smallest model "
                    "that the analysis and the other arguments allow has "
                    f"{name}={_rounded_up(least / full)} ({least:,} of {full:,}). Raise the "
                    "budget, or see what is pinned with print(fxprune.analyze(model, "
                    "example_inputs)), and what keep=, min_channels= and round_to= hold back."
                )

    def _counts(self, widths: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return how many units of each kind survive at these widths."""
        rows = [table[width] for table, width in zip(self.survivors, widths, strict=True)]
        return np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)

    def _is_within_limits(self) -> bool:
        """Tell whether every budget holds at the current widths."""
        counts = self._counts(self.widths)
        return all(cost.at(counts) <= limit for _, cost, limit in self.limits)

    def _next_width(self, pool: int) -> int:
        """Return the width of a pool after its next loss: the multiple of its step below."""
        return max(
            (self.widths[pool] - 1) // self.steps[pool] * self.steps[pool], self.floor[pool]
        )

    def _remove_batch(self, count: int) -> list[tuple[int, int]]:
        """Remove the ``count`` units of the lowest ranks, at the current costs.

        Returns
        -------
        list of (int, int)
            Each pool that lost units and its new width, in the order of removal.
        """
        offset = self._offsets()
        shrinkable = [p for p in range(len(self.pools)) if self.widths[p] > self.floor[p]]
        heap = [(self._rank(pool, offset), pool) for pool in shrinkable]
        heapq.heapify(heap)
        removals: list[tuple[int, int]] = []
        while heap and len(removals) < count:
            _, pool = heapq.heappop(heap)
            self.widths[pool] = self._next_width(pool)
            removals.append((pool, self.widths[pool]))
            if self.widths[pool] > self.floor[pool]:
                heapq.heappush(heap, (self._rank(pool, offset), pool))
        return removals

    def _rank(self, pool: int, offset: Floats) -> float:
        """Return the rank of a pool's next loss: mean value plus the costs' part."""
        gone = self.pools[pool].width - self.widths[pool]
        after = self.pools[pool].width - self._next_width(pool)
        return self.ranking.alpha * sum(self.values[pool][gone:after]) / (after - gone) + float(
            offset[pool]
        )

    def _offsets(self) -> Floats:
        """Return what the costs add to the rank of each pool's units, at the current widths."""
        out = np.zeros(len(self.pools))
        if not (self.ranking.beta or self.ranking.gamma):
            return out
        counts = self._counts(self.widths)
        after = [self._next_width(pool) for pool in range(len(self.pools))]
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


def _shrinking_steps(pools: Sequence[Pool], budget: Budget, timed: TimeCost | None) -> list[int]:
    """Return by how many units each block of each pool shrinks at a time."""
    steps = [step_of(pool, budget) for pool in pools]
    if timed is None:
        return steps
    return [math.lcm(*pair) for pair in zip(steps, timed.steps, strict=True)]


def _survivors(
    labels: Sequence[npt.NDArray[np.int64]], kinds: Kinds
) -> list[npt.NDArray[np.int64]]:
    """Return for each pool how many units of each of its kinds survive at each width.

    Parameters
    ----------
    labels:
        The labels of each pool in the order of removal, shape (blocks, width).
    kinds:
        The kinds of the units.

    Returns
    -------
    list of Array
        For each pool the counts at the widths 0 to its full width, shape (width + 1, kinds).
    """
    first = np.searchsorted(kinds.pool, np.arange(len(labels) + 1)).tolist()
    out = []
    for units, start, stop in zip(labels, first, first[1:], strict=False):
        # the last unit to go comes first, because it survives at width 1
        of_kind = kinds.of_unit[units[:, ::-1, np.newaxis]] == np.arange(start, stop)
        counts = of_kind.sum(axis=0).cumsum(axis=0)
        out.append(np.concatenate([np.zeros((1, stop - start), dtype=np.int64), counts]))
    return out


def _rounded_up(share: float) -> float:
    """Return the share rounded up to four digits.

    An error message names this share, so it must be reachable.

    >>> _rounded_up(0.123401), _rounded_up(0.25), _rounded_up(0.00012)
    (0.1235, 0.25, 0.00012)
    """
    digits = 3 - math.floor(math.log10(share)) if share > 0 else 0
    near = round(share, digits)
    return near if near >= share else round(near + 10.0**-digits, digits)
