"""The stages of a plan: how each pruning of a chain is repeated on a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxprune.coupling import Coupling
from fxprune.coupling.analysis import Clock, label_and_couple
from fxprune.emission import emit_pruned, terms_of
from fxprune.errors import PlanError
from fxprune.inputs import read
from fxprune.result.plan import Plan, fingerprint, stored_plan
from fxprune.result.pruned import Pruned
from fxprune.result.stored_inputs import holds_objects, unpack_inputs

__all__ = ["apply_stage", "replay", "stages_of"]


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
