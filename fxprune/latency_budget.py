"""Pruning within a latency budget.

Units are chosen by a forecast of the latency. The result is measured, and if it misses the budget,
units are chosen again by a corrected forecast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from torch import nn

from fxprune.common.arrays import Counts
from fxprune.coupling import Coupling, Terms
from fxprune.coupling.analysis import Clock
from fxprune.criteria import Ranking
from fxprune.emission import emit_pruned
from fxprune.errors import BudgetError
from fxprune.inference import deploy
from fxprune.latency.forecast import Forecast
from fxprune.latency.measuring import time_models
from fxprune.latency.setting import Setting
from fxprune.result.pruned import Pruned
from fxprune.result.report import LatencyRow
from fxprune.select.budget import Budget
from fxprune.select.selection import select

__all__ = ["Improve", "KeptUnits", "prune_to_latency"]

KeptUnits: TypeAlias = Mapping[str, tuple[int, ...]]
"""For each group name the indices of the units that stay."""

Improve: TypeAlias = Callable[[KeptUnits, Callable[[Ranking], KeptUnits]], Sequence[KeptUnits]]
"""Takes a choice of units, and a function that chooses by another ranking within the same budget.

Returns better choices, the best one first.
"""

_MOST_ATTEMPTS = 6
# shares of channels of the models to which the forecast is fitted, besides the dense model
_FITTED = (0.5, 0.25)
# Turns of a measurement, and seconds per turn. The lower quartile counts, because nothing else on
# the machine delayed the fast turns.
_ROUNDS, _SECONDS = 15, 0.1
# another choice is tried if the measured time is further from the budget, relative to it
_ABOVE, _BELOW = 0.02, 0.04
# A choice that seems too slow is measured again, because something else may have delayed it.
_LOOKS = 2
_REFUSED = 0.05  # a result that is further above the budget, relative to it, is an error


@dataclass(frozen=True)
class Attempt:
    """A choice of units, the pruned model, and its measured latency.

    Attributes
    ----------
    kept:
        For each group the surviving units.
    result:
        The pruned model.
    dense_ms, ms:
        Latency of the dense model and of the pruned model in milliseconds, both deployed and
        measured in turns (lower quartiles).
    forecast_ms:
        Latency of the pruned model in milliseconds as forecast before the measurement.
    aim:
        The forecast that the choice was to stay below, relative to the dense model.
    """

    kept: KeptUnits
    result: Pruned
    dense_ms: float
    ms: float
    forecast_ms: float
    aim: float

    @property
    def share(self) -> float:
        """The measured latency relative to that of the dense model."""
        return self.ms / self.dense_ms


def prune_to_latency(
    model: nn.Module,
    coupling: Coupling,
    ranking: Ranking,
    budget: Budget,
    terms: Terms,
    example_inputs: Any,
    setting: Setting,
    improve: Improve | None = None,
) -> tuple[Pruned, dict[str, tuple[int, ...]]]:
    """Prune a model to a share of its latency, measured on deployed models.

    The forecast is fitted to the dense model and to models with half and a quarter of its
    channels. Units are chosen by the forecast, and the result is measured next to the dense model.
    If the latency misses the budget, the aim of the forecast is corrected and units are chosen
    again, up to five times.

    Parameters
    ----------
    model:
        The model to prune.
    coupling:
        Its analysis.
    ranking:
        The scores of its units.
    budget:
        The budget; its ``latency`` is a share of the dense model's.
    terms:
        The options of the analysis, which the plan records.
    example_inputs:
        Inputs of the model.
    setting:
        Where and how latency is measured.
    improve:
        Returns better choices than the one that was found. They are measured in turn, and the
        first one that is within the budget is the result.

    Returns
    -------
    The pruned model, with its latency in the report, and for each group the surviving units. Among
    the attempts within the budget this is the slowest one; up to 2 % above the budget counts as
    noise. If all attempts are above the budget, it is the fastest one.

    Raises
    ------
    BudgetError
        If the aim cannot be reached, or if the latency stays more than 5 % above the budget.
    """
    assert budget.latency is not None
    search = _Search(model, coupling, ranking, budget, terms, example_inputs, setting)
    best = _best(search.attempts(budget.latency), budget.latency)
    if improve is not None:
        best = search.improved(best, budget.latency, improve)
    time = LatencyRow(best.dense_ms, best.ms, best.forecast_ms, str(setting))
    report = replace(best.result.report, latency=time)
    return replace(best.result, report=report), dict(best.kept)


@dataclass
class _Search:
    """The search for units that meet a latency budget; see :func:`prune_to_latency`."""

    model: nn.Module
    coupling: Coupling
    ranking: Ranking
    budget: Budget
    terms: Terms
    example_inputs: Any
    setting: Setting
    dense: nn.Module = field(init=False)
    forecast: Forecast = field(init=False)

    def attempts(self, share: float) -> list[Attempt]:
        """Choose and measure until the latency meets the budget or the attempts are used up."""
        self.dense = self._deployed(self._emitted(self._with_channels(1.0)))
        self.forecast = self._fitted_forecast(self.dense)
        # forecast and measured latency of each attempt, relative to the dense model
        tried: list[tuple[float, float]] = []
        attempts: list[Attempt] = []
        for _ in range(_MOST_ATTEMPTS):
            aim = min(1.0, _aim(share, tried))
            try:
                kept = self._choose(self.ranking, aim)
            except BudgetError:
                if attempts:
                    break
                raise
            predicted = self._predicted(kept)
            attempts.append(self._attempt(kept, share, aim, tried))
            reached = attempts[-1].share
            is_met = share * (1 - _BELOW) <= reached <= share * (1 + _ABOVE)
            if is_met or (reached <= share and predicted >= 1):
                break
            tried.append((predicted, reached))
        return attempts

    def improved(self, best: Attempt, share: float, improve: Improve) -> Attempt:
        """Return the best one of the better choices that is within the budget, or the first.

        They are chosen by the forecast that led to the first one, and then measured. Their groups
        exchange no units: the widths that are asked for are those of the first one, changed.
        """
        tried = [(self._predicted(best.kept), best.share)]

        def choose(ranking: Ranking) -> KeptUnits:
            """Return the units that stay by another ranking."""
            return self._choose(ranking, best.aim, exchanges=False)

        for kept in improve(best.kept, choose):
            attempt = self._attempt(kept, share, best.aim, tried)
            if attempt.share <= max(best.share, share * (1 + _ABOVE)):
                return attempt
        return best

    def _choose(self, ranking: Ranking, aim: float, *, exchanges: bool = True) -> KeptUnits:
        """Return the units that stay by a ranking, with this share of the time by the forecast."""
        budget = replace(self.budget, latency=aim)
        return select(self.coupling, ranking, budget, self.forecast, exchanges=exchanges)

    def _predicted(self, kept: KeptUnits) -> float:
        """Return the forecast for a choice, relative to the dense model."""
        counts = _counts(self.coupling, kept, self.forecast)
        return self.forecast.at(counts) / self.forecast.at(self.forecast.full)

    def _attempt(
        self, kept: KeptUnits, share: float, aim: float, tried: Sequence[tuple[float, float]]
    ) -> Attempt:
        """Emit a choice and measure it next to the dense model."""
        result = self._emitted(kept)
        models = {"dense": self.dense, "pruned": self._deployed(result)}
        ms = _milliseconds(models, self.example_inputs, self.setting, share)
        expected_ms = _corrected_share(self._predicted(kept), share, tried) * ms["dense"]
        return Attempt(kept, result, ms["dense"], ms["pruned"], expected_ms, aim)

    def _fitted_forecast(self, dense: nn.Module) -> Forecast:
        """Return a forecast that is fitted to the dense model and to narrower models."""
        forecast = Forecast(self.coupling, dense, self.example_inputs, self.setting)
        narrower = {str(share): self._with_channels(share) for share in _FITTED}
        models = {"dense": dense}
        for name, kept in narrower.items():
            models[name] = self._deployed(self._emitted(kept))
        timings = time_models(
            models, self.example_inputs, self.setting, rounds=_ROUNDS, seconds=_SECONDS
        )
        measured = [(forecast.full, timings["dense"].low)]
        for name, kept in narrower.items():
            measured.append((_counts(self.coupling, kept, forecast), timings[name].low))
        forecast.fit(measured)
        return forecast

    def _with_channels(self, share: float) -> KeptUnits:
        """Return the surviving units if every group keeps this share of its units."""
        return select(self.coupling, self.ranking, Budget(channels=share))

    def _emitted(self, kept: KeptUnits) -> Pruned:
        """Return the pruned model that keeps these units."""
        return emit_pruned(self.model, self.coupling, dict(kept), self.terms, Clock())

    def _deployed(self, pruned: Pruned) -> nn.Module:
        """Return the inference form of a pruned model."""
        return deploy(pruned.model)


def _counts(coupling: Coupling, kept: KeptUnits, forecast: Forecast) -> Counts:
    """Return how many units of each kind survive, shape (kinds,)."""
    labels = [group.units[list(kept[group.name])] for group in coupling.groups]
    kinds = forecast.kinds.of_unit[np.concatenate([np.zeros(0, dtype=np.int64), *labels])]
    return np.bincount(kinds[kinds >= 0], minlength=len(forecast.full))


def _milliseconds(
    models: dict[str, nn.Module], example_inputs: Any, setting: Setting, share: float
) -> dict[str, float]:
    """Return the latency of the dense and of the pruned model in milliseconds, measured in turns.

    If the pruned model seems to be above the budget ``share``, both are measured again and the
    shorter times count.
    """
    ms = dict.fromkeys(models, float("inf"))
    for _ in range(_LOOKS):
        timings = time_models(models, example_inputs, setting, rounds=_ROUNDS, seconds=_SECONDS)
        ms = {name: min(timings[name].low, before) for name, before in ms.items()}
        if ms["pruned"] <= share * (1 + _ABOVE) * ms["dense"]:
            break
    return ms


def _best(attempts: Sequence[Attempt], share: float) -> Attempt:
    """Return the slowest attempt within the budget, or the fastest one if all are above it.

    Raises
    ------
    BudgetError
        If that attempt is far above the budget.
    """
    within = [attempt for attempt in attempts if attempt.share <= share * (1 + _ABOVE)]
    if within:
        best = max(within, key=lambda attempt: attempt.share)
    else:
        best = min(attempts, key=lambda attempt: attempt.share)
    if best.share > share * (1 + _REFUSED):
        raise BudgetError(
            f"latency={share} was not reached: the best of {len(attempts)} choices takes "
            f"{best.share:.3f} of the dense model's time ({best.ms:.3f} of {best.dense_ms:.3f} "
            "ms, both deployed). Raise the budget, measure while the machine does nothing else, "
            "or see what is pinned with print(fxprune.analyze(model, example_inputs))."
        )
    return best


def _corrected_share(
    predicted: float, share: float, tried: Sequence[tuple[float, float]]
) -> float:
    """Return the latency to expect for a forecast, given what was measured before.

    Between the nearest attempts on either side of the budget, the expected latency is linear in
    the forecast. If all attempts are on one side, it is proportional to the forecast. All numbers
    are shares of the dense model's latency.

    Parameters
    ----------
    predicted:
        The forecast.
    share:
        The budget.
    tried:
        Forecast and measured latency of earlier attempts.

    Examples
    --------
    >>> one, two = [(0.5, 0.55)], [(0.5, 0.55), (0.6, 0.65)]
    >>> [_corrected_share(*given) for given in ((0.5, 0.6, []), (0.6, 0.6, one), (0.55, 0.6, two))]
    [0.5, 0.66, 0.6]
    """
    if not tried:
        return predicted
    (low, low_measured), (high, high_measured) = _nearest_attempts(share, tried)
    if high > low:
        slope = (high_measured - low_measured) / (high - low)
        return round(low_measured + (predicted - low) * slope, 12)
    return round(predicted * low_measured / low, 12)


def _aim(share: float, tried: Sequence[tuple[float, float]]) -> float:
    """Return the forecast for which the budget ``share`` is the latency to expect.

    This is the inverse of :func:`_corrected_share`.

    >>> one, two = [(0.5, 0.55)], [(0.5, 0.55), (0.6, 0.65)]
    >>> _aim(0.6, []), round(_aim(0.6, one), 4), round(_aim(0.6, two), 4)
    (0.6, 0.5455, 0.55)
    """
    if not tried:
        return share
    (low, low_measured), (high, high_measured) = _nearest_attempts(share, tried)
    if high > low:
        return low + (share - low_measured) * (high - low) / (high_measured - low_measured)
    return low * share / low_measured


def _nearest_attempts(
    share: float, tried: Sequence[tuple[float, float]]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the nearest attempts below and above the budget, as (forecast, measured).

    If all attempts are on one side of the budget, or if the forecasts are in the wrong order,
    return the last attempt twice.
    """
    fast_enough = [attempt for attempt in tried if attempt[1] <= share]
    below = max(fast_enough, key=lambda attempt: attempt[1], default=None)
    too_slow = [attempt for attempt in tried if attempt[1] > share]
    above = min(too_slow, key=lambda attempt: attempt[1], default=None)
    if below and above and below[0] < above[0]:
        return below, above
    return tried[-1], tried[-1]
