"""The main functions of fxprune.

:func:`analyze` shows which channels are coupled. :func:`prune` removes channels,
:func:`compensate` corrects the weights that stay, and :func:`verify` proves the result.
:func:`apply` replays a plan, and :func:`load` reads a saved result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from fxprune.common.compiled import uncompiled
from fxprune.common.models import check_model
from fxprune.common.numbers import check_bool
from fxprune.common.public import public
from fxprune.coupling import Coupling
from fxprune.coupling.analysis import Clock, label_and_couple
from fxprune.criteria import Criterion, given_data
from fxprune.errors import ArgumentError
from fxprune.evaluation import Search
from fxprune.inputs import ExampleInputs, read
from fxprune.latency import Setting
from fxprune.options import (
    Kept,
    analysis_terms,
    build_model,
    check_plan,
    check_search,
    latency_setting,
    read_budget,
    read_compensation,
)
from fxprune.pipeline import Task, carry_out, compensated
from fxprune.result.plan import Plan
from fxprune.result.pruned import Pruned
from fxprune.result.serialization import read_pruned
from fxprune.result.tensor_files import load_tensors
from fxprune.result.warnings import warn_if_little_removed, warn_if_training_is_lost
from fxprune.select.budget import Budget
from fxprune.stages import apply_stage, stages_of

__all__ = ["analyze", "apply", "load", "prune"]


@public
def analyze(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    keep: Kept = (),
    units: str | Mapping[str, str] = "dims",
) -> Coupling:
    """Find which channels of a model are coupled.

    The model is not changed. If it cannot be traced as one graph, its Python code runs on a copy.

    Parameters
    ----------
    model:
        The model to analyse.
    example_inputs:
        The arguments with which the model is called: a tensor, a tuple of positional arguments or
        a dict of keyword arguments. It may also hold numbers, flags, text and None; they are
        treated as constants. Only shapes and dtypes of the tensors matter, unless the model's
        Python code reads their values.
    keep:
        The modules that must not be pruned: a module name, a glob, a module object, or a list of
        these.
    units:
        ``"dims"`` or ``"heads"``: what a unit of an attention layer is (see :func:`prune`).

    Returns
    -------
    Coupling
        The groups of units that can be pruned (``groups``), and the axes that cannot, with the
        reasons (``pinned``). ``print`` shows both.

    Raises
    ------
    ArgumentError
        If ``keep`` or ``units`` is not valid, or names a module that does not exist.
    InputError
        If the example inputs do not fit the model.
    ModelError
        If this model can never be pruned.
    TraceError
        If the model's Python code cannot be followed.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> print(analyze(net, torch.zeros(1, 3, 8, 8)).groups[0])
    8 units: 0.weight:0, 0.bias:0, 2.weight:1
    """
    model = uncompiled(model)
    check_model(model)
    terms = analysis_terms(model, keep, units)
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
    criterion: Criterion = "cpmc_flow",
    keep: Kept = (),
    units: str | Mapping[str, str] = "dims",
    round_to: int = 1,
    min_channels: int = 1,
    max_ratio: float | Mapping[str, float] = 1.0,
    scopes: str | Mapping[str, str | Iterable[str]] | None = None,
    data: Iterable[object] | None = None,
    compensate: str | Sequence[str] | None = None,
    search: Search | None = None,
    verify: bool | None = None,
) -> Pruned:
    """Remove the least important channels of a model and return the smaller model.

    At least one of ``channels``, ``macs``, ``params``, ``latency`` and ``layers`` must be given.
    If several are given, the result meets all of them.

    Parameters
    ----------
    model:
        The model to prune. It is not changed. A pruned model can be pruned again: shares then
        refer to its current size, and the new plan contains the earlier plans, so that it replays
        on the original model.
    example_inputs:
        The arguments with which the model is called: a tensor, a tuple of positional arguments or
        a dict of keyword arguments. It may also hold numbers, flags, text and None; they are
        treated as constants. Only shapes and dtypes of the tensors matter, unless the model's
        Python code reads their values.
    channels:
        The share of units to keep, in (0, 1]. With ``scope="group"`` every group keeps this share.
        With ``scope="global"`` the share counts all units of the network together, and the least
        important ones go first. 1.0 returns a model of the same size.
    macs, params:
        The share of multiply-accumulates, or of parameters, to keep, in (0, 1]. The least
        important units of the whole network are removed one by one until the budget holds. No more
        are removed than needed, apart from ``round_to``.
    latency:
        The share of the time of one call to keep, in (0, 1]. It counts the whole model in its
        inference form (:func:`deploy`), with the batch of the example. fxprune measures the layers
        of the model at several widths and keeps the times on disk. CPMC then counts nanoseconds
        instead of multiply-accumulates, and prefers widths at which the device is fast. At the end
        the result is measured beside the dense model; the report shows both times and the
        forecast.
    device:
        The device on which ``latency`` is measured: ``"cuda"``, ``"cpu"``, or a
        :class:`~fxprune.latency.Setting`, which also sets precision, mode, layout and batch. The
        default is the GPU, if there is one.
    scope:
        ``"group"`` or ``"global"``: which units ``channels`` counts.
    layers:
        The share of units that single layers keep, whatever the budgets ask for, as a dict from
        globs of module names to shares: ``{"layer4.*": 0.3}``. Coupled layers keep the same share.
        If several globs match a layer, the last one counts.
    criterion:
        How important a unit is: a name (``"cpmc_flow"``, ``"cpmc"``, ``"l1"``, ``"l2"``,
        ``"bn_scale"``, ``"lamp"``, ``"fpgm"``, ``"random"``), an object of
        :mod:`fxprune.criteria` (some of them, such as :class:`~fxprune.criteria.Taylor`, read
        data), or a function that takes a :class:`~fxprune.criteria.UnitView` and returns one score
        per unit. The default, :class:`~fxprune.criteria.FlowCPMC`, runs the model on noise.
    keep:
        The modules that must not be pruned: a module name, a glob, a module object, or a list of
        these. Their parameters keep their shapes.
    units:
        What a unit of an attention layer is. ``"dims"``: one dimension of a head; every head loses
        the same number. ``"heads"``: a whole head; if several query heads share a key and a value,
        they are removed together with these. A dict from globs of module names to either value
        sets this per module; the last glob that matches counts.
    round_to:
        Every group keeps a multiple of this many units, if it has at least as many.
    min_channels:
        Every group keeps at least this many units, if it has as many.
    max_ratio:
        The largest share of its units that a group may lose, in (0, 1]. A dict from globs of
        module names to shares sets it for single groups, as with ``layers``. It holds whatever the
        budgets ask for, also for each part of a group that is balanced by itself.
    scopes:
        Which units are ranked against each other under a budget of the whole network (``macs``,
        ``params``, ``latency``, or ``channels`` with ``scope="global"``). By default these are all
        units. With scopes, the ranks of different scopes are never compared: every scope loses the
        same share of its units, to one removal, as far as its lower limits allow. A dict from the
        name of a scope to a glob of module names, or a list of them, makes one scope each; the
        last glob that matches a group counts, and groups that none matches form one more scope.
        ``"isomorphic"`` makes a scope of the groups of isomorphic structure, sizes aside.
    data:
        Unlabelled calibration data: batches ``(inputs, ...)`` that can be read repeatedly, a
        ``DataLoader`` or a list. With it, the weights that stay are corrected for what was
        removed, and a criterion that can read unlabelled data reads it. A few hundred samples
        from varied sources are enough; the network is fitted to what they show.
    compensate:
        How the weights are corrected with ``data``, as in :func:`compensate`:
        ``"least_squares"`` (the default), ``"constants"``, ``"batch_norm"``, a list of one of the
        first two and the last, or ``"none"``. The report names the modules that could not be
        corrected.
    search:
        A :class:`Search`: it chooses the widths of the groups by a score of the pruned models,
        within the same budget. The criterion still says which units of a group go. With ``data``,
        the weights of each candidate are corrected before it is scored.
    verify:
        Whether to prove the result against the masked original (see :func:`verify`). The report
        then shows the error, and an error above 1e-6 raises a :class:`VerificationError`. The
        result is proved before its weights are corrected with ``data``. By
        default, the result is proved if it depends on one of your own rules
        (:func:`register_rule`).

    Returns
    -------
    Pruned
        The smaller model (``model``), what survives (``plan``) and what changed (``report``).

    Warns
    -----
    FxpruneWarning
        If channels should be removed but none, or nearly none, could be. Also if the model's
        training mode cannot be followed: the pruned model then computes the same in training as in
        evaluation. Also if ``"batch_norm"`` refuses the data.

    Raises
    ------
    ArgumentError
        If an argument is not valid.
    BudgetError
        If even the smallest possible model is above the budget, or if ``max_ratio`` forbids what
        ``layers`` or ``channels`` ask for.
    InputError
        If the example inputs do not fit the model.
    ModelError
        If this model can never be pruned.
    TraceError
        If the model's Python code cannot be followed.
    RewriteError
        If the smaller model cannot be emitted.
    CallbackError
        If a criterion or a score of your own, or a data loader, raises an error.
    VerificationError
        If the result was to be proved and is wrong.

    Notes
    -----
    ``scopes="isomorphic"`` is the ranking of Fang et al., "Isomorphic Pruning for Vision Models",
    ECCV 2024, with any criterion.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> pruned = prune(net, torch.zeros(1, 3, 8, 8), channels=0.5)
    >>> pruned.model(torch.zeros(5, 3, 8, 8)).shape, pruned.model.get_submodule("0").weight.shape
    (torch.Size([5, 4, 4, 4]), torch.Size([4, 3, 3, 3]))
    """
    methods = read_compensation(data, compensate)
    budget = read_budget(
        channels, macs, params, latency, scope, layers, round_to, min_channels, max_ratio, scopes
    )
    setting = latency_setting(device, budget, example_inputs)
    verify = None if verify is None else check_bool("verify", verify)
    criterion = criterion if data is None else given_data(criterion, data)
    check_search(search, budget)
    task = _task(model, example_inputs, keep, units, criterion, budget, setting)
    task = replace(task, search=search, data=() if data is None else data, compensate=methods)
    pruned, coupling = carry_out(task, verify)
    if methods:
        pruned = compensated(task, pruned, coupling)
    warn_if_training_is_lost(coupling, stacklevel=3)
    warn_if_little_removed(pruned.report, coupling, budget, stacklevel=3)
    return pruned


def _task(
    model: nn.Module,
    example_inputs: ExampleInputs,
    keep: Kept,
    units: str | Mapping[str, str],
    criterion: Criterion,
    budget: Budget,
    setting: Setting | None,
) -> Task:
    """Check the model and its arguments, and return everything that pruning needs."""
    clock = Clock()
    with clock("check"):
        model = uncompiled(model)
        check_model(model)
        example = read(example_inputs)
        terms = analysis_terms(model, keep, units)
    return Task(model, example, example_inputs, terms, criterion, budget, setting, clock)


@public
def apply(plan: Plan, model: nn.Module) -> Pruned:
    """Replay a plan on a model of the architecture that it was made for.

    Parameters
    ----------
    plan:
        The plan of an earlier :func:`prune`.
    model:
        A model of the same architecture; its weights may differ. It is not changed. If the plan
        comes from a model that was pruned several times, this is the original architecture, or the
        result of any earlier stage.

    Returns
    -------
    Pruned
        The smaller model, its plan and its report. The report compares ``model`` with the last
        stage.

    Raises
    ------
    PlanError
        If the plan is damaged, or the model has another architecture.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> plan = prune(net, torch.zeros(1, 3, 8, 8), channels=0.5).plan
    >>> apply(Plan.from_json(plan.to_json()), net).plan == plan
    True
    """
    check_plan(plan, "apply")
    model = uncompiled(model)
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
    """Read a pruned model from a folder that :meth:`Pruned.save` wrote.

    The original architecture is built, the plan is replayed on it, and the saved weights are read
    into the result. Nothing is unpickled, and no code comes from the folder.

    Parameters
    ----------
    folder:
        The folder that :meth:`Pruned.save` or ``fxprune prune -o`` wrote.
    model_factory:
        A function without arguments that builds the original model, from before the first pruning;
        or such a model, which is not changed. The result is in training or evaluation mode as this
        model is.
    device:
        The device for the loaded model. By default it stays where the factory builds it.

    Returns
    -------
    Pruned
        The model, the plan and the report as they were saved. Tensors have the dtypes in which
        they were saved.

    Raises
    ------
    PlanError
        If the folder is damaged (a file is missing, cut short or changed), or was made for another
        architecture.
    ArgumentError
        If the folder or the device does not exist.
    ModelError
        If the factory does not build a module.
    CallbackError
        If the factory raises an error.

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
    pruned = apply(plan, build_model(model_factory))
    load_tensors(pruned.model, weights)
    if device is not None:
        try:
            pruned.model.to(device)
        except (RuntimeError, AssertionError, TypeError) as error:
            # torch raises any of these if there is no such device
            raise ArgumentError(f"device={device!r} cannot be used: {error}") from error
    return replace(pruned, report=report)
