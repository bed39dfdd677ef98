"""Common code of the benchmarks: models, torch-pruning, one process per model, and results."""

from __future__ import annotations

import contextlib
import copy
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import signal
import statistics
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
if str(ROOT) not in sys.path:  # run from a checkout, installed or not
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from fxprune.cost import MacCounter  # noqa: E402

Record = dict[str, Any]


# ------------------------------------------------------------------------------------------ models


def first_tensor(output: Any) -> Tensor:
    """Return the main output of a model: the tensor itself, or the first one in a container."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output


def parameter_count(model: nn.Module) -> int:
    """Return the number of elements of the parameters, shared parameters counted once."""
    return sum(p.numel() for p in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, shared ones counted once."""
    return sum(
        t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    )


@torch.no_grad()
def count_macs(model: nn.Module, inputs: Tensor) -> int:
    """Return the multiply-accumulates of one forward pass.

    They are counted from the ATen operations that run, in the same way for every kind of model.
    """
    with MacCounter() as counter:
        model(inputs)
    return counter.macs


# --------------------------------------------------------------------------------------- the rival


def output_layers(model: nn.Module, inputs: Tensor) -> list[nn.Module]:
    """Return the layers with as many outputs as the model has classes.

    torch-pruning also prunes the outputs unless the user lists the last layers. This function
    lists every ``Linear`` and convolution of such a width, as a user of its plain interface does
    by hand.
    """
    with torch.no_grad():
        outputs = torch.utils._pytree.tree_leaves(model(inputs))
    classes = {out.shape[1] for out in outputs if isinstance(out, Tensor) and out.dim() > 1}
    widths = {
        nn.Linear: "out_features",
        nn.Conv1d: "out_channels",
        nn.Conv2d: "out_channels",
        nn.Conv3d: "out_channels",
    }
    return [
        module
        for module in model.modules()
        for kind, attribute in widths.items()
        if isinstance(module, kind) and getattr(module, attribute) in classes
    ]


def torch_pruning_prune(
    model: nn.Module,
    inputs: Tensor,
    ratio: float,
    *,
    ignored: Sequence[nn.Module],
    round_to: int | None = None,
    num_heads: Mapping[nn.Module, int] | None = None,
) -> nn.Module:
    """Prune ``model`` **in place** with torch-pruning's plain interface.

    The importance is the L2 magnitude, and ``ratio`` is removed from each layer. ``num_heads``
    gives the number of heads of attention layers, which torch-pruning does not find out.
    """
    import torch_pruning

    pruner = torch_pruning.pruner.BasePruner(
        model,
        inputs,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=list(ignored),
        round_to=round_to,
        # its defaults are shared between calls and remember earlier models
        in_channel_groups={},
        out_channel_groups={},
        num_heads=dict(num_heads or {}),
    )
    pruner.step()
    return model


def torch_pruning_to_macs(
    dense: nn.Module,
    inputs: Tensor,
    kept: float,
    importance: Callable[[nn.Module], Any],
    ignored: Callable[[nn.Module], Sequence[nn.Module]],
    attempts: int = 12,
) -> nn.Module:
    """Prune a copy to at most ``kept`` of the MACs, as near as bisection of the ratio comes.

    torch-pruning prunes globally. ``importance`` and ``ignored`` give the importance and the
    ignored layers of a copy of the model.
    """
    import torch_pruning

    limit = kept * count_macs(dense, inputs)
    low, high, best = 0.0, 1.0, None
    for _ in range(attempts):
        ratio, model = (low + high) / 2, copy.deepcopy(dense).eval()
        try:
            torch_pruning.pruner.BasePruner(
                model,
                inputs,
                importance=importance(model),
                global_pruning=True,
                pruning_ratio=ratio,
                ignored_layers=[*ignored(model)],
                # its defaults are shared between calls and remember earlier models
                in_channel_groups={},
                out_channel_groups={},
            ).step()
            macs = count_macs(model, inputs)
        except Exception:  # it removed a whole layer, so the model cannot run
            high = ratio
            continue
        if macs > limit:
            low = ratio
            continue
        high = ratio
        if best is None or macs > best[1]:
            best = model, macs
    if best is None:
        raise RuntimeError(f"no pruning_ratio leaves a model that runs at {kept:.0%} of the MACs")
    best[0].zero_grad()
    return best[0]


