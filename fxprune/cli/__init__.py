"""The commands of fxprune.

They are ``inspect``, ``plan``, ``prune``, ``apply``, ``compare``, ``sensitivity``, ``bench`` and
``export``.

Results go to standard output. Progress, warnings and errors go to standard error, so that the
output of ``--json`` can be piped. An error is printed without a traceback, and the exit code is 2,
or 1 if the error is a bug of fxprune. FXPRUNE_DEBUG=1 in the environment keeps the traceback.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from fxprune import api, api_pruned, api_sensitivity
from fxprune.cli.groups import (
    BudgetOptions,
    LatencyOptions,
    ModelInputOptions,
    ModelOptions,
    TimingOptions,
    expand_groups,
)
from fxprune.cli.loading import import_attribute, model_and_inputs
from fxprune.cli.options import (
    Checkpoint,
    Criterion,
    Input,
    Json,
    Keep,
    Model,
    Out,
    UnitKind,
    Verify,
    Weights,
    criterion_of,
    removed_shares,
    several_criteria,
    units_of,
)
from fxprune.cli.printing import (
    comparison_to_dict,
    coupling_to_dict,
    latency_to_dict,
    plan_text,
    print_comparison,
    print_coupling,
    print_latencies,
)
from fxprune.cli.terminal import dumps, errors_to_stderr, read_text, stage, write_text
from fxprune.errors import ArgumentError
from fxprune.inference import deploy
from fxprune.latency import Latency, Setting, measure
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
            module, inputs = model_and_inputs(model, input_shapes, weights, checkpoint)
        with stage("analysing"):
            coupling = api.analyze(module, inputs, keep=tuple(keep or ()), units=units_of(units))
        if as_json:
            typer.echo(json.dumps(coupling_to_dict(coupling), indent=2))
        elif full:
            typer.echo(str(coupling))
        else:
            print_coupling(coupling)


_PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="FILE", help="Where the plan goes, as JSON.", show_default=False
    ),
]


@app.command()
@expand_groups
def plan(
    *,
    out: _PlanFile = None,
    budget: BudgetOptions,
    latency_budget: LatencyOptions,
    criterion: Criterion = "cpmc_flow",
    source: ModelInputOptions,
    as_json: Json = False,
) -> None:
    """Choose the units to keep and write the plan; no model is written."""
    with errors_to_stderr():
        options = latency_budget.arguments() | budget.arguments()
        options["criterion"] = criterion_of(criterion)
        module, inputs = source.load_with_inputs()
        with stage("planning"):
            pruned = api.prune(module, inputs, **options)
        if out is not None:
            with stage(f"writing {out}"):
                write_text(out, pruned.plan.to_json() + "\n")
        typer.echo(pruned.plan.to_json() if as_json else plan_text(pruned))


@app.command()
@expand_groups
def prune(
    *,
    out: Out = None,
    budget: BudgetOptions,
    latency_budget: LatencyOptions,
    criterion: Criterion = "cpmc_flow",
    verify: Verify = False,
    source: ModelInputOptions,
    as_json: Json = False,
) -> None:
    """Prune a model and write the plan, the weights and a report."""
    with errors_to_stderr():
        options = latency_budget.arguments() | budget.arguments()
        options["criterion"] = criterion_of(criterion)
        module, inputs = source.load_with_inputs()
        with stage("pruning and verifying" if verify else "pruning"):
            pruned = api.prune(module, inputs, verify=verify or None, **options)
        _deliver(pruned, out, as_json)


_PlanArgument = Annotated[
    Path,
    typer.Argument(
        metavar="PLAN",
        help="What fxprune plan or fxprune prune wrote: a plan.json.",
        show_default=False,
    ),
]


@app.command()
@expand_groups
def apply(
    *,
    plan: _PlanArgument,
    out: Out = None,
    verify: Verify = False,
    source: ModelOptions,
    as_json: Json = False,
) -> None:
    """Replay a plan on a model of the same architecture, for instance with other weights."""
    with errors_to_stderr():
        replayed = Plan.from_json(read_text(plan))
        module = source.load()
        with stage("applying and verifying" if verify else "applying"):
            pruned = api.apply(replayed, module)
            if verify:
                error = api_pruned.verify(module, pruned).error
                report = dataclasses.replace(pruned.report, error=error)
                pruned = dataclasses.replace(pruned, report=report)
        _deliver(pruned, out, as_json)


_Criteria = Annotated[
    str,
    typer.Option(
        metavar="NAMES",
        help="Criteria to set side by side, with commas; each as --criterion of prune.",
    ),
]
_Score = Annotated[
    str,
    typer.Option(
        metavar="FUNCTION",
        help="package.module:function of your own, which takes a model and returns a number, the "
        "higher the better.",
        show_default=False,
    ),
]
_Removed = Annotated[
    str, typer.Option(metavar="SHARES", help="Shares of each group to remove, with commas.")
]
_CacheFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Keeps the scores, as JSON, to go on from.", show_default=False
    ),
]
_PlotFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Draw the scores: .png, .svg or .pdf.", show_default=False),
]


@app.command()
@expand_groups
def sensitivity(
    *,
    score: _Score,
    removed: _Removed = "0.1,0.25,0.5,0.75,0.9",
    criterion: Criterion = "cpmc_flow",
    keep: Keep = None,
    units: UnitKind = None,
    cache: _CacheFile = None,
    plot: _PlotFile = None,
    source: ModelInputOptions,
    as_json: Json = False,
) -> None:
    """Score a model with one group narrower at a time, by a function of your own."""
    with errors_to_stderr():
        options = {"criterion": criterion_of(criterion), "removed": removed_shares(removed)}
        function = import_attribute(score, "a score")
        module, inputs = source.load_with_inputs()
        with stage("scoring"):
            found = api_sensitivity.sensitivity(
                module,
                inputs,
                function,
                keep=tuple(keep or ()),
                units=units_of(units),
                cache=cache,
                **options,
            )
        if plot is not None:
            with stage(f"drawing {plot}"):
                found.plot(plot)
        typer.echo(dumps(found.to_dict()) if as_json else str(found), nl=not as_json)


_AllGroups = Annotated[
    bool,
    typer.Option("--full", help="Print all groups, not only those on which the criteria differ."),
]


@app.command()
@expand_groups
def compare(
    *,
    criteria: _Criteria = "cpmc,l1,lamp",
    budget: BudgetOptions,
    latency_budget: LatencyOptions,
    source: ModelInputOptions,
    as_json: Json = False,
    full: _AllGroups = False,
) -> None:
    """Compare criteria at the same budget: cost, units kept per group, and how much they agree."""
    with errors_to_stderr():
        options = latency_budget.arguments() | budget.arguments()
        by_name = several_criteria(criteria)
        module, inputs = source.load_with_inputs()
        results = {}
        for name, criterion in by_name.items():
            with stage(f"pruning by {name}"):
                results[name] = api.prune(module, inputs, criterion=criterion, **options)
        if as_json:
            typer.echo(dumps(comparison_to_dict(results)), nl=False)
        else:
            print_comparison(results, full)


@app.command()
@expand_groups
def bench(
    *,
    budget: BudgetOptions,
    criterion: Criterion = "cpmc_flow",
    timing: TimingOptions,
    source: ModelInputOptions,
    as_json: Json = False,
) -> None:
    """Time a model next to its pruned versions: as emitted, and in its inference form."""
    with errors_to_stderr():
        options = {"criterion": criterion_of(criterion)}
        settings = timing.settings()
        module, inputs = source.load_with_inputs()
        models: dict[str, nn.Module] = {"as given": module}
        if budget.is_given:
            options |= budget.arguments()
            with stage("pruning"):
                pruned = api.prune(module, inputs, **options).model
            models |= {"pruned": pruned, "pruned, deployed": deploy(pruned)}
        rows = []
        for setting in settings:
            latencies = _measure(models, inputs, setting, timing)
            rows += [(setting, name, latency) for name, latency in latencies.items()]
        if as_json:
            typer.echo(dumps([latency_to_dict(*row) for row in rows]), nl=False)
        else:
            print_latencies(rows)


def _measure(
    models: dict[str, nn.Module], inputs: Any, setting: Setting, timing: TimingOptions
) -> dict[str, Latency]:
    """Return the latency of each model in a setting, with a message about the progress."""
    with stage(f"timing {setting.precision}, {setting.mode}, batch {setting.batch}"):
        return measure(models, inputs, setting, rounds=timing.rounds, seconds=timing.seconds)


_OnnxFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write ONNX, to FILE.onnx.", show_default=False),
]
_Pt2File = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Write a program of torch.export, to FILE.pt2.", show_default=False
    ),
]
_Check = Annotated[
    bool, typer.Option(help="Run what was written in a process of its own, and compare.")
]


@app.command()
@expand_groups
def export(
    *,
    onnx: _OnnxFile = None,
    pt2: _Pt2File = None,
    dynamic_batch: Annotated[bool, typer.Option(help="Take any batch size.")] = True,
    check: _Check = True,
    source: ModelInputOptions,
) -> None:
    """Write a model for other runtimes, in its inference form if it was pruned."""
    with errors_to_stderr():
        files = [file for file in (onnx, pt2) if file is not None]
        if not files:
            raise ArgumentError(
                "nothing to write: give --onnx FILE.onnx or --pt2 FILE.pt2, or both."
            )
        module, inputs = source.load_with_inputs()
        if source.saved is not None:
            module = deploy(module)
        for file in files:
            with stage(f"writing {file}"):
                error = write_exported(
                    module, inputs, file, dynamic_batch=dynamic_batch, check=check
                )
            outcome = "not checked" if error is None else f"largest relative error {error:.1e}"
            typer.echo(f"{file}: {outcome}")


def _deliver(pruned: Pruned, out: Path | None, as_json: bool) -> None:
    """Print the report of a pruned model, and save the model if ``out`` names a folder."""
    if out is not None:
        with stage(f"writing {out}"):
            pruned.save(out)
    if as_json:
        typer.echo(dumps(pruned.report.to_dict()), nl=False)
    else:
        typer.echo(str(pruned.report))
