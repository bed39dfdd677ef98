"""Prune a little, train, prune again: down to a budget in several steps, around a training loop of
the user's own.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.api import load, prune
from fxprune.common.compiled import plain
from fxprune.common.contents import named_tensors
from fxprune.common.models import check_model
from fxprune.common.numbers import number, path_of, share, whole
from fxprune.common.public import guarded, public
from fxprune.cost import cost_of
from fxprune.errors import ArgumentError, PlanError, SignatureError
from fxprune.options import kept_modules
from fxprune.result.pruned import Pruned
from fxprune.result.serialization import read_files, write_files

__all__ = ["Steps"]

_SETTINGS = "steps.json"
_OPTIONS = frozenset(inspect.signature(prune).parameters) - {"model", "example_inputs"}


@public
class Steps:
    """Iterate over ever smaller models; train each in the body of the loop, in place.

    Step k of n is brought to ``budget ** (k / n)`` of the original model, by pruning what the body
    left of step k - 1; so every step takes away the same share, and the last one meets the budget
    itself.

    Parameters
    ----------
    model, example_inputs:
        As for :func:`fxprune.prune`. The model is left as it is.
    count:
        Number of steps.
    macs, params:
        The final budgets, as shares of the original.
    folder:
        Where to keep the state after each step. A run that was interrupted goes on behind the last
        step that it finished; a step that was killed, even while it was written, leaves the state
        before it. Without a folder nothing is kept.
    options:
        Everything else that :func:`fxprune.prune` takes (``criterion``, ``keep``, ``round_to``,
        ...), for each step.

    Raises
    ------
    ArgumentError
        If the folder belongs to another run (of another model or other weights, with other inputs,
        budgets or options), or no budget is given.

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
        folder: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        unknown = [name for name in options if name not in _OPTIONS]
        if unknown:
            raise SignatureError(
                f"Steps got an unexpected keyword {unknown[0]!r}: beside its own it takes those "
                "of prune."
            )
        if any(name in options for name in ("channels", "layers", "latency")):
            raise ArgumentError(
                "channels=, layers= and latency= count what the model at hand has: give macs= or "
                "params= instead."
            )
        model = plain(model)
        check_model(model)
        count = whole("count", count)
        asked = {
            name: value
            for name, value in (("macs", macs), ("params", params))
            if value is not None
        }
        if not asked:
            raise ArgumentError(
                "nothing says how far to go: give macs= or params=, e.g. macs=0.25."
            )
        self.budget = {
            name: share(name, value, "the share of the original to end with")
            for name, value in asked.items()
        }
        if "keep" in options:  # by their names, which the smaller models have too
            options["keep"] = tuple(sorted(kept_modules(model, options["keep"])))
        self.model, self.inputs, self.count, self.options = model, example_inputs, count, options
        self.folder = None if folder is None else path_of("the folder", folder)
        if self.folder is not None:
            self._claim(self.folder)

    def __iter__(self) -> Iterator[Pruned]:
        with guarded("Steps"):
            done = self.done
            current = self.model if done == 0 else self._load(done).model
            start = self._cost(self.model)
        for k in range(done + 1, self.count + 1):
            with guarded("Steps"):
                now = self._cost(current)
                goal = {
                    name: part ** (k / self.count) * start[name]
                    for name, part in self.budget.items()
                }
                shares: dict[str, Any] = {
                    name: min(1.0, goal[name] / now[name]) if now[name] else 1.0 for name in goal
                }
                step = prune(current, self.inputs, **shares, **self.options)
            yield step
            if self.folder is not None:
                step.save(self._path(k))
            current = step.model

    @property
    @public
    def done(self) -> int:
        """How many steps the folder holds, trained."""
        if self.folder is None:
            return 0
        return max((k for k in range(1, self.count + 1) if self._path(k).is_dir()), default=0)

    @public
    def last(self) -> Pruned:
        """The last finished step, from the folder.

        Raises
        ------
        ArgumentError
            If there is none.
        PlanError
            If it is damaged.
        """
        if not self.done:
            raise ArgumentError(
                "no step has been finished"
                + (": give folder= to keep them." if self.folder is None else " yet.")
            )
        return self._load(self.done)

    def _load(self, k: int) -> Pruned:
        return load(self._path(k), self.model)

    def _path(self, k: int) -> Path:
        assert self.folder is not None
        return self.folder / f"step-{k}"

    def _cost(self, model: nn.Module) -> dict[str, float]:
        found = cost_of(model, self.inputs)
        return {"macs": float(found.macs), "params": float(found.params)}

    def _claim(self, folder: Path) -> None:
        """Write what the run is into a new folder; compare it with what an old one holds."""
        settings = {
            "count": self.count,
            "budget": self.budget,
            "model": _digest(self.model),
            "inputs": described(self.inputs),
            "options": described(self.options),
        }
        settings = json.loads(json.dumps(settings))
        if not (folder / _SETTINGS).exists():
            text = json.dumps(settings, sort_keys=True) + "\n"
            write_files(folder, {_SETTINGS: lambda path: path.write_text(text, encoding="utf-8")})
            return
        found = _read_settings(read_files(folder, (_SETTINGS,))[_SETTINGS])
        other = [name for name in settings if found.get(name) != settings[name]]
        if other:
            was, now = ({name: run.get(name) for name in other} for run in (found, settings))
            raise ArgumentError(
                f"{folder} holds a run with other settings: another "
                f"{' and another '.join(other)}. It has {was!s:.300}, and now there is "
                f"{now!s:.300}. Give another folder=, or what the run began with."
            )


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is damaged: {error}. Give another folder=.") from error
    if not isinstance(found, dict):
        raise PlanError(f"{path} is damaged: it holds no settings. Give another folder=.")
    return found


def _digest(model: nn.Module) -> str:
    """Of names, shapes, types and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors(model).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if not tensor.is_meta:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def described(value: Any) -> Any:
    """What tells a setting from another one, as data that is the same in every process: of an
    object its type and settings.

    >>> described((torch.zeros(2, 3), {"share": 0.5})), described(torch.relu)
    (['float32 (2, 3)', {'share': 0.5}], 'torch.relu')
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)) or number(value) is not None:
        return value if isinstance(value, bool) else number(value)
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {
            "kind": described(type(value)),
            **{own.name: described(getattr(value, own.name)) for own in fields(value)},
        }
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', None) or 'torch'}.{named.__name__}"
