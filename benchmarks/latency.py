"""Latency of dense against pruned models: fxprune and torch-pruning at equal MACs.

    python benchmarks/latency.py             # everything: the GPU where there is one, otherwise the CPU
    python benchmarks/latency.py --quick     # two models, small images, eager float32: a minute
    python benchmarks/latency.py --models resnet50 --batches 1,256  # adds to what the file of the device holds

For each model, the ``channels`` of ``fxprune.prune`` and the ``pruning_ratio`` of torch-pruning are searched until both
leave ``--macs`` of the dense model's multiply-accumulates, counted by one counter; both counts are in the table. Then
every pairing of data type, eager or compiled, and batch size is timed, channels-last: the three models take turns, so
that a machine that slows down slows all of them, and medians over all iterations are compared. On a GPU, CUDA events
measure; on a CPU, the clock.

torch-pruning gets the help by hand that it needs: it is told the classifier and the number of heads of each attention
layer, and a ViT's ``hidden_dim`` is corrected after pruning.

The figures go to ``benchmarks/results/latency_<device>.json`` and ``.md``, one pair per device.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import re
import time
import warnings
from collections.abc import Callable

import _common as common
import torch
from torch import Tensor, nn

import fxprune
from tests.torchvision_models import CASES

MODELS = ("resnet18", "resnet50", "vgg16_bn", "densenet121", "mobilenet_v2", "vit_b_16")
QUICK_MODELS = ("resnet18", "mobilenet_v2")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOOLS = ("dense", "fxprune", "torch-pruning")


# ----------------------------------------------------------------------------------------------------------- equal MACs


def match_macs(
    make: Callable[[float], nn.Module], inputs: Tensor, dense: int, target: float, tolerance: float, attempts: int = 9
) -> tuple[nn.Module, common.Record]:
    """Search the kept share of channels at which ``make(share)`` has ``target * dense`` MACs.

    MACs go about with the square of the kept share, so each guess corrects the last one by the square root of what is
    missing, within the bracket known so far. Returns the closest model and what it costs. A share at which ``make``
    fails is stepped over; if all fail, the last error is raised.
    """
    low, high, share = 0.0, 1.0, target**0.5
    best: tuple[float, nn.Module, common.Record] | None = None
    failure: Exception | None = None
    for _ in range(attempts):
        try:
            model = make(share)
            macs = common.count_macs(model, inputs)
        except Exception as error:
            failure = error
            share = min(share * 1.013, (share + high) / 2)
            continue
        gap = abs(macs / dense / target - 1)
        if best is None or gap < best[0]:
            best = gap, model, {"kept": share, "macs": macs, "parameters": common.parameter_count(model)}
        if gap <= tolerance:
            break
        low, high = (share, high) if macs < target * dense else (low, share)
        guess = share * (target * dense / macs) ** 0.5
        share = guess if low < guess < high else (low + high) / 2
    if best is None:
        raise failure or RuntimeError("no attempt was made")
    return best[1], best[2]


def with_fxprune(dense: nn.Module, inputs: Tensor, kept: float, round_to: int) -> nn.Module:
    """Prune with fxprune: nothing but the share to keep is said."""
    return fxprune.prune(dense, inputs, channels=kept, round_to=round_to).model


def with_torch_pruning(dense: nn.Module, inputs: Tensor, kept: float, round_to: int) -> nn.Module:
    """Prune a copy with torch-pruning, with the help that it needs: classifier, heads, and a ViT's ``hidden_dim``."""
    model = copy.deepcopy(dense)
    heads = {}
    for attention in (m for m in model.modules() if isinstance(m, nn.MultiheadAttention)):
        heads[attention] = attention.num_heads
    model = common.torch_pruning_prune(
        model, inputs, 1 - kept, ignored=common.output_layers(model, inputs), round_to=round_to, num_heads=heads
    )
    if isinstance(getattr(model, "hidden_dim", None), int) and hasattr(model, "conv_proj"):
        model.hidden_dim = model.conv_proj.out_channels
    if fault := common.torch_pruning_faults(dense, model, inputs):
        raise RuntimeError(fault)
    return model


# --------------------------------------------------------------------------------------------------------------- timing


