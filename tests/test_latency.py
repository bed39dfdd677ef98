"""Latency measurements: impossible settings are refused, and models run as the setting says."""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxprune.errors import ArgumentError
from fxprune.latency import (
    Latency,
    Roofline,
    Setting,
    Timing,
    measure,
    measuring,
    roofline,
    time_in_turns,
)
from fxprune.latency.cuda import captured, peak_bytes
from tests.support.checking import assert_unharmed, snapshot

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU, and torch sees none"
)
QUICK = {"rounds": 2, "seconds": 0.005}


class Recording(nn.Module):
    """A convolution that records how it is called; its copies share the record."""

    def __init__(self, seen: list[Any]) -> None:
        super().__init__()
        self.conv, self.seen = nn.Conv2d(3, 4, 1), (seen,)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if not x.is_meta:
            self.seen[0].append(
                (x, scale, self.conv.weight, self.training, torch.is_grad_enabled())
            )
        return self.conv(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recording":
        new = Recording(self.seen[0])
        new.load_state_dict(self.state_dict())
        return new


def test_runs_take_turns() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    found = time_in_turns(runs, rounds=4, seconds=1e-9, warm_up=1)
    assert {timing.count for timing in found.values()} == {4}
    turns = [name for name, _ in itertools.groupby(order)]
    # after the warm-up; each turn begins with calls that are not timed
    assert "".join(turns[3:]) == "abc" + "bca" + "cab" + "abc"


def test_what_is_timed_runs_in_the_mode_of_the_caller() -> None:
    seen: list[bool] = []
    for mode in (True, False):
        with torch.inference_mode(mode):
            time_in_turns(
                {"run": lambda: seen.append(torch.is_inference_mode_enabled())},
                rounds=1,
                seconds=1e-9,
                warm_up=1,
            )
            assert set(seen) == {mode}
            seen.clear()


def test_the_median_and_the_quartiles() -> None:
    assert Timing.of([5.0, 1.0, 100.0, 2.0, 3.0, 4.0, 6.0, 7.0]) == Timing(4.5, 3.0, 7.0, 8)


@pytest.mark.parametrize(
    "options", [{"rounds": 0}, {"seconds": 0}, {"rounds": 2.5}, {"seconds": "long"}]
)
def test_nothing_to_time(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(options))}="):
        time_in_turns({"run": lambda: None}, **options)
    with pytest.raises(ArgumentError, match="not empty"):
        time_in_turns({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "precision='fp8'.*fp32, tf32, bf16, fp16"),
        ({"mode": "fast"}, "mode='fast'.*eager, compiled, cudagraph"),
        ({"batch": 0}, "batch=0"),
        ({"device": "cpu", "mode": "cudagraph"}, "mode 'cudagraph' needs a GPU"),
        ({"device": "cpu", "precision": "tf32"}, "precision 'tf32' needs a GPU"),
    ],
)
def test_settings_that_cannot_be_had(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Setting(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu() -> None:
    with pytest.raises(ArgumentError, match="torch sees no GPU here"):
        Setting("cuda")
    assert Setting().place == torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_what_runs_is_what_was_asked_for(precision: str, dtype: torch.dtype) -> None:
    seen: list[Any] = []
    model = Recording(seen).train()
    before = snapshot(model)
    found = measure(
        {"model": model},
        (torch.zeros(2, 3, 8, 8), torch.tensor(2)),
        Setting("cpu", precision, batch=5),
        **QUICK,
    )
    assert_unharmed(model, before)
    assert model.training
    assert seen
    for x, scale, weight, training, grad in seen:
        assert x.shape == (5, 3, 8, 8)
        assert x.dtype == weight.dtype == dtype
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert float(x.float().std()) > 0.5
        assert scale.item() == 2
        assert (training, grad) == (False, False)
    latency = found["model"]
    assert latency.batch == 5
    assert latency.peak_bytes is None
    assert latency.throughput == pytest.approx(5e3 / latency.timing.ms)


def test_a_floor_is_the_longer_of_two() -> None:
    limits = Roofline(macs_per_second=2e9, bytes_per_second=1e9)
    assert limits.floor_ms(4_000_000, 1) == 2.0
    assert limits.floor_ms(1, 3_000_000) == 3.0
    text = str(Latency(Timing(4.0, 3.5, 4.5, 9), 8, 2.0, None))
    assert text == "4.000 ms (3.500 to 4.500; floor 2.000), 2,000 per second"


def test_the_floor_counts_macs_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Limits:
        def floor_ms(self, macs: int, nbytes: int) -> float:
            asked.append((macs, nbytes))
            return 1.0

    monkeypatch.setattr(measuring, "roofline", lambda *_: Limits())
    measure({"model": nn.Conv2d(3, 4, 1)}, torch.zeros(2, 3, 8, 8), Setting("cpu"), **QUICK)
    assert asked == [(2 * 64 * 12, 4 * (12 + 4 + 2 * 64 * 3 + 2 * 64 * 4))]


def test_the_roofline_is_measured_once() -> None:
    first = roofline(torch.device("cpu"), torch.float32)
    assert first is roofline(torch.device("cpu"), torch.float32)
    assert first.macs_per_second > 1e8
    assert first.bytes_per_second > 1e8


@pytest.mark.long
def test_inputs_by_name_and_compiled() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    torch._dynamo.reset()
    inputs = {"x": torch.zeros(2, 3), "y": torch.zeros(2, 3)}
    assert (
        measure({"model": Named()}, inputs, Setting("cpu", mode="compiled"), **QUICK)[
            "model"
        ].timing.count
        == 2
    )


def test_every_model_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of ten models of one class are compiled.

    By default torch compiles the same code at most eight times, and then runs it uncompiled.
    """

    class Wide(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.width, self.linear = width, nn.Linear(3, width)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.linear(x).relu())

    compiled: list[int] = []

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        def run(*args: Tensor) -> Any:
            out = graph(*args)
            compiled.append(out[0].shape[-1])
            return out

        return run

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    widths = range(1, 11)
    measure(
        {str(width): Wide(width) for width in widths},
        torch.zeros(2, 3),
        Setting("cpu", mode="compiled"),
        **QUICK,
    )
    assert set(compiled) == set(widths)


class OnAGpu:
    """A fake GPU that logs what is done, in order.

    Its clock advances by a millisecond with every call.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.now, self.used, self.peak, self.mode = 0.0, 1000, 0, 0
        for name, made in {
            "Event": self._event,
            "Stream": self._new_stream,
            "CUDAGraph": self._cudagraph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, made)
        for name in ("device", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, functools.partial(self._entered, name))
        for name in ("synchronize", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, functools.partial(self.log.append, name))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_stream", self._new_stream)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: self.used)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(
            torch.cuda, "set_sync_debug_mode", functools.partial(setattr, self, "mode")
        )

    def call(self) -> str:
        self.log.append("call")
        self.now += 1.0
        self.peak = self.used + 50
        if self.mode == "error" and "waits" in self.log:
            raise RuntimeError("called a synchronizing CUDA operation")
        return "result"

    @contextlib.contextmanager
    def _entered(self, what: str, value: Any) -> Iterator[None]:
        self.log.append(f"{what} {value}" if what == "device" else what)
        yield
        self.log.append(f"leave {what}")

    def _event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace(at=-1.0)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda after: after.at - event.at
        return event

    def _new_stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: self.log.append("wait"))

    def _cudagraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.log.append("replay"))


