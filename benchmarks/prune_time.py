"""Compare how long ``fxprune.prune`` and torch-pruning take, side by side in one run.

    # every torchvision model that both can prune
    python benchmarks/prune_time.py
    # some of them; the rows of the others are kept
    python benchmarks/prune_time.py --only 'resnet*,vgg*'
    # small images, so that slow forward passes do not help
    python benchmarks/prune_time.py --inputs small
    # time by number of nodes, on a synthetic DenseNet
    python benchmarks/prune_time.py --scaling
    # peak memory relative to the weights
    python benchmarks/prune_time.py --memory
    # the first call of a new process compared with the second
    python benchmarks/prune_time.py --first

Each model has its own process. Both tools prune once without being timed. Then they take turns,
``--repeats`` times, and medians are compared. torch-pruning prunes in place: the copy of the model
that it needs is made outside the measured time, while fxprune's own copying is inside. Which
models torch-pruning can prune is found by trying: it must finish, remove something, and leave a
model that runs and keeps its output shape. torch-pruning is given the classifier layer, which
fxprune finds by itself.

The figures go to ``benchmarks/results/prune_time.json`` and ``.md`` (``prune_scaling``,
``prune_memory``, ``prune_first``).
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import fnmatch
import gc
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import _common as common
import torch
from torch import Tensor, nn

import fxprune
from tests.torchvision_models import CASES

#: The aims of the project.
REACH_TOTAL = 0.4
REACH_WORST = 1.25
REACH_DEEPEST = ("densenet201", 10.0)
REACH_MEMORY = 2.5
REACH_SLOPE = 1.2
REACH_FIRST = 2.0


# --------------------------------------------------------------------------- against torch-pruning


def race(name: str, size: str, repeats: int, seconds: float, limit: float) -> common.Record:
    """Time both tools on one model in turns.

    Stop after about ``seconds``, but measure each tool at least once.
    """
    case = CASES[name]
    model, inputs = case.build(size=size), case.inputs(size=size)
    record: common.Record = {
        "parameters": common.parameter_count(model),
        "input": list(inputs.shape),
    }
    stages: list[dict[str, float]] = []
    left: dict[str, int] = {}

    def ours() -> float:
        gc.collect()
        start = time.perf_counter()
        pruned = fxprune.prune(model, inputs, channels=0.5)
        taken = time.perf_counter() - start
        stages.append(dict(pruned.report.seconds))
        left["fxprune"] = common.parameter_count(pruned.model)
        with torch.no_grad():
            pruned.model(inputs)
        return taken

    def theirs(check: bool = False) -> float:
        victim = copy.deepcopy(model)
        ignored = common.output_layers(victim, inputs)
        gc.collect()
        start = time.perf_counter()
        common.torch_pruning_prune(victim, inputs, 0.5, ignored=ignored)
        taken = time.perf_counter() - start
        left["torch-pruning"] = common.parameter_count(victim)
        if check and (fault := common.torch_pruning_faults(model, victim, inputs)):
            raise RuntimeError(fault)
        return taken

    first: dict[str, float] = {}
    for tool, attempt in (("fxprune", ours), ("torch-pruning", lambda: theirs(check=True))):
        try:
            with common.time_limit(limit):
                first[tool] = attempt()
        except Exception as error:
            record.setdefault("failed", {})[tool] = common.one_line(error)
    record |= {"first": first, "left": left}
    if "failed" in record:
        return record

    stages.clear()
    times: dict[str, list[float]] = {"fxprune": [], "torch-pruning": []}
    began = time.perf_counter()
    for turn in range(repeats):
        if turn and time.perf_counter() - began > seconds:
            break
        for tool, attempt in (("fxprune", ours), ("torch-pruning", theirs))[
            :: 1 if turn % 2 == 0 else -1
        ]:
            times[tool].append(attempt())
    record["times"] = times
    record["stages"] = {
        stage: common.median([run.get(stage, 0.0) for run in stages]) for stage in stages[0]
    }
    record["seconds"] = {tool: common.median(values) for tool, values in times.items()}
    record["ratio"] = record["seconds"]["fxprune"] / record["seconds"]["torch-pruning"]
    return record


def report_race(
    records: dict[str, common.Record], about: common.Record
) -> tuple[common.Record, str, bool]:
    """Return the totals, the shares of the stages, the Markdown page, and whether aims are met."""
    both = {name: r for name, r in records.items() if "ratio" in r}
    if not both:
        return (
            {"machine": about, "models": records},
            "# Pruning time\n\nNo model can be pruned by both tools.\n",
            False,
        )
    ours = sum(r["seconds"]["fxprune"] for r in both.values())
    theirs = sum(r["seconds"]["torch-pruning"] for r in both.values())
    worst = max(both, key=lambda name: both[name]["ratio"])
    stages: dict[str, float] = {}
    for record in both.values():
        for stage, seconds in record["stages"].items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    known = sum(stages.values())
    if ours > known:
        stages["other"] = ours - known
    summary = {
        "models": len(both),
        "fxprune_seconds": ours,
        "torch_pruning_seconds": theirs,
        "total_ratio": ours / theirs,
        "total_ratio_without_densenets": _total_ratio(
            {n: r for n, r in both.items() if "densenet" not in n}
        ),
        "median_ratio": common.median([r["ratio"] for r in both.values()]),
        "worst": [worst, both[worst]["ratio"]],
        "stage_share": {stage: seconds / ours for stage, seconds in stages.items()},
    }
    aims = [
        (
            f"total at most {REACH_TOTAL} of torch-pruning's time",
            f"{ours / theirs:.3f}",
            ours / theirs <= REACH_TOTAL,
        ),
        (
            f"no model takes more than {REACH_WORST} times torch-pruning's time",
            f"{both[worst]['ratio']:.2f} ({worst})",
            both[worst]["ratio"] <= REACH_WORST,
        ),
    ]
    deepest, times_faster = REACH_DEEPEST
    if deepest in both:
        speed = 1 / both[deepest]["ratio"]
        aims.append(
            (
                f"{deepest} at least {times_faster:.0f} times faster",
                f"{speed:.1f} times",
                speed >= times_faster,
            )
        )
    rows = [
        [
            f"`{name}`",
            f"{r['seconds']['fxprune']:.3f}",
            f"{r['seconds']['torch-pruning']:.3f}",
            f"{r['ratio']:.3f}",
            len(r["times"]["fxprune"]),
            f"{r['left']['fxprune'] / r['parameters']:.3f}",
            f"{r['left']['torch-pruning'] / r['parameters']:.3f}",
        ]
        for name, r in sorted(both.items(), key=lambda item: -item[1]["ratio"])
    ]
    parts = [
        "# Pruning time",
        "",
        "<!-- generated by benchmarks/prune_time.py -->",
        "",
        "`fxprune.prune(channels=0.5)` compared with torch-pruning "
        f"{about['versions']['torch-pruning']} at half the width, on the {len(both)}",
        f"torchvision models that both can prune. Times are medians, with {about['inputs']} "
        "inputs.",
        f"{common.machine_line(about)}",
        "",
        common.markdown_table(
            ["aim", "measured", "reached"], [[a, b, "yes" if c else "no"] for a, b, c in aims]
        ),
        "",
        f"Total: fxprune {ours:.1f} s, torch-pruning {theirs:.1f} s. Median ratio: "
        f"{summary['median_ratio']:.3f}. Ratio of totals without the DenseNets: "
        f"{summary['total_ratio_without_densenets']:.3f}.",
        "",
        "Share of fxprune's time by stage: "
        + ", ".join(f"{stage} {share:.0%}" for stage, share in summary["stage_share"].items())
        + ".",
        "",
        common.markdown_table(
            [
                "model",
                "fxprune, s",
                "torch-pruning, s",
                "ratio",
                "repeats",
                "left, fxprune",
                "left, torch-pruning",
            ],
            rows,
        ),
    ]
    for tool in ("fxprune", "torch-pruning"):
        failed = [
            f"- `{name}`: {r['failed'][tool]}"
            for name, r in records.items()
            if tool in r.get("failed", {})
        ]
        if failed:
            parts += ["", f"Not pruned by {tool}:", "", *failed]
    lost = [f"- `{name}`: {r['error']}" for name, r in records.items() if "error" in r]
    if lost:
        parts += ["", "Not measured:", "", *lost]
    record = {"machine": about, "summary": summary, "models": records}
    return record, "\n".join(parts), all(reached for _, _, reached in aims) and not lost


def _total_ratio(records: dict[str, common.Record]) -> float:
    theirs = sum(r["seconds"]["torch-pruning"] for r in records.values())
    return sum(r["seconds"]["fxprune"] for r in records.values()) / theirs if theirs else math.nan


def run_race(options: argparse.Namespace) -> bool:
    """Race on every chosen model, print each ratio at once, and write the results."""
    about = common.machine() | {"inputs": options.inputs, "repeats": options.repeats}
    names = [
        name
        for name in CASES
        if any(fnmatch.fnmatch(name, glob) for glob in options.only.split(","))
    ]
    stem = "prune_time" if options.inputs == "native" else f"prune_time_{options.inputs}"
    records: dict[str, common.Record] = (
        common.read(stem).get("models", {}) if options.only != "*" else {}
    )
    print(f"{'model':32} {'fxprune':>9} {'t-pruning':>9} {'ratio':>7}", flush=True)
    for name in names:
        record = common.in_child(
            race,
            name,
            options.inputs,
            options.repeats,
            options.seconds,
            options.limit,
            timeout=options.timeout,
        )
        records[name] = record
        if "ratio" in record:
            seconds = record["seconds"]
            print(
                f"{name:32} {seconds['fxprune']:8.3f}s {seconds['torch-pruning']:8.3f}s "
                f"{record['ratio']:7.3f}",
                flush=True,
            )
        else:
            failed = record.get("failed") or {"process": record["error"]}
            print(
                f"{name:32} " + "; ".join(f"{tool} failed: {why}" for tool, why in failed.items()),
                flush=True,
            )
    record, markdown, reached = report_race(records, about)
    print("\n" + markdown.split("| model |")[0].strip())
    common.write(stem, record, markdown)
    return reached


# ----------------------------------------------------------------------------------------- scaling


class SyntheticDenseNet(nn.Module):
    """A DenseNet of any depth at one resolution: dense blocks with a 1x1 transition between them.

    The work of a layer grows with the number of layers before it in its block. The number of nodes
    is therefore a fair measure of size only if blocks keep their length: use more blocks, not
    longer ones.
    """

    def __init__(self, blocks: int, layers: int = 6, growth: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2 * growth, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList()
        self.transitions = nn.ModuleList()
        for _ in range(blocks):
            widths = [2 * growth + i * growth for i in range(layers)]
            self.blocks.append(nn.ModuleList([_dense_layer(width, growth) for width in widths]))
            end = 2 * growth + layers * growth
            self.transitions.append(
                nn.Sequential(
                    nn.BatchNorm2d(end), nn.ReLU(), nn.Conv2d(end, 2 * growth, 1, bias=False)
                )
            )
        self.head = nn.Linear(2 * growth, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, 3, height, width) to logits (batch, 10)."""
        x = self.stem(x)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            features = [x]
            for layer in block:  # type: ignore[attr-defined]
                features.append(layer(torch.cat(features, 1)))
            x = transition(torch.cat(features, 1))
        return self.head(x.mean((2, 3)))


