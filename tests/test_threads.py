"""Pruning beside other threads: nothing of theirs gets into a model, and nothing of pruning's into them."""

import queue
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune


class Net(nn.Module):
    """A stem, residual blocks, a head; ``at`` is called in the middle of forward."""

    def __init__(self, at: Callable[[str], None] = lambda place: None) -> None:
        super().__init__()
        self.at = at
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        self.at("begin")
        for block in self.body:
            x = x + block(x)
        self.at("end")
        return self.head(x.mean((2, 3)))


class Python(Net):
    """One that is no graph: Python reads a value of the input."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 100).any()):
            x = x.clamp(-1, 1)
        return super().forward(x)


class Threaded(Net):
    """Computes in threads of its own; ``asks``: after Python has read a value of the input."""

    def __init__(self, compute: Callable[[Callable[[], Tensor]], Tensor], asks: bool, module: bool) -> None:
        super().__init__()
        self.compute, self.asks, self.module = compute, asks, module

    def forward(self, x: Tensor) -> Tensor:
        if self.asks and bool((x > 100).any()):
            x = x.clamp(-1, 1)
        x = self.stem(x)
        x = self.compute(lambda: self.body[0](x) if self.module else x.relu())
        return self.head(x.mean((2, 3)))


def in_a_pool(work: Callable[[], Tensor]) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return next(iter(pool.map(lambda _: work(), [None])))


def in_a_thread(work: Callable[[], Tensor]) -> Tensor:
    out: list[Tensor] = []
    thread = threading.Thread(target=lambda: out.append(work()))
    thread.start()
    thread.join()
    return out[0]


IMAGE = torch.randn(1, 3, 8, 8)


class Other:
    """A thread that does what it is told, while the one that tells waits."""

    def __init__(self) -> None:
        self.jobs: queue.Queue[Callable[[], Any]] = queue.Queue()
        self.done: queue.Queue[BaseException | None] = queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            job = self.jobs.get()
            try:
                job()
            except BaseException as error:
                self.done.put(error)
            else:
                self.done.put(None)

    def __call__(self, job: Callable[[], Any]) -> None:
        self.jobs.put(job)
        error = self.done.get(timeout=60)
        if error is not None:
            raise error


@pytest.mark.parametrize("kind", [Net, Python])
@pytest.mark.parametrize(
    "region", [torch.no_grad, lambda: torch.autocast("cpu"), torch.inference_mode], ids=["grad", "cast", "mode"]
)
def test_a_region_of_another_thread_is_its_own(region: Callable[[], Any], kind: type[Net]) -> None:
    other, entered = Other(), []

    def at(place: str) -> None:
        if place == "begin":
            entered.append(region())
            other(entered[-1].__enter__)
        else:
            other(lambda: entered[-1].__exit__(None, None, None))

    small = fxprune.prune(kind(at).eval(), IMAGE, channels=0.5).model
    assert entered
    assert small(IMAGE).dtype is torch.float32
    if kind is Net:
        small.train()(IMAGE.expand(2, -1, -1, -1)).sum().backward()
        assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("kind", [Net, Python])
def test_another_thread_runs_trains_and_asks_undisturbed(kind: type[Net]) -> None:
    other, mine = Other(), nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))
    asked: list[Any] = []

    def work() -> None:
        mine(torch.zeros(2, 4)).sum().backward()
        asked.append((torch.is_grad_enabled(), torch.zeros(2).device.type, torch.broadcast_shapes((1, 3), (2, 1))))
        attention = nn.MultiheadAttention(8, 2).eval()
        attention(*[torch.zeros(3, 1, 8)] * 3)

    fxprune.prune(kind(lambda place: other(work)).eval(), IMAGE, channels=0.5)
    assert set(asked) == {(True, "cpu", (2, 3))}
    assert all(p.grad is not None for p in mine.parameters())


@pytest.mark.parametrize("kind", [Net, Python])
@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_random_numbers_of_another_thread_are_its_own(draw: Callable[[], Any], kind: type[Net]) -> None:
    """What another thread draws in the middle of a run is no choice of the model's."""
    other, before = Other(), []

    def at(place: str) -> None:
        if not before:
            before.append(draw)
            other(draw)

    model = kind(at).eval()
    beside = fxprune.prune(model, IMAGE, channels=0.5)
    assert before
    assert beside.plan == fxprune.prune(model, IMAGE, channels=0.5).plan
    assert isinstance(beside.model, torch.fx.GraphModule) == (kind is Net)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("module", [False, True], ids=["function", "module"])
@pytest.mark.parametrize("asks", [False, True], ids=["graph", "python"])
@pytest.mark.parametrize("compute", [in_a_pool, in_a_thread])
def test_threads_of_the_model_itself_are_refused(compute: Any, asks: bool, module: bool) -> None:
    before = threading.Thread.start, ThreadPoolExecutor.submit
    with pytest.raises(fxprune.TraceError, match=r"another thread compute with tensors \(at test_threads\.py:\d+\)"):
        fxprune.prune(Threaded(compute, asks, module).eval(), IMAGE, channels=0.5)
    assert before == (threading.Thread.start, ThreadPoolExecutor.submit)


def test_threads_of_the_model_that_compute_nothing_are_none_of_our_business() -> None:
    def at(place: str) -> None:
        in_a_thread(lambda: torch.zeros(1))

    for kind in (Net, Python):
        fxprune.prune(kind(at).eval(), IMAGE, channels=0.5)


def side_by_side(threads: int, prunes: int) -> None:
    """Prunes in several threads, beside one that serves, one that trains, and one that uses no_grad."""
    torch.manual_seed(0)
    models = [Net().eval(), Python().eval()]
    wanted = [fxprune.prune(model, IMAGE, channels=0.5).plan for model in models]
    before = dict(vars(torch)), torch.no_grad.__enter__, nn.Module.__call__, nn.Module.__getattr__
    failed: list[BaseException] = []
    over = threading.Event()

    def until_over(work: Callable[[], Any]) -> Callable[[], None]:
        def loop() -> None:
            try:
                while not over.is_set():
                    work()
            except BaseException as error:
                failed.append(error)

        return loop

    served, trained = Net().eval(), Net()
    optimiser = torch.optim.SGD(trained.parameters(), 0.01)

    def serve() -> None:
        assert served(IMAGE).requires_grad

    def train() -> None:
        optimiser.zero_grad()
        trained(IMAGE.expand(2, -1, -1, -1)).square().sum().backward()
        assert all(p.grad is not None for p in trained.parameters())
        optimiser.step()

    def without() -> None:
        with torch.no_grad():
            assert not served(IMAGE).requires_grad

    beside = [threading.Thread(target=until_over(work)) for work in (serve, train, without)]
    for thread in beside:
        thread.start()
    try:
        with ThreadPoolExecutor(threads) as pool:
            jobs = [pool.submit(fxprune.prune, models[i % 2], IMAGE, channels=0.5) for i in range(threads * prunes)]
            plans = [job.result().plan for job in jobs]
    finally:
        over.set()
        for thread in beside:
            thread.join()
    assert not failed
    assert all(plan == wanted[i % 2] for i, plan in enumerate(plans))
    assert before[1:] == (torch.no_grad.__enter__, nn.Module.__call__, nn.Module.__getattr__)
    assert {name for name, value in before[0].items() if vars(torch).get(name) is not value} == set()


def test_pruning_in_threads() -> None:
    side_by_side(threads=4, prunes=4)


@pytest.mark.slow
def test_pruning_in_many_threads() -> None:
    side_by_side(threads=8, prunes=50)
