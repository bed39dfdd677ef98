"""Tests of benchmark code whose mistakes would not show in a result.

They check what the data are, what a row of a table means, and that the latency scripts run.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets

import fxprune
from fxprune.criteria import CPMC
from fxprune.latency import Latency, Setting, Timing
from tests.support.scripts import imported


@pytest.fixture(scope="module")
def accuracy() -> Iterator[ModuleType]:
    with imported("accuracy") as module:
        yield module


@pytest.fixture(scope="module")
def data(accuracy: Any) -> ModuleType:
    return sys.modules["_data"]


# -- pretrained networks


@pytest.fixture(scope="module")
def pretrained() -> Iterator[ModuleType]:
    with imported("pretrained") as module:
        yield module


def test_the_table_of_pretrained_networks(pretrained: Any) -> None:
    """The best of a column is bold, and a row with an error has no mean."""
    rows: dict[str, list[Any]] = {
        "crepe:cpmc": [0.9, 0.8, 0.7, 0.4],
        "crepe:l2": [1.0, 0.7, "BudgetError: no", 0.1],
        "rnet:cpmc": [0.0] * 4,
    }
    lines = pretrained.table(rows, "crepe").splitlines()
    assert lines[2:] == [
        "| cpmc | 0.90 | **0.80** | **0.70** | **0.40** | **0.70** |",
        "| l2 | **1.00** | 0.70 | refused | 0.10 | refused |",
    ]


def test_agreement_is_judged_by_faces_that_both_find(pretrained: Any) -> None:
    judge = sys.modules["_pretrained"]
    wanted = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.9, 0.1], [0.8, 0.2]])
    found = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.2, 0.8], [0.8, 0.2]])
    assert judge._f1(found, wanted) == 0.5  # one of two is found, and one of two was there
    assert judge._same_class(found, wanted) == 0.5
    tones = judge._tones(3, seed=1)
    assert tones.shape == (3, 1024)
    torch.testing.assert_close(tones.std(1, unbiased=False), torch.ones(3))


def test_a_criterion_that_reads_data_gets_the_calibration_inputs(pretrained: Any) -> None:
    loader = [(torch.zeros(1),)]
    (flow,) = pretrained.criteria_of("cpmc_flow+data", loader)
    assert flow.data is loader
    assert pretrained.criteria_of("lamp", loader) == ["lamp"]
    assert len(set(pretrained.criteria_of("random", loader))) == pretrained.SEEDS


def test_the_search_is_scored_by_other_inputs_than_the_judge() -> None:
    """The score of the dense network is 0, and the inputs that correct weights are not scored."""
    with imported("search") as search:
        judge, read = sys.modules["_pretrained"], []

        def model(batch: torch.Tensor) -> torch.Tensor:
            read.extend(batch.flatten().tolist())
            return batch.sum(1, keepdim=True)

        calibration, test = torch.arange(8.0)[:, None], torch.full((4, 1), 99.0)
        what = judge.Network(model, calibration, test, lambda found, wanted: 0.0, "nothing")
        score, batches = search.scored(what)
        assert score(model) == 0.0
        # outputs 1, 3, 5, 7 that are off by 2 have an error of 4, and their variance is 5
        assert score(lambda batch: model(batch) + 2) == pytest.approx(-0.8)
        assert torch.cat([batch for (batch,) in batches]).flatten().tolist() == [0, 2, 4, 6]
        assert set(read) == {1.0, 3.0, 5.0, 7.0}


def test_the_table_of_the_search() -> None:
    with imported("search") as search:
        agreement = {"1": 0.5, "20": 0.75}
        row = {"network": "crepe", "setting": "l2", "macs": 0.8, "agreement": agreement}
        record = {
            "command": "it",
            "machine": {"processor": "", "cores": 2, "threads": 1, "date": "", "versions": {}},
            "judged_by": {"crepe": "pitch"},
            "evaluations": [1, 20],
            "rows": [row],
        }
        record["machine"]["accelerator"] = None
        lines = search.report(record).splitlines()
    assert "|  | MACs left | ranking | search, 20 |" in lines
    assert "| l2 | 0.8 | 0.500 | 0.750 |" in lines


# -- data


def write_cifar(
    folder: Path, kind: type[datasets.CIFAR10], monkeypatch: pytest.MonkeyPatch
) -> dict[str, np.ndarray]:
    """Write the files of CIFAR as its authors ship them, filled with noise.

    There are 6,000 training images and 40 test images. Return the images of each file.
    """
    generator, written = np.random.default_rng(0), {}
    labels, classes = ("labels", 10) if kind is datasets.CIFAR10 else ("fine_labels", 100)
    below = folder / kind.base_folder
    below.mkdir(parents=True)

    def write(name: str, content: dict[str, Any]) -> str:
        (below / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((below / name).read_bytes()).hexdigest()

    for attribute, total in (("train_list", 6000), ("test_list", 40)):
        listed = []
        for name, _ in getattr(kind, attribute):
            count = total // len(getattr(kind, attribute))
            images = generator.integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
            targets = generator.integers(0, classes, count).tolist()
            listed.append([name, write(name, {"data": images, labels: targets})])
            written[name] = images
        monkeypatch.setattr(kind, attribute, listed)
    meta = {
        **kind.meta,
        "md5": write(kind.meta["filename"], {kind.meta["key"]: [str(i) for i in range(classes)]}),
    }
    monkeypatch.setattr(kind, "meta", meta)
    return written


@pytest.mark.parametrize(
    ("name", "kind", "classes"),
    [("cifar10", datasets.CIFAR10, 10), ("cifar100", datasets.CIFAR100, 100)],
)
def test_cifar_is_read_from_its_folder(
    name: str,
    kind: type[datasets.CIFAR10],
    classes: int,
    data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = write_cifar(tmp_path, kind, monkeypatch)
    found = data.load(name, folder=tmp_path)
    parts = (found.train, found.validation, found.test)
    assert [tuple(part.images.shape) for part in parts] == [
        (1000, 3, 32, 32),
        (5000, 3, 32, 32),
        (40, 3, 32, 32),
    ]
    assert (found.classes, found.channels, found.flip) == (classes, 3, True)
    assert found.train.labels.max() < classes
    # The first image is the first one of the first file: a red, a green and a blue plane,
    # normalised.
    first = next(iter(written.values()))[0].reshape(3, 32, 32)
    for channel in range(3):
        assert np.corrcoef(first[channel].ravel(), found.train.images[0, channel].ravel())[
            0, 1
        ] == pytest.approx(1)
    assert found.train.images.mean().item() == pytest.approx(0, abs=1e-4)
    assert found.train.images.std().item() == pytest.approx(1, abs=1e-3)
    assert data.load(name, 16, tmp_path).test.images.shape == (40, 3, 16, 16)


def test_cifar_that_is_not_there_is_an_error(data: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not found"):
        data.load("cifar10", folder=tmp_path)


@pytest.mark.long
def test_textures_are_equal_at_every_call_and_no_image_is_in_two_parts(data: Any) -> None:
    once, again = data.load("textures"), data.load("textures")
    assert torch.equal(once.train.images, again.train.images)
    every = torch.cat([once.train.images, once.validation.images, once.test.images])
    assert len({image.numpy().tobytes() for image in every}) == len(every) == 8400
    assert once.train.labels.unique().tolist() == list(range(once.classes))


def test_digits_have_the_parts_that_are_written_down(data: Any) -> None:
    digits = data.load("digits")
    assert [len(part.labels) for part in (digits.train, digits.validation, digits.test)] == [
        1047,
        250,
        500,
    ]
    assert digits.example.shape == (1, 1, 16, 16)


def test_augmentation_moves_each_image_on_its_own_and_no_further_than_it_says(data: Any) -> None:
    digits = data.load("digits", 8)
    images = torch.zeros(200, 1, 8, 8)
    images[:, :, 4, 4] = 1
    moved = data.augmented(images, replace(digits, shift=2), torch.Generator().manual_seed(0))
    places = {tuple(place) for place in moved[:, 0].nonzero()[:, 1:].tolist()}
    assert places == {(y, x) for y in range(2, 7) for x in range(2, 7)}
    assert moved.flatten(1).sum(1).eq(1).all()


# -- rows


def test_criteria_are_read_from_text(accuracy: Any) -> None:
    assert accuracy.cpmc("cpmc") == CPMC()
    assert accuracy.cpmc("cpmc:alpha=0:roles=own+scale") == CPMC(alpha=0, roles=("own", "scale"))
    assert accuracy.cpmc("cpmc:by=max") == accuracy.Variant(
        by="max", beta=CPMC().beta, gamma=CPMC().gamma
    )
    with pytest.raises(fxprune.FxpruneError, match="choose one or several of"):
        accuracy.cpmc("cpmc:roles=none")


def test_a_variant_with_the_settings_of_cpmc_is_cpmc(accuracy: Any, data: Any) -> None:
    digits = data.load("digits", 8)
    model = accuracy.NETWORKS["vgg_narrow"](digits.channels, digits.classes).eval()
    plans = [
        fxprune.prune(model, digits.example, macs=0.5, criterion=c).plan
        for c in (CPMC(), accuracy.Variant())
    ]
    assert plans[0] == plans[1]


@pytest.fixture
def few(
    accuracy: Any, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Any]:
    """Return a setting of one epoch over 70 digits, and the place for its weights."""
    digits = data.load("digits", 8)
    parts = {
        part: data.Part(getattr(digits, part).images[:70], getattr(digits, part).labels[:70])
        for part in ("train", "validation", "test")
    }
    monkeypatch.setattr(accuracy, "_loaded", lambda *_: replace(digits, **parts))
    accuracy.trained.cache_clear()
    return accuracy.Setting("digits", 8, "vgg_narrow", 0, 1, 1, 0.1), accuracy.Where(
        str(tmp_path), None, "cpu"
    )


@pytest.mark.parametrize(
    "criterion",
    ["cpmc", "l2", "taylor", "activation", "random", "cpmc/constants", "cpmc/least_squares"],
)
def test_a_row_keeps_to_its_budget_and_leaves_the_dense_network_as_it_was(
    criterion: str, accuracy: Any, few: Any
) -> None:
    setting, where = few
    dense = accuracy.dense_row(setting, where)
    weights = {
        name: tensor.clone()
        for name, tensor in accuracy.trained(setting, where).state_dict().items()
    }
    row = accuracy.pruned_row(setting, criterion, 0.7, where)
    assert 0.2 < row["macs_left"] <= 0.3
    assert (
        set(row["before"]) == set(row["after"]) == set(dense["accuracy"]) == {"validation", "test"}
    )
    again = accuracy.trained(setting, where).state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in again.items())


def test_criteria_are_compared_on_the_same_weights(accuracy: Any) -> None:
    """Criteria are compared on seeds that both have.

    Seeds differ by far more than criteria, so a seed that only one has says nothing.
    """
    names = {"cpmc": "cpmc", "l1": "l1", "random": "random"}
    dense = {"data": "digits", "size": 8, "epochs": 1, "finetune": 1, "rate": 0.1}
    options = SimpleNamespace(shown=names, removed=(0.5, 0.85), seeds=(0, 1, 2), **dense)
    rows = {}
    for seed, base in enumerate((50.0, 70.0, 90.0)):
        setting = accuracy.setting_of(options, "vgg_narrow", seed)
        for removed, (better, spread) in {0.5: (1.0, 0.0), 0.85: (2.0, 3.0)}.items():
            rows[accuracy.key_of(setting, "cpmc", removed)] = {
                "after": {"test": base + better + spread * (seed - 1)}
            }
            rows[accuracy.key_of(setting, "l1", removed)] = {"after": {"test": base}}
    del rows[accuracy.key_of(accuracy.setting_of(options, "vgg_narrow", 2), "l1", 0.5)]
    lines = accuracy.Table(rows, options).ahead("vgg_narrow", "after", "test").splitlines()
    assert lines[2:] == [
        "| l1 | +1.00 ± 0.00 | +2.00 ± 1.73 | +0.75 ± 0.75 |",
        "| random | - | - | - |",
    ]


def test_a_second_run_reads_the_trained_weights_from_the_cache(accuracy: Any, few: Any) -> None:
    setting, where = few
    first = accuracy.trained(setting, where)
    accuracy.trained.cache_clear()
    second = accuracy.trained(setting, where)
    assert first is not second
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


# -- latency


@pytest.fixture
def run_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that runs a latency benchmark briefly on small images.

    It returns the models in the file of results that the benchmark wrote.
    """

    def run(name: str, *more: str) -> Any:
        with imported(name) as module:
            monkeypatch.setattr(sys.modules["_common"], "RESULTS", tmp_path)
            # keep_memory would change this whole process
            monkeypatch.setattr(sys.modules["_latency"], "keep_memory", lambda: False)
            argv = [
                "--quick",
                "--device",
                "cpu",
                "--rounds",
                "1",
                "--seconds",
                "0.001",
                "--batches",
                "2",
                *more,
            ]
            monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
            module.main()
        written = sorted(
            path.name for path in tmp_path.iterdir() if path.suffix in (".json", ".md")
        )
        assert [name.rpartition(".")[2] for name in written] == ["json", "md"]
        assert all(name.startswith(f"{module.__name__}_") and "_quick" in name for name in written)
        assert "on the CPU" in (tmp_path / written[1]).read_text()
        return json.loads((tmp_path / written[0]).read_text())["models"]

    return run


