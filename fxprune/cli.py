"""The command line: ``fxprune inspect``, ``plan``, ``prune``, ``apply`` and ``compare``.

Results go to standard output, progress and errors to standard error, so that ``--json`` can be piped. An error of
fxprune's own is printed without a traceback and ends with exit code 2.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.metadata
import inspect as inspection
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
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
from fxprune.criteria import CRITERIA
from fxprune.errors import ArgumentError, FxpruneError, InputError
from fxprune.plan import Plan

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
        help="Shape of an example input, as 1,3,224,224; once per positional argument. A list of tensors has + behind each: "
        "3,320,320+3,300,400+. A torchvision name needs none.",
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
_Saved = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="Start from an earlier result of -o instead, whose first model was MODEL.", show_default=False
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
_Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="FOLDER",
        help="Where plan.json, model.safetensors, report.json and report.txt go; made if missing.",
        show_default=False,
    ),
]
_Verify = Annotated[bool, typer.Option("--verify", help="Prove that the result equals the masked original.")]
_Channels = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Share of units to keep, in (0, 1]: of every group, see --scope.", show_default=False),
]
_Macs = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Share of multiply-accumulates to keep, in (0, 1].", show_default=False),
]
_Params = Annotated[
    float | None, typer.Option(metavar="SHARE", help="Share of parameters to keep, in (0, 1].", show_default=False)
]
_Scope = Annotated[
    str, typer.Option(metavar="SCOPE", help="What --channels counts: group (each group) or global (all together).")
]
_Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layer",
        metavar="GLOB=SHARE",
        help="Share of units that matching layers keep, whatever the budgets ask for; may be repeated.",
        show_default=False,
    ),
]
_Units = Annotated[
    list[str] | None,
    typer.Option(
        metavar="UNIT",
        help="What a unit of an attention is: dims (of its heads, the default) or heads (whole ones); GLOB=UNIT for single "
        "modules, may be repeated.",
        show_default=False,
    ),
]
_Criterion = Annotated[
    str,
    typer.Option(metavar="NAME", help=f"How important a unit is: {', '.join(CRITERIA)}, or package.module:criterion of your own."),
]
_RoundTo = Annotated[int, typer.Option(metavar="N", help="Keep a multiple of N units per group.")]
_MinChannels = Annotated[int, typer.Option(metavar="N", help="Keep at least N units per group.")]


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
    units: _Units = None,
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
            coupling = api.analyze(module, example_inputs, keep=tuple(keep or ()), units=_units(units))
        if as_json:
            typer.echo(json.dumps(_coupling_to_dict(coupling), indent=2))
        elif full:
            typer.echo(str(coupling))
        else:
            _print_coupling(coupling)


@app.command()
def plan(
    model: _Model,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Where the plan goes, as JSON.", show_default=False),
    ] = None,
    channels: _Channels = None,
    macs: _Macs = None,
    params: _Params = None,
    scope: _Scope = "group",
    layers: _Layers = None,
    criterion: _Criterion = "cpmc",
    keep: _Keep = None,
    units: _Units = None,
    round_to: _RoundTo = 1,
    min_channels: _MinChannels = 1,
    input_shapes: _Input = None,
    weights: _Weights = None,
    checkpoint: _Checkpoint = None,
    saved: _Saved = None,
    as_json: _Json = False,
) -> None:
    """Choose what survives, and write that down; nothing else is written."""
    with _errors_to_stderr():
        options = _options(channels, macs, params, scope, layers, keep, units, round_to, min_channels)
        found = _criterion(criterion)
        module, example_inputs = _built(model, input_shapes, weights, checkpoint, saved)
        with _stage("planning"):
            pruned = api.prune(module, example_inputs, criterion=found, **options)
        if out is not None:
            with _stage(f"writing {out}"):
                _write_text(out, pruned.plan.to_json() + "\n")
        typer.echo(pruned.plan.to_json() if as_json else _planned(pruned))


@app.command()
def prune(
    model: _Model,
    out: _Out = None,
    channels: _Channels = None,
    macs: _Macs = None,
    params: _Params = None,
    scope: _Scope = "group",
    layers: _Layers = None,
    criterion: _Criterion = "cpmc",
    keep: _Keep = None,
    units: _Units = None,
    round_to: _RoundTo = 1,
    min_channels: _MinChannels = 1,
    verify: _Verify = False,
    input_shapes: _Input = None,
    weights: _Weights = None,
    checkpoint: _Checkpoint = None,
    saved: _Saved = None,
    as_json: _Json = False,
) -> None:
    """Prune a model and write the plan, the weights and a report."""
    with _errors_to_stderr():
        options = _options(channels, macs, params, scope, layers, keep, units, round_to, min_channels)
        found = _criterion(criterion)
        module, example_inputs = _built(model, input_shapes, weights, checkpoint, saved)
        with _stage("pruning and verifying" if verify else "pruning"):
            pruned = api.prune(module, example_inputs, criterion=found, verify=verify or None, **options)
        _deliver(pruned, out, as_json)


@app.command()
def apply(
    plan: Annotated[
        Path, typer.Argument(metavar="PLAN", help="What fxprune plan or fxprune prune wrote: a plan.json.", show_default=False)
    ],
    model: _Model,
    out: _Out = None,
    verify: _Verify = False,
    weights: _Weights = None,
    checkpoint: _Checkpoint = None,
    saved: _Saved = None,
    as_json: _Json = False,
) -> None:
    """Replay a plan on a model of the architecture that it was made for, for instance with other weights."""
    with _errors_to_stderr():
        replayed = Plan.from_json(_read_text(plan))
        with _stage(f"building {model}"):
            module = _load_model(model, weights, checkpoint, saved)
        _note_random(model, weights, checkpoint, saved)
        with _stage("applying and verifying" if verify else "applying"):
            pruned = api.apply(replayed, module)
            if verify:
                error = api.verify(module, pruned).error
                pruned = dataclasses.replace(pruned, report=dataclasses.replace(pruned.report, error=error))
        _deliver(pruned, out, as_json)


@app.command()
def compare(
    model: _Model,
    criteria: Annotated[
        str, typer.Option(metavar="NAMES", help="Criteria to set side by side, with commas; each as --criterion of prune.")
    ] = "cpmc,l1,lamp",
    channels: _Channels = None,
    macs: _Macs = None,
    params: _Params = None,
    scope: _Scope = "group",
    layers: _Layers = None,
    keep: _Keep = None,
    units: _Units = None,
    round_to: _RoundTo = 1,
    min_channels: _MinChannels = 1,
    input_shapes: _Input = None,
    weights: _Weights = None,
    checkpoint: _Checkpoint = None,
    saved: _Saved = None,
    as_json: _Json = False,
    full: Annotated[bool, typer.Option("--full", help="Print all groups, not only those on which the criteria differ.")] = False,
) -> None:
    """Show what several criteria leave within the same budget: cost, units kept per group, and how much they agree."""
    with _errors_to_stderr():
        options = _options(channels, macs, params, scope, layers, keep, units, round_to, min_channels)
        names = [name.strip() for name in criteria.split(",") if name.strip()]
        if len(set(names)) < 2 or len(set(names)) < len(names):
            raise ArgumentError(f"--criteria {criteria!r} must name two criteria or more, each once, as --criteria cpmc,l1.")
        found = {name: _criterion(name) for name in names}
        module, example_inputs = _built(model, input_shapes, weights, checkpoint, saved)
        results = {}
        for name in names:
            with _stage(f"pruning by {name}"):
                results[name] = api.prune(module, example_inputs, criterion=found[name], **options)
        if as_json:
            typer.echo(_dumps(_comparison_to_dict(results)), nl=False)
        else:
            _print_comparison(results, full)


# ---- options -------------------------------------------------------------------------------------------------


def _options(
    channels: float | None,
    macs: float | None,
    params: float | None,
    scope: str,
    layers: list[str] | None,
    keep: list[str] | None,
    units: list[str] | None,
    round_to: int,
    min_channels: int,
) -> dict[str, Any]:
    """The budget, as arguments of :func:`fxprune.prune`."""
    return {
        "channels": channels,
        "macs": macs,
        "params": params,
        "scope": scope,
        "layers": dict(_layer(text) for text in layers or ()),
        "keep": tuple(keep or ()),
        "units": _units(units),
        "round_to": round_to,
        "min_channels": min_channels,
    }


def _layer(text: str) -> tuple[str, float]:
    glob, _, share = text.rpartition("=")
    try:
        if glob:
            return glob, float(share)
    except ValueError:
        pass
    raise ArgumentError(f"--layer {text!r} is not GLOB=SHARE: write for instance --layer 'layer4.*=0.3'.")


def _units(texts: list[str] | None) -> dict[str, str]:
    """The last that matches counts; one without a glob is for all modules."""
    return {glob or "*": unit for glob, _, unit in (text.rpartition("=") for text in texts or ())}


def _criterion(text: str) -> Any:
    """A name that fxprune knows, or what ``package.module:attribute`` names."""
    if ":" not in text:
        if text not in CRITERIA:
            raise ArgumentError(
                f"No criterion is named {text!r}: choose from {', '.join(CRITERIA)}, or name your own as package.module:criterion."
            )
        return text
    found = _attribute(text, "a criterion")
    if not callable(found) and not hasattr(found, "scores"):
        raise ArgumentError(f"{text} is a {type(found).__name__}: a criterion is a function or has scores(coupling, model).")
    return found


def _note_random(model: str, weights: str | None, checkpoint: Path | None, saved: Path | None) -> None:
    if weights is None and checkpoint is None and saved is None and ":" not in model:
        _stderr().print(
            "note: the weights are random; --weights, --checkpoint or --saved gives trained ones", style="yellow", soft_wrap=True
        )


def _built(
    model: str, input_shapes: list[str] | None, weights: str | None, checkpoint: Path | None, saved: Path | None
) -> tuple[nn.Module, tuple[Any, ...]]:
    with _stage(f"building {model}"):
        built = _load(model, input_shapes, weights, checkpoint, saved)
    _note_random(model, weights, checkpoint, saved)
    return built


def _deliver(pruned: api.Pruned, out: Path | None, as_json: bool) -> None:
    """Write the result, if asked to, and print its report."""
    if out is not None:
        with _stage(f"writing {out}"):
            pruned.save(out)
    if as_json:
        typer.echo(_dumps(pruned.report.to_dict()), nl=False)
    else:
        typer.echo(str(pruned.report))


# ---- the model -----------------------------------------------------------------------------------------------


def _load(
    spec: str,
    input_shapes: list[str] | None,
    weights: str | None,
    checkpoint: Path | None,
    saved: Path | None = None,
) -> tuple[nn.Module, tuple[Any, ...]]:
    """The model that ``spec`` names, in eval mode, and example inputs for it."""
    module = _load_model(spec, weights, checkpoint, saved)
    shapes = input_shapes
    if not shapes and ":" in spec:
        raise InputError(f"{spec} is not a torchvision name, so its input is not known: pass --input, as --input 1,3,224,224.")
    return module, tuple(_example(text) for text in shapes or _usual_shapes(spec))


def _load_model(spec: str, weights: str | None, checkpoint: Path | None, saved: Path | None) -> nn.Module:
    """The model that ``spec`` names, with the weights that are asked for, in eval mode."""
    torch.manual_seed(0)  # the same command gives the same plan, also on random weights
    if saved is not None and (weights is not None or checkpoint is not None):
        raise ArgumentError("--saved holds weights of its own: leave out --weights and --checkpoint.")
    if ":" in spec:
        if weights is not None:
            raise ArgumentError(f"--weights is for torchvision names; {spec} is your own: load its weights with --checkpoint.")
        module = _own_model(spec)
    else:
        module = _torchvision_model(spec, weights)
    if saved is not None:
        module = api.load(saved, module).model
    if checkpoint is not None:
        _load_checkpoint(module, checkpoint)
    return module.eval()


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


def _usual_shapes(name: str) -> list[str]:
    """What ``--input`` would be: batch 1 at the resolution that the model's published weights expect; 16 frames for video."""
    import torchvision

    for entry in torchvision.models.get_model_weights(name):
        transform = entry.transforms  # a preset class, mostly inside functools.partial
        preset = getattr(transform, "func", transform).__name__
        if preset == "VideoClassification":
            height, width = transform.keywords["crop_size"]
            return [f"1,3,16,{height},{width}"]
        if preset == "OpticalFlow":
            height, width = entry.meta["min_size"]
            return 2 * [f"1,3,{height},{width}"]
        if preset == "ObjectDetection":
            return ["3,320,320+3,300,400+"]
    # inception_v3's auxiliary classifier, alive in training, needs more than the others.
    return ["1,3,299,299" if name == "inception_v3" else "1,3,224,224"]


