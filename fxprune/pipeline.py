"""The steps from a coupling and a budget, or from a plan, to a smaller model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from fxprune.coupling import Coupling, Terms
from fxprune.coupling.analysis import Clock, label_and_couple
from fxprune.criteria import Ranking, rank
from fxprune.emission import emit_pruned, terms_of
from fxprune.errors import PlanError, RewriteError, VerificationError
from fxprune.inputs import Call, read
from fxprune.latency import Setting
from fxprune.latency_budget import prune_to_latency
from fxprune.result.plan import Plan, fingerprint, stored_plan
from fxprune.result.pruned import Pruned
from fxprune.result.stored_inputs import holds_objects, unpack_inputs
from fxprune.rewrite import Survivors
from fxprune.select.budget import Budget
from fxprune.select.selection import select
from fxprune.training.methods import compensate_by
from fxprune.verification import Verification, check

__all__ = [
    "Task",
    "apply_stage",
    "carry_out",
    "compensated",
    "proofs",
    "replay",
    "stages_of",
]


_ATTEMPTS = 16  # prune gives up after this many attempts, each of which pins one more node


@dataclass(frozen=True)
class Task:
    """One call of :func:`fxprune.prune`, with its arguments checked.

    Attributes
    ----------
    example, example_inputs:
        The arguments of the model: as read, and as the caller gave them.
    terms:
        What the analysis must leave alone.
    setting:
        Where a latency budget is measured; None if there is no such budget.
    clock:
        The seconds that each step takes.
    """

    model: nn.Module
    example: Call
    example_inputs: Any
    terms: Terms
    criterion: Any
    budget: Budget
    setting: Setting | None
    clock: Clock


class Result(NamedTuple):
    """A pruned model and what it is based on.

    Attributes
    ----------
    pruned:
        The smaller model with its plan and report.
    coupling:
        The analysis.
    survivors:
        For each group name the indices of the units that stay.
    """

    pruned: Pruned
    coupling: Coupling
    survivors: dict[str, tuple[int, ...]]


def carry_out(task: Task, verify: bool | None) -> tuple[Pruned, Coupling]:
    """Prune a model and prove the result.

    Parameters
    ----------
    verify:
        Whether to prove the result; if None, only a result that depends on rules of the caller is
        proved.

    Returns
    -------
    The result, and the analysis that it is based on.
    """
    result = smaller_model(task)
    pruned, coupling, _ = result
    trusted = sorted(coupling.context.found.custom_rules)
    if verify or (verify is None and trusted):
        with task.clock("verify"):
            error = prove(task, result, trusted)
        report = replace(pruned.report, error=error, seconds=dict(task.clock.seconds))
        pruned = replace(pruned, report=report)
    return pruned, coupling


def compensated(
    task: Task,
    pruned: Pruned,
    coupling: Coupling,
    data: Iterable[object],
    methods: Sequence[str],
) -> Pruned:
    """Correct the weights of a result for what was removed, and report what could not be.

    Parameters
    ----------
    task:
        The call that gave the result.
    pruned:
        The result; its model is changed in place.
    coupling:
        The analysis that it is based on.
    data:
        Batches ``(inputs, ...)``.
    methods:
        The names of the methods.
    """
    survivors = Survivors(coupling, {group.name: group.kept for group in pruned.plan.groups})
    with task.clock("compensate"):
        done = compensate_by(methods, coupling, survivors, task.model, pruned.model, data)
    report = replace(
        pruned.report,
        compensated=done.changed,
        uncompensated=done.uncorrected,
        compensation_notes=done.notes,
        seconds=dict(task.clock.seconds),
    )
    return replace(pruned, report=report)


def smaller_model(task: Task) -> Result:
    """Analyse a model, choose the units that stay within a budget, and emit the smaller model.

    Raises
    ------
    RewriteError
        If a node cannot be emitted and pinning its operands does not help.
    """
    terms = task.terms
    for _ in range(_ATTEMPTS):
        coupling = label_and_couple(task.model, task.example, terms, task.clock)
        with task.clock("score"):
            ranking = rank(task.criterion, coupling, task.model)
        try:
            pruned, survivors = _within_budget(task, coupling, ranking, terms)
            return Result(pruned, coupling, survivors)
        except RewriteError as error:
            # a node that cannot be emitted smaller is not guessed at: its operands stay whole
            if not error.node or error.node in terms.pinned_nodes:
                raise
            terms = replace(terms, pinned_nodes=(*terms.pinned_nodes, error.node))
    failed = ", ".join(terms.pinned_nodes)
    raise RewriteError(
        f"after {_ATTEMPTS} attempts some nodes cannot be emitted smaller ({failed}); pass "
        "modules in keep=."
    )


def _within_budget(
    task: Task, coupling: Coupling, ranking: Ranking, terms: Terms
) -> tuple[Pruned, dict[str, tuple[int, ...]]]:
    """Choose the units that stay, and emit the smaller model; return it and the units."""
    model, budget, clock = task.model, task.budget, task.clock
    if task.setting is None:
        with clock("select"):
            survivors = select(coupling, ranking, budget)
        return emit_pruned(model, coupling, survivors, terms, clock), survivors
    with clock("latency"):
        pruned, survivors = prune_to_latency(
            model, coupling, ranking, budget, terms, task.example_inputs, task.setting
        )
    report = replace(pruned.report, seconds=dict(clock.seconds))
    return replace(pruned, report=report), survivors


def prove(task: Task, result: Result, trusted: list[str]) -> float:
    """Return the error of a result that was just made.

    ``trusted`` holds the names of the operations whose rules the caller registered.

    Raises
    ------
    VerificationError
        If the error is more than rounding.
    """
    pruned, coupling, survivors = result
    proof = check(
        task.model,
        pruned.model,
        pruned.plan,
        coupling,
        survivors,
        example_inputs=task.example_inputs,
        fresh=True,
    )
    if proof.error <= proof.limit:
        return proof.error
    blamed = (
        f"Look at the rules registered for {', '.join(trusted)}" if trusted else "Please report it"
    )
    raise VerificationError(
        f"the pruned model differs from the masked original by {proof.error:.1e}, relative. "
        f"{blamed}; modules in keep= are left as they are, and verify=False returns the model all "
        "the same."
    )


def stages_of(plan: Plan, model: nn.Module) -> tuple[Plan, ...]:
    """Return the plans that lead from this model to the final one.

    These are all plans of the chain, or only those after the stage that produced this model.
    """
    chain = plan.chain
    done = stored_plan(model)
    if done in chain[:-1]:
        return chain[chain.index(done) + 1 :]
    architecture = fingerprint(model)
    for number, stage in enumerate(chain):
        if stage.fingerprint == architecture:
            return chain[number:]
    return chain


def apply_stage(stage: Plan, model: nn.Module) -> Pruned:
    """Return the result of one plan of a chain on the model that the plan was made for."""
    coupling, survivors, clock = replay(stage, model)
    return emit_pruned(model, coupling, survivors, terms_of(stage), clock)


def replay(
    plan: Plan, model: nn.Module, example: Any = None
) -> tuple[Coupling, dict[str, tuple[int, ...]], Clock]:
    """Analyse a model in the same way as when its plan was made.

    Parameters
    ----------
    example:
        Example inputs. They are used instead of the plan's inputs if the plan could not store an
        object that was among them.

    Returns
    -------
    coupling:
        The analysis.
    survivors:
        For each group name the indices of the units that stay.
    clock:
        The seconds that each step took.

    Raises
    ------
    PlanError
        If the plan was made for another architecture.
    """
    _check_architecture(plan, model)
    clock = Clock()
    stored = example is None or not holds_objects(plan.inputs)
    call = unpack_inputs(plan.inputs) if stored else read(example)
    coupling = label_and_couple(model, call, terms_of(plan), clock)
    _check_same_groups(plan, coupling, model)
    return coupling, {group.name: group.kept for group in plan.groups}, clock


def _check_architecture(plan: Plan, model: nn.Module) -> None:
    """Raise a PlanError if the model's parameters are not those that the plan was made for."""
    if fingerprint(model) != plan.fingerprint:
        raise PlanError(
            f"the plan was made for another architecture than this {type(model).__name__}: names "
            "or shapes of its parameters differ. Build the model exactly as it was when the plan "
            "was made."
        )
    known = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    unknown = [name for name in (*plan.keep, *plan.heads) if name not in known]
    if unknown:
        raise PlanError(
            f"the plan names {unknown[0]!r}, which this {type(model).__name__} does not have. "
            "Prune anew."
        )


def _check_same_groups(plan: Plan, coupling: Coupling, model: nn.Module) -> None:
    """Raise a PlanError if the analysis finds other groups than the plan has."""
    found = {group.name: group.size for group in coupling.groups}
    planned = {group.name: group.size for group in plan.groups}
    if found != planned:
        names = sorted(set(found.items()) ^ set(planned.items()))
        raise PlanError(
            f"the plan's groups are not those of this {type(model).__name__} (first difference: "
            f"{names[0]}). Prune anew."
        )


def proofs(
    plan: Plan, model: nn.Module, smaller: nn.Module, example_inputs: Any, **options: Any
) -> Iterator[Verification]:
    """Prove a pruned model stage by stage and yield one result per stage.

    ``options`` are passed to :func:`fxprune.verification.check`.
    """
    stages = stages_of(plan, model)
    for stage in stages:
        coupling, survivors, clock = replay(stage, model, example_inputs)
        last = stage is stages[-1]
        after = (
            smaller
            if last
            else emit_pruned(model, coupling, survivors, terms_of(stage), clock).model
        )
        yield check(
            model, after, stage, coupling, survivors, example_inputs=example_inputs, **options
        )
        model = after
