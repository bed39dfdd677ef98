"""Times of single operations on one device, measured once and stored on disk."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fxprune.latency.clock import time_in_turns
from fxprune.latency.cuda import captured
from fxprune.latency.setting import Setting

__all__ = ["Table", "cache_folder", "device_name"]

# calls of an operation per CUDA graph, so that starting the graph costs little in comparison
_CALLS_PER_GRAPH = 10


def cache_folder() -> Path:
    """Return the folder of all tables: ``$FXPRUNE_CACHE``, or ``fxprune`` in the user's cache."""
    given = os.environ.get("FXPRUNE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxprune"


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor with the number of threads of torch."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _run_repeatedly(run: Callable[[], object]) -> Callable[[], object]:
    """Return a function that makes the calls of one CUDA graph and keeps their results alive."""
    return lambda: [run() for _ in range(_CALLS_PER_GRAPH)]


def _processor() -> str:
    """Return the name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


class Table:
    """Times of operations, looked up by a description.

    The description contains everything that the time depends on, except for what the whole table
    has in common: device, version of torch, precision, layout and kind of call. There is one file
    for each combination of these. It grows as more operations are measured. If the file cannot be
    read, the operations are measured again. If it cannot be written, the table stays in memory.

    Parameters
    ----------
    setting:
        The device, precision and layout. On a GPU the mode matters, too: times for compiled or
        replayed models leave out the cost of launching an operation.
    folder:
        Folder of the file. None: :func:`cache_folder`.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table = Table(Setting("cpu"), folder)
    ...     first = table.ms("sum of ten", lambda: lambda: sum(range(10)))
    ...     table.save()
    ...     Table(Setting("cpu"), folder).ms("sum of ten", None) == first
    True
    """

    def __init__(self, setting: Setting, folder: str | os.PathLike[str] | None = None) -> None:
        self.setting = setting
        self.measured = 0
        """Number of operations that were timed instead of looked up."""
        counts_launches = setting.mode == "eager" or not setting.on_gpu
        self._about = {
            "device": device_name(setting.place),
            "torch": torch.__version__,
            "precision": setting.precision,
            "layout": "channels-last" if setting.channels_last else "as is",
            "launches": "counted" if counts_launches else "not counted",
        }
        name = re.sub(r"[^A-Za-z0-9.]+", "-", "_".join(self._about.values())).strip("-")
        self.path = Path(folder or cache_folder()) / f"{name}.json"
        self._ms = self._read()
        self._measured_again: set[str] = set()

    def ms(
        self,
        description: str,
        prepare: Callable[[], Callable[[], object]] | None,
        *,
        again: bool = False,
    ) -> float:
        """Return the time of an operation in milliseconds, measured if it is not known yet.

        Parameters
        ----------
        description:
            The key of the operation.
        prepare:
            Returns the callable to time; not called if the time is known. None is allowed only
            then.
        again:
            Measure once more, unless this was done before, and keep the shorter time.
        """
        if description not in self._ms or (again and description not in self._measured_again):
            assert prepare is not None
            run, calls = prepare(), 1
            if self.setting.on_gpu and self.setting.mode != "eager":
                run, calls = captured(_run_repeatedly(run)), _CALLS_PER_GRAPH
            timing = time_in_turns(
                {"run": run}, self.setting.place, rounds=4, seconds=0.004, warm_up=2
            )["run"]
            before = self._ms.get(description, float("inf"))
            self._ms[description] = min(timing.low / calls, before)
            self.measured += 1
            if again:
                self._measured_again.add(description)
        return self._ms[description]

    def save(self) -> None:
        """Write the file, completely or not at all.

        Times that other processes have written meanwhile are kept.
        """
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_suffix(f".{os.getpid()}")
            content = {**self._about, "ms": {**self._read(), **self._ms}}
            new.write_text(json.dumps(content, indent=0), encoding="utf-8")
            os.replace(new, self.path)

    def _read(self) -> dict[str, float]:
        """Return the times in the file; empty if it is missing, damaged or of another table."""
        try:
            data: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            times = data.pop("ms")
            if data == self._about and all(isinstance(ms, float) for ms in times.values()):
                return dict(times)
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            pass
        return {}