def _own_model(spec: str) -> nn.Module:
    found = _attribute(spec, "MODEL")
    made = found if isinstance(found, nn.Module) else found() if callable(found) else found
    if not isinstance(made, nn.Module):
        raise ArgumentError(f"{spec} gave {type(made).__name__}, not a torch.nn.Module.")
    return made


def _attribute(spec: str, what: str) -> Any:
    """What ``package.module:attribute`` names."""
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ArgumentError(f"{what} {spec!r} must be named as package.module:attribute, or be one that fxprune knows by name.")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as python -m does, so that a model beside the user is found
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ArgumentError(f"Cannot import {module_name!r} for {what} {spec!r}: {error}.") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ArgumentError(f"{module_name!r} has no {attribute!r} ({what} is named as package.module:attribute).")
        found = getattr(found, part)
    return found


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


def _example(text: str) -> Tensor | list[Tensor]:
    """A tensor, or a list of tensors, of random values in [0, 1): a detector refuses others."""
    if "+" in text:
        return [torch.rand(_shape(part, text)) for part in text.removesuffix("+").split("+")]
    return torch.rand(_shape(text, text))


def _shape(text: str, given: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise InputError(
            f"--input {given!r} is not a shape: write positive sizes with commas, as 1,3,224,224, or several with + behind each."
        )
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
        "pinned_macs": coupling.pinned_macs(),
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
    held = [f"{share:.1%} {reason}" for reason, share in coupling.pinned_macs().items()]
    for title, lines in (
        ("multiply-accumulates held by pins, of all", held),
        ("not used by any operation", coupling.untouched),
        ("control flow fixed", coupling.decisions),
    ):
        if lines:
            console.print(f"{title}:")
            for line in lines:
                console.print(f"  {line}", markup=False, highlight=False)


def _dumps(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2) + "\n"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"Cannot read {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path} is not text: {error}.") from error


