"""Groups of command-line options, each a dataclass.

A command that has a group as a parameter takes all options of the group. Options that several
commands share are thus listed once, with their defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from torch import nn

from fxprune.cli.loading import load_model, model_and_inputs, note_random
from fxprune.cli.options import (
    Batch,
    Batches,
    Channels,
    ChannelsLast,
    Checkpoint,
    Device,
    Input,
    Keep,
    LatencyShare,
    Layers,
    Macs,
    MaxRatio,
    MinChannels,
    Mode,
    Model,
    Modes,
    Params,
    Precision,
    Precisions,
    Rounds,
    RoundTo,
    Saved,
    Scope,
    Scopes,
    Seconds,
    UnitKind,
    Weights,
    layer_of,
    listed,
    max_ratio_of,
    rank_scopes,
    sizes,
    units_of,
)
from fxprune.cli.terminal import stage
from fxprune.errors import ArgumentError
from fxprune.latency import Setting

__all__ = [
    "BudgetOptions",
    "LatencyOptions",
    "ModelInputOptions",
    "ModelOptions",
    "TimingOptions",
    "expand_groups",
]


@dataclass(frozen=True)
class ModelOptions:
    """The model of a command, and where its weights come from."""

    model: Model
    weights: Weights = None
    checkpoint: Checkpoint = None
    saved: Saved = None

    def load(self) -> nn.Module:
        """Return the model in eval mode, with messages about progress and random weights."""
        with stage(f"building {self.model}"):
            module = load_model(self.model, self.weights, self.checkpoint, self.saved)
        note_random(self.model, self.weights, self.checkpoint, self.saved)
        return module


@dataclass(frozen=True)
class ModelInputOptions(ModelOptions):
    """The model of a command, and its example inputs."""

    input_shapes: Input = None

    def load_with_inputs(self) -> tuple[nn.Module, tuple[Any, ...]]:
        """Return the model in eval mode and example inputs, with the messages of ``load``."""
        weights_from = self.weights, self.checkpoint, self.saved
        with stage(f"building {self.model}"):
            built = model_and_inputs(self.model, self.input_shapes, *weights_from)
        note_random(self.model, *weights_from)
        return built


@dataclass(frozen=True)
class BudgetOptions:
    """How much to keep, and which units may be removed."""

    channels: Channels = None
    macs: Macs = None
    params: Params = None
    scope: Scope = "group"
    layers: Layers = None
    keep: Keep = None
    units: UnitKind = None
    round_to: RoundTo = 1
    min_channels: MinChannels = 1
    max_ratio: MaxRatio = None
    scopes: Scopes = None

    @property
    def is_given(self) -> bool:
        """Whether an option says how much to keep."""
        budgets = (self.channels, self.macs, self.params, self.layers)
        return any(budget is not None for budget in budgets)

    def arguments(self) -> dict[str, Any]:
        """Return the options as keyword arguments of :func:`fxprune.prune`.

        Raises
        ------
        ArgumentError
            If a value of ``--layer``, ``--max-ratio`` or ``--scopes`` is malformed.
        """
        return {
            "channels": self.channels,
            "macs": self.macs,
            "params": self.params,
            "scope": self.scope,
            "layers": dict(layer_of(text) for text in self.layers or ()),
            "keep": tuple(self.keep or ()),
            "units": units_of(self.units),
            "round_to": self.round_to,
            "min_channels": self.min_channels,
            "max_ratio": max_ratio_of(self.max_ratio),
            "scopes": rank_scopes(self.scopes),
        }


@dataclass(frozen=True)
class LatencyOptions:
    """A latency budget, and where and how latency is measured."""

    latency: LatencyShare = None
    device: Device = None
    precision: Precision = "fp32"
    mode: Mode = "eager"
    batch: Batch = None

    def arguments(self) -> dict[str, Any]:
        """Return the options as keyword arguments of :func:`fxprune.prune`.

        Raises
        ------
        ArgumentError
            If options about the measurement are given without ``--latency``, or if the setting is
            not possible on this machine.
        """
        if self.latency is not None:
            setting = Setting(self.device, self.precision, self.mode, batch=self.batch)
            return {"latency": self.latency, "device": setting}
        if self != LatencyOptions():
            raise ArgumentError(
                "--device, --precision, --mode and --batch say how --latency is measured: give "
                "that too."
            )
        return {}


@dataclass(frozen=True)
class TimingOptions:
    """How ``bench`` measures: lists of settings, and the length of the measurement."""

    device: Device = None
    precisions: Precisions = "fp32"
    modes: Modes = "eager"
    batches: Batches = "1"
    channels_last: ChannelsLast = True
    rounds: Rounds = 9
    seconds: Seconds = 0.2

    def settings(self) -> list[Setting]:
        """Return every combination of the precisions, modes and batch sizes.

        Raises
        ------
        ArgumentError
            If one of the three lists is empty, or if a setting is not possible on this machine.
        """
        choices: dict[str, list[Any]] = {
            "--precision": listed(self.precisions),
            "--mode": listed(self.modes),
            "--batch": sizes(self.batches),
        }
        empty = [option for option, values in choices.items() if not values]
        if empty:
            raise ArgumentError(
                f"{empty[0]} names nothing: write for instance --precision fp32,bf16 --mode eager "
                "--batch 1,64."
            )
        settings = []
        for precision, mode, batch in itertools.product(*choices.values()):
            settings.append(Setting(self.device, precision, mode, self.channels_last, batch))
        return settings


def expand_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each group among the parameters of a command by the options of the group.

    Typer reads the options of a command from its signature. The result has a signature with the
    fields of each group, and builds the groups when it is called.
    """
    hints = get_type_hints(command)
    groups = {name: hints[name] for name in hints if dataclasses.is_dataclass(hints[name])}

    @functools.wraps(command)
    def call(**options: Any) -> None:
        """Call the command with groups made from ``options``."""
        built = {}
        for name, kind in groups.items():
            built[name] = kind(**{f.name: options.pop(f.name) for f in dataclasses.fields(kind)})
        command(**options, **built)

    call.__signature__ = _expanded_signature(command, groups)  # type: ignore[attr-defined]
    return call


def _expanded_signature(
    command: Callable[..., None], groups: Mapping[str, Any]
) -> inspect.Signature:
    """Return the signature of a command with the fields of each group in place of the group."""
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if parameter.name in groups:
            group = inspect.signature(groups[parameter.name], eval_str=True)
            parameters += group.parameters.values()
        else:
            parameters.append(parameter)
    # keyword-only parameters may have defaults in any order
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature([each.replace(kind=keyword_only) for each in parameters])