def _dense_layer(width: int, growth: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 4 * growth, 1, bias=False),
        nn.BatchNorm2d(4 * growth),
        nn.ReLU(),
        nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
    )


def scale(blocks: int, layers: int, repeats: int) -> common.Record:
    """Time ``fxprune.prune`` on one synthetic DenseNet."""
    torch.manual_seed(0)
    model, inputs = SyntheticDenseNet(blocks, layers).eval(), torch.randn(1, 3, 8, 8)
    fxprune.prune(SyntheticDenseNet(1, 2).eval(), inputs, channels=0.5)
    times = []
    for _ in range(repeats):
        gc.collect()
        start = time.perf_counter()
        pruned = fxprune.prune(model, inputs, channels=0.5)
        times.append(time.perf_counter() - start)
    nodes = pruned.model.graph.nodes
    return {
        "blocks": blocks,
        "layers": layers,
        "nodes": len(nodes),
        "edges": sum(len(node.all_input_nodes) for node in nodes),
        "seconds": common.median(times),
        "stages": dict(pruned.report.seconds),
    }


def slope(sizes: list[float], seconds: list[float]) -> float:
    """Return the exponent of ``seconds = a * sizes ** exponent``.

    It is fitted by least squares on logarithms.
    """
    x, y = [math.log(n) for n in sizes], [math.log(s) for s in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )


