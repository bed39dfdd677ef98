"""Timing of models in one precision, layout and mode."""

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
from fxprune.common.hooks import put_in_mode
from fxprune.common.identity import IdentitySet
from fxprune.common.process_lock import PROCESS_LOCK
from fxprune.common.public import calling_user_code, public
from fxprune.cost import MacCounter, cost_of
from fxprune.errors import ArgumentError
from fxprune.inference import LAYOUTS, lay_out
from fxprune.inputs import ExampleInputs, as_call, batch_size, random_like
from fxprune.latency.clock import Timing, time_in_turns
from fxprune.latency.cuda import cache_bytes, captured, peak_bytes, use_device
from fxprune.latency.roofline import roofline
from fxprune.latency.setting import PRECISIONS, Setting

__all__ = [
    "Latency",
    "apply_setting",
    "make_batch",
    "measure",
    "prepare_model",
    "time_models",
]


_MOST_BATCHES = 4096  # upper limit for tiny inputs, for which reading costs nothing


@public
@dataclass(frozen=True)
class Latency:
    """The measured time and memory of one model.

    Attributes
    ----------
    timing:
        Time of one call, in milliseconds.
    batch:
        Images per call.
    floor_ms:
        Least time of one call on this device, in milliseconds: the longer of computing all
        multiply-accumulates at the peak rate, and moving weights, inputs and outputs through
        memory once (see :func:`roofline`).
    peak_bytes:
        Memory of the weights, the inputs and the peak of one call, in bytes. None on a CPU, where
        it is not measured.

    Examples
    --------
    >>> print(Latency(Timing(ms=4.0, low=3.5, high=4.5, count=9), 8, 2.0, None))
    4.000 ms (3.500 to 4.500; floor 2.000), 2,000 per second
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

    The models are copied first. The copies run in ``eval`` mode and without gradients.

    Parameters
    ----------
    models:
        For each name a module.
    example_inputs:
        A tensor, a tuple of positional arguments or a dict of keyword arguments. Only shapes and
        dtypes matter for floating-point tensors, whose values are replaced by random ones. On a
        GPU the models get several batches in turn, which together exceed its L2 cache.
    setting:
        Device, precision, mode, layout and batch size. None: ``Setting()``.
    rounds:
        Number of turns of each model.
    seconds:
        Approximate duration of a turn, in seconds.

    Returns
    -------
    For each name the latency, in the order of ``models``. Times are in milliseconds, memory is in
    bytes.

    Raises
    ------
    ArgumentError
        If ``models`` is empty or not a dict of modules, or if another argument is not valid.
    CallbackError
        If a model raises an error.

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
    setting = Setting() if setting is None else setting
    _check_models(models)
    _check_setting(setting)
    with _running_models(models, example_inputs, setting) as running:
        timings = time_in_turns(running.calls, setting.place, rounds=rounds, seconds=seconds)
        limits = roofline(
            setting.place, PRECISIONS[setting.precision], setting.precision == "tf32"
        )
        first, out = running.batches[0], {}
        for name, model in running.models.items():
            traffic = _bytes(model, first, _call_model(model, first))
            floor = limits.floor_ms(_macs(model, first), traffic)
            peak = running.peak_bytes(name, setting) if setting.on_gpu else None
            out[name] = Latency(timings[name], batch_size(first), floor, peak)
    return out


def _check_models(models: object) -> None:
    """Refuse anything but a dict of modules that is not empty."""
    values = list(models.values()) if isinstance(models, Mapping) else []
    if not values or not all(isinstance(model, nn.Module) for model in values):
        raise ArgumentError(
            'measure() takes models by name, as {"dense": model}: a dict from text to '
            "torch.nn.Module, not empty."
        )


def _check_setting(setting: object) -> None:
    """Refuse anything but a :class:`Setting`."""
    if not isinstance(setting, Setting):
        raise ArgumentError(
            f"setting is a {type(setting).__name__}: give a fxprune.latency.Setting, as "
            "Setting(device='cpu')."
        )


def time_models(
    models: Mapping[str, nn.Module],
    example_inputs: ExampleInputs,
    setting: Setting,
    *,
    rounds: int = 9,
    seconds: float = 0.2,
) -> dict[str, Timing]:
    """Time models as :func:`measure` does, and return only the times, in milliseconds."""
    with _running_models(models, example_inputs, setting) as running:
        return time_in_turns(running.calls, setting.place, rounds=rounds, seconds=seconds)


@dataclass(frozen=True)
class _RunningModels:
    """Models that are ready to be timed.

    Attributes
    ----------
    batches:
        The inputs that each model gets in turn.
    models:
        The prepared copies of the models, by name.
    calls:
        For each name a function that calls the model with the next batch.
    """

    batches: list[Any]
    models: dict[str, nn.Module]
    calls: dict[str, Callable[[], object]]

    def peak_bytes(self, name: str, setting: Setting) -> int:
        """Return the bytes of weights and inputs, and the peak of one call on the current GPU."""
        model, first = self.models[name], self.batches[0]
        call = self.calls[name]
        if setting.mode == "cudagraph":  # a replay allocates nothing: the recording already has
            call = functools.partial(_call_model, model, first)
        return _bytes(model, first) + peak_bytes(call)


@contextlib.contextmanager
def _running_models(
    models: Mapping[str, nn.Module], example_inputs: Any, setting: Setting
) -> Iterator[_RunningModels]:
    """Apply a setting, and prepare copies of models to run in it, without gradients."""
    with apply_setting(setting), _no_recompile_limit(setting), torch.inference_mode():
        batches = _make_batches(example_inputs, setting)
        copies = {name: prepare_model(model, setting) for name, model in models.items()}
        calls = {name: _make_call(model, batches, setting) for name, model in copies.items()}
        yield _RunningModels(batches, copies, calls)


def _no_recompile_limit(setting: Setting) -> AbstractContextManager[Any]:
    """Return a context in which any number of models of one class are compiled.

    Models of one class share the code that is compiled. Torch has a limit on how often it compiles
    the same code, and silently runs the code uncompiled beyond that.
    """
    if setting.mode != "compiled":
        return contextlib.nullcontext()  # does not import the compiler
    return torch._dynamo.config.patch(
        recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize
    )


@contextlib.contextmanager
def apply_setting(setting: Setting) -> Iterator[None]:
    """Apply a setting to the process, and restore the former state at the end.

    The GPU of the setting becomes the current one, TF32 is on only if the precision is tf32, and
    cuDNN searches for its fastest algorithms, as in production.
    """
    tf32 = setting.precision == "tf32"
    # These options belong to the process. Two threads that change them at the same time would
    # restore wrong values and disturb each other's times.
    with PROCESS_LOCK:
        before = (
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.benchmark,
        )
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = True
        try:
            with use_device(setting.place):
                yield
        finally:
            (
                torch.backends.cuda.matmul.allow_tf32,
                torch.backends.cudnn.allow_tf32,
                torch.backends.cudnn.benchmark,
            ) = before


def prepare_model(model: nn.Module, setting: Setting) -> nn.Module:
    """Return a copy of a model in eval mode, on the device and in the precision and layout."""
    dtype = PRECISIONS[setting.precision]
    copied = put_in_mode(copy.deepcopy(model), False).to(setting.place, dtype)
    if setting.channels_last:
        lay_out(copied)
    return copied


def _make_batches(example_inputs: Any, setting: Setting) -> list[Any]:
    """Return the batches that a model gets in turn.

    On a GPU they are together twice as large as its L2 cache, so that no input is still in the
    cache when it is used again. On a CPU there is one batch.
    """
    first = make_batch(example_inputs, setting)
    count = 1
    if setting.on_gpu:
        nbytes = sum(tensor.nbytes for tensor in tensors_of(first))
        count = min(-(-2 * cache_bytes(setting.place) // max(nbytes, 1)), _MOST_BATCHES)
    return [first, *(make_batch(example_inputs, setting, seed) for seed in range(1, count))]


def make_batch(example_inputs: Any, setting: Setting, seed: int = 0) -> Any:
    """Return random inputs with the setting's batch size, precision, layout and device.

    Shapes are those of the example inputs, apart from the batch size.
    """

    def place(tensor: Tensor) -> Tensor:
        """Return a tensor on the device, in the precision and layout."""
        dtype = PRECISIONS[setting.precision] if tensor.is_floating_point() else None
        tensor = tensor.to(setting.place, dtype)
        if setting.channels_last and tensor.dim() in LAYOUTS:
            return tensor.contiguous(memory_format=LAYOUTS[tensor.dim()])
        return tensor

    return tree_map_only(
        Tensor, place, random_like(example_inputs, batch=setting.batch, seed=seed)
    )


def _call_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model; its errors become a :class:`CallbackError`."""
    args, kwargs = as_call(inputs)
    with calling_user_code(f"the {type(model).__name__}"):
        return model(*args, **kwargs)


