"""Timing callables in turns: what slows the machine down for a while slows all of them."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fxprune.common.numbers import device_of, number, whole
from fxprune.common.public import calling, public, shown
from fxprune.errors import ArgumentError
from fxprune.latency.cuda import current

__all__ = ["Timing", "time_in_turns"]


@public
@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median, the quartiles, and of how many measurements.

    On a GPU every call is a measurement, on a CPU every turn is one, the mean of its calls.
    """

    ms: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> Timing:
        """
        >>> Timing.of([3.0, 1.0, 2.0, 5.0, 4.0])
        Timing(ms=3.0, low=2.0, high=4.0, count=5)
        """
        ordered = sorted(milliseconds)
        return cls(
            statistics.median(ordered),
            ordered[len(ordered) // 4],
            ordered[3 * len(ordered) // 4],
            len(ordered),
        )


@functools.partial(public, inference=True)
def time_in_turns(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device | str = "cpu",
    *,
    rounds: int = 9,
    seconds: float = 0.2,
    warm_up: int = 10,
) -> dict[str, Timing]:
    """Time several callables side by side.

    Each is warmed up, ``warm_up`` times or for a second, which is where compilation and the choice
    of algorithms go. Then they take turns, in another order each round, and every turn lasts about
    ``seconds``. On a GPU, CUDA events measure each call; elsewhere
    :class:`torch.utils.benchmark.Timer` measures each turn, with as many threads as torch uses
    now.

    Raises
    ------
    ArgumentError
        If there is nothing to time, or ``rounds`` or ``seconds`` is not positive.

    Examples
    --------
    >>> calls = {"short": lambda: sum(range(100)), "long": lambda: sum(range(10_000))}
    >>> found = time_in_turns(calls, rounds=3, seconds=0.01)
    >>> long = found["long"]
    >>> list(found), found["short"].count, long.low <= long.ms <= long.high
    (['short', 'long'], 3, True)
    """
    if not isinstance(runs, Mapping) or not runs or not all(map(callable, runs.values())):
        raise ArgumentError(
            "time_in_turns takes functions without arguments by name: a dict from text to "
            "callables, not empty."
        )
    rounds, warm_up, lasting = (
        whole("rounds", rounds),
        whole("warm_up", warm_up, 0),
        number(seconds),
    )
    if lasting is None or not 0 < lasting < float("inf"):
        raise ArgumentError(f"seconds={shown(seconds)} must be a number above 0.")
    seconds, device = lasting, device_of("device", device, here=False)
    on_gpu = device.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise ArgumentError(
            f"device={str(device)!r}: torch sees no GPU here. Leave device out to measure on the "
            "CPU."
        )
    turn = _turn_on_gpu if on_gpu else _turn
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    with current(device), calling("a function that is timed"):
        calls = {name: _warmed_up(run, warm_up, seconds, on_gpu) for name, run in runs.items()}
        for turned in range(rounds):
            first = turned % len(order)
            for name in order[first:] + order[:first]:
                times[name] += turn(runs[name], calls[name])
    return {name: Timing.of(own) for name, own in times.items()}


def _warmed_up(run: Callable[[], object], warm_up: int, seconds: float, on_gpu: bool) -> int:
    """How many calls fill a turn."""
    run()  # compiles
    start, done = time.perf_counter(), 0
    while done < max(warm_up, 1) and time.perf_counter() - start < 1.0:
        run()
        if on_gpu:
            torch.cuda.synchronize()
        done += 1
    each = (time.perf_counter() - start) / done
    return max(1, min(1000, round(seconds / each)))


def _turn(run: Callable[[], object], calls: int) -> list[float]:
    from torch.utils.benchmark import Timer  # its import looks for a compiler, and says so

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    # Calls that do not count come first: others have used the caches.
    return [1e3 * timer.timeit(calls).mean]


def _turn_on_gpu(run: Callable[[], object], calls: int) -> list[float]:
    run()  # others have used the caches
    events = [torch.cuda.Event(enable_timing=True) for _ in range(max(calls, 3) + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]
