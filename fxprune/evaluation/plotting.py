"""Figures, drawn with matplotlib, which is an optional package."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from fxprune.errors import ArgumentError

__all__ = ["save_figure"]

_ROWS = 24  # lines in one column of the legend


def save_figure(path: Path, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draw lines of scores, and save the figure.

    Parameters
    ----------
    path:
        The file; its suffix is the format.
    lines:
        For each name of a line its points: percent of units removed, and score.

    Raises
    ------
    ArgumentError
        If matplotlib is not installed, does not know the format, or cannot write the file.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        message = 'a plot needs matplotlib: pip install "fxprune[plot]".'
        raise ArgumentError(message) from error
    columns = math.ceil(len(lines) / _ROWS)
    figure = Figure(figsize=(6 + 2.5 * columns, 4.5), layout="constrained")
    axes = figure.add_subplot()
    # the first groups of the network are dark, the last ones bright
    for number, (name, points) in enumerate(lines.items()):
        colour = colormaps["viridis"](number / max(len(lines), 1))
        axes.plot(*zip(*points, strict=True), marker=".", color=colour, label=name)
    axes.set(xlabel="units of one group removed, %", ylabel="score")
    axes.grid(alpha=0.3)
    if lines:
        figure.legend(loc="outside right upper", ncols=columns, fontsize=7)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{path} cannot be written: {error}") from error
