"""Warnings about results that differ from what the caller probably wanted."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from fxprune.coupling import KEPT, OUTPUT, Coupling
from fxprune.errors import FxpruneWarning
from fxprune.ops import READS_INPUT
from fxprune.result.report import Report
from fxprune.select.budget import Budget

__all__ = ["warn_of_evaluation", "warn_of_little"]

# A pruning that removes less than this fraction of the requested share of the parameters removes
# only channels that hold few parameters.
_LITTLE = 0.2


def warn_of_evaluation(coupling: Coupling, *, stacklevel: int) -> None:
    """Warn if the pruned model computes in training mode what it computes in evaluation mode.

    This is so if neither the training mode of the model nor of any part of it can be traced.
    """
    if coupling.untrained:
        text = (
            "the pruned model computes in training what it computes in evaluation, because "
            f"training cannot be followed: {coupling.untrained} To train it, rewrite that line; "
            "to use it as it is needs nothing."
        )
        warnings.warn(text, FxpruneWarning, stacklevel=stacklevel + 1)


def warn_of_little(report: Report, coupling: Coupling, budget: Budget, *, stacklevel: int) -> None:
    """Warn if channels should have been removed, but (almost) none were, because most are pinned.

    There is no warning if the caller's ``keep=`` pins most. Budgets of multiply-accumulates,
    parameters or latency need no warning, because pruning fails if it cannot meet them: only
    ``channels`` and ``layers`` are looked at.
    """
    shares = [share for share in (budget.channels, *budget.layers.values()) if share is not None]
    wanted = min(shares, default=1.0)
    if wanted >= 1:
        return
    units, left = (
        sum(group.total for group in report.groups),
        sum(group.kept for group in report.groups),
    )
    gone = 1 - report.params_after / max(report.params_before, 1)
    pinned = (report.params_pinned or 0) > report.params_before / 2
    held = coupling.pinned_macs()
    most = _most(held)
    if most == KEPT:
        return
    if left < units and (
        budget.channels is None or not pinned or gone >= _LITTLE * (1 - budget.channels)
    ):
        return
    asked = (
        f"channels={budget.channels:g}"
        if budget.channels is not None
        else f"layers={dict(budget.layers)}"
    )
    result = f"{report.params_after / max(report.params_before, 1):.0%} of the parameters are left"
    if not units:
        result = "nothing in this model can be pruned"
    elif left == units:
        result = (
            f"none of the {units} units went, each group being left what min_channels= and "
            "round_to= ask for"
        )
    said = _most_pinned(coupling, held, most) if pinned or not left == units > 0 else ""
    way = "print(fxprune.analyze(model, example_inputs)) shows all that is pinned, and why."
    text = f"{asked} was asked for, and {result}. {said}{way}"
    warnings.warn(text, FxpruneWarning, stacklevel=stacklevel + 1)


def _most(held: Mapping[str, float]) -> str | None:
    """Return the reason that pins most multiply-accumulates.

    Every model has layers that read an input and layers that give an output. Other reasons come
    first.
    """
    others = [reason for reason in held if reason != READS_INPUT]
    return next(iter(others if set(others) - {OUTPUT} else held), None)


def _most_pinned(coupling: Coupling, held: Mapping[str, float], most: str | None) -> str:
    """Return a sentence about the reason that pins most, with an axis that it pins."""
    if not coupling.pinned:
        return ""
    reason = most or coupling.pinned[0].reason
    axis = next(
        (
            str(pinned.axes[0])
            for pinned in coupling.pinned
            if pinned.reason == reason and pinned.axes
        ),
        "",
    )
    share = f", {held[reason]:.0%} of the multiply-accumulates" if reason in held else ""
    return f'What pins most: "{reason}"{f", as {axis}" if axis else ""}{share}. '
