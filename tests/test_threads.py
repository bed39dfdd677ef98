"""Pruning while other threads run: neither affects the other."""

import importlib
import itertools
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
import fxprune.latency


class Net(nn.Module):
    """A stem, residual blocks and a head; ``at`` is called twice within forward."""

    def __init__(self, at: Callable[[str], None] = lambda place: None) -> None:
        super().__init__()
        self.at = at
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            for _ in range(2)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        self.at("begin")
        for block in self.body:
            x = x + block(x)
        self.at("end")
        return self.head(x.mean((2, 3)))


class Python(Net):
    """A model that cannot be traced as one graph, because Python reads a value of the input."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 100).any()):
            x = x.clamp(-1, 1)
        return super().forward(x)


class Threaded(Net):
    """A model that computes in threads that it starts itself.

    With ``asks``, Python has read a value of the input before.
    """

    def __init__(
        self, compute: Callable[[Callable[[], Tensor]], Tensor], asks: bool, module: bool
    ) -> None:
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
    """A thread that runs the jobs it is given, while the calling thread waits."""

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
    "region",
    [torch.no_grad, lambda: torch.autocast("cpu"), torch.inference_mode],
    ids=["grad", "cast", "mode"],
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
        asked.append(
            (
                torch.is_grad_enabled(),
                torch.zeros(2).device.type,
                torch.broadcast_shapes((1, 3), (2, 1)),
            )
        )
        attention = nn.MultiheadAttention(8, 2).eval()
        attention(*[torch.zeros(3, 1, 8)] * 3)

    fxprune.prune(kind(lambda place: other(work)).eval(), IMAGE, channels=0.5)
    assert set(asked) == {(True, "cpu", (2, 3))}
    assert all(p.grad is not None for p in mine.parameters())


@pytest.mark.parametrize("kind", [Net, Python])
@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_random_numbers_of_another_thread_are_its_own(
    draw: Callable[[], Any], kind: type[Net]
) -> None:
    """Random numbers that another thread draws are not taken for draws of the model."""
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
    with pytest.raises(
        fxprune.TraceError,
        match=r"another thread compute with tensors \(at test_threads\.py:\d+\)",
    ):
        fxprune.prune(Threaded(compute, asks, module).eval(), IMAGE, channels=0.5)
    assert before == (threading.Thread.start, ThreadPoolExecutor.submit)


def test_threads_of_the_model_that_compute_nothing_are_none_of_our_business() -> None:
    def at(place: str) -> None:
        in_a_thread(lambda: torch.zeros(1))

    for kind in (Net, Python):
        fxprune.prune(kind(at).eval(), IMAGE, channels=0.5)


def prune(model: nn.Module, pruned: fxprune.Pruned, folder: Path) -> Any:
    return fxprune.prune(model, IMAGE, channels=0.5).plan


def analyze(model: nn.Module, pruned: fxprune.Pruned, folder: Path) -> Any:
    return str(fxprune.analyze(model, IMAGE))


def verify(model: nn.Module, pruned: fxprune.Pruned, folder: Path) -> Any:
    found = fxprune.verify(model, pruned, IMAGE)
    return found.outputs, found.compared, found.left_out


def deploy(model: nn.Module, pruned: fxprune.Pruned, folder: Path) -> Any:
    return fxprune.deploy(pruned.model)(IMAGE).round(decimals=3).tolist()


def load(model: nn.Module, pruned: fxprune.Pruned, folder: Path) -> Any:
    return fxprune.load(folder, type(model)).plan


def measure(model: nn.Module, pruned: fxprune.Pruned, folder: Path) -> Any:
    return sorted(
        fxprune.latency.measure(
            {"large": model, "small": pruned.model}, IMAGE, rounds=1, seconds=0.001
        )
    )


CALLS = (prune, analyze, verify, deploy, load, measure)


def settings_of_torch() -> list[Any]:
    backends = (
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.mha.get_fastpath_enabled(),
    )
    return [*backends, torch.is_grad_enabled(), torch.get_num_threads()]


def names_of_torch() -> dict[str, Any]:
    """Return attributes that a call might leave replaced; imports may add other names."""
    spaces = torch, torch.autograd, torch.nn.functional, torch.no_grad, nn.Module, Tensor
    return {
        f"{space.__name__}.{name}": value
        for space in spaces
        for name, value in vars(space).items()
    }


def side_by_side(
    folder: Path,
    calls: Sequence[Callable[..., Any]],
    threads: int,
    times: int,
    kinds: Sequence[type[Net]] = (Net, Python),
) -> None:
    """Make calls in several threads, and compare their results with those of single calls.

    Next to them, four threads call a model, train a model, compute without gradients, and draw
    random numbers.
    """
    torch.manual_seed(0)
    models = [kind().eval() for kind in kinds]
    pruned = [fxprune.prune(model, IMAGE, channels=0.5) for model in models]
    folders = [folder / type(model).__name__ for model in models]
    for own, place in zip(pruned, folders, strict=True):
        own.save(place)
    given = [*itertools.product(calls, zip(models, pruned, folders, strict=True))]
    wanted = [call(*arguments) for call, arguments in given]
    # this import replaces a function of torch's, and optimisers trigger it
    importlib.import_module("torch._dynamo")
    settings, names = settings_of_torch(), names_of_torch()
    failed: list[BaseException] = []
    over = threading.Event()

    def until_over(work: Callable[[], Any]) -> Callable[[], None]:
        def loop() -> None:
            try:
                while not over.is_set():
                    work()
                    time.sleep(1e-3)  # otherwise these loops would block the calls
            except BaseException as error:
                failed.append(error)

        return loop

    served, trained = Net().eval(), nn.Sequential(Net(), nn.Dropout())
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

    def draw() -> None:
        random.random()
        np.random.rand()

    beside = [threading.Thread(target=until_over(work)) for work in (serve, train, without, draw)]
    for thread in beside:
        thread.start()
    try:
        with ThreadPoolExecutor(threads) as pool:
            jobs = [
                pool.submit(call, *arguments) for _ in range(times) for call, arguments in given
            ]
            found = [job.result() for job in jobs]
    finally:
        over.set()
        for thread in beside:
            thread.join()
    assert not failed
    for one, other in zip(found, wanted * times, strict=True):
        assert one == other
    now = names_of_torch()
    assert settings_of_torch() == settings
    assert [name for name, value in names.items() if now.get(name) is not value] == []


def test_calls_in_threads(tmp_path: Path) -> None:
    side_by_side(tmp_path, CALLS, threads=8, times=1, kinds=[Net])


def test_pruning_in_threads(tmp_path: Path) -> None:
    side_by_side(tmp_path, [prune], threads=4, times=4)


@pytest.mark.slow
@pytest.mark.parametrize("calls", [(prune,), CALLS], ids=["prune", "all"])
def test_calls_in_many_threads(calls: Sequence[Callable[..., Any]], tmp_path: Path) -> None:
    side_by_side(tmp_path, calls, threads=8, times=200 // len(calls))


@pytest.fixture
def draws_beside() -> Iterator[None]:
    """Run a thread that draws random numbers all the time."""
    over = threading.Event()

    def loop() -> None:
        while not over.wait(1e-4):
            random.random()
            np.random.rand()

    thread = threading.Thread(target=loop)
    thread.start()
    yield
    over.set()
    thread.join()


@pytest.mark.usefixtures("draws_beside")
@pytest.mark.parametrize("kind", [Net, Python])
def test_numbers_that_another_thread_draws_all_the_time_are_its_own(kind: type[Net]) -> None:
    model = kind().eval()
    pruned = fxprune.prune(model, IMAGE, channels=0.5)
    assert isinstance(pruned.model, torch.fx.GraphModule) == (kind is Net)
    assert all(
        p.shape[0] == 4
        for name, p in pruned.model.named_parameters()
        if not name.startswith("head")
    )
    assert not [
        reason for reason in fxprune.verify(model, pruned, IMAGE).left_out if "random" in reason
    ]


@pytest.mark.filterwarnings("ignore::fxprune.FxpruneWarning")
@pytest.mark.usefixtures("draws_beside")
@pytest.mark.parametrize(
    "draw",
    [
        random.random,
        np.random.rand,
        lambda: random.random(),
        lambda: np.random.rand(),
        lambda: draws_by_name(),
        lambda: NUMPYS.rand(),
    ],
)
def test_a_model_that_draws_beside_another_thread_does_so_itself(
    draw: Callable[[], float],
) -> None:
    class Skips(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2 if draw() < 0.5 else 1)

    pruned = fxprune.prune(Skips().eval(), IMAGE, channels=0.5)
    assert not isinstance(pruned.model, torch.fx.GraphModule)
    seen = {float(pruned.model(IMAGE).detach().abs().sum()) for _ in range(30)}
    assert len(seen) == 2


NUMPYS = np.random
draws_by_name = np.random.rand