def _write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise ArgumentError(f"Cannot write to --out {path}: {error.strerror or error}.") from error


def _planned(pruned: api.Pruned) -> str:
    """A plan and what it would bring, for a person."""
    report = dataclasses.replace(pruned.report, groups=(), pinned=(), untouched=(), decisions=(), statistics=())
    cost = str(report).split("\n\n")[0]  # the figures, without the sections
    return f"{cost}\n\n{pruned.plan}"


# ---- several criteria ----------------------------------------------------------------------------------------


def _removed(pruned: api.Pruned) -> set[tuple[str, int]]:
    return {(group.name, unit) for group in pruned.plan.groups for unit in set(range(group.size)) - set(group.kept)}


def _overlaps(results: Mapping[str, api.Pruned]) -> dict[str, dict[str, float]]:
    """For each two criteria the share of the units that either removes which both remove; 1 where neither removes any."""
    removed = {name: _removed(pruned) for name, pruned in results.items()}

    def overlap(one: str, other: str) -> float:
        either = removed[one] | removed[other]
        return len(removed[one] & removed[other]) / len(either) if either else 1.0

    return {one: {other: overlap(one, other) for other in results} for one in results}


def _kept_units(results: Mapping[str, api.Pruned]) -> dict[str, dict[str, int]]:
    """For each group how many units each criterion keeps.

    A node that cannot be emitted smaller is pinned for that criterion alone, so that it may have fewer groups than another.
    """
    sizes = {group.name: group.size for pruned in results.values() for group in pruned.plan.groups}
    kept = {name: {group.name: len(group.kept) for group in pruned.plan.groups} for name, pruned in results.items()}
    return {group: {name: kept[name].get(group, size) for name in results} for group, size in sizes.items()}