@pytest.mark.long
def test_the_latency_of_every_budget(run_quickly: Callable[..., Any]) -> None:
    record = run_quickly(
        "latency", "--models", "mobilenet_v2", "--removed", "0.3,0.5", "--round-to", "1"
    )["mobilenet_v2"]
    (row,) = record["rows"]
    assert list(row["latency"]) == ["dense", "30% removed", "50% removed"]
    assert (row["precision"], row["mode"], row["batch"]) == ("fp32", "eager", 2)
    for label, most in {"30% removed": 0.7, "50% removed": 0.5}.items():
        assert most - 0.05 < record["left"][label]["macs"] <= most
        assert row["latency"][label]["floor_ms"] < row["latency"]["dense"]["floor_ms"]
    assert all(
        own["quartiles"][0] <= own["ms"] <= own["quartiles"][1] for own in row["latency"].values()
    )


@pytest.mark.long
def test_by_hand_at_the_pruned_widths(run_quickly: Callable[..., Any]) -> None:
    """The pruned network computes the same in all four forms that are measured."""
    record = run_quickly("latency_plain", "--models", "resnet18", "--repeats", "2")["resnet18"]
    assert list(record["differences"]) == ["plain", "deployed", "class", "graph"]
    assert max(record["differences"].values()) < 1e-4
    (row,) = record["rows"]
    assert {form: len(own) for form, own in row["latency"].items()} == dict.fromkeys(
        record["differences"], 2
    )


