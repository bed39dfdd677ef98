"""Selection of the units that survive, from their scores and a budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fxprune.common.arrays import Floats
from fxprune.common.contents import tensors_of
from fxprune.coupling import Coupling
from fxprune.criteria import Ranking
from fxprune.labels import Array
from fxprune.select.budget import Budget, keep_count
from fxprune.select.costs import TimeCost
from fxprune.select.exchange import exchange
from fxprune.select.greedy import descend, give_back
from fxprune.select.kinds import Pool, labels_along_dims, pools_of
from fxprune.select.matching import value_of_groups
from fxprune.select.ratios import check_ratios, least_by_ratio, ratios_of
from fxprune.select.scopes import scopes_of
from fxprune.select.widths import Widths, ordered_labels, step_of

__all__ = ["select"]


def select(
    coupling: Coupling,
    ranking: Ranking,
    budget: Budget,
    timed: TimeCost | None = None,
    *,
    exchanges: bool = True,
) -> dict[str, tuple[int, ...]]:
    """Choose the units that survive.

    Parameters
    ----------
    coupling:
        The analysis.
    ranking:
        The scores, and the weights of the costs.
    budget:
        The budgets to reach.
    timed:
        The cost that a latency budget limits; needed if the budget has one.
    exchanges:
        Whether groups exchange units under a latency budget, to keep more value within it.

    Returns
    -------
    dict of str to tuple of int
        For each group's name the indices of its surviving units, ascending. In a balanced group
        every block keeps the same number.

    Raises
    ------
    BudgetError
        If even the smallest model that the analysis allows is above a budget; the message names
        the smallest share that can be reached. Also if ``max_ratio`` forbids what ``layers`` or
        ``channels`` ask for.
    ArgumentError
        If a glob of ``layers``, ``max_ratio`` or ``scopes`` matches no group.
    """
    pools = pools_of(coupling)
    order = [_ascending(pool, ranking.value) for pool in pools]
    order, for_tensors = _spare_tensors(coupling, pools, order)
    for_statistics = _least_for_statistics(coupling, pools)
    wanted = [math.ceil(budget.min_channels / pool.blocks) for pool in pools]
    ratios = ratios_of(coupling, budget)
    by_ratio = least_by_ratio(pools, ratios)
    limits = wanted, for_tensors, for_statistics, by_ratio
    least = [max(needed) for needed in zip(*limits, strict=True)]
    widths, fixed = _starting_widths(coupling, pools, budget, least, ratios)
    if budget.limits_the_whole_model:
        scopes = scopes_of(coupling, budget.scopes)
        state = Widths(
            coupling, pools, order, ranking, budget, widths, fixed, least, timed, scopes
        )
        descend(state)
        # an exchange compares the worth of units, which scopes say cannot be compared
        if exchanges and budget.latency is not None and budget.scopes is None:
            exchange(state)
        give_back(state)
        widths = state.now
    kept: dict[str, list[int]] = {group.name: [] for group in coupling.groups}
    for pool, ascending, width in zip(pools, order, widths, strict=True):
        survivors = np.take_along_axis(pool.units, ascending, axis=1)[:, pool.width - width :]
        kept[coupling.groups[pool.group].name] += survivors.ravel().tolist()
    return {name: tuple(sorted(units)) for name, units in kept.items()}


def _ascending(pool: Pool, value: Floats) -> npt.NDArray[np.int64]:
    """Return for each block the positions of its units, the least important first.

    Of equally important units, the last one comes first.
    """
    return pool.width - 1 - np.argsort(value[pool.labels][:, ::-1], axis=1, kind="stable")


def _spare_tensors(
    coupling: Coupling, pools: Sequence[Pool], order: Sequence[npt.NDArray[np.int64]]
) -> tuple[list[npt.NDArray[np.int64]], list[int]]:
    """Change the order of removal so that no tensor loses everything.

    Units of one block may lie on different tensors (the two halves of a split, layers that share
    balanced blocks). All units of one tensor could then be the least important ones. So units are
    moved to the end of the order until each row of each tensor has a position whose units go last.

    Returns
    -------
    tuple
        The new order of each pool, and for each pool how many units every block has to keep.
    """
    spared = np.zeros(coupling.context.units.count, dtype=bool)
    spared[0] = True  # label 0 is no unit, and always stays
    # how many units of its block come after a unit in the order
    height = np.zeros(len(spared), dtype=np.int64)
    labels = ordered_labels(pools, order)
    for pool, units in zip(pools, labels, strict=True):
        height[units] = np.arange(pool.width)[::-1]
        spared[units[:, -1]] = True
    for fields in _distinct_fields(coupling):
        if not _are_spared_lines(fields, spared):
            for _, rows in labels_along_dims(coupling, fields):
                _spare_rows(rows, spared, height)
    new_order = []
    for ascending, units in zip(order, labels, strict=True):
        put_off = np.argsort(spared[units], axis=1, kind="stable")
        new_order.append(np.take_along_axis(ascending, put_off, axis=1))
    return new_order, [int(spared[units].sum(axis=1).max()) for units in labels]


def _distinct_fields(coupling: Coupling) -> Iterator[list[Array]]:
    """Yield the fields of each tensor that has any; tensors with the same fields count once."""
    seen: set[tuple[int, ...]] = set()
    for tensor in _all_tensors(coupling):
        fields = coupling.labels(tensor)
        key = tuple(map(id, fields))
        if fields and key not in seen:
            seen.add(key)
            yield fields


def _are_spared_lines(fields: Sequence[Array], spared: npt.NDArray[np.bool_]) -> bool:
    """Tell whether each field is one row along an axis of its own, with a spared unit in it.

    This is the usual case: then no unit has to be moved.
    """
    axes = set()
    for labels in fields:
        if labels.size in labels.shape and spared[labels].any():
            axes.add(labels.shape.index(labels.size))
    return len(axes) == len(fields)


def _spare_rows(rows: Array, spared: npt.NDArray[np.bool_], height: npt.NDArray[np.int64]) -> None:
    """Spare the units of one position in each row that has no spared position.

    The position is the one whose units come last in the order. Both arrays are changed in place.

    Parameters
    ----------
    rows:
        Labels along one dimension, shape (fields, rows, positions).
    spared:
        Whether the units at each label are spared, shape (labels,).
    height:
        How many units of its block come after a unit in the order, shape (labels,).
    """
    for row in np.flatnonzero(~np.any(np.all(spared[rows], axis=0), axis=1)):
        units = rows[:, row, height[rows[:, row]].max(axis=0).argmin()]
        spared[units], height[units] = True, 0


def _least_for_statistics(coupling: Coupling, pools: Sequence[Pool]) -> list[int]:
    """Return for each pool how many units every block has to keep for the sake of statistics.

    A statistic over a single value is not defined. So blocks under one keep two units, or one if
    they have no more.
    """
    context = coupling.context
    needed = np.zeros(context.units.count, dtype=bool)
    for labels in context.found.keep_two:
        needed[context.units.live(labels)] = True
    return [min(2, pool.width) if needed[pool.labels].any() else 1 for pool in pools]


def _all_tensors(coupling: Coupling) -> list[Tensor]:
    """Return the parameters, then the results of all nodes."""
    nodes = [node.meta.get("val") for trace in coupling.traces for node in trace.graph.nodes]
    return [*coupling.parameters.values(), *tensors_of(nodes)]


def _starting_widths(
    coupling: Coupling,
    pools: Sequence[Pool],
    budget: Budget,
    least: Sequence[int],
    ratios: Sequence[float],
) -> tuple[list[int], list[bool]]:
    """Return the width of each pool to start from, and whether a layer's own share fixes it."""
    shares = value_of_groups(coupling, "layers", budget.layers.items())
    per_group = 1.0
    if budget.channels is not None and budget.scope == "group":
        per_group = budget.channels
    check_ratios(coupling, shares, per_group, ratios)
    widths, fixed = [], []
    for pool, at_least in zip(pools, least, strict=True):
        fixed.append(pool.group in shares)
        share = shares.get(pool.group, per_group)
        widths.append(keep_count(pool.width, share, step_of(pool, budget), at_least))
    return widths, fixed