def _make_call(model: nn.Module, batches: list[Any], setting: Setting) -> Callable[[], object]:
    """Return a function that calls a model in the setting's mode with the next batch."""
    batch = itertools.cycle(batches)
    if setting.mode == "cudagraph":
        return _record_call(model, batches[0], batch)
    called: Any = torch.compile(model, dynamic=False) if setting.mode == "compiled" else model
    return lambda: _call_model(called, next(batch))


def _record_call(model: nn.Module, first: Any, batch: Iterator[Any]) -> Callable[[], object]:
    """Record a call of a model as a CUDA graph, and return a function that replays it.

    The function first copies the next batch to the tensors that the graph reads.
    """
    inputs = tree_map_only(Tensor, torch.clone, first)
    replay = captured(lambda: _call_model(model, inputs))
    targets = tensors_of(inputs)

    def run() -> None:
        """Copy the next batch and replay the graph."""
        for target, value in zip(targets, tensors_of(next(batch)), strict=True):
            target.copy_(value)
        replay()

    return run


def _macs(model: nn.Module, inputs: Any) -> int:
    """Return the number of multiply-accumulates of one call."""
    try:
        return cost_of(model, inputs).macs
    except Exception:  # values decide what runs, as in a detector: count during a real run
        with MacCounter() as counter:
            _call_model(model, inputs)
        return counter.macs


def _bytes(model: nn.Module, *more: Any) -> int:
    """Return the bytes of all weights, buffers and tensors in ``more``, each counted once."""
    leaves = [*model.parameters(), *model.buffers(), *tree_leaves(more)]
    return sum(leaf.nbytes for leaf in IdentitySet(leaves) if isinstance(leaf, Tensor))