def test_both_tools_at_equal_macs(run_quickly: Callable[..., Any]) -> None:
    pytest.importorskip("torch_pruning", reason="the rival is not installed")
    record = run_quickly("latency_rivals", "--models", "resnet18")["resnet18"]
    assert "error" not in record
    (row,) = record["rows"]
    assert len(row["latency"]) >= 3


def test_the_staircase_of_a_layer(run_quickly: Callable[..., Any]) -> None:
    pytest.importorskip("matplotlib", reason="it draws")
    record = run_quickly("latency_staircase", "--models", "linear")
    (row,) = record["linear"]["rows"]
    assert list(row["ms"]) == [str(width) for width in range(96, 769, 96)]


@pytest.mark.slow
def test_both_budgets_at_equal_latency(
    run_quickly: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path / "cache"))
    record = run_quickly("latency_budget", "--models", "resnet50", "--shares", "0.7")["resnet50"]
    (row,) = record["rows"]
    if "error" not in row:  # on a busy machine the budget may be refused
        assert 0 < row["ms"]["measured"] < row["ms"]["dense"]
        for by in ("by latency", "by macs"):
            assert 0 < row[by]["macs"] < 1
            assert row[by]["macs"] < row[by]["importance"] < 1


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def measure(models: Any, inputs: Any, setting: Setting, **options: Any) -> dict[str, Latency]:
        assert setting.batch is not None
        tried.append(setting.batch)
        if setting.batch > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {"dense": Latency(Timing(2.0, 1.0, 3.0, 5), setting.batch, 1.0, 100)}

    found = SimpleNamespace(
        device="cpu", precisions=["fp32"], modes=["eager"], batches=[256], rounds=1, seconds=0.1
    )
    with imported("_latency") as shared:
        monkeypatch.setattr(shared, "measure", measure)
        limit = 100
        (row,) = shared.time_all({}, None, found)
        assert (tried, row["batch"], row["latency"]["dense"]["throughput"]) == (
            [256, 128, 64],
            64,
            32_000.0,
        )
        limit = 0
        (row,) = shared.time_all({}, None, found)
        assert row["error"] == "OutOfMemoryError: CUDA out of memory."
        assert tried[-1] == 1
