"""Relative floors: the largest share of its units that a group may lose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fxprune.coupling import Coupling
from fxprune.errors import BudgetError
from fxprune.select.budget import Budget
from fxprune.select.kinds import Pool
from fxprune.select.matching import value_of_groups

__all__ = ["check_ratios", "least_by_ratio", "ratios_of"]


_SHARE_ROUNDING = 1e-9  # floats miss shares such as 0.3: 1 - 0.7 is above it


def ratios_of(coupling: Coupling, budget: Budget) -> list[float]:
    """Return the largest share of its units that each group may lose.

    Raises
    ------
    ArgumentError
        If a glob of ``max_ratio`` matches no group.
    """
    if not isinstance(budget.max_ratio, Mapping):
        return [budget.max_ratio] * len(coupling.groups)
    found = value_of_groups(coupling, "max_ratio", budget.max_ratio.items())
    return [found.get(group, 1.0) for group in range(len(coupling.groups))]


def least_by_ratio(pools: Sequence[Pool], ratios: Sequence[float]) -> list[int]:
    """Return for each pool how many units every block has to keep.

    Parameters
    ----------
    pools:
        The pools.
    ratios:
        The largest share of its units that each group may lose. It holds for each pool.
    """
    return [math.ceil(pool.width * (1 - ratios[pool.group]) - _SHARE_ROUNDING) for pool in pools]


def check_ratios(
    coupling: Coupling, layers: Mapping[int, float], channels: float, ratios: Sequence[float]
) -> None:
    """Check that groups may lose what is asked of them.

    Parameters
    ----------
    coupling:
        The analysis.
    layers:
        The share that single groups are asked to keep, by the group's position.
    channels:
        The share that all other groups are asked to keep.
    ratios:
        The largest share of its units that each group may lose.

    Raises
    ------
    BudgetError
        If a group of ``layers`` may not lose as much, or none of the other groups may.
    """
    asked = [layers.get(group, channels) for group in range(len(ratios))]
    short = [
        share < 1 - ratio - _SHARE_ROUNDING for share, ratio in zip(asked, ratios, strict=True)
    ]
    others = [group for group in range(len(ratios)) if group not in layers]
    for group in layers:
        if short[group]:
            raise _contradiction(coupling, f"layers={asked[group]}", group, ratios[group])
    if others and all(short[group] for group in others):
        raise _contradiction(coupling, f"channels={channels}", others[0], ratios[others[0]])


def _contradiction(coupling: Coupling, option: str, group: int, ratio: float) -> BudgetError:
    """Return the error for a group that is asked to lose more than it may."""
    return BudgetError(
        f"{option} cannot be reached: max_ratio={ratio} lets group "
        f"{coupling.groups[group].name!r} lose at most {ratio:.4g} of its units. Raise max_ratio "
        "or the share to keep."
    )
