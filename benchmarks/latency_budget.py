"""Compare a latency budget with a budget of multiply-accumulates at equal measured latency.

    # on the GPU if there is one, otherwise on the CPU
    python benchmarks/latency_budget.py
    # one model with small images
    python benchmarks/latency_budget.py --quick

The question is which budget keeps more of the model. Each model is pruned by
``fxprune.prune(latency=share)``, with untrained weights, by CPMC. Then ``macs=`` is searched until
its result is as fast, both deployed and measured in turns with the dense model. The table shows
the forecast and the measured time, and the shares of multiply-accumulates, parameters and
importance (the sum of CPMC's normalised values) that each budget keeps.

The figures go to ``benchmarks/results/latency_budget_<device>.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import _common as common
import _latency as shared
import torch
from torch import nn

import fxprune
from fxprune.criteria import rank
from fxprune.errors import FxpruneError
from fxprune.latency import Setting
from fxprune.latency.measuring import time_models

MODELS = ("resnet50", "mobilenet_v2", "densenet121")
NEAR = 0.02  # two latencies count as equal if they differ by at most this share
ATTEMPTS = 7


def kept(dense: nn.Module, inputs: Any, pruned: fxprune.Pruned) -> common.Record:
    """Return the shares of MACs, parameters and importance of the dense model that are left."""
    coupling = fxprune.analyze(dense, inputs)
    value = rank("cpmc", coupling, dense).value
    names = {group.name: group for group in coupling.groups}
    importance = sum(
        float(value[names[own.name].units[list(own.kept)]].sum()) for own in pruned.plan.groups
    )
    report = pruned.report
    assert report.macs_before is not None
    assert report.macs_after is not None
    return {
        "macs": report.macs_after / report.macs_before,
        "parameters": report.params_after / report.params_before,
        "importance": importance / float(value[coupling.units].sum()),
    }


def as_fast(
    dense: nn.Module, inputs: Any, share: float, setting: Setting, found: argparse.Namespace
) -> tuple[fxprune.Pruned, float]:
    """Search the budget of multiply-accumulates that leaves ``share`` of the latency.

    Return the pruned model, and the share of the latency that it really leaves.
    """
    whole = fxprune.deploy(fxprune.prune(dense, inputs, channels=1.0).model)
    low, high, macs = 0.0, 1.0, share
    best: tuple[float, fxprune.Pruned, float] | None = None
    for _ in range(ATTEMPTS):
        try:
            pruned = fxprune.prune(dense, inputs, macs=macs)
        except FxpruneError:  # the budget is too small to be reached
            low, macs = macs, (macs + high) / 2
            continue
        models = {"dense": whole, "pruned": fxprune.deploy(pruned.model)}
        timed = time_models(models, inputs, setting, rounds=found.rounds, seconds=found.seconds)
        torch._dynamo.reset()
        left = timed["pruned"].low / timed["dense"].low
        print(f"    macs={macs:.3f} leaves {left:.3f} of the latency", flush=True)
        if best is None or abs(left - share) < best[0]:
            best = abs(left - share), pruned, left
        if best[0] <= NEAR * share:
            break
        low, high = (macs, high) if left < share else (low, macs)
        macs = (low + high) / 2
    assert best is not None
    return best[1], best[2]


def measure(name: str, found: argparse.Namespace) -> common.Record:
    """Prune by both budgets in each setting and time the results."""
    torch.manual_seed(0)
    dense, inputs = shared.built(name, found.size)
    rows = []
    for setting in shared.settings(found):
        for share in found.shares:
            row: common.Record = {
                "precision": setting.precision,
                "mode": setting.mode,
                "batch": setting.batch,
                "share": share,
            }
            try:
                start = time.perf_counter()
                timed = fxprune.prune(dense, inputs, latency=share, device=setting)
                row["seconds"] = round(time.perf_counter() - start, 1)
                time_left = timed.report.latency
                assert time_left is not None
                row["by latency"] = kept(dense, inputs, timed) | {
                    "left": time_left.after / time_left.before
                }
                row["ms"] = {
                    "dense": time_left.before,
                    "forecast": time_left.forecast,
                    "measured": time_left.after,
                }
                counted, left = as_fast(
                    dense, inputs, time_left.after / time_left.before, setting, found
                )
                row["by macs"] = kept(dense, inputs, counted) | {"left": left}
                summary = ", ".join(
                    f"{by} {row[by]['importance']:.3f}" for by in ("by latency", "by macs")
                )
            except Exception as error:
                summary = row["error"] = common.one_line(error)
            print(
                f"  {setting.precision} {setting.mode} batch {setting.batch} latency={share}: "
                f"{summary}",
                flush=True,
            )
            rows.append(row)
            torch._dynamo.reset()
    return {"rows": rows}


def report(results: common.Record) -> str:
    """Return the Markdown page of one device."""
    rows = []
    for line, row in shared.lines(results):
        if row is not None:
            ms = row["ms"]
            line += [
                row["share"],
                *(f"{ms[what]:.2f}" for what in ("dense", "forecast", "measured")),
            ]
            line.append(f"{ms['forecast'] / ms['measured'] - 1:+.1%}")
            for what in ("left", "macs", "parameters", "importance"):
                line.append(" / ".join(f"{row[by][what]:.3f}" for by in ("by latency", "by macs")))
            line.append(row["seconds"])
        rows.append(line)
    header = [
        "model",
        "precision",
        "mode",
        "batch",
        "latency=",
        "dense, ms",
        "forecast",
        "measured",
        "forecast error",
        "latency left",
        "MACs left",
        "parameters left",
        "importance left",
        "seconds",
    ]
    text = [
        "Deployed models, milliseconds per batch: lower quartiles over rounds in which the models "
        "take turns. In each pair, the",
        "first figure is for the latency budget, the second for the budget of "
        "multiply-accumulates that leaves the same latency.",
        "*Seconds* is the time of `prune(latency=)`, including its measurements.",
    ]
    title = "A latency budget compared with a budget of multiply-accumulates"
    return shared.page(results, title, text, common.markdown_table(header, rows))


def main() -> None:
    """Read the command line, measure each model, and write the results after each one."""
    made = shared.parser(__doc__, MODELS)
    made.add_argument(
        "--shares",
        type=common.shares,
        default=(0.7, 0.5),
        help="shares of the dense model's latency to keep; default: 0.7,0.5",
    )
    found = shared.options(made, MODELS)
    shared.run(found, "latency_budget", measure, report, alike=("quick", "shares"))


if __name__ == "__main__":
    main()
