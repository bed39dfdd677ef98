"""Budgets: limits on the size and the cost of a pruned model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Budget", "keep_count"]


@dataclass(frozen=True)
class Budget:
    """Limits on a pruned model; all limits that are given must hold.

    Attributes
    ----------
    channels:
        Share of units kept: by every group (``scope="group"``) or by all groups together
        (``scope="global"``).
    macs, params:
        Share of multiply-accumulates and of parameters kept, of the whole model, pinned parts
        included.
    latency:
        Share of the time of one call of the whole model.
    scope:
        ``"group"`` or ``"global"``: whether ``channels`` holds for each group or for all together.
    layers:
        Glob -> share of units kept, for groups in which a matching module (or parameter) has
        filters of its own. The last glob that matches counts. No other budget changes these
        groups.
    round_to:
        Groups keep a multiple of this many units, as far as they have that many; a group that no
        budget shrinks keeps all.
    min_channels:
        Groups keep at least this many units, or all if they have fewer.
    max_ratio:
        The largest share of its units that a group may lose; or glob -> share, for groups in which
        a matching module has filters of its own. The last glob that matches counts.
    scopes:
        Whose units are ranked against each other: ``"isomorphic"`` or name -> globs. None: all.

    Examples
    --------
    >>> budget = Budget(macs=0.5, layers={"stem.*": 0.75}, round_to=8)
    >>> budget.params is None, budget.scope, budget.min_channels
    (True, 'group', 1)
    """

    channels: float | None = None
    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    scope: str = "group"
    layers: Mapping[str, float] = field(default_factory=dict)
    round_to: int = 1
    min_channels: int = 1
    max_ratio: float | Mapping[str, float] = 1.0
    scopes: str | Mapping[str, tuple[str, ...]] | None = None

    @property
    def limits_the_whole_model(self) -> bool:
        """Whether a budget limits all groups together."""
        limits = [self.macs, self.params, self.latency]
        if self.scope == "global":
            limits.append(self.channels)
        return any(share is not None for share in limits)


def keep_count(size: int, share: float, round_to: int, min_channels: int) -> int:
    """Return how many of ``size`` units survive.

    This is the largest multiple of ``round_to`` within the share, but never 0.

    Parameters
    ----------
    size:
        Number of units.
    share:
        Share of units to keep; 1 keeps all, whatever ``round_to`` is.
    round_to:
        The count is a multiple of this, unless ``size`` is smaller.
    min_channels:
        The count is at least this, unless ``size`` is smaller.

    Examples
    --------
    >>> [keep_count(*given, 1) for given in ((64, 0.5, 1), (12, 0.5, 8), (3, 0.1, 1), (6, 0.5, 8))]
    [32, 8, 1, 6]
    """
    if share >= 1:
        return size
    wanted = max(math.floor(size * share + 1e-9), min_channels, 1)
    rounded = wanted // round_to * round_to
    if rounded < min(max(min_channels, 1), size):
        rounded = math.ceil(max(min_channels, 1) / round_to) * round_to
    return min(rounded, size)
