"""Choose by a forecast, measure what was chosen, and choose again where the two differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from torch import nn

from fxprune.coupling import Coupling
from fxprune.deploy import deploy
from fxprune.descent import Timed
from fxprune.errors import BudgetError
from fxprune.latency.forecast import Forecast
from fxprune.latency.measuring import Setting, time_models
from fxprune.latency.table import Table

__all__ = ["Attempt", "search"]

Emitted = TypeVar("Emitted")
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
class Attempt(Generic[Emitted]):
    """A choice, what was emitted for it, and its time.

    Attributes
    ----------
    kept, result:
        The survivors, and what ``emit`` made of them.
    dense_ms, ms:
        Milliseconds of the deployed dense model and of this one, measured in turns: the lower
        quartiles.
    forecast_ms:
        What had been forecast, before it was measured.
    """

    kept: Kept
    result: Emitted
    dense_ms: float
    ms: float
    forecast_ms: float

    @property
    def share(self) -> float:
        """Of the dense model's time."""
        return self.ms / self.dense_ms


def search(
    share: float,
    coupling: Coupling,
    example_inputs: Any,
    setting: Setting,
    *,
    some: Callable[[float], Kept],
    choose: Callable[[float, Timed], Kept],
    emit: Callable[[Kept], Emitted],
    model_of: Callable[[Emitted], nn.Module],
    table: Table | None = None,
) -> Attempt[Emitted]:
    """Find survivors that take a share of the dense model's time, all deployed.

    The forecast is fitted to the dense model and to ones with half and a quarter of its channels.
    What is chosen by it is measured next to the dense model; where the time is not the budget's,
    the aim is corrected by the difference, up to five times.

    Parameters
    ----------
    share:
        Of the dense model's time, in (0, 1].
    some:
        The survivors where every group keeps such a share of its units.
    choose:
        The survivors for an aim, a share of the dense model's time as forecast.
    emit, model_of:
        What makes a result of survivors, and the model in it.
    table:
        What layers take; None: what the setting has on disk.

    Returns
    -------
    Of the attempts within the budget (2 % above it are taken for noise) the slowest; where all are
    above, the fastest.

    Raises
    ------
    BudgetError
        If the aim cannot be reached, or if what is measured stays 5 % above the budget or more.
    """

    def deployed(kept: Kept) -> nn.Module:
        return deploy(model_of(emit(kept)))

    whole = deployed(some(1.0))
    forecast = Forecast(coupling, whole, example_inputs, setting, table)

    def counts(kept: Kept) -> np.ndarray[Any, np.dtype[np.int64]]:
        labels = [group.units[list(kept[group.name])] for group in coupling.groups]
        kinds = forecast.kinds.of_unit[np.concatenate([np.zeros(0, dtype=np.int64), *labels])]
        return np.bincount(kinds[kinds >= 0], minlength=len(forecast.full))

    fewer = {str(kept): some(kept) for kept in _FITTED}
    models = {"dense": whole} | {name: deployed(kept) for name, kept in fewer.items()}
    found = time_models(models, example_inputs, setting, rounds=_ROUNDS, seconds=_SECONDS)
    forecast.fit(
        [
            (forecast.full, found["dense"].low),
            *((counts(kept), found[name].low) for name, kept in fewer.items()),
        ]
    )
    # what was forecast and what was measured, as shares of the dense model
    tried: list[tuple[float, float]] = []
    attempts: list[Attempt[Emitted]] = []
    for _ in range(_MOST_ATTEMPTS):
        try:
            kept = choose(min(1.0, _aim(share, tried)), forecast)
        except BudgetError:
            if attempts:
                break
            raise
        result = emit(kept)
        both = {"dense": whole, "pruned": deploy(model_of(result))}
        ms = _milliseconds(both, example_inputs, setting, share)
        told = forecast.at(counts(kept)) / forecast.at(forecast.full)
        attempts.append(
            Attempt(
                kept,
                result,
                ms["dense"],
                ms["pruned"],
                _corrected_share(told, share, tried) * ms["dense"],
            )
        )
        reached = attempts[-1].share
        if share * (1 - _BELOW) <= reached <= share * (1 + _ABOVE) or (
            reached <= share and told >= 1
        ):
            break
        tried.append((told, reached))
    return _best(attempts, share)


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


def _best(attempts: Sequence[Attempt[Emitted]], share: float) -> Attempt[Emitted]:
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
