"""The command line: ``fxprune inspect MODEL`` and ``fxprune prune MODEL --channels 0.5 -o out/``.

Results go to standard output, progress and errors to standard error, so that ``--json`` can be piped. An error of
fxprune's own is printed without a traceback and ends with exit code 2.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect as inspection
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import safetensors
import safetensors.torch
import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from fxprune import api
from fxprune.coupling import Coupling
from fxprune.errors import ArgumentError, FxpruneError, InputError

__all__ = ["app", "main"]

app = typer.Typer(
    name="fxprune",
    help="Structured pruning of any traceable PyTorch model: exact, without a rule per model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

_Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A torchvision name (resnet50), or package.module:factory for your own.",
        show_default=False,
    ),
]
_Keep = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="A module name or glob that must not be pruned; may be repeated.", show_default=False),
]
_Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE",
        help="Shape of an example input, as 1,3,224,224; once per positional argument. A torchvision name needs none.",
        show_default=False,
    ),
]
_Weights = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="torchvision weights to load, as DEFAULT or IMAGENET1K_V1 (downloads).", show_default=False),
]
_Checkpoint = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A state_dict to load: .safetensors, or what torch.save wrote.", show_default=False),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]


def main() -> None:
    """Entry point of the ``fxprune`` command."""
    app()


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"fxprune {importlib.metadata.version('fxprune')}")
        raise typer.Exit


@app.command()
def inspect(
    model: _Model,
    keep: _Keep = None,
    input_shapes: _Input = None,
    weights: _Weights = None,
    checkpoint: _Checkpoint = None,
    as_json: _Json = False,
    full: Annotated[bool, typer.Option("--full", help="Print every axis, and the nodes that tie them.")] = False,
) -> None:
    """Show what must be pruned together, and what is never pruned and why."""
    with _errors_to_stderr():
        with _stage(f"building {model}"):
            module, example_inputs = _load(model, input_shapes, weights, checkpoint)
        with _stage("analysing"):
            coupling = api.analyze(module, example_inputs, keep=tuple(keep or ()))
        if as_json:
            typer.echo(json.dumps(_coupling_to_dict(coupling), indent=2))
        elif full:
            typer.echo(str(coupling))
        else:
            _print_coupling(coupling)


@app.command()
def prune(
    model: _Model,
    channels: Annotated[
        float,
        typer.Option(metavar="SHARE", help="Share of every group's units to keep, in (0, 1].", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="Where plan.json, model.safetensors, report.json and report.txt go; made if missing.",
            show_default=False,
        ),
    ] = None,
    keep: _Keep = None,
    round_to: Annotated[int, typer.Option(metavar="N", help="Keep a multiple of N units per group.")] = 1,
    min_channels: Annotated[int, typer.Option(metavar="N", help="Keep at least N units per group.")] = 1,
    verify: Annotated[bool, typer.Option("--verify", help="Prove that the result equals the masked original.")] = False,
    input_shapes: _Input = None,
    weights: _Weights = None,
    checkpoint: _Checkpoint = None,
    as_json: _Json = False,
) -> None:
    """Prune a model and write the plan, the weights and a report."""
    with _errors_to_stderr():
        with _stage(f"building {model}"):
            module, example_inputs = _load(model, input_shapes, weights, checkpoint)
        if weights is None and checkpoint is None and ":" not in model:
            _stderr().print("note: the weights are random; --weights or --checkpoint gives trained ones", style="yellow")
        with _stage("pruning and verifying" if verify else "pruning"):
            pruned = api.prune(
                module,
                example_inputs,
                channels=channels,
                keep=tuple(keep or ()),
                round_to=round_to,
                min_channels=min_channels,
                verify=verify,
            )
        if out is not None:
            with _stage(f"writing {out}"):
                _write(
                    out,
                    {
                        "plan.json": lambda path: path.write_text(pruned.plan.to_json() + "\n", encoding="utf-8"),
                        "model.safetensors": lambda path: safetensors.torch.save_model(pruned.model, str(path)),
                        "report.json": lambda path: path.write_text(_dumps(pruned.report.to_dict()), encoding="utf-8"),
                        "report.txt": lambda path: path.write_text(f"{pruned.report}\n", encoding="utf-8"),
                    },
                )
        if as_json:
            typer.echo(_dumps(pruned.report.to_dict()), nl=False)
        else:
            typer.echo(str(pruned.report))


# ---- the model -----------------------------------------------------------------------------------------------


def _load(
    spec: str, input_shapes: list[str] | None, weights: str | None, checkpoint: Path | None
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model that ``spec`` names, in eval mode, and example inputs for it."""
    torch.manual_seed(0)  # the same command gives the same plan, also on random weights
    if ":" in spec:
        if weights is not None:
            raise ArgumentError(f"--weights is for torchvision names; {spec} is your own: load its weights with --checkpoint.")
        module = _own_model(spec)
        shapes = input_shapes
        if not shapes:
            raise InputError(f"{spec} is not a torchvision name, so its input is not known: pass --input, as --input 1,3,224,224.")
    else:
        module = _torchvision_model(spec, weights)
        shapes = input_shapes or [_usual_shape(spec)]
    if checkpoint is not None:
        _load_checkpoint(module, checkpoint)
    return module.eval(), tuple(torch.randn(_shape(text)) for text in shapes)


