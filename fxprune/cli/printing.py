"""Output of the commands: couplings, plans, comparisons of criteria, latencies."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fxprune.coupling import Coupling, Group, Pinned
from fxprune.latency import Latency, Setting
from fxprune.result.pruned import Pruned

__all__ = [
    "comparison_to_dict",
    "coupling_to_dict",
    "latency_to_dict",
    "plan_text",
    "print_comparison",
    "print_coupling",
    "print_latencies",
]


def coupling_to_dict(coupling: Coupling) -> dict[str, Any]:
    """Return the analysis of a model as data for JSON."""
    return {
        "groups": [_group_to_dict(group) for group in coupling.groups],
        "pinned": [_pinned_to_dict(pinned) for pinned in coupling.pinned],
        "pinned_macs": coupling.pinned_macs(),
        "untouched": list(coupling.untouched),
        "decisions": list(coupling.decisions),
        "not_one_graph": coupling.not_one_graph,
        "not_set": list(coupling.not_set),
    }


def _group_to_dict(group: Group) -> dict[str, Any]:
    """Return a group as data for JSON."""
    return {
        "name": group.name,
        "units": group.size,
        "axes": [str(axis) for axis in group.axes],
        "blocks": group.blocks,
        "normalised": list(group.normalised),
    }


def _pinned_to_dict(pinned: Pinned) -> dict[str, Any]:
    """Return axes that are pinned for the same reason as data for JSON."""
    return {
        "axes": [str(axis) for axis in pinned.axes],
        "reason": pinned.reason,
        "node": pinned.node,
    }


def print_coupling(coupling: Coupling) -> None:
    """Print the groups of a model, its pinned axes, and notes about the analysis."""
    console = Console()
    console.print(_groups_table(coupling))
    if coupling.pinned:
        console.print(_pinned_table(coupling.pinned))
    pinned_shares = [f"{share:.1%} {reason}" for reason, share in coupling.pinned_macs().items()]
    reasons = [coupling.not_one_graph] if coupling.not_one_graph else []
    notes: Mapping[str, Sequence[str]] = {
        "multiply-accumulates held by pins, of all": pinned_shares,
        "not used by any operation": coupling.untouched,
        "in parts, not one graph, because": reasons,
        "set by forward, not by its graph": coupling.not_set,
        "control flow fixed": coupling.decisions,
    }
    for title, lines in notes.items():
        if lines:
            console.print(f"{title}:")
            for line in lines:
                console.print(f"  {line}", markup=False, emoji=False, highlight=False)


def _groups_table(coupling: Coupling) -> Table:
    """Return a table with one row per group."""
    units = sum(group.size for group in coupling.groups)
    table = Table(title=f"{len(coupling.groups)} groups, {units:,} units", title_justify="left")
    table.add_column("group", overflow="fold")
    table.add_column("units", justify="right")
    table.add_column("axes", justify="right")
    table.add_column("of the axes", overflow="fold")
    for group in coupling.groups:
        size = f"{group.size} in {group.blocks} blocks" if group.blocks else str(group.size)
        table.add_row(escape(group.name), size, str(len(group.axes)), _first_axes(group.axes))
    return table


def _pinned_table(pinned: Iterable[Pinned]) -> Table:
    """Return a table with one row per pinned entry."""
    table = Table(title="pinned, never pruned", title_justify="left")
    for column in ("axes", "reason", "node"):
        table.add_column(column, overflow="fold")
    for entry in pinned:
        table.add_row(_first_axes(entry.axes), escape(entry.reason), escape(entry.node))
    return table


def _first_axes(axes: Sequence[Any]) -> str:
    """Return the names of the first two axes, escaped for a table."""
    names = [str(axis) for axis in axes[:2]]
    return escape(", ".join([*names, "..."] if len(axes) > 2 else names))


def plan_text(pruned: Pruned) -> str:
    """Return the plan as readable text, below the costs before and after pruning."""
    report = dataclasses.replace(
        pruned.report, groups=(), pinned=(), untouched=(), decisions=(), statistics=(), not_set=()
    )
    cost = str(report).split("\n\n")[0]  # the figures come first, before the sections
    return f"{cost}\n\n{pruned.plan}"


def _removed_units(pruned: Pruned) -> set[tuple[str, int]]:
    """Return the removed units as (name of the group, index of the unit)."""
    removed: set[tuple[str, int]] = set()
    for group in pruned.plan.groups:
        removed.update((group.name, unit) for unit in set(range(group.size)) - set(group.kept))
    return removed


def _overlaps(results: Mapping[str, Pruned]) -> dict[str, dict[str, float]]:
    """Return for each pair of criteria how similar their choices are.

    This is the number of units that both remove, divided by the number of units that at least one
    of them removes. It is 1 if neither removes any.
    """
    removed = {name: _removed_units(pruned) for name, pruned in results.items()}

    def overlap(one: str, other: str) -> float:
        """Return the similarity of two criteria."""
        either = removed[one] | removed[other]
        return len(removed[one] & removed[other]) / len(either) if either else 1.0

    return {one: {other: overlap(one, other) for other in results} for one in results}


def _group_sizes(results: Mapping[str, Pruned]) -> dict[str, int]:
    """Return the number of units of each group that any of the models has."""
    return {group.name: group.size for pruned in results.values() for group in pruned.plan.groups}


def _kept_units(results: Mapping[str, Pruned]) -> dict[str, dict[str, int]]:
    """Return for each group how many units each criterion keeps.

    A node that cannot be emitted smaller is pinned for the criterion that pruned it. One criterion
    may therefore have fewer groups than another; it keeps all units of a group that it lacks.
    """
    kept: dict[str, dict[str, int]] = {}
    for name, size in _group_sizes(results).items():
        kept[name] = dict.fromkeys(results, size)
    for criterion, pruned in results.items():
        for group in pruned.plan.groups:
            kept[group.name][criterion] = len(group.kept)
    return kept


def comparison_to_dict(results: Mapping[str, Pruned]) -> dict[str, Any]:
    """Return a comparison of criteria as data for JSON; ``results`` maps criteria to models."""
    sizes, kept = _group_sizes(results), _kept_units(results)
    return {
        "criteria": {name: _cost_to_dict(pruned) for name, pruned in results.items()},
        "groups": [{"name": name, "units": sizes[name], "kept": kept[name]} for name in kept],
        "overlap": _overlaps(results),
    }


def _cost_to_dict(pruned: Pruned) -> dict[str, Any]:
    """Return the costs of a model before and after pruning as data for JSON."""
    report, groups = pruned.report, pruned.plan.groups
    return {
        "macs_before": report.macs_before,
        "macs_after": report.macs_after,
        "params_before": report.params_before,
        "params_after": report.params_after,
        "units_before": sum(group.size for group in groups),
        "units_after": sum(len(group.kept) for group in groups),
        "seconds": sum(report.seconds.values()),
    }


def print_comparison(results: Mapping[str, Pruned], full: bool) -> None:
    """Print what each criterion costs and keeps, and how much the criteria agree.

    Parameters
    ----------
    results:
        For each criterion the model that it pruned.
    full:
        Print all groups. False: only those of which the criteria keep different numbers of units.
    """
    comparison, console = comparison_to_dict(results), Console()
    console.print(_cost_table(comparison["criteria"]))
    groups = comparison["groups"]
    rows = [row for row in groups if full or len(set(row["kept"].values())) > 1]
    if rows:
        console.print(_kept_table(rows, len(groups), list(results)))
    console.print(_overlap_table(comparison["overlap"]))


def _cost_table(criteria: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table with the remaining costs for each criterion."""
    table = Table(title="what is left", title_justify="left")
    table.add_column("criterion", overflow="fold")
    for column in ("MACs", "%", "parameters", "%", "units", "%", "seconds"):
        table.add_column(column, justify="right")
    for name, row in criteria.items():
        cells = []
        for cost in ("macs", "params", "units"):
            before, after = row[f"{cost}_before"], row[f"{cost}_after"]
            cells += [f"{after:,}", f"{100 * after / before:.1f}" if before else "-"]
        table.add_row(escape(name), *cells, f"{row['seconds']:.2f}")
    return table


