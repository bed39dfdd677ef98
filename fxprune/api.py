"""What users call: :func:`prune`, :func:`analyze`, :func:`apply`, :func:`verify`, :func:`load`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxprune.calibration import check_loader
from fxprune.common.compiled import plain
from fxprune.common.models import check_model
from fxprune.common.numbers import number, switch, whole
from fxprune.common.public import public, shown
from fxprune.coupling import Coupling, Terms
from fxprune.coupling.analysis import Clock, label_and_couple
from fxprune.criteria import Criterion
from fxprune.errors import ArgumentError
from fxprune.inputs import ExampleInputs, read
from fxprune.latency import Setting
from fxprune.options import (
    Kept,
    budget_of,
    check_plan,
    check_pruned,
    kept_parameters,
    model_of,
    of_whole_heads,
    setting_of,
)
from fxprune.pipeline import (
    apply_stage,
    proofs,
    prove,
    replay,
    smaller_model,
    stages_of,
)
from fxprune.result.plan import (
    Plan,
)
from fxprune.result.pruned import Pruned
from fxprune.result.serialization import load_tensors, read_pruned
from fxprune.result.warnings import warn_of_evaluation, warn_of_little
from fxprune.rewrite import Survivors
from fxprune.training.compensation import Compensation, fold_constants, reconstruct
from fxprune.verification import Verification

__all__ = ["analyze", "apply", "compensate", "load", "prune", "verify"]


@public
def analyze(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    keep: Kept = (),
    units: str | Mapping[str, str] = "dims",
) -> Coupling:
    """Find which channels are coupled, without changing or even reading a weight.

    Parameters
    ----------
    model:
        Any module; it is not run and not changed.
    example_inputs:
        A tensor, a tuple of positional arguments or a dict of keyword arguments; numbers, flags,
        text and None may stand beside the tensors, and are constants of the call. Of tensors only
        shapes and dtypes matter, unless the model's Python reads values.
    keep:
        What must not be pruned: a module name, a glob, a module object, or several of these.
    units:
        What a unit of an attention is, see :func:`prune`.

    Raises
    ------
    ModelError, InputError, ArgumentError, TraceError

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> print(analyze(net, torch.zeros(1, 3, 8, 8)).groups[0])
    8 units: 0.weight:0, 0.bias:0, 2.weight:1
    """
    model = plain(model)
    check_model(model)
    terms = Terms(kept_parameters(model, keep), (), of_whole_heads(model, units))
    return label_and_couple(model, read(example_inputs), terms)


@public
def prune(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    channels: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    device: torch.device | str | Setting | None = None,
    scope: str = "group",
    layers: Mapping[str, float] | None = None,
    criterion: Criterion = "cpmc",
    keep: Kept = (),
    units: str | Mapping[str, str] = "dims",
    round_to: int = 1,
    min_channels: int = 1,
    verify: bool | None = None,
) -> Pruned:
    """Remove the least important channels of every group and return the smaller model.

    Parameters
    ----------
    model:
        Any module that can be traced; it is left exactly as it is. A model that was pruned before
        can be pruned again: shares are then of what it has now, and the plan leads from the
        original architecture to the new one, through the plans before it.
    example_inputs:
        A tensor, a tuple of positional arguments or a dict of keyword arguments of the model's
        ``forward``; numbers, flags, text and None may stand beside the tensors, and are constants
        of the call. Of tensors only shapes and dtypes matter, unless the model's Python reads
        values.
    channels:
        The share of units to keep, in (0, 1]: by each group, or with ``scope="global"`` by all
        groups together, the least important of the whole network going first. 1.0 returns an equal
        model.
    macs, params:
        The share of multiply-accumulates, or of parameters, to keep, in (0, 1]. The least
        important units of the whole network go, one by one, until it holds; giving the last one
        back would break it (``round_to`` aside). Of several budgets all hold.
    latency:
        The share of the time of one call to keep, in (0, 1], of the whole model in its inference
        form (:func:`deploy`), for the example's batch. What the model's layers take is measured at
        several widths (and kept on disk), CPMC counts nanoseconds in the place of
        multiply-accumulates, and widths land where the device has its steps. The result is
        measured next to the dense model; the report shows the forecast and the measured time.
    device:
        Where the latency is that counts: ``"cuda"``, ``"cpu"``, or a
        :class:`~fxprune.latency.Setting`, which also says precision, mode, layout and batch;
        default: the GPU where there is one.
    scope:
        What ``channels`` counts: ``"group"`` or ``"global"``.
    layers:
        Glob of module names -> share of units that these layers keep, whatever the budgets ask
        for: ``{"layer4.*": 0.3}``. Layers that are coupled keep the same; the last glob that
        matches counts.
    criterion:
        How important a unit is: a name (``"cpmc"``, ``"l1"``, ``"l2"``, ``"bn_scale"``,
        ``"lamp"``, ``"fpgm"``, ``"random"``), an object of :mod:`fxprune.criteria`
        (:class:`~fxprune.criteria.Taylor` and others read data), or a function from a
        :class:`~fxprune.criteria.UnitView` to one score per unit.
    keep:
        What must not be pruned: a module name, a glob, a module object, or several of these. Their
        parameters keep their shapes.
    units:
        What a unit of an attention is: ``"dims"``, one of the dimensions of its heads, every head
        losing equally many; ``"heads"``, a whole head (with the key's and value's, all query heads
        that share them). Or glob of module names -> either of the two; the last that matches
        counts.
    round_to:
        Groups keep a multiple of this many units, where they have as many.
    min_channels:
        Groups keep at least this many units, where they have as many.
    verify:
        Prove the result against the masked original at once (see :func:`verify`); the report then
        shows the error, and one above 1e-6 is raised. By default that is done where a rule of your
        own took part (:func:`register_rule`).

    Warns
    -----
    FxpruneWarning
        If channels were to go and none, or nearly none, could; or if the pruned model computes in
        training what it computes in evaluation, because training cannot be followed.

    Raises
    ------
    ArgumentError, BudgetError, InputError, ModelError, TraceError, RewriteError, VerificationError
        All of them are :class:`FxpruneError`.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> pruned = prune(net, torch.zeros(1, 3, 8, 8), channels=0.5)
    >>> pruned.model(torch.zeros(5, 3, 8, 8)).shape, pruned.model.get_submodule("0").weight.shape
    (torch.Size([5, 4, 4, 4]), torch.Size([4, 3, 3, 3]))
    """
    budget = budget_of(channels, macs, params, latency, scope, layers, round_to, min_channels)
    setting = setting_of(device, budget, example_inputs)
    verify = None if verify is None else switch("verify", verify)
    clock = Clock()
    with clock("check"):
        model = plain(model)
        check_model(model)
        example = read(example_inputs)
        terms = Terms(kept_parameters(model, keep), (), of_whole_heads(model, units))
    pruned, coupling, survivors = smaller_model(
        model, example, example_inputs, terms, criterion, budget, setting, clock
    )
    trusted = sorted(coupling.context.found.trusted)
    if verify or (verify is None and trusted):
        with clock("verify"):
            found = prove(model, pruned, coupling, survivors, example_inputs, trusted)
        report = replace(pruned.report, error=found, seconds=dict(clock.seconds))
        pruned = replace(pruned, report=report)
    warn_of_evaluation(coupling, stacklevel=3)
    warn_of_little(pruned.report, coupling, budget, stacklevel=3)
    return pruned


@public
def apply(plan: Plan, model: nn.Module) -> Pruned:
    """Replay a plan on a model of the architecture it was made for.

    A plan of a model that was pruned several times takes the original architecture, or that of any
    of its stages; the report then goes from there to the last stage.

    Raises
    ------
    PlanError
        If the model's architecture is another one.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> plan = prune(net, torch.zeros(1, 3, 8, 8), channels=0.5).plan
    >>> apply(Plan.from_json(plan.to_json()), net).plan == plan
    True
    """
    check_plan(plan, "apply")
    model = plain(model)
    check_model(model)
    stages = stages_of(plan, model)
    pruned = apply_stage(stages[0], model)
    for stage in stages[1:]:
        before, pruned = pruned.report, apply_stage(stage, pruned.model)
        report = replace(
            pruned.report, params_before=before.params_before, macs_before=before.macs_before
        )
        pruned = replace(pruned, report=report)
    return pruned


@public
def load(
    folder: str | os.PathLike[str],
    model_factory: Callable[[], nn.Module] | nn.Module,
    *,
    device: torch.device | str | None = None,
) -> Pruned:
    """Rebuild what :meth:`Pruned.save` wrote: build the original architecture, replay the plan,
    read the weights.

    Nothing is unpickled, and no code comes from the folder.

    Parameters
    ----------
    folder:
        What :meth:`Pruned.save`, or ``fxprune prune -o``, wrote.
    model_factory:
        A function without arguments that builds the architecture which was pruned first, or such a
        model; it is not changed. ``train()`` or ``eval()`` is as in what it builds.
    device:
        Where the model goes; default: where the factory builds it.

    Returns
    -------
    Model, plan and report as they were saved. Dtypes are those of the saved tensors.

    Raises
    ------
    PlanError
        If the folder is damaged (a file is missing, was cut short or changed), or of another
        architecture.
    ArgumentError
        If there is no such folder, or no such device.
    ModelError
        If the factory does not build a module.

    Examples
    --------
    >>> import tempfile
    >>> def build():
    ...     return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> x = torch.zeros(1, 3, 8, 8)
    >>> pruned = prune(build(), x, channels=0.5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pruned.save(folder)
    ...     torch.equal(load(folder, build).model(x), pruned.model(x))
    True
    """
    plan, weights, report = read_pruned(folder)
    pruned = apply(plan, model_of(model_factory))
    load_tensors(pruned.model, weights)
    if device is not None:
        try:
            pruned.model.to(device)
        except (RuntimeError, AssertionError, TypeError) as error:
            # torch raises any of them where there is no such device
            raise ArgumentError(f"device={device!r} cannot be used: {error}") from error
    return replace(pruned, report=report)


@public
def verify(
    model: nn.Module,
    pruned: Pruned,
    example_inputs: ExampleInputs | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    randomize: bool = True,
    seed: int = 0,
    numeric: bool = True,
) -> Verification:
    """Prove that a pruned model computes what the original computes with the removed channels set
    to zero.

    A model that was pruned several times can be held against the original, or against the model of
    any of its stages.

    Two checks: the emitted graph is labelled again, each surviving element with its old label, and
    no two labels that were apart may meet; and both models run, in ``dtype``, and their outputs
    are compared. The original runs as its own code, hooks included. Compared are the outputs for
    the example; in training mode, with dropout off; for another batch and other sizes, where the
    original takes them; which parameters get a gradient; and shapes and dtypes on the example as
    it is. Both runs draw the same random numbers. A model with an operation that has no float64 is
    proved in float32.

    Parameters
    ----------
    example_inputs:
        As in :func:`prune`; whole numbers stay as they are, others unless ``randomize``. Without
        them, the shapes of the plan.
    randomize:
        Draw all parameters, buffers and inputs at random (variances positive), so that no zero in
        a fresh model hides an error, and a model that was trained since can be proved, too:
        ``left_out`` says then that its own weights are others. False: the models' own, of which
        also those count that no output shows.
    seed:
        For these draws.
    numeric:
        False: the first check only.

    Returns
    -------
    ``error`` is ``||out - reference|| / ||reference||`` over all outputs, the largest one;
    ``compared`` and ``left_out`` say what was compared, and what could not be and why.

    Raises
    ------
    VerificationError
        If the structures differ; if nothing can be compared (there is no tensor, or none that is
        finite, or the original fails); if the pruned model fails where the original runs; or if
        anything but the values for the example's sizes differs: how far these differ is the error
        that is returned.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> x = torch.zeros(1, 3, 8, 8)
    >>> verify(net, prune(net, x, channels=0.5), x).error < 1e-9
    True
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ArgumentError(
            f"dtype={shown(dtype)} is no floating-point type of torch, e.g. torch.float64."
        )
    options: dict[str, Any] = {
        "dtype": dtype,
        "randomize": switch("randomize", randomize),
        "seed": whole("seed", seed, 0) % 2**63,
        "numeric": switch("numeric", numeric),
    }
    check_pruned(pruned, "verify")
    model = plain(model)
    check_model(model)
    if example_inputs is not None:
        read(example_inputs)  # refuses what is no example
    found = proofs(pruned.plan, model, pruned.model, example_inputs, **options)
    return max(found, key=lambda verification: verification.error)


@public
def compensate(
    model: nn.Module,
    pruned: Pruned,
    loader: Iterable[object],
    *,
    method: str = "constants",
    ridge: float = 1e-4,
) -> Compensation:
    """Put what the removed channels gave to the next layers into the weights that stay, before any
    fine-tuning.

    Parameters
    ----------
    model:
        The model that was pruned, with its weights; it is left as it is.
    pruned:
        What :func:`prune` gave; its model is changed in place.
    loader:
        Calibration data: batches ``(inputs, ...)``. No targets are read.
    method:
        ``"constants"`` adds the mean of what is gone to the next layers' biases (or subtracts it
        from the running mean of the batch normalisation behind them); ``"least_squares"`` refits
        each next layer on the channels that it still reads.
    ridge:
        For least squares: how strongly weights are held where the data says nothing, as a share of
        the inputs' mean square.

    Returns
    -------
    Which modules took something over, and which could not.

    Raises
    ------
    ArgumentError
        If there is no such method, or no data, or the model is not the one that was pruned last.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> x = torch.randn(16, 3, 8, 8)
    >>> compensate(net, prune(net, x, channels=0.5), [(x,)]).changed
    ('2',)
    """
    if not isinstance(method, str) or method not in ("constants", "least_squares"):
        raise ArgumentError(f"method={shown(method)} is neither 'constants' nor 'least_squares'.")
    damping = number(ridge)
    if damping is None or not 0 <= damping < float("inf"):
        raise ArgumentError(
            f"ridge={shown(ridge)} must be a number of at least 0, e.g. ridge=1e-4."
        )
    check_pruned(pruned, "compensate")
    model = plain(model)
    check_model(model)
    check_loader(loader)
    stages = stages_of(pruned.plan, model)
    if len(stages) > 1:
        raise ArgumentError(
            "compensate takes the model that was pruned last: call it after each prune, with the "
            "model before it."
        )
    coupling, kept, _ = replay(stages[0], model)
    survivors = Survivors(coupling, kept)
    if method == "constants":
        return fold_constants(coupling, survivors, model, pruned.model, loader)
    return reconstruct(coupling, survivors, model, pruned.model, loader, ridge=damping)