def run_scaling(options: argparse.Namespace) -> bool:
    """Measure time by number of nodes, for more and more blocks and for longer and longer ones."""
    about = common.machine()
    families = {
        "more blocks of 6 layers": [(blocks, 6) for blocks in (4, 8, 16, 32, 64)[: options.sizes]],
        "one block of more layers": [
            (1, layers) for layers in (16, 32, 64, 128, 256)[: options.sizes]
        ],
    }
    results: common.Record = {"machine": about, "families": {}}
    parts = [
        "# Pruning time by size of the graph",
        "",
        "<!-- generated by benchmarks/prune_time.py --scaling -->",
        "",
        common.machine_line(about),
    ]
    reached = True
    for family, sizes in families.items():
        rows = []
        for blocks, layers in sizes:
            row = common.in_child(scale, blocks, layers, options.repeats, timeout=options.timeout)
            if "error" in row:
                print(f"{family}: {blocks} x {layers}: {row['error']}", flush=True)
                reached = False
                break
            rows.append(row)
            print(
                f"{family}: {row['nodes']:6} nodes {row['edges']:7} edges {row['seconds']:8.3f} s"
                f" {1e6 * row['seconds'] / row['nodes']:8.0f} us/node",
                flush=True,
            )
        exponents = {
            size: slope([row[size] for row in rows], [row["seconds"] for row in rows])
            if len(rows) > 1
            else math.nan
            for size in ("nodes", "edges")
        }
        results["families"][family] = {"rows": rows, "exponent": exponents}
        if family.startswith("more blocks"):
            reached &= exponents["nodes"] <= REACH_SLOPE
        summary = f"time ~ nodes^{exponents['nodes']:.2f} ~ edges^{exponents['edges']:.2f}"
        print(f"{family}: {summary}\n", flush=True)
        table = [
            [
                row["nodes"],
                row["edges"],
                f"{row['seconds']:.3f}",
                f"{1e6 * row['seconds'] / row['nodes']:.0f}",
            ]
            for row in rows
        ]
        parts += ["", f"## A synthetic DenseNet, {family}: {summary}", ""]
        parts.append(common.markdown_table(["nodes", "edges", "seconds", "us per node"], table))
    common.write("prune_scaling", results, "\n".join(parts))
    return reached


