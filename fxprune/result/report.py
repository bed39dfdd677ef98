"""Reports: the changes that pruning made to a model, as text and as data."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fxprune.common.public import iterate_user_input, public
from fxprune.errors import ArgumentError, PlanError

__all__ = ["CandidateRow", "GroupRow", "LatencyRow", "PinnedRow", "Report", "SearchRow"]


class GroupRow(NamedTuple):
    """The name of a group, how many of its units survive, and how many it had."""

    name: str
    kept: int
    total: int


class PinnedRow(NamedTuple):
    """Parameter axes that are never pruned, the reason, and the graph node that is the cause."""

    axes: tuple[str, ...]
    reason: str
    node: str


class LatencyRow(NamedTuple):
    """The latency of the model before and after pruning, in milliseconds per call.

    Attributes
    ----------
    before, after:
        Measured in turns, with both models deployed.
    forecast:
        The latency that was predicted for the pruned model.
    setting:
        How the models were deployed.
    """

    before: float
    after: float
    forecast: float
    setting: str


class CandidateRow(NamedTuple):
    """The score of one candidate of a search, and how many units each group keeps in it."""

    score: float
    kept: tuple[int, ...]


class SearchRow(NamedTuple):
    """The candidates of a search for widths, in the order in which they were scored.

    Attributes
    ----------
    candidates:
        The first one is the choice by the ranking alone.
    chosen:
        The position of the one that is the result.
    """

    candidates: tuple[CandidateRow, ...]
    chosen: int

    @property
    def evaluations(self) -> int:
        """How many candidates were scored."""
        return len(self.candidates)

    @property
    def before(self) -> float:
        """The score of the choice by the ranking alone."""
        return self.candidates[0].score

    @property
    def after(self) -> float:
        """The score of the result."""
        return self.candidates[self.chosen].score

    def to_dict(self) -> dict[str, Any]:
        """Return the candidates as dicts, lists and numbers."""
        rows = [{"score": row.score, "kept": list(row.kept)} for row in self.candidates]
        return {"candidates": rows, "chosen": self.chosen}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchRow:
        """Return the row that :meth:`to_dict` returned as data."""
        rows = [CandidateRow(row["score"], tuple(row["kept"])) for row in data["candidates"]]
        return cls(tuple(rows), data["chosen"])


_TEXTS = (
    "untouched",
    "decisions",
    "statistics",
    "parts",
    "not_set",
    "compensated",
    "uncompensated",
    "compensation_notes",
)


@public
@dataclass(frozen=True)
class Report:
    """The changes that pruning made to a model.

    ``print(report)`` shows them as text; :meth:`to_dict` returns them as plain data.

    Attributes
    ----------
    params_before, params_after:
        Number of elements of all parameters; tied parameters count once.
    macs_before, macs_after:
        Multiply-accumulates on the example inputs; None if they could not be counted.
    groups:
        One row for each group, in the order of the plan.
    pinned:
        Axes that are never pruned, with the reasons.
    untouched:
        Names of parameters that no executed operation used; they stay as they are.
    decisions:
        Control flow that the trace fixed, as text.
    statistics:
        Normalisations that take statistics over the surviving channels only, as text. Only there
        may a pruned model differ from the masked original.
    seconds:
        Wall-clock seconds for each stage, in the order in which the stages ran.
    error:
        Relative error of the verification; None if there was none.
    params_pinned, macs_pinned:
        The share of ``params_before`` and ``macs_before`` that no budget can remove: elements of
        parameters that cannot shrink, and multiply-accumulates of contractions (matrix products,
        convolutions, attention) that cannot shrink. None if they were not counted.
    parts:
        Paths of the modules that were emitted as graphs inside the model's own class; empty if the
        model is one graph.
    not_one_graph:
        What prevents the model from being one graph, with the line; empty if it is one.
    latency:
        The latency before and after pruning; None if the budget was not a latency.
    not_set:
        Attributes that forward sets to values that it computes from the inputs
        (``self.features = h``). A graph does not set them.
    compensated, uncompensated:
        Names of the modules whose weights were corrected for what was removed, and of those that
        read removed channels but could not be corrected. Both are empty if no data was given.
    compensation_notes:
        Sentences that say where a method of compensation was not used as asked for, and why.
    search:
        The candidates of a search for widths, with their scores; None if there was no search.

    Raises
    ------
    ArgumentError
        If an attribute has another type.

    Examples
    --------
    >>> report = Report(params_before=1000, params_after=250, macs_before=4000,
    ...     macs_after=1000,
    ...                 groups=(GroupRow("conv1", 4, 8),), error=1e-15)
    >>> print(report)
    parameters  1,000 -> 250 (25.0 % left)
    MACs        4,000 -> 1,000 (25.0 % left)
    verified    equals the masked original, relative error 1.0e-15
    <BLANKLINE>
    1 group, 4 of 8 units kept
      conv1  4 of 8
    >>> report.to_dict()["groups"]
    [{'name': 'conv1', 'kept': 4, 'total': 8}]
    """

    params_before: int
    params_after: int
    macs_before: int | None
    macs_after: int | None
    groups: tuple[GroupRow, ...] = ()
    pinned: tuple[PinnedRow, ...] = ()
    untouched: tuple[str, ...] = ()
    decisions: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    error: float | None = None
    params_pinned: int | None = None
    macs_pinned: int | None = None
    parts: tuple[str, ...] = ()
    not_one_graph: str = ""
    latency: LatencyRow | None = None
    not_set: tuple[str, ...] = ()
    compensated: tuple[str, ...] = ()
    uncompensated: tuple[str, ...] = ()
    compensation_notes: tuple[str, ...] = ()
    search: SearchRow | None = None

    def __post_init__(self) -> None:
        # Rows may be given as plain tuples, and pinned axes as one string or several.
        try:
            groups = tuple(GroupRow(*row) for row in iterate_user_input(self.groups, "groups"))
            object.__setattr__(self, "groups", groups)
            pinned = tuple(_pinned_rows(iterate_user_input(self.pinned, "pinned")))
            object.__setattr__(self, "pinned", pinned)
            for name in _TEXTS:
                object.__setattr__(
                    self, name, tuple(iterate_user_input(getattr(self, name), name))
                )
            self._check()
        except (TypeError, ValueError, AttributeError) as error:
            raise ArgumentError(f"a report cannot be made of this: {error}.") from error

    def _check(self) -> None:
        """Check the types of all attributes, which ``str(report)`` relies on."""
        for name in ("params_before", "params_after"):
            _of_kind(name, getattr(self, name), numbers.Real)
        for name in ("macs_before", "macs_after", "params_pinned", "macs_pinned", "error"):
            _of_kind(name, getattr(self, name), (numbers.Real, type(None)))
        for name in _TEXTS:
            for text in getattr(self, name):
                _of_kind(name, text, str)
        _of_kind("not_one_graph", self.not_one_graph, str)
        _of_kind("seconds", self.seconds, Mapping)
        for stage, seconds in self.seconds.items():
            _of_kind(f"seconds[{stage!r}]", seconds, numbers.Real)
        for group in self.groups:
            for value, kind in zip(group, (str, numbers.Real, numbers.Real), strict=True):
                _of_kind("groups", value, kind)
        for axes, *texts in self.pinned:
            for text in (*axes, *texts):
                _of_kind("pinned", text, str)
        if self.latency is not None:
            _of_kind("latency", self.latency, tuple)
            for value, kind in zip(self.latency, (*[numbers.Real] * 3, str), strict=True):
                _of_kind("latency", value, kind)
        if self.search is not None:
            _check_search(self.search)

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes as dicts, lists, strings, numbers and None, for ``json.dumps``."""
        return {
            "params_before": self.params_before,
            "params_after": self.params_after,
            "macs_before": self.macs_before,
            "macs_after": self.macs_after,
            "groups": [row._asdict() for row in self.groups],
            "pinned": [{**row._asdict(), "axes": list(row.axes)} for row in self.pinned],
            "untouched": list(self.untouched),
            "decisions": list(self.decisions),
            "statistics": list(self.statistics),
            "seconds": dict(self.seconds),
            "error": self.error,
            "params_pinned": self.params_pinned,
            "macs_pinned": self.macs_pinned,
            "parts": list(self.parts),
            "not_one_graph": self.not_one_graph,
            "not_set": list(self.not_set),
            "compensated": list(self.compensated),
            "uncompensated": list(self.uncompensated),
            "compensation_notes": list(self.compensation_notes),
            "latency": None if self.latency is None else self.latency._asdict(),
            "search": None if self.search is None else self.search.to_dict(),
        }

    @classmethod
    @public
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Return the report that :meth:`to_dict` returned as data.

        Raises
        ------
        PlanError
            If the data is not a report.

        Examples
        --------
        >>> report = Report(1000, 250, 4000, 1000, groups=(GroupRow("conv1", 4, 8),),
        ...     seconds={"trace": 0.5})
        >>> Report.from_dict(report.to_dict()) == report
        True
        """
        if not isinstance(data, Mapping):
            raise PlanError(
                f"this is not a report, but a {type(data).__name__}. Write reports with "
                "Report.to_dict()."
            )
        try:
            groups = tuple(GroupRow(**row) for row in data["groups"])
            pinned = tuple(PinnedRow(**row) for row in data["pinned"])
            latency = LatencyRow(**data["latency"]) if data.get("latency") else None
            search = SearchRow.from_dict(data["search"]) if data.get("search") else None
            rows = {"groups": groups, "pinned": pinned, "latency": latency, "search": search}
            return cls(**{**data, **rows})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PlanError(
                f"this is not a report: {type(error).__name__}: {error}. Write reports with "
                "Report.to_dict()."
            ) from error

    def __str__(self) -> str:
        lines = [*self._summary(), *self._groups(), *self._pinned()]
        lines += _section("not used by any operation, left as they are", self.untouched)
        lines += _section("set by forward, not by its graph", self.not_set)
        lines += _section("read removed channels, not compensated", self.uncompensated)
        lines += _section("compensated in another way than asked for", self.compensation_notes)
        lines += _section("control flow fixed by the example inputs", self.decisions)
        lines += _section("normalised over the surviving channels", self.statistics)
        return "\n".join(lines)

    def _summary(self) -> Iterable[str]:
        """Yield the lines above the sections."""
        yield from self._costs()
        if self.parts:
            yield (
                "emitted     in the model's own class, whose Python stays, graphs at "
                f"{', '.join(self.parts)}"
            )
        if self.not_one_graph:
            yield f"because     {self.not_one_graph}"
        if self.error is not None:
            yield f"verified    equals the masked original, relative error {self.error:.1e}"
        if self.compensated:
            yield f"compensated {_counted(len(self.compensated), 'module')} on data"
        if self.seconds:
            stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in self.seconds.items())
            yield f"seconds     {sum(self.seconds.values()):.2f} ({stages})"

    def _costs(self) -> Iterable[str]:
        """Yield the lines on parameters, MACs and latency."""
        yield f"parameters  {_change(self.params_before, self.params_after)}"
        if self.macs_before is None or self.macs_after is None:
            yield "MACs        not counted"
        else:
            yield f"MACs        {_change(self.macs_before, self.macs_after)}"
        if self.latency is not None:
            before, after, forecast, setting = self.latency
            left = f" ({100 * after / before:.1f} % left)" if before else ""
            measured = f"{before:.3f} -> {after:.3f} ms{left}, {forecast:.3f} forecast"
            yield f"latency     {measured}; deployed {setting}"
        if self.search is not None:
            scored = f"{self.search.before:.4g} -> {self.search.after:.4g}"
            yield f"score       {scored} in {_counted(self.search.evaluations, 'evaluation')}"
        pinned = [
            *_share(self.params_pinned, self.params_before, "parameters"),
            *_share(self.macs_pinned, self.macs_before, "MACs"),
        ]
        if pinned:
            yield f"pinned      {', '.join(pinned)} before: what no budget reaches"

    def _groups(self) -> Iterable[str]:
        """Return the lines of the section on groups."""
        kept, total = sum(row.kept for row in self.groups), sum(row.total for row in self.groups)
        title = f"{_counted(len(self.groups), 'group')}, {kept:,} of {total:,} units kept"
        width = max((len(row.name) for row in self.groups[:_SHOWN]), default=0)
        rows = [f"{row.name:{width}}  {row.kept} of {row.total}" for row in self.groups]
        return _section(title, rows) or ["", "no group: nothing in this model can be pruned"]

    def _pinned(self) -> Iterable[str]:
        """Return the lines of the section on pinned axes."""
        # One reason often pins many axes (every logit of every head), so name it once.
        by_reason: dict[tuple[str, str], list[str]] = {}
        for row in self.pinned:
            by_reason.setdefault((row.reason, row.node), []).extend(row.axes)
        rows = []
        for (reason, node), axes in by_reason.items():
            more = f" and {len(axes) - 3} more" if len(axes) > 3 else ""
            rows.append(
                f"{', '.join(axes[:3])}{more}: {reason}" + (f" (at {node})" if node else "")
            )
        return _section("pinned, never pruned", rows)


def _pinned_rows(rows: Iterable[Any]) -> Iterator[PinnedRow]:
    """Yield rows with their axes in a tuple; they may be given as one string or as several."""
    for axes, *rest in rows:
        yield PinnedRow((axes,) if isinstance(axes, str) else tuple(axes), *rest)


def _check_search(search: Any) -> None:
    """Check the types of a search's attributes, and that its result is among its candidates."""
    _of_kind("search", search, SearchRow)
    if search.chosen not in range(len(search.candidates)):
        raise ValueError(f"search has no candidate {search.chosen}")
    for row in search.candidates:
        _of_kind("search", row.score, numbers.Real)


def _of_kind(name: str, value: Any, kind: Any) -> None:
    """Check the type of a value; a bool is not a number here."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} holds a {type(value).__name__}")


_SHOWN = 40  # upper limit on the lines of a section; the rest is only counted


def _section(title: str, rows: Iterable[str]) -> list[str]:
    """Return the lines of a section; none if it has no rows."""
    rows = list(rows)
    if not rows:
        return []
    more = [f"  ... and {len(rows) - _SHOWN} more"] if len(rows) > _SHOWN else []
    return ["", title, *(f"  {row}" for row in rows[:_SHOWN]), *more]


def _change(before: int, after: int) -> str:
    """Return a change as text: ``1,000 -> 250 (25.0 % left)``."""
    left = f" ({100 * after / before:.1f} % left)" if before else ""
    return f"{before:,} -> {after:,}{left}"


def _share(part: int | None, whole: int | None, name: str) -> list[str]:
    """Return a share as text, if it is known: ``["25.0 % of the MACs"]``."""
    return [] if part is None or not whole else [f"{100 * part / whole:.1f} % of the {name}"]


def _counted(number: int, noun: str) -> str:
    """Return a number with its noun in the singular or plural."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
