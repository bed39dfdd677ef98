"""Warnings about results that differ from what the caller probably wanted."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from fxprune.coupling import KEPT, OUTPUT, Coupling
from fxprune.errors import FxpruneWarning
from fxprune.ops import READS_INPUT
from fxprune.result.report import Report
from fxprune.select.budget import Budget

__all__ = ["warn_if_little_removed", "warn_if_training_is_lost"]

# A pruning that removes less than this fraction of the requested share of the parameters removes
# only channels that hold few parameters.
_LITTLE = 0.2


def warn_if_training_is_lost(coupling: Coupling, *, stacklevel: int) -> None:
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


def warn_if_little_removed(
    report: Report, coupling: Coupling, budget: Budget, *, stacklevel: int
) -> None:
    """Warn if channels should have been removed, but (almost) none were, because most are pinned.

    There is no warning if the caller's ``keep=`` pins most. Budgets of multiply-accumulates,
    parameters or latency need no warning, because pruning fails if it cannot meet them: only
    ``channels`` and ``layers`` are looked at.
    """
    shares = [share for share in (budget.channels, *budget.layers.values()) if share is not None]
    if min(shares, default=1.0) >= 1:
        return
    outcome = _Outcome(report)
    pinned_macs = coupling.pinned_macs()
    reason = _main_reason(pinned_macs)
    if reason == KEPT or outcome.is_enough(budget.channels):
        return
    asked = (
        f"channels={budget.channels:g}"
        if budget.channels is not None
        else f"layers={dict(budget.layers)}"
    )
    cause = _cause(coupling, pinned_macs, reason) if outcome.is_due_to_pins else ""
    hint = "print(fxprune.analyze(model, example_inputs)) shows all that is pinned, and why."
    text = f"{asked} was asked for, and {outcome}. {cause}{hint}"
    warnings.warn(text, FxpruneWarning, stacklevel=stacklevel + 1)


class _Outcome:
    """How much a pruning has removed."""

    def __init__(self, report: Report) -> None:
        self.units = sum(group.total for group in report.groups)
        self.kept = sum(group.kept for group in report.groups)
        self.params_left = report.params_after / max(report.params_before, 1)
        self.is_mostly_pinned = (report.params_pinned or 0) > report.params_before / 2

    def is_enough(self, channels: float | None) -> bool:
        """Tell whether enough was removed, for the share of channels that was to stay."""
        if self.kept >= self.units:
            return False
        if channels is None or not self.is_mostly_pinned:
            return True
        return 1 - self.params_left >= _LITTLE * (1 - channels)

    @property
    def is_due_to_pins(self) -> bool:
        """Whether pinned axes, rather than lower limits of groups, are the cause."""
        return self.is_mostly_pinned or not self.kept == self.units > 0

    def __str__(self) -> str:
        if not self.units:
            return "nothing in this model can be pruned"
        if self.kept == self.units:
            return (
                f"none of the {self.units} units went, each group being left what min_channels=, "
                "max_ratio= and round_to= ask for"
            )
        return f"{self.params_left:.0%} of the parameters are left"


def _main_reason(pinned_macs: Mapping[str, float]) -> str | None:
    """Return the reason that pins most multiply-accumulates.

    Every model has layers that read an input and layers that give an output. Other reasons come
    first.
    """
    others = [reason for reason in pinned_macs if reason != READS_INPUT]
    return next(iter(others if set(others) - {OUTPUT} else pinned_macs), None)


def _cause(coupling: Coupling, pinned_macs: Mapping[str, float], main_reason: str | None) -> str:
    """Return a sentence about the reason that pins most, with an axis that it pins."""
    if not coupling.pinned:
        return ""
    reason = main_reason or coupling.pinned[0].reason
    axes = (p.axes[0] for p in coupling.pinned if p.reason == reason and p.axes)
    axis = next(axes, None)
    example = "" if axis is None else f", as {axis}"
    share = (
        f", {pinned_macs[reason]:.0%} of the multiply-accumulates" if reason in pinned_macs else ""
    )
    return f'What pins most: "{reason}"{example}{share}. '
