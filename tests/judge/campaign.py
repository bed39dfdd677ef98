"""Judge many networks in separate processes, and count the outcomes."""

from __future__ import annotations

import collections
import gc
import json
import multiprocessing
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from .spec import draw
from .verdict import Verdict, judge


class Summary:
    """How many networks had which outcome."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.settings: collections.Counter[str] = collections.Counter()
        self.refusals: collections.Counter[str] = collections.Counter()
        self.parts = self.guarded = 0
        self.left: list[float] = []
        self.start = time.time()

    @property
    def count(self) -> int:
        """The number of networks."""
        return self.outcomes.total()

    @property
    def judged(self) -> int:
        """The number of networks that run before they are pruned."""
        return self.count - self.outcomes["invalid"]

    def add(self, verdict: Verdict) -> None:
        """Count one verdict."""
        self.outcomes[verdict.outcome] += 1
        self.parts += verdict.parts
        self.guarded += verdict.guarded > 0
        if verdict.outcome in ("right", "whole"):
            self.left.append(verdict.left)
        elif verdict.outcome == "wrong":
            self.settings[verdict.what.split(":")[0]] += 1
        elif verdict.outcome == "refused":
            self.refusals[verdict.what.split(":")[0]] += 1

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as plain data."""
        return {
            "command": self.command,
            "drawn": self.count,
            "judged": self.judged,
            "wrong": self.outcomes["wrong"],
            "refused": self.outcomes["refused"],
            "nothing_pruned": self.outcomes["whole"],
            "kept_in_python": self.parts,
            "refused_another_size": self.guarded,
            "parameters_left": round(sum(self.left) / max(1, len(self.left)), 3),
            "wrong_by_setting": dict(self.settings),
            "refused_by_error": dict(self.refusals),
            "seconds": round(time.time() - self.start),
        }

    def to_json(self) -> str:
        """Return the summary as JSON text."""
        return json.dumps(self.as_dict(), indent=2) + "\n"

    def __str__(self) -> str:
        return "\n".join(
            f"{name.replace('_', ' ')}: {value}" for name, value in self.as_dict().items()
        )


def campaign(seeds: Sequence[int], processes: int = 1, seconds: float = 120) -> Iterator[Verdict]:
    """Judge the networks of these seeds and yield the verdicts.

    A network is wrong if its process dies or takes longer than ``seconds``.
    """
    todo = collections.deque(seeds)
    context = multiprocessing.get_context("spawn")
    workers = [_Worker(context) for _ in range(min(processes, len(seeds)))]
    try:
        for worker in workers:
            worker.give(todo)
        while busy := [w for w in workers if w.seed is not None]:
            ready = wait([w.pipe for w in busy], timeout=1)
            for worker in busy:
                verdict = worker.take(worker.pipe in ready, seconds)
                if verdict is not None:
                    yield verdict
                    worker.give(todo)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()


class _Worker:
    """A process that judges one seed after another."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.seed: int | None = None
        self._start()

    def _start(self) -> None:
        self.pipe, other = self.context.Pipe()
        self.process = self.context.Process(target=_serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.served = 0

    def give(self, todo: collections.deque[int]) -> None:
        """Send the next seed to the process, if one is left.

        The process is replaced after 500 networks, so that memory does not pile up.
        """
        self.seed = todo.popleft() if todo else None
        if self.seed is None:
            return
        if self.served >= 500:
            self.process.kill()
            self._start()
        self.since, self.served = time.monotonic(), self.served + 1
        self.pipe.send(self.seed)

    def take(self, ready: bool, seconds: float) -> Verdict | None:
        assert self.seed is not None
        if ready:
            try:
                return self.pipe.recv()  # type: ignore[no-any-return]
            except EOFError:
                self.process.join()
                code = self.process.exitcode or 0
                what = (
                    "process: died of "
                    f"{signal.Signals(-code).name if code < 0 else f'exit {code}'}"
                )
        elif time.monotonic() - self.since > seconds:
            self.process.kill()
            self.process.join()
            what = f"process: took more than {seconds:.0f} s"
        else:
            return None
        self._start()
        return Verdict(str(draw(self.seed)), "wrong", what)


def _serve(pipe: Connection) -> None:
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    while True:
        seed = pipe.recv()
        spec = draw(seed)
        try:
            verdict = judge(spec)
        except Exception as error:
            verdict = Verdict(str(spec), "wrong", f"judge: {type(error).__name__}: {error}")
        pipe.send(verdict)
        # imported objects stay, so the garbage collector need not look at them
        if not gc.get_freeze_count():
            gc.freeze()
