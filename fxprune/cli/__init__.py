"""The commands ``inspect``, ``plan``, ``prune``, ``apply``, ``compare``, ``bench`` and ``export``.

Results go to standard output. Progress, warnings and errors go to standard error, so that the
output of ``--json`` can be piped. An error is printed without a traceback, and the exit code is 2,
or 1 if the error is a bug of fxprune. FXPRUNE_DEBUG=1 in the environment keeps the traceback.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from fxprune import api
from fxprune.cli.loading import built, load_model, model_and_inputs, note_random
from fxprune.cli.options import (
    Batch,
    Channels,
    Checkpoint,
    Criterion,
    Device,
    Input,
    Json,
    Keep,
    LatencyShare,
    Layers,
    Macs,
    MinChannels,
    Mode,
    Model,
    Out,
    Params,
    Precision,
    RoundTo,
    Saved,
    Scope,
    UnitKind,
    Verify,
    Weights,
    criterion_of,
    latency_setting,
    options_of,
    settings_of,
    several_criteria,
    units_of,
)
from fxprune.cli.printing import (
    comparison_to_dict,
    coupling_to_dict,
    latency_to_dict,
    planned,
    print_comparison,
    print_coupling,
    print_latencies,
)
from fxprune.cli.terminal import dumps, errors_to_stderr, read_text, stage, write_text
from fxprune.errors import ArgumentError
from fxprune.inference import deploy
from fxprune.latency import MODES, PRECISIONS, measure
from fxprune.result.plan import Plan
from fxprune.result.pruned import Pruned
from fxprune.runtimes import export as write_exported
from fxprune.version import __version__

__all__ = ["app"]

app = typer.Typer(
    name="fxprune",
    help="Structured pruning of any traceable PyTorch model: exact, without a rule per model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Print the version if ``--version`` is given."""
    if version:
        typer.echo(f"fxprune {__version__}")
        raise typer.Exit


@app.command()
def inspect(
    model: Model,
    keep: Keep = None,
    units: UnitKind = None,
    input_shapes: Input = None,
    weights: Weights = None,
    checkpoint: Checkpoint = None,
    as_json: Json = False,
    full: Annotated[
        bool, typer.Option("--full", help="Print every axis, and the nodes that tie them.")
    ] = False,
) -> None:
    """Show what must be pruned together, and what is never pruned and why."""
    with errors_to_stderr():
        with stage(f"building {model}"):
            module, example_inputs = model_and_inputs(model, input_shapes, weights, checkpoint)
        with stage("analysing"):
            coupling = api.analyze(
                module, example_inputs, keep=tuple(keep or ()), units=units_of(units)
            )
        if as_json:
            typer.echo(json.dumps(coupling_to_dict(coupling), indent=2))
        elif full:
            typer.echo(str(coupling))
        else:
            print_coupling(coupling)


@app.command()
def plan(
    model: Model,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Where the plan goes, as JSON.", show_default=False
        ),
    ] = None,
    channels: Channels = None,
    macs: Macs = None,
    params: Params = None,
    latency: LatencyShare = None,
    device: Device = None,
    precision: Precision = "fp32",
    mode: Mode = "eager",
    batch: Batch = None,
    scope: Scope = "group",
    layers: Layers = None,
    criterion: Criterion = "cpmc",
    keep: Keep = None,
    units: UnitKind = None,
    round_to: RoundTo = 1,
    min_channels: MinChannels = 1,
    input_shapes: Input = None,
    weights: Weights = None,
    checkpoint: Checkpoint = None,
    saved: Saved = None,
    as_json: Json = False,
) -> None:
    """Choose the units to keep and write the plan; no model is written."""
    with errors_to_stderr():
        setting = latency_setting(latency, device, precision, mode, batch)
        options = options_of(
            channels,
            macs,
            params,
            scope,
            layers,
            keep,
            units,
            round_to,
            min_channels,
            latency,
            setting,
        )
        found = criterion_of(criterion)
        module, example_inputs = built(model, input_shapes, weights, checkpoint, saved)
        with stage("planning"):
            pruned = api.prune(module, example_inputs, criterion=found, **options)
        if out is not None:
            with stage(f"writing {out}"):
                write_text(out, pruned.plan.to_json() + "\n")
        typer.echo(pruned.plan.to_json() if as_json else planned(pruned))


