"""Scores and a budget -> which units survive.

One greedy pass over the whole network: the pool whose least unit ranks lowest loses it, costs are brought up to date as widths
shrink, until every budget holds. The order of removals does not depend on the budget, so a smaller budget keeps a subset.
"""

from __future__ import annotations

import fnmatch
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fxprune.coupling import Coupling, Group
from fxprune.criteria import Ranking
from fxprune.errors import ArgumentError, BudgetError
from fxprune.widths import Polynomial, Pool, macs_of, params_of, pools_of

__all__ = ["Budget", "keep_count", "select"]

Floats = npt.NDArray[np.float64]

_REFRESHES = 512  # how often, at most, costs are brought up to date while a whole network is taken apart


@dataclass(frozen=True)
class Budget:
    """What a pruned model may have; every one that is given must hold.

    Attributes
    ----------
    channels:
        Share of units kept: by every group (``scope="group"``) or by all together (``"global"``).
    macs, params:
        Share of multiply-accumulates and of parameters kept, of the whole model, pinned parts included.
    layers:
        Glob -> share of units kept, for groups in which a matching module (or parameter) has filters of its own. The last glob that
        matches counts. These groups are left alone otherwise.
    round_to:
        Groups keep a multiple of this many units, where they have as many.
    min_channels:
        Groups keep at least this many units, where they have as many.
    """

    channels: float | None = None
    macs: float | None = None
    params: float | None = None
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


def select(coupling: Coupling, ranking: Ranking, budget: Budget) -> dict[str, tuple[int, ...]]:
    """Choose the survivors.

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
    order = [_ascending(coupling, pool, ranking.value) for pool in pools]
    widths, fixed = _given(coupling, pools, budget)
    if budget.macs is not None or budget.params is not None or (budget.channels is not None and budget.scope == "global"):
        widths = _Descent(coupling, pools, order, ranking, budget, widths, fixed).run()
    kept: dict[str, list[int]] = {group.name: [] for group in coupling.groups}
    for pool, ascending, width in zip(pools, order, widths, strict=True):
        survivors = np.take_along_axis(pool.units, ascending, axis=1)[:, pool.width - width :]
        kept[coupling.groups[pool.group].name] += survivors.ravel().tolist()
    return {name: tuple(sorted(units)) for name, units in kept.items()}


def _ascending(coupling: Coupling, pool: Pool, value: Floats) -> npt.NDArray[np.int64]:
    """For each block the positions of its units, the least important first; of equals, the last first."""
    own = value[np.array(coupling.groups[pool.group].units)[pool.units]]
    return pool.width - 1 - np.argsort(own[:, ::-1], axis=1, kind="stable")


def _given(coupling: Coupling, pools: Sequence[Pool], budget: Budget) -> tuple[list[int], list[bool]]:
    """The widths to start from, and which of them are settled by a layer's own share."""
    shares = _shares(coupling, budget.layers)
    widths, fixed = [], []
    for pool in pools:
        share = shares.get(pool.group)
        fixed.append(share is not None)
        if share is None:
            share = budget.channels if budget.channels is not None and budget.scope == "group" else 1.0
        widths.append(keep_count(pool.width, share, _step(pool, budget), _least(pool, budget)))
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


