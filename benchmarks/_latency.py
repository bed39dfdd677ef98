"""Common code of the latency benchmarks: models, options, and one results file per device."""

from __future__ import annotations

import argparse
import ctypes
import itertools
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import _common as common
import torch
from torch import nn

from fxprune.latency import MODES, PRECISIONS, Latency, Setting, measure
from tests.torchvision_models import CASES, COMPOSITE

KNOWN = {**CASES, **COMPOSITE}
MODELS = (
    "vgg16_bn",
    "resnet18",
    "resnet50",
    "densenet121",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_v2_s",
    "regnet_y_8gf",
    "convnext_tiny",
    "vit_b_16",
    "swin_t",
    "deeplabv3_resnet50",
    "retinanet_resnet50_fpn",
)
QUICK_MODELS = ("resnet18", "mobilenet_v2")


def parser(description: str | None, models: Sequence[str] = MODELS) -> argparse.ArgumentParser:
    """Return a parser with the options that all latency benchmarks have."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--models", type=common.names, default=None, help=f"default: {','.join(models)}"
    )
    made.add_argument(
        "--precisions",
        type=common.names,
        help=f"names from {', '.join(PRECISIONS)}; default: bf16 on a GPU, fp32 on a CPU",
    )
    made.add_argument(
        "--modes",
        type=common.names,
        help=f"names from {', '.join(MODES)}; default: eager,compiled on a GPU, eager on a CPU",
    )
    made.add_argument(
        "--batches", type=common.numbers, help="batch sizes; default: 1,256 on a GPU, 1,8 on a CPU"
    )
    made.add_argument("--rounds", type=int, default=7, help="how often the models take turns")
    made.add_argument("--seconds", type=float, default=0.2, help="about how long each turn lasts")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument(
        "--quick", action="store_true", help="small images, two models, batches of 1 and 4"
    )
    return made


def options(
    made: argparse.ArgumentParser, models: Sequence[str] = MODELS, known: Mapping[str, Any] = KNOWN
) -> argparse.Namespace:
    """Read the command line, fill in defaults that depend on the device, and print the device."""
    found = made.parse_args()
    on_gpu = torch.device(found.device).type == "cuda"
    quick = tuple(name for name in QUICK_MODELS if name in models) or models[:1]
    found.models = found.models or (quick if found.quick else models)
    found.precisions = found.precisions or (("bf16",) if on_gpu else ("fp32",))
    found.modes = found.modes or (("eager", "compiled") if on_gpu else ("eager",))
    found.batches = found.batches or ((1, 4) if found.quick else (1, 256) if on_gpu else (1, 8))
    found.size = "small" if found.quick else "native"
    unknown = [
        *set(found.models) - set(known),
        *set(found.precisions) - set(PRECISIONS),
        *set(found.modes) - set(MODES),
    ]
    if unknown:
        made.error(f"unknown: {', '.join(unknown)}")
    warnings.simplefilter("ignore")
    print("On the GPU." if on_gpu else "No GPU: these are latencies of the CPU.", flush=True)
    return found


def settings(found: argparse.Namespace) -> Iterator[Setting]:
    """Yield every combination of precision, mode and batch size."""
    for precision, mode, batch in itertools.product(found.precisions, found.modes, found.batches):
        yield Setting(found.device, precision, mode, batch=batch)


def built(name: str, size: str) -> tuple[nn.Module, Any]:
    """Return a model in eval mode and an example of one image."""
    case = KNOWN[name]
    return case.build(size=size).eval(), case.inputs(size=size, batch=1)


def time_all(
    models: Mapping[str, nn.Module], inputs: Any, found: argparse.Namespace
) -> list[common.Record]:
    """Return one row per setting: the milliseconds of every model, or the error."""
    rows = []
    for setting in settings(found):
        row: common.Record = {
            "precision": setting.precision,
            "mode": setting.mode,
            "batch": setting.batch,
        }
        try:
            row |= fitting(models, inputs, setting, found)
            summary = "  ".join(
                f"{name} {latency['ms']:.3f} ms" for name, latency in row["latency"].items()
            )
        except Exception as error:
            summary = row["error"] = common.one_line(error)
        print(
            f"  {setting.precision} {setting.mode:9} batch {row['batch']:4}  {summary}", flush=True
        )
        rows.append(row)
        torch._dynamo.reset()
    return rows


def fitting(
    models: Mapping[str, nn.Module], inputs: Any, setting: Setting, found: argparse.Namespace
) -> common.Record:
    """Measure the models, and return the times and the batch size.

    The batch is halved until it fits into the GPU's memory.
    """
    batch = setting.batch
    assert batch is not None
    while True:
        try:
            measured = measure(
                models,
                inputs,
                replace(setting, batch=batch),
                rounds=found.rounds,
                seconds=found.seconds,
            )
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        else:
            return {
                "batch": batch,
                "latency": {name: as_record(latency) for name, latency in measured.items()},
            }
        batch //= 2  # after the except block, because the error keeps the tensors alive
        print(f"  out of memory: trying a batch of {batch}", flush=True)
        torch.cuda.empty_cache()


def as_record(latency: Latency) -> common.Record:
    """Return one measurement as JSON data."""
    timing = latency.timing
    return {
        "ms": timing.ms,
        "quartiles": [timing.low, timing.high],
        "measurements": timing.count,
        "floor_ms": latency.floor_ms,
        "throughput": latency.throughput,
        "peak_bytes": latency.peak_bytes,
    }


def keep_memory() -> bool:
    """Let the C library keep freed memory for the next call; return whether that worked.

    The allocators of production servers do the same. By default glibc gives large blocks back to
    the system, and their pages fault again. At batch 8 this happens up to 45,000 times in one call
    of torchvision's ResNet-50, and up to three times as often in one spelling of a network as in
    another, only because blocks are freed in another order. If all blocks stay, the times depend
    on the network alone.
    """
    # M_TRIM_THRESHOLD and M_MMAP_MAX of mallopt(3)
    trim_threshold, largest_number_of_mappings = -1, -4
    try:
        library = ctypes.CDLL("libc.so.6")
        return bool(
            library.mallopt(trim_threshold, 2**31 - 1)
            and library.mallopt(largest_number_of_mappings, 0)
        )
    except (OSError, AttributeError):  # another C library
        return False


def run(
    found: argparse.Namespace,
    question: str,
    measure: Callable[[str, argparse.Namespace], common.Record],
    report: Callable[[common.Record], str],
    *,
    alike: Sequence[str],
    plot: Callable[[common.Record], None] | None = None,
) -> None:
    """Measure each model and write the results after each one.

    Earlier results for this device are kept for models that are not measured now. ``alike`` names
    the options that must be the same for that; otherwise the file is started anew.
    """
    about = common.machine()
    if not found.device.startswith("cuda"):
        about["accelerator"] = None
    common.warn_if_busy(about)
    print(common.machine_line(about), flush=True)
    label = about["accelerator"] or f"cpu {about['processor']}"
    stem = (
        f"{question}_"
        + re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
        + ("_quick" if found.quick else "")
    )
    chosen = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(found).items()
    }
    chosen["keeps_memory"] = keep_memory()
    before = common.read(stem)
    same = all(
        before.get("settings", {}).get(name) == chosen[name] for name in (*alike, "keeps_memory")
    )
    kept = before.get("models", {}) if same else {}
    command = f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".rstrip()
    results: common.Record = {
        "machine": about,
        "command": command,
        "settings": chosen,
        "stem": stem,
        "models": kept,
    }
    for name in found.models:
        print(name, flush=True)
        try:
            record = measure(name, found)
        except Exception as error:
            record = {"error": common.one_line(error)}
            print(f"  {record['error']}", flush=True)
        else:
            measured = {_setting(row) for row in record["rows"]}
            others = [
                row for row in kept.get(name, {}).get("rows", ()) if _setting(row) not in measured
            ]
            record["rows"] = sorted([*others, *record["rows"]], key=_setting)
        results["models"][name] = record
        if plot is not None:
            plot(results)
        common.write(stem, results, report(results))
    print("\n" + report(results))


def lines(results: common.Record) -> Iterator[tuple[list[Any], common.Record | None]]:
    """Yield the beginning of a table line and the measured row, for each row of each model.

    A line with an error is complete, and its row is None.
    """
    for name, record in results["models"].items():
        if "error" in record:
            yield [f"`{name}`", record["error"]], None
        for row in record.get("rows", ()):
            line = [f"`{name}`", row["precision"], row["mode"], row["batch"]]
            yield ([*line, row["error"]], None) if "error" in row else (line, row)


def _setting(row: common.Record) -> tuple[str, str, int]:
    return row["precision"], row["mode"], row["batch"]


def page(results: common.Record, title: str, text: Sequence[str], *blocks: str) -> str:
    """Return a Markdown page: title, command, explanation, machine and tables."""
    accelerator = results["machine"]["accelerator"]
    where = f"on the GPU ({accelerator})" if accelerator else "on the CPU (no GPU was used)"
    memory = (
        "Memory that a call frees is kept for the next one."
        if results["settings"].get("keeps_memory")
        else ""
    )
    about = f"{common.machine_line(results['machine'])} {memory}".rstrip()
    heading = [f"# {title}, {where}", f"`{results['command']}`", "\n".join(text), about]
    return "\n\n".join([*(part for part in heading if part), *blocks])