def _comparison_to_dict(results: Mapping[str, api.Pruned]) -> dict[str, Any]:
    sizes = {group.name: group.size for pruned in results.values() for group in pruned.plan.groups}
    return {
        "criteria": {
            name: {
                "macs_before": pruned.report.macs_before,
                "macs_after": pruned.report.macs_after,
                "params_before": pruned.report.params_before,
                "params_after": pruned.report.params_after,
                "units_before": sum(group.size for group in pruned.plan.groups),
                "units_after": sum(len(group.kept) for group in pruned.plan.groups),
                "seconds": sum(pruned.report.seconds.values()),
            }
            for name, pruned in results.items()
        },
        "groups": [{"name": name, "units": sizes[name], "kept": kept} for name, kept in _kept_units(results).items()],
        "overlap": _overlaps(results),
    }


def _print_comparison(results: Mapping[str, api.Pruned], full: bool) -> None:
    data, console = _comparison_to_dict(results), Console()
    cost = Table(title="what is left", title_justify="left")
    cost.add_column("criterion", overflow="fold")
    for column in ("MACs", "%", "parameters", "%", "units", "%", "seconds"):
        cost.add_column(column, justify="right")
    for name, row in data["criteria"].items():
        cells = []
        for what in ("macs", "params", "units"):
            before, after = row[f"{what}_before"], row[f"{what}_after"]
            cells += [f"{after:,}", f"{100 * after / before:.1f}" if before else "-"]
        cost.add_row(escape(name), *cells, f"{row['seconds']:.2f}")
    console.print(cost)

    rows = [row for row in data["groups"] if full or len(set(row["kept"].values())) > 1]
    groups = Table(title=f"units kept, {len(rows)} of {len(data['groups'])} groups", title_justify="left")
    groups.add_column("group", overflow="fold")
    for column in ("units", *results):
        groups.add_column(escape(column), justify="right")
    for row in rows:
        groups.add_row(escape(row["name"]), str(row["units"]), *(str(row["kept"][name]) for name in results))
    if rows:
        console.print(groups)

    overlap = Table(title="removed by both, % of what either removes", title_justify="left")
    for column in ("", *results):
        overlap.add_column(escape(column), justify="right" if column else "left")
    for one, others in data["overlap"].items():
        overlap.add_row(escape(one), *(f"{100 * others[other]:.1f}" for other in results))
    console.print(overlap)


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
