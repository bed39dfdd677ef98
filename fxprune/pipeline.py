"""From a coupling and a budget to a smaller model, and from a plan to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from fxprune.coupling import Coupling, Terms
from fxprune.coupling.analysis import Clock, label_and_couple
from fxprune.criteria import rank
from fxprune.emission import emitted, terms_of
from fxprune.errors import PlanError, RewriteError, VerificationError
from fxprune.inputs import Call, read
from fxprune.latency import Setting
from fxprune.latency_budget import within_time
from fxprune.result.plan import (
    Plan,
    fingerprint,
    history,
    holds_objects,
    unpack_inputs,
)
from fxprune.result.pruned import Pruned
from fxprune.select.budget import Budget
from fxprune.select.selection import select
from fxprune.verification import Verification, check

__all__ = ["apply_stage", "proofs", "prove", "replay", "smaller_model", "stages_of"]


_ATTEMPTS = 16  # how many nodes may turn out not to be emittable before prune gives up


def smaller_model(
    model: nn.Module,
    example: Call,
    example_inputs: Any,
    terms: Terms,
    criterion: Any,
    budget: Budget,
    setting: Setting | None,
    clock: Clock,
) -> tuple[Pruned, Coupling, dict[str, tuple[int, ...]]]:
    """Analyse a model, score and select its units and write what is left, within a budget.

    Parameters
    ----------
    example, example_inputs:
        The call of the model, in shapes, and as the caller gave it.
    setting:
        Where a latency budget is measured; None without one.

    Returns
    -------
    The result, the analysis that it is of, and by groups the indices of the units that stay.

    Raises
    ------
    RewriteError
        If too many nodes cannot be emitted smaller.
    """
    for _ in range(_ATTEMPTS):
        coupling = label_and_couple(model, example, terms, clock)
        with clock("score"):
            ranking = rank(criterion, coupling, model)
        try:
            if setting is not None:
                with clock("latency"):
                    pruned, survivors = within_time(
                        model, coupling, ranking, budget, terms, example_inputs, setting
                    )
                report = replace(pruned.report, seconds=dict(clock.seconds))
                pruned = replace(pruned, report=report)
            else:
                with clock("select"):
                    survivors = select(coupling, ranking, budget)
                pruned = emitted(model, coupling, survivors, terms, clock)
            return pruned, coupling, survivors
        except RewriteError as error:
            # Never guess: a node that cannot be made smaller keeps its operands whole.
            if not error.node or error.node in terms.pinned_nodes:
                raise
            terms = replace(terms, pinned_nodes=(*terms.pinned_nodes, error.node))
    failed = ", ".join(terms.pinned_nodes)
    raise RewriteError(
        f"after {_ATTEMPTS} attempts some nodes cannot be emitted smaller ({failed}); pass "
        "modules in keep=."
    )


def prove(
    model: nn.Module,
    pruned: Pruned,
    coupling: Coupling,
    survivors: dict[str, tuple[int, ...]],
    example_inputs: Any,
    trusted: list[str],
) -> float:
    """The error of a result that was just made; VerificationError where it is too large."""
    proof = check(
        model,
        pruned.model,
        pruned.plan,
        coupling,
        survivors,
        example_inputs=example_inputs,
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
    """The plans of a chain that lead from this model to the end: all, or those after the stage
    that it is the model of.
    """
    chain = plan.chain
    done = history(model)
    if done in chain[:-1]:
        return chain[chain.index(done) + 1 :]
    found = fingerprint(model)
    return next((chain[i:] for i, stage in enumerate(chain) if stage.fingerprint == found), chain)


def apply_stage(stage: Plan, model: nn.Module) -> Pruned:
    """What one plan of a chain makes of the model that it is of."""
    coupling, survivors, clock = replay(stage, model)
    return emitted(model, coupling, survivors, terms_of(stage), clock)


def replay(
    plan: Plan, model: nn.Module, example: Any = None
) -> tuple[Coupling, dict[str, tuple[int, ...]], Clock]:
    """Analyse a model as for its plan: the coupling, the units that stay by group, and the times.

    Parameters
    ----------
    example:
        Read in the place of the plan's inputs where these held an object.

    Raises
    ------
    PlanError
        If the plan is of another architecture.
    """
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
    clock = Clock()
    call = (
        read(example)
        if example is not None and holds_objects(plan.inputs)
        else unpack_inputs(plan.inputs)
    )
    coupling = label_and_couple(model, call, terms_of(plan), clock)
    found, planned = (
        {g.name: g.size for g in coupling.groups},
        {g.name: g.size for g in plan.groups},
    )
    if found != planned:
        names = sorted(set(found.items()) ^ set(planned.items()))
        raise PlanError(
            f"the plan's groups are not those of this {type(model).__name__} (first difference: "
            f"{names[0]}). Prune anew."
        )
    return coupling, {g.name: g.kept for g in plan.groups}, clock


def proofs(
    plan: Plan, model: nn.Module, smaller: nn.Module, example_inputs: Any, **options: Any
) -> Iterator[Verification]:
    """Prove a pruned model, stage by stage (see :func:`fxprune.verification.check`)."""
    stages = stages_of(plan, model)
    for stage in stages:
        coupling, survivors, clock = replay(stage, model, example_inputs)
        last = stage is stages[-1]
        after = (
            smaller if last else emitted(model, coupling, survivors, terms_of(stage), clock).model
        )
        yield check(
            model, after, stage, coupling, survivors, example_inputs=example_inputs, **options
        )
        model = after
