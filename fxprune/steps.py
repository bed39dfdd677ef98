"""Pruning to a budget in several steps, with training by the user after each."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fxprune.api import load, prune
from fxprune.common.compiled import uncompiled
from fxprune.common.description import describe, digest_of
from fxprune.common.models import check_model
from fxprune.common.numbers import as_path, check_integer, check_share
from fxprune.common.public import calling_user_code, guarded, public
from fxprune.cost import cost_of
from fxprune.errors import ArgumentError, PlanError, SignatureError
from fxprune.options import kept_modules
from fxprune.result.pruned import Pruned
from fxprune.result.serialization import read_files, write_files
from fxprune.training.schedules import Geometric, Schedule, value_at

__all__ = ["Steps"]

_SETTINGS = "steps.json"
_OPTIONS = frozenset(inspect.signature(prune).parameters) - {"model", "example_inputs"}


@public
class Steps:
    """Iterate over ever smaller models; train each in place in the body of the loop.

    Step k of n prunes the model that the body left at step k - 1. By default it reaches ``budget
    ** (k / n)`` of the original model. So every step removes the same share, and the last step
    meets the budget.

    Parameters
    ----------
    model, example_inputs:
        As for :func:`fxprune.prune`. The model is left as it is.
    count:
        Number of steps.
    macs, params:
        The final budgets, as shares of the original; at least one of them.
    schedule:
        How a budget is reached: a class of :mod:`fxprune.training.schedules`, or a function, that
        makes a schedule of ``start=1``, ``end=budget`` and ``steps=count``. With
        :class:`~fxprune.training.Cubic` the first steps remove most.
    folder:
        Where to save the model after each step. A run that was interrupted continues after the
        last step that it finished. If a step is killed, even while it is being saved, the folder
        keeps the step before it. Without a folder nothing is saved.
    options:
        All other keywords of :func:`fxprune.prune` (``criterion``, ``keep``, ``round_to``, ...),
        used at each step. ``channels``, ``layers``, ``latency`` and ``max_ratio`` are not allowed.

    Yields
    ------
    Pruned
        The model of each step, to be trained.

    Raises
    ------
    ArgumentError
        If no budget is given; if an option counts what the current model has; if the folder
        belongs to another run (another model or weights, other inputs, budgets or options).
    SignatureError
        If an option is no keyword of :func:`fxprune.prune`.
    PlanError
        If the folder is damaged.

    Examples
    --------
    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 3))
    >>> for step in Steps(net, torch.zeros(1, 3, 8, 8), count=3, macs=0.25):
    ...     pass  # train(step.model)
    >>> step.model.get_submodule("0").weight.shape[0]
    8
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        count: int,
        macs: float | None = None,
        params: float | None = None,
        schedule: Callable[[float, float, int], Schedule] = Geometric,
        folder: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        _check_options(options)
        model = uncompiled(model)
        check_model(model)
        count = check_integer("count", count)
        self.budget = _final_budget({"macs": macs, "params": params})
        self.schedule = schedule
        self._shares_at = _shares_by_step(schedule, self.budget, count)
        if "keep" in options:  # by names, because the smaller models have these too
            options["keep"] = tuple(sorted(kept_modules(model, options["keep"])))
        self.model, self.inputs, self.count, self.options = model, example_inputs, count, options
        self.folder = None if folder is None else as_path("the folder", folder)
        if self.folder is not None:
            self._claim(self.folder)

    def __iter__(self) -> Iterator[Pruned]:
        """Yield the model of each unfinished step; save it once the body has trained it."""
        with guarded("Steps"):
            done = self.done
            current = self.model if done == 0 else self._load(done).model
            start = self._cost(self.model)
        for k in range(done + 1, self.count + 1):
            with guarded("Steps"):
                step = prune(
                    current, self.inputs, **self._shares(current, start, k), **self.options
                )
            yield step
            if self.folder is not None:
                step.save(self._path(k))
            current = step.model

    def _shares(self, current: nn.Module, start: dict[str, float], k: int) -> dict[str, Any]:
        """Return the budget of step k as shares of the current model.

        Parameters
        ----------
        current:
            The model that the step prunes.
        start:
            The costs of the original.
        k:
            The number of the step, from 1.
        """
        now = self._cost(current)
        shares: dict[str, Any] = {}
        for name in self.budget:
            goal = self._shares_at[name][k - 1] * start[name]
            shares[name] = min(1.0, goal / now[name]) if now[name] else 1.0
        return shares

    @property
    @public
    def done(self) -> int:
        """Number of finished steps, trained and saved in the folder; 0 without a folder."""
        if self.folder is None:
            return 0
        return max((k for k in range(1, self.count + 1) if self._path(k).is_dir()), default=0)

    @public
    def last(self) -> Pruned:
        """Load the last finished step from the folder.

        Raises
        ------
        ArgumentError
            If no step has been finished.
        PlanError
            If its files are damaged.
        """
        if not self.done:
            ending = ": give folder= to keep them." if self.folder is None else " yet."
            raise ArgumentError(f"no step has been finished{ending}")
        return self._load(self.done)

    def _load(self, k: int) -> Pruned:
        """Load a finished step."""
        return load(self._path(k), self.model)

    def _path(self, k: int) -> Path:
        """Return the folder of a step."""
        assert self.folder is not None
        return self.folder / f"step-{k}"

    def _cost(self, model: nn.Module) -> dict[str, float]:
        """Return the multiply-accumulates and the parameters of a model."""
        found = cost_of(model, self.inputs)
        return {"macs": float(found.macs), "params": float(found.params)}

    def _claim(self, folder: Path) -> None:
        """Write this run's settings into a new folder, or compare them with an old one's.

        Raises
        ------
        ArgumentError
            If the folder belongs to a run with other settings.
        PlanError
            If its settings are damaged.
        """
        settings = {
            "count": self.count,
            "budget": self.budget,
            "schedule": describe(self.schedule),
            "model": digest_of(self.model),
            "inputs": describe(self.inputs),
            "options": describe(self.options),
        }
        settings = json.loads(json.dumps(settings))
        if not (folder / _SETTINGS).exists():
            text = json.dumps(settings, sort_keys=True) + "\n"
            write_files(folder, {_SETTINGS: lambda path: path.write_text(text, encoding="utf-8")})
            return
        # versions without schedules wrote none
        found = {"schedule": describe(Geometric)}
        found |= _read_settings(read_files(folder, (_SETTINGS,))[_SETTINGS])
        other = [name for name in settings if found.get(name) != settings[name]]
        if other:
            was, now = ({name: run.get(name) for name in other} for run in (found, settings))
            raise ArgumentError(
                f"{folder} holds a run with other settings: another "
                f"{' and another '.join(other)}. It has {was!s:.300}, and now there is "
                f"{now!s:.300}. Give another folder=, or what the run began with."
            )


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse keywords that a step of pruning does not take.

    Raises
    ------
    SignatureError
        If `prune` has no such keyword.
    ArgumentError
        If it counts what the current model has, so that it cannot be the budget of a whole run.
    """
    unknown = [name for name in options if name not in _OPTIONS]
    if unknown:
        raise SignatureError(
            f"Steps got an unexpected keyword {unknown[0]!r}: beside its own it takes those of "
            "prune."
        )
    if any(name in options for name in ("channels", "layers", "latency", "max_ratio")):
        raise ArgumentError(
            "channels=, layers=, latency= and max_ratio= count what the model at hand has: give "
            "macs= or params= instead, and min_channels= as a lower limit."
        )


def _final_budget(shares: Mapping[str, float | None]) -> dict[str, float]:
    """Return the shares that are given, checked.

    Raises
    ------
    ArgumentError
        If none is given, or one is outside (0, 1].
    """
    given = {name: value for name, value in shares.items() if value is not None}
    if not given:
        raise ArgumentError("nothing says how far to go: give macs= or params=, e.g. macs=0.25.")
    meaning = "the share of the original to end with"
    return {name: check_share(name, value, meaning) for name, value in given.items()}


def _shares_by_step(
    schedule: Callable[[float, float, int], Schedule], budget: Mapping[str, float], count: int
) -> dict[str, list[float]]:
    """Return for each budget the shares of the original after steps 1 to ``count``.

    Raises
    ------
    ArgumentError
        If ``schedule`` makes no schedule of shares that ends at the budget.
    CallbackError
        If it raises an error.
    """
    found = {}
    for name, end in budget.items():
        with calling_user_code("schedule(1, budget, count)"):
            made = schedule(1.0, end, count)
        shares = [value_at(made, k) for k in range(1, count + 1)]
        if not all(0 < share <= 1 for share in shares) or shares[-1] != end:
            raise ArgumentError(
                f"schedule: for {name}={end:g} it gives {shares!s:.100}, which are no shares in "
                "(0, 1] that end at the budget. Give a class such as fxprune.training.Cubic."
            )
        found[name] = shares
    return found


def _read_settings(path: Path) -> dict[str, Any]:
    """Read the settings of a run.

    Raises
    ------
    PlanError
        If the file is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is damaged: {error}. Give another folder=.") from error
    if not isinstance(found, dict):
        raise PlanError(f"{path} is damaged: it holds no settings. Give another folder=.")
    return found