def torch_pruning_faults(before: nn.Module, after: nn.Module, inputs: Tensor) -> str | None:
    """Return in one line what is wrong with torch-pruning's result, or None if nothing is.

    A result is wrong if nothing was removed, or if the outputs have another shape.
    """
    left, total = parameter_count(after), parameter_count(before)
    if left >= total:
        return "removed nothing"
    with torch.no_grad():
        expected, got = first_tensor(before(inputs)).shape, first_tensor(after(inputs)).shape
    if expected != got:
        return f"output shape changed from {tuple(expected)} to {tuple(got)}"
    return None


# ---------------------------------------------------------------------------- processes and memory


def one_line(error: BaseException) -> str:
    """Return an error as ``Type: first line of the message``, without absolute paths.

    The text has at most 160 characters.
    """
    text = next(iter(str(error).strip().splitlines()), "")
    return re.sub(r"(?<!\w)/\S*/", "", f"{type(error).__name__}: {text}")[:160]


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TimeoutError`` in the block after ``seconds``.

    On systems without ``SIGALRM`` there is no limit.
    """

    def ring(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _child(
    connection: Connection, target: Callable[..., Record], arguments: tuple[Any, ...], threads: int
) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    try:
        record = target(*arguments)
    except Exception as error:
        traceback.print_exc()
        record = {"error": one_line(error)}
    connection.send(record)
    connection.close()


def in_child(target: Callable[..., Record], *arguments: Any, timeout: float = 900.0) -> Record:
    """Run ``target(*arguments)`` in a new process that has the libraries imported.

    ``target`` must be a module-level function.

    Returns
    -------
    The record that ``target`` returns. If it raises an error, dies or takes longer than
    ``timeout`` seconds, the record is ``{"error": ...}``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "torch_pruning"])
    folders = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    # the server does not inherit sys.path
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, folders)))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_child, args=(sender, target, arguments, torch.get_num_threads()), daemon=True
    )
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            return {"error": f"took longer than {timeout:.0f} s"}
        return receiver.recv()
    except EOFError:
        process.join()
        return {"error": f"the process ended with code {process.exitcode} and no result"}
    finally:
        if process.is_alive():
            process.join(5)
        if process.is_alive():
            process.kill()
        process.join()
        receiver.close()


# --------------------------------------------------------------------------------- writing it down


def machine() -> Record:
    """Describe what the figures depend on: processor, accelerator, threads and versions."""
    processor = platform.processor() or platform.machine()
    try:
        match = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
        processor = match.group(1).strip() if match else processor
    except OSError:
        pass
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {
            name: _version(name) for name in ("torch", "torchvision", "torch-pruning", "fxprune")
        },
    }


def warn_if_busy(about: Record) -> None:
    """Print a warning if other processes use the machine, because they distort the times."""
    if about["load"] is not None and about["load"] > 0.5 * (about["cores"] or 1):
        print(
            f"warning: load average {about['load']}: other processes are running, do not trust "
            "the times",
            file=sys.stderr,
        )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_line(about: Record) -> str:
    """Return the description of :func:`machine` as one line of Markdown."""
    versions = ", ".join(
        f"{name} {version}" for name, version in about["versions"].items() if version
    )
    device = f"{about['accelerator']}, " if about["accelerator"] else ""
    processor = f"{about['processor']}, {about['cores']} cores, {about['threads']} threads"
    return f"{device}{processor}; {versions}; {about['date']}."


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; every column but the first is right-aligned."""
    lines = [
        "| " + " | ".join(header) + " |",
        "|" + "|".join(["---", *["---:"] * (len(header) - 1)]) + "|",
    ]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def write(stem: str, record: Record, markdown: str) -> None:
    """Write ``benchmarks/results/<stem>.json`` and ``.md``, and print their names."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / f"{stem}.md").write_text(markdown.rstrip() + "\n")
    print(f"\nwritten: benchmarks/results/{stem}.json and {stem}.md", flush=True)


def read(stem: str) -> Record:
    """Return the content of ``benchmarks/results/<stem>.json``, or an empty record."""
    path = RESULTS / f"{stem}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def median(values: Sequence[float]) -> float:
    """Return the median as a plain float."""
    return float(statistics.median(values))


# ----------------------------------------------------------------------------------- command lines


def names(text: str) -> tuple[str, ...]:
    """Return the names in a comma-separated text."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def numbers(text: str) -> tuple[int, ...]:
    """Return the whole numbers in a comma-separated text."""
    return tuple(int(part) for part in names(text))


def shares(text: str) -> tuple[float, ...]:
    """Return the numbers in a comma-separated text."""
    return tuple(float(part) for part in names(text))
