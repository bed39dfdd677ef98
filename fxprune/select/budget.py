"""What a pruned model may have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Budget", "keep_count"]


@dataclass(frozen=True)
class Budget:
    """What a pruned model may have; every one that is given must hold.

    Attributes
    ----------
    channels:
        Share of units kept: by every group (``scope="group"``) or by all together (``"global"``).
    macs, params:
        Share of multiply-accumulates and of parameters kept, of the whole model, pinned parts
        included.
    latency:
        Share of the time that the whole model takes.
    layers:
        Glob -> share of units kept, for groups in which a matching module (or parameter) has
        filters of its own. The last glob that matches counts. These groups are left alone
        otherwise.
    round_to:
        Groups keep a multiple of this many units, where they have as many; all of them where a
        budget takes nothing.
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
    """How many of ``size`` units survive: at most the share, a multiple of ``round_to``, never
    none.

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