def _torchvision_model(name: str, weights: str | None) -> nn.Module:
    import torchvision

    known = torchvision.models.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise ArgumentError(f"No torchvision model is named {name!r}. {hint}Your own is named as package.module:factory.")
    builder = torchvision.models.get_model_builder(name)
    options: dict[str, Any] = {"weights": weights}
    if "weights_backbone" in inspection.signature(builder).parameters:
        options["weights_backbone"] = None  # the default would download a backbone
    try:
        with warnings.catch_warnings():
            # inception_v3 and googlenet announce a change of their random initialisation.
            warnings.filterwarnings("ignore", message="The default weight initialization", category=FutureWarning)
            module = builder(**options)
    except (KeyError, ValueError) as error:
        choices = ", ".join(torchvision.models.get_model_weights(name).__members__) or "none"
        raise ArgumentError(f"{name} has no weights named {weights!r}. Available: {choices}.") from error
    assert isinstance(module, nn.Module)
    return module


def _usual_shape(name: str) -> str:
    """Batch 1 at the resolution that the model's published weights expect; 16 frames for video."""
    import torchvision

    for entry in torchvision.models.get_model_weights(name):
        transform = entry.transforms  # a preset class, mostly inside functools.partial
        preset = getattr(transform, "func", transform).__name__
        if preset == "VideoClassification":
            height, width = transform.keywords["crop_size"]
            return f"1,3,16,{height},{width}"
        if preset == "OpticalFlow":
            raise InputError(f"{name} compares two images: pass --input twice, as --input 1,3,128,128 --input 1,3,128,128.")
    # inception_v3's auxiliary classifier, alive in training, needs more than the others.
    return "1,3,299,299" if name == "inception_v3" else "1,3,224,224"


def _own_model(spec: str) -> nn.Module:
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ArgumentError(f"MODEL {spec!r} is neither a torchvision name nor package.module:factory.")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as python -m does, so that a model beside the user is found
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ArgumentError(f"Cannot import {module_name!r} for MODEL {spec!r}: {error}.") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ArgumentError(f"{module_name!r} has no {attribute!r} (MODEL is package.module:factory).")
        found = getattr(found, part)
    made = found if isinstance(found, nn.Module) else found() if callable(found) else found
    if not isinstance(made, nn.Module):
        raise ArgumentError(f"{spec} gave {type(made).__name__}, not a torch.nn.Module.")
    return made


