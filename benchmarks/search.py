"""Measure what a search for widths gains over the ranking on pretrained networks.

    python benchmarks/search.py
    # a larger network
    python benchmarks/search.py --networks lite0 --settings cpmc_flow --stem search_lite0

Networks that other people trained (EfficientNet-lite0, MTCNN, CREPE) are pruned to shares of their
multiply-accumulates, without any training. The search scores candidates on the calibration inputs,
by how far their outputs are from those of the dense network. The results are judged on the test
inputs, whose sources (photographs, faces, tones) are others, by the same agreement as in
``pretrained.py``. ``cpmc+data``: the weights of every candidate, and those of the ranking's
answer, are corrected by least squares on half of the calibration inputs, and the score reads the
other half.

A search of fewer evaluations is the beginning of a longer one. So each candidate that is better
than all before is judged, and one search gives all columns; what the judge says changes nothing.
Results go to ``benchmarks/results/search.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import _common as common
import _pretrained
from torch import nn

import fxprune

SMALL = ("pnet", "rnet", "onet", "crepe")
SETTINGS = ("cpmc", "cpmc_flow", "cpmc+data")
LEFT_OUT = {("crepe", "cpmc+data")}  # the correction of a single candidate takes many seconds
BATCH = 16


def scored(what: _pretrained.Network) -> tuple[fxprune.evaluation.Score, list[Any]]:
    """Return a score on one half of the calibration inputs, and batches of the other half."""
    judge = replace(what, test=what.calibration[1::2])
    wanted = judge.outputs(what.model)
    spread = (wanted - wanted.mean(0)).square().mean()

    def score(model: nn.Module) -> float:
        """Return minus the mean square error of the outputs, relative to their variance."""
        return float(-(judge.outputs(model) - wanted).square().mean() / spread)

    return score, [(batch,) for batch in what.calibration[::2].split(BATCH)]


def row_of(network: str, setting: str, share: float, counts: Sequence[int]) -> common.Record:
    """Return the agreement with the dense network after each number of evaluations.

    ``setting`` is a criterion; ``+data`` after it corrects the weights.
    """
    what = _pretrained.NETWORKS[network]()
    dense = what.outputs(what.model)
    score, batches = scored(what)
    scores: list[float] = []
    agreements: list[float] = []

    def judged(model: nn.Module) -> float:
        """Return the score, and take note of the agreement of the best model so far."""
        found = score(model)
        is_best = found > max(scores, default=-math.inf)
        agreements.append(
            what.agreement(what.outputs(model), dense) if is_best else agreements[-1]
        )
        scores.append(found)
        return found

    criterion, _, data = setting.partition("+")
    started = time.perf_counter()
    fxprune.prune(
        what.model,
        what.example,
        macs=share,
        criterion=criterion,
        data=batches if data else None,
        search=fxprune.Search(judged, max(counts)),
    )
    return {
        "network": network,
        "setting": setting,
        "macs": share,
        "agreement": {str(count): agreements[min(count, len(scores)) - 1] for count in counts},
        "evaluations": len(scores),
        "seconds": round(time.perf_counter() - started, 1),
    }


def report(record: common.Record) -> str:
    """Return the whole result in Markdown."""
    counts = [str(count) for count in record["evaluations"]]
    heads = ["ranking" if count == "1" else f"search, {count}" for count in counts]
    parts = [
        "# What a search for widths gains over the ranking",
        f"`{record['command']}`, {common.machine_line(record['machine'])}",
        _pretrained.NOTE,
        "Agreement with the dense network on inputs of other sources than the search has seen, "
        "by the number of evaluations. `+data`: weights corrected by least squares.",
    ]
    for network, judged_by in record["judged_by"].items():
        lines = []
        for row in record["rows"]:
            if row["network"] == network:
                found = [f"{row['agreement'][count]:.3f}" for count in counts]
                lines.append([row["setting"], f"{row['macs']:.1f}", *found])
        parts += [f"## {network}: {judged_by}"]
        parts += [common.markdown_table(["", "MACs left", *heads], lines)]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, by default the command line, measure, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ", ".join(_pretrained.NETWORKS)
    parser.add_argument("--networks", type=common.names, default=SMALL, help=known)
    parser.add_argument("--settings", type=common.names, default=SETTINGS)
    parser.add_argument("--shares", type=common.shares, default=(0.8, 0.5))
    parser.add_argument("--evaluations", type=common.numbers, default=(1, 20, 40))
    parser.add_argument("--stem", default="search", help="name of the results")
    options = parser.parse_args(arguments)
    try:
        judged_by = {name: _pretrained.NETWORKS[name]().judged_by for name in options.networks}
    except ImportError as error:
        parser.error(f"{error}. Install the packages:\n{_pretrained.INSTALL}")
    warnings.simplefilter("ignore", fxprune.FxpruneWarning)
    rows: list[common.Record] = []
    record: common.Record = {
        "machine": common.machine(),
        "command": " ".join(["python benchmarks/search.py", *(arguments or sys.argv[1:])]),
        "judged_by": judged_by,
        "evaluations": list(options.evaluations),
        "rows": rows,
    }
    for network in options.networks:
        for setting in options.settings:
            for share in options.shares:
                if (network, setting) not in LEFT_OUT:
                    rows.append(row_of(network, setting, share, options.evaluations))
                    print(rows[-1], flush=True)
    common.write(options.stem, record, report(record))
    print("\n" + report(record))


if __name__ == "__main__":
    main()
