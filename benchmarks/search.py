"""Measure what a search for widths gains over the ranking on pretrained networks.

    python benchmarks/search.py
    # one network
    python benchmarks/search.py --networks crepe --evaluations 20,50

Networks that other people trained (EfficientNet-lite0, MTCNN, CREPE) are pruned to shares of their
multiply-accumulates, without any training. The search scores candidates on the calibration inputs,
by how far their outputs are from those of the dense network. The results are judged on the test
inputs, whose sources (photographs, faces, tones) are others, by the same agreement as in
``pretrained.py``. ``least squares``: the weights of every candidate, and those of the ranking's
answer, are corrected on half of the calibration inputs, and the score reads the other half.

A search for more evaluations is not another one: its first candidates are the same. Results go to
``benchmarks/results/search.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import _common as common
import _pretrained
from torch import nn

import fxprune

METHODS = ("", "least squares")
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


def row_of(
    network: str, method: str, share: float, criterion: str, evaluations: Sequence[int]
) -> common.Record:
    """Return the agreement of the ranking's answer, and of searches, with the dense network."""
    what = _pretrained.NETWORKS[network]()
    dense = what.outputs(what.model)
    score, batches = scored(what)
    options: dict[str, Any] = {"macs": share, "criterion": criterion}
    if method:
        options["data"] = batches
    row: common.Record = {"network": network, "method": method, "macs": share, "agreement": {}}
    started = time.perf_counter()
    for count in evaluations:
        search = fxprune.Search(score, evaluations=count)
        pruned = fxprune.prune(what.model, what.example, search=search, **options)
        row["agreement"][str(count)] = what.agreement(what.outputs(pruned.model), dense)
        assert pruned.report.search is not None
        row["score"] = [pruned.report.search.before, pruned.report.search.after]
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


def report(record: common.Record) -> str:
    """Return the whole result in Markdown."""
    counts = [str(count) for count in record["evaluations"]]
    heads = ["ranking" if count == "1" else f"search, {count}" for count in counts]
    parts = [
        "# What a search for widths gains over the ranking",
        f"`{record['command']}`, {common.machine_line(record['machine'])}",
        _pretrained.NOTE,
        "Agreement with the dense network on inputs of other sources than the search has seen, "
        f"by the number of evaluations. The criterion is `{record['criterion']}`.",
    ]
    for network, judged_by in record["judged_by"].items():
        lines = []
        for row in record["rows"]:
            if row["network"] == network:
                found = [f"{row['agreement'][count]:.3f}" for count in counts]
                lines.append([f"{row['macs']:.1f}", row["method"] or "none", *found])
        parts += [f"## {network}: {judged_by}"]
        parts += [common.markdown_table(["MACs left", "correction", *heads], lines)]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, by default the command line, measure, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = tuple(_pretrained.NETWORKS)
    parser.add_argument("--networks", type=common.names, default=known, help=", ".join(known))
    parser.add_argument("--shares", type=common.shares, default=(0.8, 0.6))
    parser.add_argument("--evaluations", type=common.numbers, default=(1, 20, 60))
    parser.add_argument("--criterion", default="cpmc")
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
        "command": "python benchmarks/search.py",
        "judged_by": judged_by,
        "criterion": options.criterion,
        "evaluations": list(options.evaluations),
        "rows": rows,
    }
    for network in options.networks:
        for method in METHODS:
            for share in options.shares:
                rows.append(row_of(network, method, share, options.criterion, options.evaluations))
                print(rows[-1], flush=True)
    common.write(options.stem, record, report(record))
    print("\n" + report(record))


if __name__ == "__main__":
    main()
