"""The steps from a coupling and a budget, or from a plan, to a smaller model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from torch import nn

from fxprune.coupling import Coupling, Terms
from fxprune.coupling.analysis import Clock, label_and_couple
from fxprune.criteria import Ranking, rank
from fxprune.emission import emit_pruned, terms_of
from fxprune.errors import RewriteError, VerificationError
from fxprune.evaluation.scoring import Search, score_of
from fxprune.evaluation.search import WidthSearch
from fxprune.inputs import Call
from fxprune.latency import Setting
from fxprune.latency_budget import Improve, KeptUnits, prune_to_latency
from fxprune.result.plan import Plan
from fxprune.result.pruned import Pruned
from fxprune.rewrite import Survivors
from fxprune.select.budget import Budget
from fxprune.select.selection import select
from fxprune.stages import replay, stages_of
from fxprune.training.compensation import Compensation
from fxprune.training.methods import compensate_by
from fxprune.verification import Verification, check

__all__ = [
    "Task",
    "carry_out",
    "compensated",
    "proofs",
    "with_analysis",
]

Emitted = TypeVar("Emitted")


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
    search:
        The score by which widths are chosen; None if the ranking alone chooses them.
    data, compensate:
        Batches ``(inputs, ...)``, and the methods by which the weights of results are corrected on
        them; empty if they are not.
    """

    model: nn.Module
    example: Call
    example_inputs: Any
    terms: Terms
    criterion: Any
    budget: Budget
    setting: Setting | None
    clock: Clock
    search: Search | None = None
    data: Iterable[object] = ()
    compensate: tuple[str, ...] = ()


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


def compensated(task: Task, pruned: Pruned, coupling: Coupling) -> Pruned:
    """Correct the weights of a result for what was removed, and report what could not be.

    Parameters
    ----------
    task:
        The call that gave the result.
    pruned:
        The result; its model is changed in place.
    coupling:
        The analysis that it is based on.
    """
    with task.clock("compensate"):
        done = _correct(task, pruned, coupling)
    report = replace(
        pruned.report,
        compensated=done.changed,
        uncompensated=done.uncorrected,
        compensation_notes=done.notes,
        seconds=dict(task.clock.seconds),
    )
    return replace(pruned, report=report)


def _correct(task: Task, pruned: Pruned, coupling: Coupling) -> Compensation:
    """Correct the weights of a result in place, and return what was corrected."""
    survivors = Survivors(coupling, {group.name: group.kept for group in pruned.plan.groups})
    return compensate_by(task.compensate, coupling, survivors, task.model, pruned.model, task.data)


def smaller_model(task: Task) -> Result:
    """Analyse a model, choose the units that stay within a budget, and emit the smaller model.

    Raises
    ------
    RewriteError
        If a node cannot be emitted and pinning its operands does not help.
    """

    def within_budget(coupling: Coupling, terms: Terms) -> Result:
        """Choose the units that stay, and emit the smaller model."""
        with task.clock("score"):
            ranking = rank(task.criterion, coupling, task.model)
        pruned, survivors = _within_budget(task, coupling, ranking, terms)
        return Result(pruned, coupling, survivors)

    return with_analysis(task.model, task.example, task.terms, task.clock, within_budget)


def with_analysis(
    model: nn.Module,
    example: Call,
    terms: Terms,
    clock: Clock,
    use: Callable[[Coupling, Terms], Emitted],
) -> Emitted:
    """Analyse a model and use the analysis to emit smaller models.

    A node that cannot be emitted smaller is not guessed at: its operands are pinned, and the
    analysis and its use are repeated.

    Parameters
    ----------
    model, example:
        The model, and a call of it.
    terms:
        The options of the analysis.
    clock:
        Adds up the seconds of the analysis.
    use:
        Takes the analysis and its options, and returns the result.

    Raises
    ------
    RewriteError
        If a node cannot be emitted and pinning its operands does not help.
    """
    for _ in range(_ATTEMPTS):
        coupling = label_and_couple(model, example, terms, clock)
        try:
            return use(coupling, terms)
        except RewriteError as error:
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
    search = _width_search(task, coupling, ranking, terms)
    better = None if search is None else search.better
    if task.setting is None:
        survivors = _select(task, coupling, ranking, better)
        pruned = emit_pruned(model, coupling, survivors, terms, clock)
    else:
        with clock("latency"):
            pruned, survivors = prune_to_latency(
                model, coupling, ranking, budget, terms, task.example_inputs, task.setting, better
            )
    report = replace(
        pruned.report,
        seconds=dict(clock.seconds),
        search=None if search is None else search.row(survivors),
    )
    return replace(pruned, report=report), survivors


def _select(
    task: Task, coupling: Coupling, ranking: Ranking, better: Improve | None
) -> dict[str, tuple[int, ...]]:
    """Return the units that stay within a budget that is counted, not measured."""

    def choose(other: Ranking) -> dict[str, tuple[int, ...]]:
        """Return the units that stay by another ranking."""
        return select(coupling, other, task.budget)

    with task.clock("select"):
        first = choose(ranking)
    if better is None:
        return first
    with task.clock("search"):
        return dict(next(iter(better(first, choose)), first))


def _width_search(
    task: Task, coupling: Coupling, ranking: Ranking, terms: Terms
) -> WidthSearch | None:
    """Return the search for widths that was asked for, if any."""
    search = task.search
    if search is None:
        return None

    def scored(kept: KeptUnits) -> float:
        """Return the score of the model that keeps these units, corrected as the result is."""
        candidate = emit_pruned(task.model, coupling, dict(kept), terms, Clock())
        if task.compensate:
            _correct(task, candidate, coupling)
        return score_of(search.score, candidate.model, "a candidate")

    return WidthSearch(search, coupling, ranking, scored)


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
