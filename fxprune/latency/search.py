"""Choose by a forecast, measure what was chosen, and choose again where the two differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

T = TypeVar("T")
Kept = Mapping[str, tuple[int, ...]]

_ATTEMPTS = 4
_FITTED = (0.5, 0.25)  # of the channels of every group: what the forecast is fitted to, beside the dense model
_ROUNDS, _SECONDS = 15, 0.1  # of a measurement; of its turns the fast ones count, which nothing else on the machine held up
_ABOVE, _BELOW = 0.02, 0.04  # how far from the budget, relative to it, the measured time may be before another choice is tried
_LOOKS = 2  # a choice that seems too slow is measured again: something else may have held it up
_REFUSED = 0.05  # above the budget


@dataclass(frozen=True)
class Attempt(Generic[T]):
    """A choice, what was emitted for it, and its time.

    Attributes
    ----------
    kept, result:
        The survivors, and what ``emit`` made of them.
    dense_ms, ms:
        Milliseconds of the deployed dense model and of this one, measured in turns: the lower quartiles.
    forecast_ms:
        What had been forecast, before it was measured.
    """

    kept: Kept
    result: T
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
    emit: Callable[[Kept], T],
    model_of: Callable[[T], nn.Module],
    table: Table | None = None,
) -> Attempt[T]:
    """Find survivors that take a share of the dense model's time, all deployed.

    The forecast is fitted to the dense model and to ones with half and a quarter of its channels. What is chosen by it is measured
    next to the dense model; where the time is not the budget's, the aim is corrected by the difference, up to three times.

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
    Of the attempts within the budget (2 % above it are taken for noise) the slowest; where all are above, the fastest.

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
    dense_ms = found["dense"].low
    known = [(forecast.full, dense_ms), *((counts(kept), found[name].low) for name, kept in fewer.items())]
    aim, off = share, 1.0
    attempts: list[Attempt[T]] = []
    for _ in range(_ATTEMPTS):
        forecast.fit(known)
        if attempts:
            off = attempts[-1].share * forecast.at(forecast.full) / forecast.at(known[-1][0])
            aim = min(1.0, share / off)
        try:
            kept = choose(aim, forecast)
        except BudgetError:
            if attempts:
                break
            raise
        result, left = emit(kept), counts(kept)
        both = {"dense": whole, "pruned": deploy(model_of(result))}
        ms = {"dense": float("inf"), "pruned": float("inf")}
        for _ in range(_LOOKS):
            found = time_models(both, example_inputs, setting, rounds=_ROUNDS, seconds=_SECONDS)
            ms = {name: min(found[name].low, before) for name, before in ms.items()}
            if ms["pruned"] <= share * (1 + _ABOVE) * ms["dense"]:
                break
        expected = off * forecast.at(left) / forecast.at(forecast.full)
        attempts.append(Attempt(kept, result, ms["dense"], ms["pruned"], expected * ms["dense"]))
        reached = attempts[-1].share
        if share * (1 - _BELOW) <= reached <= share * (1 + _ABOVE) or (reached <= share and aim >= 1):
            break
        known.append((left, reached * dense_ms))
    within = [attempt for attempt in attempts if attempt.share <= share * (1 + _ABOVE)]
    best = max(within, key=lambda own: own.share) if within else min(attempts, key=lambda own: own.share)
    if best.share > share * (1 + _REFUSED):
        raise BudgetError(
            f"latency={share} was not reached: the best of {len(attempts)} choices takes {best.share:.3f} of the dense model's "
            f"time ({best.ms:.3f} of {best.dense_ms:.3f} ms, both deployed). Raise the budget, measure while the machine does "
            "nothing else, or see what is pinned with print(fxprune.analyze(model, example_inputs))."
        )
    return best
