"""Emit a smaller model, with its plan and its report."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from fxprune.cost import count_parameters
from fxprune.coupling import Coupling, Terms
from fxprune.coupling.analysis import Clock
from fxprune.result.plan import GroupPlan, Plan, fingerprint, store_plan, stored_plan
from fxprune.result.pruned import Pruned
from fxprune.result.report import GroupRow, PinnedRow, Report
from fxprune.result.stored_inputs import pack_inputs
from fxprune.rewrite import Survivors, emit

__all__ = ["emit_pruned", "terms_of"]


def terms_of(plan: Plan) -> Terms:
    """Return the options of the analysis that made a plan."""
    return Terms(plan.keep, plan.pinned_nodes, plan.heads)


def emit_pruned(
    model: nn.Module,
    coupling: Coupling,
    survivors: dict[str, tuple[int, ...]],
    terms: Terms,
    clock: Clock,
) -> Pruned:
    """Return the smaller model, with its plan and its report.

    Parameters
    ----------
    model:
        The user's model.
    coupling:
        Its analysis.
    survivors:
        Name of a group -> indices of its surviving units.
    terms:
        The options of the analysis.
    clock:
        Measures the time of each stage; the report includes all stages so far.

    Raises
    ------
    RewriteError
        If the smaller model cannot be written.
    """
    with clock("rewrite"):
        remaining = Survivors(coupling, survivors)
        smaller = emit(coupling, remaining, type(model).__name__)
        _restore_modes(model, smaller)
    with clock("report"):
        plan = Plan(
            tuple(GroupPlan(g.name, g.size, survivors[g.name]) for g in coupling.groups),
            pack_inputs(*coupling.example),
            terms.keep,
            terms.pinned_nodes,
            fingerprint(model),
            stored_plan(model),
            terms.heads,
        )
        store_plan(smaller, plan)
        report = _report(model, smaller, coupling, remaining, plan)
    return Pruned(smaller, plan, replace(report, seconds=dict(clock.seconds)))


def _report(
    model: nn.Module, smaller: nn.Module, coupling: Coupling, survivors: Survivors, plan: Plan
) -> Report:
    """Return the report of a pruning, without the time of its stages."""
    pinned = (PinnedRow(tuple(map(str, p.axes)), p.reason, p.node) for p in coupling.pinned)
    statistics = (node for group in coupling.groups for node in group.normalised)
    return Report(
        params_before=count_parameters(model),
        params_after=count_parameters(smaller),
        macs_before=coupling.macs(),
        macs_after=coupling.macs(survivors.shape),
        groups=tuple(GroupRow(g.name, len(g.kept), g.size) for g in plan.groups),
        pinned=tuple(pinned),
        untouched=coupling.untouched,
        decisions=coupling.decisions,
        statistics=tuple(dict.fromkeys(statistics)),
        params_pinned=_pinned_parameters(coupling),
        macs_pinned=_pinned_macs(coupling),
        parts=coupling.parts,
        not_one_graph=coupling.not_one_graph,
        not_set=coupling.not_set,
    )


def _pinned_parameters(coupling: Coupling) -> int:
    """Return the number of elements of parameters that no pruning can shrink."""
    parameters = [t for t in coupling.parameters.values() if isinstance(t, nn.Parameter)]
    return sum(tensor.numel() for tensor in parameters if not coupling.labels(tensor))


def _pinned_macs(coupling: Coupling) -> int:
    """Return the multiply-accumulates of contractions that no pruning can shrink."""
    return coupling.macs(
        of=[ran for ran in coupling.contractions if not any(map(coupling.labels, ran.tensors))]
    )


def _restore_modes(model: nn.Module, smaller: nn.Module) -> None:
    """Set each module of the smaller model to the mode that it has in the original."""
    modes = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    for name, module in smaller.named_modules(remove_duplicate=False):
        module.training = modes.get(name, model.training)
