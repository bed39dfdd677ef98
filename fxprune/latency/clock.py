"""Timing of several callables in turns.

Because they take turns, anything that slows the machine down for a while slows all of them.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fxprune.common.numbers import as_device, as_number, check_integer
from fxprune.common.public import calling_user_code, public, short_repr
from fxprune.errors import ArgumentError
from fxprune.latency.cuda import use_device

__all__ = ["Timing", "time_in_turns"]


@public
@dataclass(frozen=True)
class Timing:
    """The time of one call, in milliseconds.

    On a GPU each call is a measurement. On a CPU each turn is one: the mean over its calls.

    Attributes
    ----------
    ms:
        Median of the measurements, in milliseconds.
    low, high:
        Lower and upper quartile, in milliseconds.
    count:
        Number of measurements.
    """

    ms: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> Timing:
        """Summarise measurements, given in milliseconds; there must be at least one.

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

    Each callable is warmed up first, so that compilation and the choice of algorithms are not
    timed. Then the callables take turns, in another order each round. On a GPU, CUDA events
    measure each call. On other devices :class:`torch.utils.benchmark.Timer` measures each turn,
    with the number of threads that torch uses at that moment.

    Parameters
    ----------
    runs:
        For each name a function without arguments.
    device:
        Where the functions compute. Its type decides how calls are timed.
    rounds:
        Number of turns of each function.
    seconds:
        Approximate duration of a turn, in seconds.
    warm_up:
        Number of calls to warm up a function; fewer if they take more than a second.

    Returns
    -------
    For each name the time of one call, in milliseconds.

    Raises
    ------
    ArgumentError
        If ``runs`` is empty or not a dict of callables, if ``rounds`` or ``seconds`` is not
        positive, if ``warm_up`` is negative, or if there is no such device.
    CallbackError
        If one of the functions raises an error.

    Examples
    --------
    >>> calls = {"short": lambda: sum(range(100)), "long": lambda: sum(range(10_000))}
    >>> found = time_in_turns(calls, rounds=3, seconds=0.01)
    >>> long = found["long"]
    >>> list(found), found["short"].count, long.low <= long.ms <= long.high
    (['short', 'long'], 3, True)
    """
    _check_runs(runs)
    rounds, warm_up = check_integer("rounds", rounds), check_integer("warm_up", warm_up, 0)
    seconds, device = _checked_seconds(seconds), _checked_device(device)
    on_gpu = device.type == "cuda"
    take_turn = _take_turn_on_gpu if on_gpu else _take_turn
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    with use_device(device), calling_user_code("a function that is timed"):
        calls = {name: _warm_up(run, warm_up, seconds, on_gpu) for name, run in runs.items()}
        for number_of_round in range(rounds):
            first = number_of_round % len(order)
            for name in order[first:] + order[:first]:
                times[name] += take_turn(runs[name], calls[name])
    return {name: Timing.of(milliseconds) for name, milliseconds in times.items()}


def _check_runs(runs: object) -> None:
    """Refuse anything but a dict of callables that is not empty."""
    if not isinstance(runs, Mapping) or not runs or not all(map(callable, runs.values())):
        raise ArgumentError(
            "time_in_turns takes functions without arguments by name: a dict from text to "
            "callables, not empty."
        )


def _checked_seconds(seconds: object) -> float:
    """Return the duration of a turn; refuse anything but a positive finite number."""
    checked = as_number(seconds)
    if checked is None or not 0 < checked < float("inf"):
        raise ArgumentError(f"seconds={short_repr(seconds)} must be a number above 0.")
    return checked


def _checked_device(name: torch.device | str) -> torch.device:
    """Return a device; refuse a GPU if torch does not see any."""
    device = as_device("device", name, here=False)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(
            f"device={str(device)!r}: torch sees no GPU here. Leave device out to measure on the "
            "CPU."
        )
    return device


def _warm_up(run: Callable[[], object], warm_up: int, seconds: float, on_gpu: bool) -> int:
    """Warm up a function, and return how many calls fill a turn.

    ``warm_up`` is the number of calls and ``seconds`` the duration of a turn.
    """
    run()  # the first call may compile
    start, done = time.perf_counter(), 0
    while done < max(warm_up, 1) and time.perf_counter() - start < 1.0:
        run()
        if on_gpu:
            torch.cuda.synchronize()
        done += 1
    each = (time.perf_counter() - start) / done
    return max(1, min(1000, round(seconds / each)))


def _take_turn(run: Callable[[], object], calls: int) -> list[float]:
    """Return the mean time of some calls, in milliseconds, as a list of one number."""
    from torch.utils.benchmark import Timer  # imported late: it looks for a compiler and prints so

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    # The timer first makes calls that do not count. They refill the caches, which other functions
    # have used meanwhile.
    return [1e3 * timer.timeit(calls).mean]


def _take_turn_on_gpu(run: Callable[[], object], calls: int) -> list[float]:
    """Return the time of each of some calls on the current GPU, in milliseconds."""
    run()  # not timed: refills the caches, which other functions have used meanwhile
    events = [torch.cuda.Event(enable_timing=True) for _ in range(max(calls, 3) + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]