def test_events_time_every_call_on_the_gpu_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    there = OnAGpu(monkeypatch)
    found = time_in_turns(
        {"a": there.call, "b": there.call}, "cuda:1", rounds=2, seconds=1e-9, warm_up=1
    )
    assert {name: (timing.ms, timing.count) for name, timing in found.items()} == {
        "a": (1.0, 6),
        "b": (1.0, 6),
    }
    assert there.log[0] == "device cuda:1"
    assert there.log[-2:] == ["synchronize", "leave device"]


def test_a_recording_follows_calls_that_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    there = OnAGpu(monkeypatch)
    replay = captured(there.call)
    assert there.log == [
        "wait",
        "stream",
        *["call"] * 4,
        "leave stream",
        "wait",
        "graph",
        "call",
        "leave graph",
    ]
    assert there.mode == 0
    replay()
    assert there.log[-1] == "replay"


def test_what_waits_for_the_gpu_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    there = OnAGpu(monkeypatch)
    there.log.append("waits")
    with pytest.raises(RuntimeError, match="synchronizing"):
        captured(there.call)
    assert "graph" not in there.log
    assert there.mode == 0


def test_the_peak_is_what_a_call_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    there = OnAGpu(monkeypatch)
    assert peak_bytes(there.call) == 50
    assert there.log == ["synchronize", "reset_peak_memory_stats", "call", "synchronize"]


@gpu
@needs_gpu
@pytest.mark.parametrize("mode", ["eager", "compiled", "cudagraph"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_on_a_gpu(mode: str, precision: str) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    before = torch.backends.cuda.matmul.allow_tf32
    found = measure(
        {"model": model},
        torch.zeros(2, 3, 16, 16),
        Setting("cuda", precision, mode, batch=4),
        **QUICK,
    )["model"]
    assert found.timing.count >= 6
    assert found.peak_bytes is not None
    weights, bytes_each = (
        sum(parameter.numel() for parameter in model.parameters()),
        2 if precision.endswith("16") else 4,
    )
    images, outputs = 4 * 3 * 16**2, 4 * 8 * 12**2
    assert (weights + images + outputs) * bytes_each <= found.peak_bytes <= 2**26, (
        "the model's own, and what cuDNN works with"
    )
    assert torch.backends.cuda.matmul.allow_tf32 == before