# ------------------------------------------------------------------------------------------ memory


def resident_bytes(field: str) -> int:
    """Return ``VmRSS`` (now) or ``VmHWM`` (the highest so far) of this process, in bytes."""
    try:
        found = re.search(
            rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE
        )
        if found:
            return int(found.group(1)) * 1024
    except OSError:
        pass
    # other systems only tell the peak, in bytes or in KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory(name: str, size: str) -> common.Record:
    """Measure how far resident memory rises while one model is pruned.

    The record also has the rise divided by the bytes of the weights.
    """
    case = CASES[name]
    small = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)
    ).eval()
    # load everything that is loaded on first use
    fxprune.prune(small, torch.randn(1, 3, 16, 16), channels=0.5)
    model, inputs = case.build(size=size), case.inputs(size=size)
    weights = common.weight_bytes(model)
    gc.collect()
    try:
        # memory that was freed while building must not hide the memory that pruning needs
        ctypes.CDLL(None).malloc_trim(0)
        # reset the peak resident size to the present size
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        pass
    before = resident_bytes("VmRSS")
    pruned = fxprune.prune(model, inputs, channels=0.5)
    rise = max(resident_bytes("VmHWM") - before, 0)
    return {
        "weights": weights,
        "pruned_weights": common.weight_bytes(pruned.model),
        "rise": rise,
        "rise_over_weights": rise / weights,
        "peak_over_weights": (weights + rise) / weights,
        "nodes": len(pruned.model.graph.nodes),
    }


