"""Widths of the pools of units: what they cost, what they may be, and which units go next."""

from __future__ import annotations

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
from fxprune.select.polynomials import Polynomial, macs_of, params_of

__all__ = ["Widths", "ordered_labels", "step_of"]


_ROUNDING = 1e-15  # floats do not hold shares such as 0.29 exactly: 0.29 of 100 must be 29


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


class Widths:
    """The widths of all pools, with what they cost and which units go next.

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
    scopes:
        The number of each group's scope; by default there is a single scope.

    Attributes
    ----------
    now, most:
        The current width of each pool, and the largest that it may have.
    scope:
        The number of each pool's scope. All scopes lose the same share of their units.
    totals:
        The number of units of each scope; units of fixed pools do not count.
    blocks, steps, floor:
        For each pool: the number of its blocks, by how many units each of them shrinks at a time,
        and the smallest width.
    macs, params:
        The multiply-accumulates and the parameters as functions of the widths.
    computation:
        The cost that a criterion's term of computation reads: MACs, or a measured time.
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
        scopes: Sequence[int] | None = None,
    ) -> None:
        self.pools, self.budget, self.ranking = pools, budget, ranking
        self.now, self.most, self.fixed = list(widths), list(widths), fixed
        self.blocks = np.array([pool.blocks for pool in pools], dtype=np.int64)
        self.steps = _shrinking_steps(pools, budget, timed)
        self.floor = self._floors(least)
        self.scope = [0 if scopes is None else scopes[pool.group] for pool in pools]
        self.totals = self._units_by_scope([pool.width for pool in pools])
        kinds = kinds_of(coupling, pools)
        self.macs, self.params = macs_of(coupling, kinds), params_of(coupling, kinds)
        self.computation: WidthCost = self.macs if timed is None else timed
        labels = ordered_labels(pools, order)
        self.values = [ranking.value[units].mean(axis=0).tolist() for units in labels]
        self.survivors = _survivors(labels, kinds)
        self.full = self.counts([pool.width for pool in pools])
        self.limits = self._limits(kinds)

    def _floors(self, least: Sequence[int]) -> list[int]:
        """Return the smallest width that each pool may have."""
        floors = []
        for number, (pool, at_least) in enumerate(zip(self.pools, least, strict=True)):
            floor = keep_count(pool.width, 1e-12, self.steps[number], at_least)
            width = self.now[number]
            floors.append(width if self.fixed[number] else min(floor, width))
        return floors

    def _units_by_scope(self, widths: Sequence[int]) -> dict[int, int]:
        """Return how many units each scope has at these widths, those of fixed pools aside."""
        units = dict.fromkeys(self.scope, 0)
        for pool, scope in enumerate(self.scope):
            if not self.fixed[pool]:
                units[scope] += int(self.blocks[pool]) * widths[pool]
        return units

    def lost_units(self) -> dict[int, int]:
        """Return how many units each scope has lost."""
        left = self._units_by_scope(self.now)
        return {scope: total - left[scope] for scope, total in self.totals.items()}

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

    def align(self) -> None:
        """Reduce each width that is not fixed to a multiple of its step, or to its floor."""
        for pool, (step, floor) in enumerate(zip(self.steps, self.floor, strict=True)):
            if not self.fixed[pool]:
                self.now[pool] = max(self.now[pool] // step * step, floor)
        self.most = list(self.now)

    def check_reachable(self) -> None:
        """Check that the smallest model is within every budget.

        Raises
        ------
        BudgetError
            If it is not; the message names the smallest share that can be reached.
        """
        for name, cost, limit in self.limits:
            least, full = cost.at(self.counts(self.floor)), cost.at(self.full)
            if least > limit:
                raise BudgetError(
                    f"{name}={getattr(self.budget, name)} cannot be reached: the smallest model "
                    "that the analysis and the other arguments allow has "
                    f"{name}={_rounded_up(least / full)} ({least:,} of {full:,}). Raise the "
                    "budget, or see what is pinned with print(fxprune.analyze(model, "
                    "example_inputs)), and what keep=, min_channels=, max_ratio= and round_to= "
                    "hold back."
                )

    def counts(self, widths: Sequence[int] | None = None) -> npt.NDArray[np.int64]:
        """Return how many units of each kind survive at these widths, by default the current."""
        at = self.now if widths is None else widths
        rows = [table[width] for table, width in zip(self.survivors, at, strict=True)]
        return np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)

    def are_within_limits(self) -> bool:
        """Tell whether every budget holds at the current widths."""
        counts = self.counts()
        return all(cost.at(counts) <= limit for _, cost, limit in self.limits)

    def next_width(self, pool: int) -> int:
        """Return the width of a pool after its next loss: the multiple of its step below."""
        return max((self.now[pool] - 1) // self.steps[pool] * self.steps[pool], self.floor[pool])

    def growth(self, pool: int) -> int:
        """Return by how many units each block of a pool can grow at once; 0 if it cannot."""
        if self.fixed[pool] or self.now[pool] >= self.most[pool]:
            return 0
        step = self.steps[pool]
        return min(self.now[pool] // step * step + step, self.most[pool]) - self.now[pool]

    def rank_of_next(self, pool: int, offset: Floats) -> float:
        """Return the rank of the units that a pool would lose next; see :meth:`offsets`."""
        gone = self.pools[pool].width - self.now[pool]
        after = self.pools[pool].width - self.next_width(pool)
        return self._rank_of(pool, gone, after, offset)

    def rank_of_last(self, pool: int, offset: Floats) -> float:
        """Return the rank of the units that a pool would get back first."""
        gone = self.pools[pool].width - self.now[pool]
        return self._rank_of(pool, gone - self.growth(pool), gone, offset)

    def _rank_of(self, pool: int, start: int, stop: int, offset: Floats) -> float:
        """Return the rank of some units of a pool, given by their places in the removal order."""
        mean = sum(self.values[pool][start:stop]) / (stop - start)
        return self.ranking.costs.of_value(mean) + float(offset[pool])

    def offsets(self) -> Floats:
        """Return what the costs add to the rank of each pool's units, at the current widths."""
        if not self.ranking.costs.reads_costs:
            return np.zeros(len(self.pools))
        counts = self.counts()
        after = [self.next_width(pool) for pool in range(len(self.pools))]
        lost = counts - self.counts(after)
        units = np.maximum(np.array(self.now, dtype=np.int64) - after, 1) * self.blocks
        saved = []
        for cost in (self.computation, self.params):
            # a measured cost may rise at a width that the hardware runs badly: nothing is saved
            saved.append(np.maximum(cost.saved(counts, lost), 0) / units)
        return self.ranking.costs.of_costs(*saved)

    def worth(self, pool: int, width: int) -> float:
        """Return the value of the survivors of one pool at a width."""
        survivors = self.values[pool][self.pools[pool].width - width :]
        return float(self.blocks[pool]) * sum(survivors)


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
