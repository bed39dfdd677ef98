"""The result of a sensitivity analysis: a table of scores, as text, as data and as a figure."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fxprune.common.numbers import as_path
from fxprune.common.public import public
from fxprune.errors import PlanError
from fxprune.evaluation.plotting import save_figure

__all__ = ["Sensitivity", "SensitivityPoint"]


@public
@dataclass(frozen=True)
class SensitivityPoint:
    """The score of a model in which one group alone is narrower.

    Attributes
    ----------
    group:
        The name of the group.
    removed:
        The share of its units that was to be removed.
    kept, total:
        How many of its units the model keeps, and how many there are.
    score:
        The score of that model.
    """

    group: str
    removed: float
    kept: int
    total: int
    score: float


@public
@dataclass(frozen=True)
class Sensitivity:
    """How the score of a model depends on the width of each group alone.

    ``print`` it to see the table; :meth:`plot` draws it.

    Attributes
    ----------
    dense:
        The score of the model with all its units.
    points:
        One row for each group and share, in the order of the network and of the shares.

    Examples
    --------
    >>> points = (SensitivityPoint("conv1.weight:0", 0.25, 24, 32, 0.93),
    ...     SensitivityPoint("conv1.weight:0", 0.5, 16, 32, 0.815))
    >>> print(Sensitivity(0.9625, points))
    score with a share of one group's units removed; 0.9625 with none
    group           units   25 %   50 %
    conv1.weight:0     32   0.93  0.815
    """

    dense: float
    points: tuple[SensitivityPoint, ...]

    def __str__(self) -> str:
        shares = list(dict.fromkeys(point.removed for point in self.points))
        rows = [["group", "units", *(f"{100 * share:g} %" for share in shares)]]
        for group, points in self.by_group().items():
            scores = {point.removed: f"{point.score:.4g}" for point in points}
            rows.append([group, f"{points[0].total:,}", *(scores.get(s, "") for s in shares)])
        title = f"score with a share of one group's units removed; {self.dense:.4g} with none"
        return "\n".join([title, *_aligned(rows)])

    def by_group(self) -> dict[str, tuple[SensitivityPoint, ...]]:
        """Return the points of each group, by its name.

        >>> point = SensitivityPoint("conv1.weight:0", 0.25, 24, 32, 0.93)
        >>> list(Sensitivity(0.96, (point,)).by_group())
        ['conv1.weight:0']
        """
        found: dict[str, list[SensitivityPoint]] = {}
        for point in self.points:
            found.setdefault(point.group, []).append(point)
        return {group: tuple(points) for group, points in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the result as dicts, lists, strings and numbers, for ``json.dumps``."""
        return {"dense": self.dense, "points": [asdict(point) for point in self.points]}

    @classmethod
    @public
    def from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        """Return the result that :meth:`to_dict` returned as data.

        Raises
        ------
        PlanError
            If the data is no such result.

        Examples
        --------
        >>> found = Sensitivity(0.96, (SensitivityPoint("conv1.weight:0", 0.25, 24, 32, 0.93),))
        >>> Sensitivity.from_dict(found.to_dict()) == found
        True
        """
        try:
            points = tuple(SensitivityPoint(**row) for row in data["points"])
            return cls(float(data["dense"]), points)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PlanError(
                f"this is no sensitivity analysis: {type(error).__name__}: {error}. Write one "
                "with Sensitivity.to_dict()."
            ) from error

    @public
    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the score against the share removed, one line per group, and save the figure.

        Parameters
        ----------
        path:
            The file; its suffix is the format (``.png``, ``.svg``, ``.pdf``).

        Raises
        ------
        ArgumentError
            If matplotlib is not installed (extra ``plot``), or the file cannot be written.
        """
        lines = {}
        for group, points in self.by_group().items():
            removed = [0.0, *(100 * (1 - point.kept / point.total) for point in points)]
            lines[group] = sorted(
                zip(removed, [self.dense, *(p.score for p in points)], strict=True)
            )
        save_figure(as_path("path", path), lines)


def _aligned(rows: list[list[str]]) -> list[str]:
    """Return rows of cells as lines: the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:{widths[0]}}", *cells]))
    return lines
