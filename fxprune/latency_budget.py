"""A latency budget: choose by a forecast, measure what was chosen, and choose again where the two
differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from fxprune.common.arrays import Counts
from fxprune.coupling import Coupling, Terms
from fxprune.coupling.analysis import Clock
from fxprune.criteria import Ranking
from fxprune.emission import emitted
from fxprune.errors import BudgetError
from fxprune.inference import deploy
from fxprune.latency.forecast import Forecast
from fxprune.latency.measuring import Setting, time_models
from fxprune.result.pruned import Pruned
from fxprune.result.report import LatencyRow
from fxprune.select.budget import Budget
from fxprune.select.selection import select

__all__ = ["within_time"]

Kept = Mapping[str, tuple[int, ...]]

_MOST_ATTEMPTS = 6
# of the channels of every group: what the forecast is fitted to, beside the dense model
_FITTED = (0.5, 0.25)
# of a measurement; of its turns the fast ones count, which nothing else on the machine held up
_ROUNDS, _SECONDS = 15, 0.1
# how far from the budget, relative to it, the measured time may be before another choice is tried
_ABOVE, _BELOW = 0.02, 0.04
_LOOKS = 2  # a choice that seems too slow is measured again: something else may have held it up
_REFUSED = 0.05  # above the budget


@dataclass(frozen=True)
class Attempt:
    """A choice, what was emitted for it, and its time.

    Attributes
    ----------
    kept, result:
        The survivors, and what was made of them.
    dense_ms, ms:
        Milliseconds of the deployed dense model and of this one, measured in turns: the lower
        quartiles.
    forecast_ms:
        What had been forecast, before it was measured.
    """

    kept: Kept
    result: Pruned
    dense_ms: float
    ms: float
    forecast_ms: float

    @property
    def share(self) -> float:
        """Of the dense model's time."""
        return self.ms / self.dense_ms


def within_time(
    model: nn.Module,
    coupling: Coupling,
    ranking: Ranking,
    budget: Budget,
    terms: Terms,
    example_inputs: Any,
    setting: Setting,
) -> tuple[Pruned, dict[str, tuple[int, ...]]]:
    """Find survivors that take the budget's share of the dense model's time, all deployed.

    The forecast is fitted to the dense model and to ones with half and a quarter of its channels.
    What is chosen by it is measured next to the dense model; where the time is not the budget's,
    the aim is corrected by the difference, up to five times.

    Returns
    -------
    Of the attempts within the budget (2 % above it are taken for noise) the slowest, with its time
    in the report; where all are above, the fastest. And its survivors.

    Raises
    ------
    BudgetError
        If the aim cannot be reached, or if what is measured stays 5 % above the budget or more.
    """
    assert budget.latency is not None
    search = _Search(model, coupling, ranking, budget, terms, example_inputs, setting)
    best = _best(search.attempts(budget.latency), budget.latency)
    time = LatencyRow(best.dense_ms, best.ms, best.forecast_ms, str(setting))
    report = replace(best.result.report, latency=time)
    return replace(best.result, report=report), dict(best.kept)


@dataclass
class _Search:
    """What attempts are made of, and with."""

    model: nn.Module
    coupling: Coupling
    ranking: Ranking
    budget: Budget
    terms: Terms
    example_inputs: Any
    setting: Setting

    def attempts(self, share: float) -> list[Attempt]:
        """Choose and measure until the time is the budget's, or often enough."""
        dense = self._deployed(self._emitted(self._with_channels(1.0)))
        forecast = self._forecast(dense)
        # what was forecast and what was measured, as shares of the dense model
        tried: list[tuple[float, float]] = []
        attempts: list[Attempt] = []
        for _ in range(_MOST_ATTEMPTS):
            aim = replace(self.budget, latency=min(1.0, _aim(share, tried)))
            try:
                kept = select(self.coupling, self.ranking, aim, forecast)
            except BudgetError:
                if attempts:
                    break
                raise
            result = self._emitted(kept)
            both = {"dense": dense, "pruned": self._deployed(result)}
            ms = _milliseconds(both, self.example_inputs, self.setting, share)
            told = forecast.at(self._counts(kept, forecast)) / forecast.at(forecast.full)
            expected = _corrected_share(told, share, tried) * ms["dense"]
            attempts.append(Attempt(kept, result, ms["dense"], ms["pruned"], expected))
            reached = attempts[-1].share
            met = share * (1 - _BELOW) <= reached <= share * (1 + _ABOVE)
            if met or (reached <= share and told >= 1):
                break
            tried.append((told, reached))
        return attempts

    def _forecast(self, dense: nn.Module) -> Forecast:
        """A forecast that agrees with the dense model and with narrower ones."""
        forecast = Forecast(self.coupling, dense, self.example_inputs, self.setting)
        fewer = {str(share): self._with_channels(share) for share in _FITTED}
        models = {name: self._deployed(self._emitted(kept)) for name, kept in fewer.items()}
        found = time_models(
            {"dense": dense} | models,
            self.example_inputs,
            self.setting,
            rounds=_ROUNDS,
            seconds=_SECONDS,
        )
        measured = [
            (self._counts(kept, forecast), found[name].low) for name, kept in fewer.items()
        ]
        forecast.fit([(forecast.full, found["dense"].low), *measured])
        return forecast

    def _with_channels(self, share: float) -> Kept:
        """The survivors where every group keeps such a share of its units."""
        return select(self.coupling, self.ranking, Budget(channels=share))

    def _emitted(self, kept: Kept) -> Pruned:
        return emitted(self.model, self.coupling, dict(kept), self.terms, Clock())

    def _deployed(self, pruned: Pruned) -> nn.Module:
        return deploy(pruned.model)

    def _counts(self, kept: Kept, forecast: Forecast) -> Counts:
        """How many units of each kind survive."""
        labels = [group.units[list(kept[group.name])] for group in self.coupling.groups]
        kinds = forecast.kinds.of_unit[np.concatenate([np.zeros(0, dtype=np.int64), *labels])]
        return np.bincount(kinds[kinds >= 0], minlength=len(forecast.full))