def _load_checkpoint(module: nn.Module, path: Path) -> None:
    try:
        if path.suffix == ".safetensors":
            safetensors.torch.load_model(module, str(path))
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        # Training scripts commonly wrap the state_dict with an epoch and an optimiser.
        module.load_state_dict(state.get("state_dict", state.get("model", state)))
    except OSError as error:
        raise ArgumentError(f"Cannot read checkpoint {path}: {error.strerror or error}.") from error
    except Exception as error:  # pickle, safetensors and torch each raise their own; all mean: not this model's state_dict
        raise ArgumentError(f"Checkpoint {path} does not fit the model: {error}") from error


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise InputError(f"--input {text!r} is not a shape: write positive sizes with commas, as 1,3,224,224.")
    return shape


# ---- the output ----------------------------------------------------------------------------------------------


def _coupling_to_dict(coupling: Coupling) -> dict[str, Any]:
    return {
        "groups": [
            {
                "name": group.name,
                "units": group.size,
                "axes": [str(axis) for axis in group.axes],
                "blocks": group.blocks,
                "normalised": list(group.normalised),
            }
            for group in coupling.groups
        ],
        "pinned": [
            {"axes": [str(axis) for axis in pinned.axes], "reason": pinned.reason, "node": pinned.node}
            for pinned in coupling.pinned
        ],
        "untouched": list(coupling.untouched),
        "decisions": list(coupling.decisions),
    }


def _print_coupling(coupling: Coupling) -> None:
    console = Console()
    units = sum(group.size for group in coupling.groups)
    groups = Table(title=f"{len(coupling.groups)} groups, {units:,} units", title_justify="left")
    groups.add_column("group", overflow="fold")
    groups.add_column("units", justify="right")
    groups.add_column("axes", justify="right")
    groups.add_column("of the axes", overflow="fold")
    for group in coupling.groups:
        shown = ", ".join(str(axis) for axis in group.axes[:2]) + (", ..." if len(group.axes) > 2 else "")
        size = f"{group.size} in {group.blocks} blocks" if group.blocks else str(group.size)
        groups.add_row(escape(group.name), size, str(len(group.axes)), escape(shown))
    console.print(groups)
    if coupling.pinned:
        pinned = Table(title="pinned, never pruned", title_justify="left")
        pinned.add_column("axes", overflow="fold")
        pinned.add_column("reason", overflow="fold")
        pinned.add_column("node", overflow="fold")
        for entry in coupling.pinned:
            shown = ", ".join(str(axis) for axis in entry.axes[:2]) + (", ..." if len(entry.axes) > 2 else "")
            pinned.add_row(escape(shown), escape(entry.reason), escape(entry.node))
        console.print(pinned)
    for title, lines in (("not used by any operation", coupling.untouched), ("control flow fixed", coupling.decisions)):
        if lines:
            console.print(f"{title}:")
            for line in lines:
                console.print(f"  {line}", markup=False, highlight=False)


def _dumps(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2) + "\n"


def _write(folder: Path, files: dict[str, Callable[[Path], Any]]) -> None:
    """Write all files or none: each is made beside the folder first, then moved in place."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not folder.is_dir():
            raise ArgumentError(f"--out {folder} is a file, not a folder.")
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for name, write in files.items():
                write(staging / name)
            folder.mkdir(exist_ok=True)
            for name in files:
                os.replace(staging / name, folder / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise ArgumentError(f"Cannot write to --out {folder}: {error.strerror or error}.") from error


def _stderr() -> Console:
    # Made anew each time: standard error may have been replaced since the import.
    return Console(stderr=True, highlight=False)


@contextmanager
def _stage(text: str) -> Iterator[None]:
    """Say on standard error what is going on, with a spinner on a terminal, and how long it took."""
    console = _stderr()
    start = time.perf_counter()
    with console.status(f"{escape(text)} ..."):
        yield
    console.print(f"{escape(text)}: {time.perf_counter() - start:.1f} s", style="dim")


@contextmanager
def _errors_to_stderr() -> Iterator[None]:
    try:
        yield
    except FxpruneError as error:
        console = _stderr()
        console.print("error:", style="bold red", end=" ")
        console.print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