def run_memory(options: argparse.Namespace) -> bool:
    """Print the peak memory of pruning for models of all kinds."""
    about = common.machine() | {"inputs": options.inputs}
    # return freed tensors to the system at once
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    chosen = (
        options.only
        if options.only != "*"
        else "resnet50,densenet201,vgg16_bn,mobilenet_v2,vit_b_16,swin_b,regnet_y_32gf"
    )
    rows: dict[str, common.Record] = {}
    for name in chosen.split(","):
        rows[name] = row = common.in_child(
            peak_memory, name, options.inputs, timeout=options.timeout
        )
        if "error" in row:
            print(f"{name:20} {row['error']}", flush=True)
            continue
        print(
            f"{name:20} weights {row['weights'] / 2**20:8.1f} MiB, rise "
            f"{row['rise'] / 2**20:8.1f} MiB = {row['rise_over_weights']:.2f} times the weights; "
            f"peak {row['peak_over_weights']:.2f} times",
            flush=True,
        )
    measured = {name: row for name, row in rows.items() if "error" not in row}
    mib = 2**20
    table = [
        [
            f"`{name}`",
            f"{row['weights'] / mib:.1f}",
            f"{row['pruned_weights'] / mib:.1f}",
            f"{row['rise'] / mib:.1f}",
            f"{row['rise_over_weights']:.2f}",
            f"{row['peak_over_weights']:.2f}",
        ]
        for name, row in measured.items()
    ]
    markdown = "\n".join(
        [
            "# Peak memory of pruning",
            "",
            "<!-- generated by benchmarks/prune_time.py --memory -->",
            "",
            "*Rise* is the growth of a process's resident memory while "
            "`fxprune.prune(channels=0.5)` runs, including the pruned",
            "model. *Peak* also includes the original's weights. The ratios are to the bytes of "
            "the original's weights.",
            f"{options.inputs.capitalize()} inputs. Models with small weights show the memory of "
            "the graph itself.",
            "",
            common.machine_line(about),
            "",
            common.markdown_table(
                [
                    "model",
                    "weights, MiB",
                    "pruned, MiB",
                    "rise, MiB",
                    "rise / weights",
                    "peak / weights",
                ],
                table,
            ),
        ]
    )
    common.write("prune_memory", {"machine": about, "models": rows}, markdown)
    return len(measured) == len(rows) and all(
        row["peak_over_weights"] <= REACH_MEMORY for row in measured.values()
    )


# ---------------------------------------------------------------------------------- the first call

FIRST_MODELS = {
    "resnet50": (
        "import torchvision; model = torchvision.models.resnet50(); x = torch.randn(1, 3, 224, "
        "224)"
    ),
    "vit_b_16": (
        "import torchvision; model = torchvision.models.vit_b_16(); x = torch.randn(1, 3, 224, "
        "224)"
    ),
    "convolutions": (
        "model = nn.Sequential(*(m for n in range(32) for m in (nn.Conv2d(3 if n == 0 else 32, "
        "32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())), nn.AdaptiveAvgPool2d(1), "
        "nn.Flatten(), nn.Linear(32, 10)); x = torch.randn(1, 3, 32, 32)"
    ),
    "transformer": (
        "layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True); "
        "model = nn.TransformerEncoder(layer, 8, enable_nested_tensor=False); "
        "x = torch.randn(1, 16, 64)"
    ),
}
"""Code that builds each model. torchvision imports torch's compiler; torch itself does not."""

