"""Scores and a budget -> which units survive."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fxprune.coupling import Coupling, Group

__all__ = ["select"]


def select(
    coupling: Coupling,
    scores: npt.NDArray[np.float64],
    *,
    channels: float,
    round_to: int = 1,
    min_channels: int = 1,
) -> dict[str, tuple[int, ...]]:
    """Keep in every group the ``channels`` share with the highest scores.

    Returns
    -------
    For each group's name the indices of its surviving units, ascending. At most ``channels * size`` survive, unless that is fewer
    than ``min_channels`` (or than one rounding step, where the group has that many). In a balanced group every block keeps equally
    many.
    """
    return {g.name: _survivors(coupling, g, scores, channels, round_to, min_channels) for g in coupling.groups}


def _survivors(
    coupling: Coupling, group: Group, scores: npt.NDArray[np.float64], channels: float, round_to: int, min_channels: int
) -> tuple[int, ...]:
    units = np.array(group.units)
    cells = coupling.balance.cell[units]
    kinds = np.where(cells >= 0, coupling.balance.kind[cells] if len(coupling.balance.kind) else -1, -1)
    kept: list[npt.NDArray[np.int64]] = []
    for kind in np.unique(kinds):
        members = np.flatnonzero(kinds == kind)
        blocks = [members] if kind < 0 else [members[cells[members] == c] for c in np.unique(cells[members])]
        count = keep_count(len(blocks[0]), channels, round_to // math.gcd(round_to, len(blocks)), min_channels)
        for block in blocks:
            order = np.argsort(-scores[units[block]], kind="stable")
            kept.append(block[order[:count]])
    return tuple(np.sort(np.concatenate(kept)).tolist())


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