@app.command()
def prune(
    model: Model,
    out: Out = None,
    channels: Channels = None,
    macs: Macs = None,
    params: Params = None,
    latency: LatencyShare = None,
    device: Device = None,
    precision: Precision = "fp32",
    mode: Mode = "eager",
    batch: Batch = None,
    scope: Scope = "group",
    layers: Layers = None,
    criterion: Criterion = "cpmc",
    keep: Keep = None,
    units: UnitKind = None,
    round_to: RoundTo = 1,
    min_channels: MinChannels = 1,
    verify: Verify = False,
    input_shapes: Input = None,
    weights: Weights = None,
    checkpoint: Checkpoint = None,
    saved: Saved = None,
    as_json: Json = False,
) -> None:
    """Prune a model and write the plan, the weights and a report."""
    with errors_to_stderr():
        setting = latency_setting(latency, device, precision, mode, batch)
        options = options_of(
            channels,
            macs,
            params,
            scope,
            layers,
            keep,
            units,
            round_to,
            min_channels,
            latency,
            setting,
        )
        found = criterion_of(criterion)
        module, example_inputs = built(model, input_shapes, weights, checkpoint, saved)
        with stage("pruning and verifying" if verify else "pruning"):
            pruned = api.prune(
                module, example_inputs, criterion=found, verify=verify or None, **options
            )
        _deliver(pruned, out, as_json)


@app.command()
def apply(
    plan: Annotated[
        Path,
        typer.Argument(
            metavar="PLAN",
            help="What fxprune plan or fxprune prune wrote: a plan.json.",
            show_default=False,
        ),
    ],
    model: Model,
    out: Out = None,
    verify: Verify = False,
    weights: Weights = None,
    checkpoint: Checkpoint = None,
    saved: Saved = None,
    as_json: Json = False,
) -> None:
    """Replay a plan on a model of the same architecture, for instance with other weights."""
    with errors_to_stderr():
        replayed = Plan.from_json(read_text(plan))
        with stage(f"building {model}"):
            module = load_model(model, weights, checkpoint, saved)
        note_random(model, weights, checkpoint, saved)
        with stage("applying and verifying" if verify else "applying"):
            pruned = api.apply(replayed, module)
            if verify:
                error = api.verify(module, pruned).error
                pruned = dataclasses.replace(
                    pruned, report=dataclasses.replace(pruned.report, error=error)
                )
        _deliver(pruned, out, as_json)


@app.command()
def compare(
    model: Model,
    criteria: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Criteria to set side by side, with commas; each as --criterion of prune.",
        ),
    ] = "cpmc,l1,lamp",
    channels: Channels = None,
    macs: Macs = None,
    params: Params = None,
    latency: LatencyShare = None,
    device: Device = None,
    precision: Precision = "fp32",
    mode: Mode = "eager",
    batch: Batch = None,
    scope: Scope = "group",
    layers: Layers = None,
    keep: Keep = None,
    units: UnitKind = None,
    round_to: RoundTo = 1,
    min_channels: MinChannels = 1,
    input_shapes: Input = None,
    weights: Weights = None,
    checkpoint: Checkpoint = None,
    saved: Saved = None,
    as_json: Json = False,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Print all groups, not only those on which the criteria differ."
        ),
    ] = False,
) -> None:
    """Compare criteria at the same budget: cost, units kept per group, and how much they agree."""
    with errors_to_stderr():
        setting = latency_setting(latency, device, precision, mode, batch)
        options = options_of(
            channels,
            macs,
            params,
            scope,
            layers,
            keep,
            units,
            round_to,
            min_channels,
            latency,
            setting,
        )
        found = several_criteria(criteria)
        module, example_inputs = built(model, input_shapes, weights, checkpoint, saved)
        results = {}
        for name, own in found.items():
            with stage(f"pruning by {name}"):
                results[name] = api.prune(module, example_inputs, criterion=own, **options)
        if as_json:
            typer.echo(dumps(comparison_to_dict(results)), nl=False)
        else:
            print_comparison(results, full)


