"""Measure latency and throughput of dense and pruned models.

    # everything, on the GPU if there is one, otherwise on the CPU
    python benchmarks/latency.py
    # two models with small images, about a minute
    python benchmarks/latency.py --quick
    # add to the results file of the device
    python benchmarks/latency.py --models resnet50 --batches 1,256

CPMC prunes each model until the shares ``--removed`` of its multiply-accumulates are gone, with
widths that are multiples of ``--round-to``. The dense model and the pruned ones, all in their
inference form (``fxprune.deploy``), take turns in every combination of precision, mode and batch
size. Beside each latency the table shows the lower bound that the measured rates of the device
allow.

The figures go to ``benchmarks/results/latency_<device>.json`` and ``.md``, one pair per device.
"""

from __future__ import annotations

import argparse

import _common as common
import _latency as shared
from torch import nn

import fxprune

DENSE = "dense"


def measure(name: str, found: argparse.Namespace) -> common.Record:
    """Prune one model to every budget and time all results side by side."""
    dense, inputs = shared.built(name, found.size)
    models: dict[str, nn.Module] = {
        DENSE: fxprune.deploy(fxprune.prune(dense, inputs, channels=1.0).model)
    }
    record: common.Record = {"left": {}}
    for removed in found.removed:
        pruned = fxprune.prune(dense, inputs, macs=1 - removed, round_to=found.round_to)
        report, label = pruned.report, f"{removed:.0%} removed"
        assert report.macs_after is not None
        assert report.macs_before is not None
        record["left"][label] = {
            "macs": report.macs_after / report.macs_before,
            "parameters": report.params_after / report.params_before,
        }
        models[label] = fxprune.deploy(pruned.model)
    record["rows"] = shared.time_all(models, inputs, found)
    return record


def report(results: common.Record) -> str:
    """Return the Markdown page of one device."""
    labels = [f"{removed:.0%} removed" for removed in results["settings"]["removed"]]
    rows, left = [], []
    for name, record in results["models"].items():
        if "error" not in record:
            shares = [record["left"][label] for label in labels]
            left.append(
                [
                    f"`{name}`",
                    *(f"{share['macs']:.3f} / {share['parameters']:.3f}" for share in shares),
                ]
            )
    for line, row in shared.lines(results):
        if row is not None:
            dense = row["latency"][DENSE]
            line += [f"{dense['ms']:.3f} ({dense['floor_ms']:.3f})", f"{dense['throughput']:,.0f}"]
            for label in labels:
                own = row["latency"][label]
                line += [
                    f"{own['ms']:.3f} ({own['floor_ms']:.3f})",
                    f"**{own['ms'] / dense['ms']:.2f}**",
                ]
        rows.append(line)
    header = ["model", "precision", "mode", "batch", "dense, ms (floor)", "per second"]
    for label in labels:
        header += [f"{label}, ms (floor)", "of dense"]
    settings = results["settings"]
    text = [
        "Milliseconds per batch: medians over rounds in which the models take turns. In brackets "
        "is the time that the",
        "multiply-accumulates and bytes need at the measured rates of the device. Widths are "
        f"multiples of {settings['round_to']}. All models",
        f"are in their inference form, channels-last, at {settings['size']} resolution.",
    ]
    table = common.markdown_table(["model", *labels], left)
    left_over = f"Shares left of multiply-accumulates / parameters:\n\n{table}"
    return shared.page(
        results,
        "Latency of dense and pruned models",
        text,
        common.markdown_table(header, rows),
        left_over,
    )


def main() -> None:
    """Read the command line, measure each model, and write the results after each one."""
    made = shared.parser(__doc__)
    made.add_argument(
        "--removed",
        type=common.shares,
        default=(0.3, 0.5, 0.7),
        help="shares of the MACs to remove; default: 0.3,0.5,0.7",
    )
    made.add_argument(
        "--round-to", type=int, default=8, help="keep multiples of this many channels; default: 8"
    )
    shared.run(
        shared.options(made), "latency", measure, report, alike=("removed", "round_to", "quick")
    )


if __name__ == "__main__":
    main()