_FIRST = """
import json, sys, time
import torch
from torch import nn
import fxprune

{build}
model.eval()
seconds, modules = [], [len(sys.modules)]
for _ in range(2):
    began = time.perf_counter()
    fxprune.prune(model, x, channels=0.5)
    seconds.append(time.perf_counter() - began)
    modules.append(len(sys.modules))
found = {{"first": seconds[0], "second": seconds[1], "modules": modules[1] - modules[0]}}
print(json.dumps(found))
"""


def run_first(options: argparse.Namespace) -> bool:
    """Print how long the first and the second call of a new process take.

    The figures are medians over ``--repeats`` processes.
    """
    about = common.machine()
    chosen = [
        name
        for name in FIRST_MODELS
        if any(fnmatch.fnmatch(name, glob) for glob in options.only.split(","))
    ]
    rows: dict[str, common.Record] = {}
    for name in chosen:
        command = [sys.executable, "-c", _FIRST.format(build=FIRST_MODELS[name])]
        runs = []
        for _ in range(options.repeats):
            ran = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=True,
                cwd=common.ROOT,
                timeout=options.timeout,
            )
            runs.append(json.loads(ran.stdout.splitlines()[-1]))
        rows[name] = row = {key: common.median([run[key] for run in runs]) for key in runs[0]}
        row["ratio"] = row["first"] / row["second"]
        print(
            f"{name:14} first {row['first']:.3f} s, second {row['second']:.3f} s, "
            f"{row['modules']:.0f} modules imported",
            flush=True,
        )
    header = ["model", "first call, s", "second call, s", "first / second", "modules imported"]
    table = [
        [
            f"`{name}`",
            f"{row['first']:.3f}",
            f"{row['second']:.3f}",
            f"{row['ratio']:.2f}",
            f"{row['modules']:.0f}",
        ]
        for name, row in rows.items()
    ]
    parts = [
        "# The first call of a process",
        "",
        "<!-- generated by benchmarks/prune_time.py --first -->",
        "",
    ]
    parts += [
        f"`fxprune.prune(channels=0.5)` in new processes, medians of {options.repeats} runs.",
        "",
        common.machine_line(about),
        "",
    ]
    common.write(
        "prune_first",
        {"machine": about, "models": rows},
        "\n".join([*parts, common.markdown_table(header, table)]),
    )
    return all(row["ratio"] <= REACH_FIRST for row in rows.values())


def main() -> None:
    """Read the command line and run one of the four measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", help="comma-separated globs of model names")
    parser.add_argument(
        "--inputs",
        choices=("small", "native"),
        default="native",
        help="size of the example inputs",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--seconds",
        type=float,
        default=30.0,
        help="stop repeating a model after about this many seconds",
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=180.0,
        help="seconds after which a tool counts as failing on a model",
    )
    parser.add_argument(
        "--timeout", type=float, default=1200.0, help="stop a process after this many seconds"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="threads for torch (default: its own choice)"
    )
    parser.add_argument("--scaling", action="store_true", help="measure time by number of nodes")
    parser.add_argument(
        "--sizes", type=int, default=5, help="with --scaling: how many sizes of each family"
    )
    parser.add_argument(
        "--memory", action="store_true", help="measure peak memory relative to the weights"
    )
    parser.add_argument(
        "--first",
        action="store_true",
        help="compare the first call of a new process with the second",
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if an aim is not met")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    common.warn_if_busy(common.machine())
    run = (
        run_scaling
        if options.scaling
        else run_memory
        if options.memory
        else run_first
        if options.first
        else run_race
    )
    reached = run(options)
    if options.check and not reached:
        sys.exit(1)


if __name__ == "__main__":
    main()
