"""A model and its inputs in one precision, layout and mode, timed."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fxprune.common.contents import tensors_of
from fxprune.common.hooks import in_mode
from fxprune.common.identity import IdentitySet
from fxprune.common.numbers import switch, whole
from fxprune.common.process_lock import TURN
from fxprune.common.public import calling, public, shown
from fxprune.cost import MacCounter, cost_of
from fxprune.errors import ArgumentError
from fxprune.inference import LAYOUTS, lay_out
from fxprune.inputs import ExampleInputs, as_call, batch_size, drawn
from fxprune.latency.clock import Timing, time_in_turns
from fxprune.latency.cuda import cache_bytes, captured, current, peak_bytes
from fxprune.latency.roofline import roofline

__all__ = [
    "MODES",
    "PRECISIONS",
    "Latency",
    "Setting",
    "batch_of",
    "measure",
    "prepared",
    "running",
    "time_models",
]

PRECISIONS: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Name -> dtype; tf32 is float32 whose products a GPU computes with 10 bits of mantissa."""

MODES = ("eager", "compiled", "cudagraph")
"""As it is; ``torch.compile``; recorded once as a CUDA graph and replayed."""

_MOST_BATCHES = 4096  # of inputs so small that reading them counts for nothing


@public
@dataclass(frozen=True)
class Setting:
    """How a model runs.

    Attributes
    ----------
    device:
        ``"cuda"`` or ``"cpu"``, or with a number; None: the GPU where there is one.
    precision:
        Of :data:`PRECISIONS`.
    mode:
        Of :data:`MODES`.
    channels_last:
        Lay images, videos and the weights of convolutions over them out channels-last.
    batch:
        Images per call; None: as in the example.
    """

    device: str | None = None
    precision: str = "fp32"
    mode: str = "eager"
    channels_last: bool = True
    batch: int | None = None

    def __post_init__(self) -> None:
        named = isinstance(self.precision, str) and isinstance(self.mode, str)
        if not named or self.precision not in PRECISIONS or self.mode not in MODES:
            known = f"precisions are {', '.join(PRECISIONS)}, modes are {', '.join(MODES)}"
            raise ArgumentError(
                f"precision={shown(self.precision)}, mode={shown(self.mode)}: {known}."
            )
        if self.batch is not None:
            object.__setattr__(self, "batch", whole("batch", self.batch))
        object.__setattr__(self, "channels_last", switch("channels_last", self.channels_last))
        if self.device is not None:
            object.__setattr__(self, "device", self._checked())
        if not self.on_gpu and (self.mode == "cudagraph" or self.precision == "tf32"):
            what = f"mode {self.mode!r}" if self.mode == "cudagraph" else "precision 'tf32'"
            raise ArgumentError(f"{what} needs a GPU, and device is {self.place}.")

    def _checked(self) -> str:
        """The device's name, of one that can be measured here."""
        given: Any = self.device
        device = (
            torch.device(given)
            if isinstance(given, (str, torch.device)) and _is_device(given)
            else None
        )
        if device is None or device.type not in ("cpu", "cuda"):
            raise ArgumentError(
                f'device={shown(given)}: latency is measured on "cuda" or "cpu", or either with '
                'a number, as "cuda:1".'
            )
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ArgumentError(
                f"device={given!r}: torch sees no GPU here. Leave device out to measure on the "
                "CPU."
            )
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ArgumentError(
                f"device={given!r}: torch sees {torch.cuda.device_count()} GPUs here, numbered "
                "from 0."
            )
        return str(given)

    def __str__(self) -> str:
        """
        >>> print(Setting("cpu", batch=8))
        on cpu, fp32, eager, channels-last, batch 8
        """
        layout = ", channels-last" if self.channels_last else ""
        batch = "the example's batch" if self.batch is None else f"batch {self.batch}"
        return f"on {self.place}, {self.precision}, {self.mode}{layout}, {batch}"

    @property
    def place(self) -> torch.device:
        """The device."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def on_gpu(self) -> bool:
        return self.place.type == "cuda"


def _is_device(name: Any) -> bool:
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True


@public
@dataclass(frozen=True)
class Latency:
    """What one model took.

    Attributes
    ----------
    timing:
        Milliseconds of one call.
    batch:
        Images per call.
    floor_ms:
        What the call would take at the device's measured rate of multiply-accumulates and its
        measured bandwidth, whichever is longer, if weights, inputs and outputs went through memory
        once and nothing else did.
    peak_bytes:
        Weights, inputs, and the most memory that one call takes beside them; None on a CPU, which
        does not tell.
    """

    timing: Timing
    batch: int
    floor_ms: float
    peak_bytes: int | None

    @property
    def throughput(self) -> float:
        """Images per second."""
        return 1e3 * self.batch / self.timing.ms

    def __str__(self) -> str:
        spread = f"{self.timing.low:.3f} to {self.timing.high:.3f}"
        memory = "" if self.peak_bytes is None else f", {self.peak_bytes / 2**20:,.0f} MiB"
        return (
            f"{self.timing.ms:.3f} ms ({spread}; floor {self.floor_ms:.3f}), "
            f"{self.throughput:,.0f} per second{memory}"
        )


@public
def measure(
    models: Mapping[str, nn.Module],
    example_inputs: ExampleInputs,
    setting: Setting | None = None,
    *,
    rounds: int = 9,
    seconds: float = 0.2,
) -> dict[str, Latency]:
    """Time models side by side, in turns, on the same inputs.

    Parameters
    ----------
    models:
        Name -> module; copies are measured, in ``eval`` mode, without gradients.
    example_inputs:
        A tensor, a tuple of positional arguments or a dict of keyword arguments. Shapes and dtypes
        matter; floating-point values are drawn anew. On a GPU several batches take turns, more
        than its L2 cache holds.
    rounds, seconds:
        How many turns each model has, and about how long each lasts.

    Returns
    -------
    Name -> latency, in the order of ``models``.

    Raises
    ------
    ArgumentError
        If the setting cannot be had here, or there is no model.

    Examples
    --------
    >>> small, large = (nn.Conv2d(3, width, 3).eval() for width in (4, 256))
    >>> models = {"small": small, "large": large}
    >>> found = measure(models, torch.zeros(1, 3, 32, 32), Setting("cpu", batch=4), rounds=3,
    ...     seconds=0.02)
    >>> small, large = found["small"], found["large"]
    >>> small.batch, small.timing.count, small.floor_ms < large.floor_ms
    (4, 3, True)
    """
    if (
        not isinstance(models, Mapping)
        or not models
        or not all(isinstance(model, nn.Module) for model in models.values())
    ):
        raise ArgumentError(
            'measure() takes models by name, as {"dense": model}: a dict from text to '
            "torch.nn.Module, not empty."
        )
    setting = Setting() if setting is None else setting
    if not isinstance(setting, Setting):
        raise ArgumentError(
            f"setting is a {type(setting).__name__}: give a fxprune.latency.Setting, as "
            "Setting(device='cpu')."
        )
    with _running_models(models, example_inputs, setting) as (batches, ready, runs):
        timings = time_in_turns(runs, setting.place, rounds=rounds, seconds=seconds)
        limits = roofline(
            setting.place, PRECISIONS[setting.precision], setting.precision == "tf32"
        )
        out = {}
        for name, model in ready.items():
            first, peak = batches[0], None
            floor = limits.floor_ms(
                _macs(model, first), _bytes(model, first, _call_model(model, first))
            )
            if setting.on_gpu:  # replaying takes no memory, since what was recorded has it already
                run = (
                    functools.partial(_call_model, model, first)
                    if setting.mode == "cudagraph"
                    else runs[name]
                )
                peak = _bytes(model, first) + peak_bytes(run)
            out[name] = Latency(timings[name], batch_size(first), floor, peak)
    return out


def time_models(
    models: Mapping[str, nn.Module],
    example_inputs: ExampleInputs,
    setting: Setting,
    *,
    rounds: int = 9,
    seconds: float = 0.2,
) -> dict[str, Timing]:
    """As :func:`measure`, the times alone."""
    with _running_models(models, example_inputs, setting) as (_, _, runs):
        return time_in_turns(runs, setting.place, rounds=rounds, seconds=seconds)


@contextlib.contextmanager
def _running_models(
    models: Mapping[str, nn.Module], example_inputs: Any, setting: Setting
) -> Iterator[tuple[list[Any], dict[str, nn.Module], dict[str, Callable[[], object]]]]:
    """The batches, the models as they run, and what calls them, in the setting's precision and
    without gradients.
    """
    with running(setting), _compiled_for_all(setting), torch.inference_mode():
        batches = _batches(example_inputs, setting)
        ready = {name: prepared(model, setting) for name, model in models.items()}
        yield (
            batches,
            ready,
            {name: _runner(model, batches, setting) for name, model in ready.items()},
        )


def _compiled_for_all(setting: Setting) -> AbstractContextManager[Any]:
    """Models of one class share the code that is compiled. Past a limit it would run as it is,
    silently: none, then.
    """
    if setting.mode != "compiled":
        return contextlib.nullcontext()  # the compiler is not even imported
    return torch._dynamo.config.patch(
        recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize
    )


@contextlib.contextmanager
def running(setting: Setting) -> Iterator[None]:
    """The setting's GPU is the current one, tf32 exactly where it is asked for; cuDNN tries its
    algorithms, as in production.
    """
    wanted = setting.precision == "tf32"
    # they are the process's: two threads that exchange them would leave the wrong ones, and
    # disturb each other's times
    with TURN:
        before = (
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.benchmark,
        )
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = wanted
        torch.backends.cudnn.benchmark = True
        try:
            with current(setting.place):
                yield
        finally:
            (
                torch.backends.cuda.matmul.allow_tf32,
                torch.backends.cudnn.allow_tf32,
                torch.backends.cudnn.benchmark,
            ) = before


def prepared(model: nn.Module, setting: Setting) -> nn.Module:
    """A copy, on the device, in the precision and layout."""
    own = in_mode(copy.deepcopy(model), False).to(setting.place, PRECISIONS[setting.precision])
    if setting.channels_last:
        lay_out(own)
    return own


def _batches(example_inputs: Any, setting: Setting) -> list[Any]:
    """Inputs of the batch size asked for: on a GPU as many as overflow its L2 cache twice."""
    first = batch_of(example_inputs, setting)
    count = 1
    if setting.on_gpu:
        own = sum(leaf.nbytes for leaf in tensors_of(first))
        count = min(-(-2 * cache_bytes(setting.place) // max(own, 1)), _MOST_BATCHES)
    return [first, *(batch_of(example_inputs, setting, seed) for seed in range(1, count))]


def batch_of(example_inputs: Any, setting: Setting, seed: int = 0) -> Any:
    """Inputs like the example's, of the setting's batch size, precision and layout, on its
    device.
    """

    def placed(tensor: Tensor) -> Tensor:
        tensor = tensor.to(
            setting.place, PRECISIONS[setting.precision] if tensor.is_floating_point() else None
        )
        laid_out = setting.channels_last and tensor.dim() in LAYOUTS
        return tensor.contiguous(memory_format=LAYOUTS[tensor.dim()]) if laid_out else tensor

    return tree_map_only(Tensor, placed, drawn(example_inputs, batch=setting.batch, seed=seed))


def _call_model(model: nn.Module, inputs: Any) -> Any:
    args, kwargs = as_call(inputs)
    with calling(f"the {type(model).__name__}"):
        return model(*args, **kwargs)


def _runner(model: nn.Module, batches: list[Any], setting: Setting) -> Callable[[], object]:
    taken = itertools.cycle(batches)
    if setting.mode == "cudagraph":
        return _replayed(model, batches, taken)
    called: Any = torch.compile(model, dynamic=False) if setting.mode == "compiled" else model
    return lambda: _call_model(called, next(taken))


def _replayed(model: nn.Module, batches: list[Any], taken: Iterator[Any]) -> Callable[[], object]:
    """A CUDA graph of one call; replaying it copies the inputs to where it reads them."""
    still = tree_map_only(Tensor, torch.clone, batches[0])
    replay = captured(lambda: _call_model(model, still))
    places = tensors_of(still)

    def run() -> None:
        for place, value in zip(places, tensors_of(next(taken)), strict=True):
            place.copy_(value)
        replay()

    return run


def _macs(model: nn.Module, inputs: Any) -> int:
    try:
        return cost_of(model, inputs).macs
    except Exception:  # the values decide what runs, as in a detector: count while it does
        with MacCounter() as counter:
            _call_model(model, inputs)
        return counter.macs


def _bytes(model: nn.Module, *more: Any) -> int:
    """Weights and the tensors in ``more``, once each."""
    leaves = [*model.parameters(), *model.buffers(), *tree_leaves(more)]
    return sum(leaf.nbytes for leaf in IdentitySet(leaves) if isinstance(leaf, Tensor))