@app.command()
def bench(
    model: Model,
    channels: Channels = None,
    macs: Macs = None,
    params: Params = None,
    scope: Scope = "group",
    layers: Layers = None,
    criterion: Criterion = "cpmc",
    keep: Keep = None,
    units: UnitKind = None,
    round_to: RoundTo = 1,
    min_channels: MinChannels = 1,
    device: Device = None,
    precisions: Annotated[
        str,
        typer.Option(
            "--precision", metavar="NAMES", help=f"Of {', '.join(PRECISIONS)}, with commas."
        ),
    ] = "fp32",
    modes: Annotated[
        str, typer.Option("--mode", metavar="NAMES", help=f"Of {', '.join(MODES)}, with commas.")
    ] = "eager",
    batches: Annotated[
        str, typer.Option("--batch", metavar="SIZES", help="Images per call, with commas.")
    ] = "1",
    channels_last: Annotated[bool, typer.Option(help="Lay images out channels-last.")] = True,
    rounds: Annotated[int, typer.Option(metavar="N", help="How many turns each model has.")] = 9,
    seconds: Annotated[
        float, typer.Option(metavar="S", help="About how long each turn lasts.")
    ] = 0.2,
    input_shapes: Input = None,
    weights: Weights = None,
    checkpoint: Checkpoint = None,
    saved: Saved = None,
    as_json: Json = False,
) -> None:
    """Time a model next to its pruned versions: as emitted, and in its inference form."""
    with errors_to_stderr():
        found = criterion_of(criterion)
        settings = settings_of(device, precisions, modes, batches, channels_last)
        module, example_inputs = built(model, input_shapes, weights, checkpoint, saved)
        models = {"as given": module}
        if any(budget is not None for budget in (channels, macs, params, layers)):
            options = options_of(
                channels, macs, params, scope, layers, keep, units, round_to, min_channels
            )
            with stage("pruning"):
                pruned = api.prune(module, example_inputs, criterion=found, **options).model
            models |= {"pruned": pruned, "pruned, deployed": deploy(pruned)}
        rows = []
        for setting in settings:
            with stage(f"timing {setting.precision}, {setting.mode}, batch {setting.batch}"):
                timed = measure(models, example_inputs, setting, rounds=rounds, seconds=seconds)
            rows += [(setting, name, latency) for name, latency in timed.items()]
        if as_json:
            typer.echo(dumps([latency_to_dict(*row) for row in rows]), nl=False)
        else:
            print_latencies(rows)


@app.command()
def export(
    model: Model,
    onnx: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write ONNX, to FILE.onnx.", show_default=False),
    ] = None,
    pt2: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a program of torch.export, to FILE.pt2.",
            show_default=False,
        ),
    ] = None,
    dynamic_batch: Annotated[bool, typer.Option(help="Take any batch size.")] = True,
    check: Annotated[
        bool, typer.Option(help="Run what was written in a process of its own, and compare.")
    ] = True,
    input_shapes: Input = None,
    weights: Weights = None,
    checkpoint: Checkpoint = None,
    saved: Saved = None,
) -> None:
    """Write a model for other runtimes, in its inference form if it was pruned."""
    with errors_to_stderr():
        files = [file for file in (onnx, pt2) if file is not None]
        if not files:
            raise ArgumentError(
                "nothing to write: give --onnx FILE.onnx or --pt2 FILE.pt2, or both."
            )
        module, example_inputs = built(model, input_shapes, weights, checkpoint, saved)
        if saved is not None:
            module = deploy(module)
        for file in files:
            with stage(f"writing {file}"):
                error = write_exported(
                    module, example_inputs, file, dynamic_batch=dynamic_batch, check=check
                )
            typer.echo(
                f"{file}: "
                + ("not checked" if error is None else f"largest relative error {error:.1e}")
            )


def _deliver(pruned: Pruned, out: Path | None, as_json: bool) -> None:
    """Print the report of a pruned model, and save the model if ``out`` names a folder."""
    if out is not None:
        with stage(f"writing {out}"):
            pruned.save(out)
    if as_json:
        typer.echo(dumps(pruned.report.to_dict()), nl=False)
    else:
        typer.echo(str(pruned.report))