def _milliseconds(
    models: dict[str, nn.Module], example_inputs: Any, setting: Setting, share: float
) -> dict[str, float]:
    """What the dense and the pruned model take, in turns; measured again where that is long."""
    ms = dict.fromkeys(models, float("inf"))
    for _ in range(_LOOKS):
        found = time_models(models, example_inputs, setting, rounds=_ROUNDS, seconds=_SECONDS)
        ms = {name: min(found[name].low, before) for name, before in ms.items()}
        if ms["pruned"] <= share * (1 + _ABOVE) * ms["dense"]:
            break
    return ms


def _best(attempts: Sequence[Attempt], share: float) -> Attempt:
    """Of the attempts within the budget the slowest; where all are above, the fastest.

    Raises
    ------
    BudgetError
        If that one is far above.
    """
    within = [attempt for attempt in attempts if attempt.share <= share * (1 + _ABOVE)]
    best = (
        max(within, key=lambda own: own.share)
        if within
        else min(attempts, key=lambda own: own.share)
    )
    if best.share > share * (1 + _REFUSED):
        raise BudgetError(
            f"latency={share} was not reached: the best of {len(attempts)} choices takes "
            f"{best.share:.3f} of the dense model's time ({best.ms:.3f} of {best.dense_ms:.3f} "
            "ms, both deployed). Raise the budget, measure while the machine does nothing else, "
            "or see what is pinned with print(fxprune.analyze(model, example_inputs))."
        )
    return best


def _corrected_share(told: float, share: float, tried: Sequence[tuple[float, float]]) -> float:
    """What a forecast means, after what was measured: straight between the nearest on either side
    of the budget, if there are two.

    >>> one, two = [(0.5, 0.55)], [(0.5, 0.55), (0.6, 0.65)]
    >>> [_corrected_share(*given) for given in ((0.5, 0.6, []), (0.6, 0.6, one), (0.55, 0.6, two))]
    [0.5, 0.66, 0.6]
    """
    if not tried:
        return told
    (low, slow), (high, fast) = _nearest_attempts(share, tried)
    return round(
        slow + (told - low) * (fast - slow) / (high - low) if high > low else told * slow / low, 12
    )


def _aim(share: float, tried: Sequence[tuple[float, float]]) -> float:
    """What has to be forecast for a share to be measured: the inverse of :func:`_corrected_share`.

    >>> one, two = [(0.5, 0.55)], [(0.5, 0.55), (0.6, 0.65)]
    >>> _aim(0.6, []), round(_aim(0.6, one), 4), round(_aim(0.6, two), 4)
    (0.6, 0.5455, 0.55)
    """
    if not tried:
        return share
    (low, slow), (high, fast) = _nearest_attempts(share, tried)
    return (
        low + (share - slow) * (high - low) / (fast - slow) if high > low else low * share / slow
    )


def _nearest_attempts(
    share: float, tried: Sequence[tuple[float, float]]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """The nearest attempts below and above a share, as (forecast, measured); twice the last where
    all are on one side.
    """
    below = max((own for own in tried if own[1] <= share), key=lambda own: own[1], default=None)
    above = min((own for own in tried if own[1] > share), key=lambda own: own[1], default=None)
    return (below, above) if below and above and below[0] < above[0] else (tried[-1], tried[-1])