@torch.inference_mode()
def time_in_turns(
    runs: dict[str, Callable[[], object]], device: torch.device, rounds: int, seconds: float, warm_up: int = 10
) -> dict[str, list[float]]:
    """Return the milliseconds of each iteration of each run; the runs take turns over ``rounds``.

    Each run is warmed up first, ``warm_up`` times or for about a second; its number of iterations per round fills
    ``seconds``.
    """
    iterations = {}
    for name, run in runs.items():
        run()  # compiles, picks algorithms, allocates
        _synchronise(device)
        start = time.perf_counter()
        done = 0
        while done < warm_up and time.perf_counter() - start < 1.0:
            run()
            _synchronise(device)
            done += 1
        each = (time.perf_counter() - start) / done
        iterations[name] = max(3, min(200, round(seconds / each)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for turn in range(rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            times[name] += _time(runs[name], iterations[name], device)
    return times


def _time(run: Callable[[], object], iterations: int, device: torch.device) -> list[float]:
    run()  # the other models have used the caches
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(iterations):
            run()
            marks.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(iterations + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _runner(model: nn.Module, x: Tensor, compiled: bool) -> Callable[[], object]:
    call = torch.compile(model, dynamic=False) if compiled else model
    return lambda: call(x)


# ------------------------------------------------------------------------------------------------------------ one model


def measure(name: str, options: argparse.Namespace, device: torch.device) -> common.Record:
    """Prune one model with both tools to equal MACs and time every pairing of data type, mode and batch size."""
    size = "small" if options.quick else "native"
    dense, inputs = CASES[name].build(size=size), CASES[name].inputs(size=size)
    macs = common.count_macs(dense, inputs)
    models: dict[str, nn.Module] = {"dense": dense}
    record: common.Record = {
        "input": list(inputs.shape[1:]),
        "models": {"dense": {"kept": 1.0, "macs": macs, "parameters": common.parameter_count(dense)}},
        "failed": {},
        "latency": [],
    }
    for tool, prune in (("fxprune", with_fxprune), ("torch-pruning", with_torch_pruning)):
        try:
            models[tool], record["models"][tool] = match_macs(
                lambda kept, prune=prune: prune(dense, inputs, kept, options.round_to),
                inputs,
                macs,
                options.macs,
                options.tolerance,
            )
        except Exception as error:
            record["failed"][tool] = common.one_line(error)
            print(f"  {name}: {tool} failed: {record['failed'][tool]}", flush=True)
    for tool, cost in record["models"].items():
        print(
            f"  {name:14} {tool:14} kept {cost['kept']:.3f}  {cost['macs'] / 1e6:10.1f} MMACs"
            f" ({cost['macs'] / macs:.3f})  {cost['parameters'] / 1e6:7.2f} M parameters",
            flush=True,
        )

    for dtype in options.dtypes:
        cast = {
            tool: copy.deepcopy(model).to(device, DTYPES[dtype], memory_format=torch.channels_last).eval()
            for tool, model in models.items()
        }
        for mode, batch in itertools.product(options.modes, options.batches):
            x = CASES[name].inputs(size=size, batch=batch).to(device, DTYPES[dtype], memory_format=torch.channels_last)
            runs = {tool: _runner(model, x, mode == "compiled") for tool, model in cast.items()}
            row: common.Record = {"dtype": dtype, "mode": mode, "batch": batch}
            try:
                times = time_in_turns(runs, device, options.rounds, options.seconds)
            except Exception as error:
                row["error"] = common.one_line(error)
                print(f"  {name:14} {dtype} {mode:8} batch {batch:4}  {row['error']}", flush=True)
            else:
                row["ms"] = {tool: common.median(values) for tool, values in times.items()}
                row["quartiles"] = {tool: _quartiles(values) for tool, values in times.items()}
                row["iterations"] = {tool: len(values) for tool, values in times.items()}
                said = "  ".join(f"{tool} {ms:8.3f} ms" for tool, ms in row["ms"].items())
                print(f"  {name:14} {dtype} {mode:8} batch {batch:4}  {said}", flush=True)
            record["latency"].append(row)
            torch._dynamo.reset()
            del runs, x
        del cast
        gc.collect()
    return record


def _quartiles(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]]


# --------------------------------------------------------------------------------------------------------------- report


def report(results: common.Record) -> str:
    """Return the Markdown page of one device."""
    about, settings = results["machine"], results["settings"]
    on = f"on the GPU ({about['accelerator']})" if results["device"] == "cuda" else "on the CPU (no GPU was there)"
    cost_rows, rows = [], []
    for name, record in results["models"].items():
        if "error" in record:
            continue
        total = record["models"]["dense"]["macs"]
        for tool in TOOLS:
            if tool not in record["models"]:
                cost_rows.append([f"`{name}`", tool, "–", "–", "–", record["failed"].get(tool, "–")])
                continue
            cost = record["models"][tool]
            cost_rows.append(
                [
                    f"`{name}`",
                    tool,
                    f"{cost['kept']:.3f}",
                    f"{cost['macs'] / 1e6:.1f}",
                    f"{cost['macs'] / total:.3f}",
                    f"{cost['parameters'] / 1e6:.2f}",
                ]
            )
        for row in record["latency"]:
            start = [f"`{name}`", row["dtype"], row["mode"], row["batch"]]
            if "error" in row:
                rows.append([*start, row["error"], "", "", "", ""])
                continue
            ms = row["ms"]
            rows.append(
                [
                    *start,
                    *(f"{ms[tool]:.3f}" if tool in ms else "–" for tool in TOOLS),
                    *(f"{ms['dense'] / ms[tool]:.2f}x" if tool in ms else "–" for tool in TOOLS[1:]),
                ]
            )
    return "\n".join(
        [
            f"# Latency {on}",
            "",
            "<!-- generated by benchmarks/latency.py -->",
            "",
            f"Dense against pruned by fxprune and by torch-pruning, both to {settings['macs']} of the dense model's",
            f"MACs (within {settings['tolerance']:.0%} where the widths allow),",
            f"widths rounded to {settings['round_to']}, channels-last, medians in milliseconds per batch.",
            "",
            common.machine_line(about),
            "",
            "## What was pruned",
            "",
            common.markdown_table(["model", "by", "channels kept", "MMACs", "of dense", "M parameters"], cost_rows),
            "",
            "## Latency",
            "",
            common.markdown_table(
                [
                    "model",
                    "dtype",
                    "mode",
                    "batch",
                    "dense, ms",
                    "fxprune, ms",
                    "t-p, ms",
                    "fxprune faster",
                    "t-p faster",
                ],
                rows,
            ),
        ]
    )


def main() -> None:
    """Read the command line, measure each model, write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=_names, default=None, help=f"default: {','.join(MODELS)}")
    parser.add_argument(
        "--macs", type=float, default=0.5, help="share of the dense model's MACs that both tools must reach"
    )
    parser.add_argument("--tolerance", type=float, default=0.02, help="how far from it is near enough")
    parser.add_argument("--round-to", type=int, default=8, help="both tools keep multiples of this many channels")
    parser.add_argument("--dtypes", type=_names, default=None, help="fp32, bf16, fp16")
    parser.add_argument("--modes", type=_names, default=None, help="eager, compiled")
    parser.add_argument("--batches", type=_numbers, default=None, help="default: 1,128 on a GPU and 1,8 on a CPU")
    parser.add_argument("--rounds", type=int, default=5, help="how often the models take turns")
    parser.add_argument("--seconds", type=float, default=0.3, help="about how long each turn lasts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--quick", action="store_true", help="small images, two models, eager float32 unless said otherwise"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    options.models = options.models or (QUICK_MODELS if options.quick else MODELS)
    options.dtypes = options.dtypes or (("fp32",) if options.quick else ("fp32", "bf16"))
    options.modes = options.modes or (("eager",) if options.quick else ("eager", "compiled"))
    options.batches = options.batches or ((1, 4) if options.quick else (1, 128) if device.type == "cuda" else (1, 8))
    unknown = [
        *set(options.models) - set(CASES),
        *set(options.dtypes) - set(DTYPES),
        *set(options.modes) - {"eager", "compiled"},
    ]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")

    warnings.simplefilter("ignore")
    torch.backends.cudnn.benchmark = True
    about = common.machine()
    if device.type != "cuda":
        about["accelerator"] = None
        print("No GPU: these are latencies of the CPU.")
    print(common.machine_line(about), flush=True)
    common.warn_if_busy(about)
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(options).items()}
    settings["tf32"] = {
        "convolutions": torch.backends.cudnn.allow_tf32,
        "matmul": torch.backends.cuda.matmul.allow_tf32,
    }
    results: common.Record = {"machine": about, "device": device.type, "settings": settings, "models": {}}
    label = about["accelerator"] or f"cpu {about['processor']}"
    stem = "latency_" + re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") + ("_quick" if options.quick else "")
    before = common.read(stem)
    alike = ("macs", "tolerance", "round_to", "quick", "tf32")
    if before and all(before["settings"].get(key) == settings[key] for key in alike):
        results["models"] = before["models"]
    for name in options.models:
        try:
            record = measure(name, options, device)
        except Exception as error:
            record = {"error": common.one_line(error)}
            print(f"  {name}: {record['error']}", flush=True)
        else:
            measured = {_setting(row) for row in record["latency"]}
            kept = [row for row in results["models"].get(name, {}).get("latency", ()) if _setting(row) not in measured]
            record["latency"] = sorted([*kept, *record["latency"]], key=_setting)
        results["models"][name] = record
        common.write(stem, results, report(results))
    print("\n" + report(results))


def _setting(row: common.Record) -> tuple[str, str, int]:
    return row["dtype"], row["mode"], row["batch"]


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in _names(text))


if __name__ == "__main__":
    main()