def _kept_table(rows: Sequence[Mapping[str, Any]], total: int, criteria: Sequence[str]) -> Table:
    """Return a table of units kept, with a row per group; ``total`` is the number of groups."""
    table = Table(title=f"units kept, {len(rows)} of {total} groups", title_justify="left")
    table.add_column("group", overflow="fold")
    for column in ("units", *criteria):
        table.add_column(escape(column), justify="right")
    for row in rows:
        kept = [str(row["kept"][name]) for name in criteria]
        table.add_row(escape(row["name"]), str(row["units"]), *kept)
    return table


def _overlap_table(overlaps: Mapping[str, Mapping[str, float]]) -> Table:
    """Return a table with the similarity of each pair of criteria."""
    table = Table(title="removed by both, % of what either removes", title_justify="left")
    for column in ("", *overlaps):
        table.add_column(escape(column), justify="right" if column else "left")
    for one, others in overlaps.items():
        table.add_row(escape(one), *(f"{100 * others[other]:.1f}" for other in overlaps))
    return table


def latency_to_dict(setting: Setting, name: str, latency: Latency) -> dict[str, Any]:
    """Return one measurement of a model as data for JSON."""
    return {
        "model": name,
        "device": str(setting.place),
        "precision": setting.precision,
        "mode": setting.mode,
        "channels_last": setting.channels_last,
        "batch": latency.batch,
        "milliseconds": latency.timing.ms,
        "quartiles": [latency.timing.low, latency.timing.high],
        "measurements": latency.timing.count,
        "floor_milliseconds": latency.floor_ms,
        "throughput": latency.throughput,
        "peak_bytes": latency.peak_bytes,
    }