def _least(pool: Pool, budget: Budget) -> int:
    return math.ceil(budget.min_channels / pool.blocks)


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
    ) -> None:
        self.pools, self.budget, self.ranking = pools, budget, ranking
        self.widths = np.array(widths, dtype=np.int64)
        self.blocks = np.array([pool.blocks for pool in pools], dtype=np.int64)
        self.steps = np.array([_step(pool, budget) for pool in pools], dtype=np.int64)
        self.macs, self.params = macs_of(coupling, pools), params_of(coupling, pools)
        full = np.array([pool.width for pool in pools], dtype=np.float64)
        self.floor = np.array([_floor(pool, budget) for pool in pools], dtype=np.int64)
        self.floor = np.where(fixed, self.widths, np.minimum(self.floor, self.widths))
        free = ~np.array(fixed, dtype=bool)
        units = full * self.blocks * free
        # (what is limited, its polynomial, its limit)
        self.limits: list[tuple[str, Polynomial, float]] = []
        for name, polynomial, share in (("macs", self.macs, budget.macs), ("params", self.params, budget.params)):
            if share is not None:
                self.limits.append((name, polynomial, share * polynomial.at(full)))
        if budget.channels is not None and budget.scope == "global":
            counted = Polynomial(np.concatenate([[0.0], self.blocks * free])[np.newaxis], [(1.0, (0,))])
            self.limits.append(("channels", counted, budget.channels * float(units.sum())))
        self.full = full
        # The value of the k-th unit to go: the mean over the blocks, which lose one each.
        self.values = []
        for pool, ascending in zip(pools, order, strict=True):
            own = ranking.value[np.array(coupling.groups[pool.group].units)[pool.units]]
            self.values.append(np.take_along_axis(own, ascending, axis=1).mean(axis=0))

    def run(self) -> list[int]:
        for name, polynomial, limit in self.limits:
            least = polynomial.at(self.floor.astype(np.float64))
            if least > limit * (1 + 1e-12):
                whole = polynomial.at(self.full)
                raise BudgetError(
                    f"{name}={limit / whole:.4g} cannot be reached: the smallest model that the analysis and the other arguments "
                    f"allow has {least / whole:.4g} ({least:,.0f} of {whole:,.0f}). Raise the budget, or see what is pinned with "
                    "print(fxprune.analyze(model, example_inputs)), and what keep=, min_channels= and round_to= hold back."
                )
        batch = max(1, int((self.widths - self.floor).sum()) // _REFRESHES)
        while not self._holds():
            before = self.widths.copy()
            removals = self._batch(batch)
            if self._holds():
                # Somewhere in this batch the budgets were met: go through it again, one by one.
                self.widths = before
                for pool, width in removals:
                    self.widths[pool] = width
                    if self._holds():
                        break
        return [int(width) for width in self.widths]

    def _holds(self) -> bool:
        widths = self.widths.astype(np.float64)
        return all(polynomial.at(widths) <= limit * (1 + 1e-12) for _, polynomial, limit in self.limits)

    def _next(self, pool: int) -> int:
        """The width of a pool after its next loss: the multiple of its step below."""
        step = int(self.steps[pool])
        return max((int(self.widths[pool]) - 1) // step * step, int(self.floor[pool]))

    def _batch(self, count: int) -> list[tuple[int, int]]:
        """Take the ``count`` lowest ranks at the costs of now; returns (pool, its new width) in order."""
        offset = self._offsets()
        heap = [(self._rank(p, offset), p) for p in range(len(self.pools)) if self.widths[p] > self.floor[p]]
        heapq.heapify(heap)
        removals: list[tuple[int, int]] = []
        while heap and len(removals) < count:
            _, pool = heapq.heappop(heap)
            self.widths[pool] = self._next(pool)
            removals.append((pool, int(self.widths[pool])))
            if self.widths[pool] > self.floor[pool]:
                heapq.heappush(heap, (self._rank(pool, offset), pool))
        return removals

    def _rank(self, pool: int, offset: Floats) -> float:
        gone = self.pools[pool].width - int(self.widths[pool])
        after = self.pools[pool].width - self._next(pool)
        return self.ranking.alpha * float(self.values[pool][gone:after].mean()) + float(offset[pool])

    def _offsets(self) -> Floats:
        """What the two costs add to the rank of every unit of a pool, at the widths of now."""
        out = np.zeros(len(self.pools))
        widths = self.widths.astype(np.float64)
        for weight, polynomial in ((self.ranking.beta, self.macs), (self.ranking.gamma, self.params)):
            if weight:
                cost = np.log2(1 + np.maximum(polynomial.saved(widths), 0) / self.blocks)
                out += weight * (1 - cost / max(cost.max(), np.finfo(np.float64).tiny))
        return out


def _floor(pool: Pool, budget: Budget) -> int:
    """The least width of a pool."""
    return keep_count(pool.width, 1e-12, _step(pool, budget), _least(pool, budget))
