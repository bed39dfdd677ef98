"""Output of the commands: couplings, plans, comparisons of criteria, latencies."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fxprune.coupling import Coupling
from fxprune.latency import Latency, Setting
from fxprune.result.pruned import Pruned

__all__ = [
    "comparison_to_dict",
    "coupling_to_dict",
    "latency_to_dict",
    "planned",
    "print_comparison",
    "print_coupling",
    "print_latencies",
]


def coupling_to_dict(coupling: Coupling) -> dict[str, Any]:
    """Return the analysis of a model as data for JSON."""
    return {
        "groups": [
            {
                "name": group.name,
                "units": group.size,
                "axes": [str(axis) for axis in group.axes],
                "blocks": group.blocks,
                "normalised": list(group.normalised),
            }
            for group in coupling.groups
        ],
        "pinned": [
            {
                "axes": [str(axis) for axis in pinned.axes],
                "reason": pinned.reason,
                "node": pinned.node,
            }
            for pinned in coupling.pinned
        ],
        "pinned_macs": coupling.pinned_macs(),
        "untouched": list(coupling.untouched),
        "decisions": list(coupling.decisions),
        "not_one_graph": coupling.not_one_graph,
        "not_set": list(coupling.not_set),
    }


def print_coupling(coupling: Coupling) -> None:
    """Print the groups of a model, its pinned axes, and notes about the analysis."""
    console = Console()
    units = sum(group.size for group in coupling.groups)
    groups = Table(title=f"{len(coupling.groups)} groups, {units:,} units", title_justify="left")
    groups.add_column("group", overflow="fold")
    groups.add_column("units", justify="right")
    groups.add_column("axes", justify="right")
    groups.add_column("of the axes", overflow="fold")
    for group in coupling.groups:
        shown = ", ".join(str(axis) for axis in group.axes[:2]) + (
            ", ..." if len(group.axes) > 2 else ""
        )
        size = f"{group.size} in {group.blocks} blocks" if group.blocks else str(group.size)
        groups.add_row(escape(group.name), size, str(len(group.axes)), escape(shown))
    console.print(groups)
    if coupling.pinned:
        pinned = Table(title="pinned, never pruned", title_justify="left")
        pinned.add_column("axes", overflow="fold")
        pinned.add_column("reason", overflow="fold")
        pinned.add_column("node", overflow="fold")
        for entry in coupling.pinned:
            shown = ", ".join(str(axis) for axis in entry.axes[:2]) + (
                ", ..." if len(entry.axes) > 2 else ""
            )
            pinned.add_row(escape(shown), escape(entry.reason), escape(entry.node))
        console.print(pinned)
    held = [f"{share:.1%} {reason}" for reason, share in coupling.pinned_macs().items()]
    for title, lines in (
        ("multiply-accumulates held by pins, of all", held),
        ("not used by any operation", coupling.untouched),
        (
            "in parts, not one graph, because",
            [coupling.not_one_graph] if coupling.not_one_graph else [],
        ),
        ("set by forward, not by its graph", coupling.not_set),
        ("control flow fixed", coupling.decisions),
    ):
        if lines:
            console.print(f"{title}:")
            for line in lines:
                console.print(f"  {line}", markup=False, emoji=False, highlight=False)


def planned(pruned: Pruned) -> str:
    """Return the plan as readable text, below the costs before and after pruning."""
    report = dataclasses.replace(
        pruned.report, groups=(), pinned=(), untouched=(), decisions=(), statistics=(), not_set=()
    )
    cost = str(report).split("\n\n")[0]  # the figures come first, before the sections
    return f"{cost}\n\n{pruned.plan}"


def _removed(pruned: Pruned) -> set[tuple[str, int]]:
    """Return the removed units as (name of the group, index of the unit)."""
    return {
        (group.name, unit)
        for group in pruned.plan.groups
        for unit in set(range(group.size)) - set(group.kept)
    }


def _overlaps(results: Mapping[str, Pruned]) -> dict[str, dict[str, float]]:
    """Return for each pair of criteria how similar their choices are.

    This is the number of units that both remove, divided by the number of units that at least one
    of them removes. It is 1 if neither removes any.
    """
    removed = {name: _removed(pruned) for name, pruned in results.items()}

    def overlap(one: str, other: str) -> float:
        either = removed[one] | removed[other]
        return len(removed[one] & removed[other]) / len(either) if either else 1.0

    return {one: {other: overlap(one, other) for other in results} for one in results}


def _kept_units(results: Mapping[str, Pruned]) -> dict[str, dict[str, int]]:
    """Return for each group how many units each criterion keeps.

    A node that cannot be emitted smaller is pinned for the criterion that pruned it. One criterion
    may therefore have fewer groups than another; it keeps all units of a group that it lacks.
    """
    sizes = {group.name: group.size for pruned in results.values() for group in pruned.plan.groups}
    kept = {
        name: {group.name: len(group.kept) for group in pruned.plan.groups}
        for name, pruned in results.items()
    }
    return {
        group: {name: kept[name].get(group, size) for name in results}
        for group, size in sizes.items()
    }


def comparison_to_dict(results: Mapping[str, Pruned]) -> dict[str, Any]:
    """Return a comparison of criteria as data for JSON; ``results`` maps criteria to models."""
    sizes = {group.name: group.size for pruned in results.values() for group in pruned.plan.groups}
    return {
        "criteria": {
            name: {
                "macs_before": pruned.report.macs_before,
                "macs_after": pruned.report.macs_after,
                "params_before": pruned.report.params_before,
                "params_after": pruned.report.params_after,
                "units_before": sum(group.size for group in pruned.plan.groups),
                "units_after": sum(len(group.kept) for group in pruned.plan.groups),
                "seconds": sum(pruned.report.seconds.values()),
            }
            for name, pruned in results.items()
        },
        "groups": [
            {"name": name, "units": sizes[name], "kept": kept}
            for name, kept in _kept_units(results).items()
        ],
        "overlap": _overlaps(results),
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
    data, console = comparison_to_dict(results), Console()
    cost = Table(title="what is left", title_justify="left")
    cost.add_column("criterion", overflow="fold")
    for column in ("MACs", "%", "parameters", "%", "units", "%", "seconds"):
        cost.add_column(column, justify="right")
    for name, row in data["criteria"].items():
        cells = []
        for what in ("macs", "params", "units"):
            before, after = row[f"{what}_before"], row[f"{what}_after"]
            cells += [f"{after:,}", f"{100 * after / before:.1f}" if before else "-"]
        cost.add_row(escape(name), *cells, f"{row['seconds']:.2f}")
    console.print(cost)

    rows = [row for row in data["groups"] if full or len(set(row["kept"].values())) > 1]
    groups = Table(
        title=f"units kept, {len(rows)} of {len(data['groups'])} groups", title_justify="left"
    )
    groups.add_column("group", overflow="fold")
    for column in ("units", *results):
        groups.add_column(escape(column), justify="right")
    for row in rows:
        groups.add_row(
            escape(row["name"]), str(row["units"]), *(str(row["kept"][name]) for name in results)
        )
    if rows:
        console.print(groups)

    overlap = Table(title="removed by both, % of what either removes", title_justify="left")
    for column in ("", *results):
        overlap.add_column(escape(column), justify="right" if column else "left")
    for one, others in data["overlap"].items():
        overlap.add_row(escape(one), *(f"{100 * others[other]:.1f}" for other in results))
    console.print(overlap)


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
    for setting, alike in itertools.groupby(rows, key=lambda row: row[0]):
        measured = [(name, latency) for _, name, latency in alike]
        batch, first = measured[0][1].batch, measured[0][1].timing.ms
        table = Table(
            title=f"{setting.precision}, {setting.mode}, batch {batch}, "
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
                f"{timing.ms / first:.2f}",
            )
        console.print(table)
    console.print(
        "floor: the multiply-accumulates and bytes at this device's measured rates, whichever "
        "takes longer"
    )


def _device_place(setting: Setting) -> str:
    """Return the name of the GPU, or the number of threads on the CPU."""
    return (
        torch.cuda.get_device_name(setting.place)
        if setting.on_gpu
        else f"the CPU, {torch.get_num_threads()} threads"
    )