def print_latencies(rows: Sequence[tuple[Setting, str, Latency]]) -> None:
    """Print one table per setting; the last column is the time relative to the first model."""
    console = Console()
    for setting, group in itertools.groupby(rows, key=lambda row: row[0]):
        console.print(_latency_table(setting, [(name, latency) for _, name, latency in group]))
    console.print(
        "floor: the multiply-accumulates and bytes at this device's measured rates, whichever "
        "takes longer"
    )


def _latency_table(setting: Setting, measured: Sequence[tuple[str, Latency]]) -> Table:
    """Return a table of the latencies of models, given by name, in one setting."""
    first = measured[0][1]
    table = Table(
        title=f"{setting.precision}, {setting.mode}, batch {first.batch}, "
        f"on {_device_place(setting)}",
        title_justify="left",
    )
    table.add_column("model")
    for column in ("ms", "quartiles", "floor, ms", "per second", "MiB", "relative"):
        table.add_column(column, justify="right")
    for name, latency in measured:
        timing, peak = latency.timing, latency.peak_bytes
        table.add_row(
            escape(name),
            f"{timing.ms:.3f}",
            f"{timing.low:.3f}-{timing.high:.3f}",
            f"{latency.floor_ms:.3f}",
            f"{latency.throughput:,.0f}",
            "-" if peak is None else f"{peak / 2**20:,.0f}",
            f"{timing.ms / first.timing.ms:.2f}",
        )
    return table


def _device_place(setting: Setting) -> str:
    """Return the name of the GPU, or the number of threads on the CPU."""
    if setting.on_gpu:
        return torch.cuda.get_device_name(setting.place)
    return f"the CPU, {torch.get_num_threads()} threads"
