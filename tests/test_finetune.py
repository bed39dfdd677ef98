"""The fine-tuning example, run end to end on a few images.

The tests check what it trains and writes, that a resumed run ends like an uninterrupted one, and
that all processes agree.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder

import fxprune
from examples import finetune as script
from fxprune.training import soft_target_loss
from tests.support.training_ranks import fsdp_is_there

SCRIPT = Path(script.__file__)
# each class has one brighter channel; in alphabetical order, as ImageFolder numbers them
COLOURS = ("blue", "green", "red")
CHANNEL = {"red": 0, "green": 1, "blue": 2}
PER_CLASS = {"train": 8, "val": 5}  # 15 to validate: two processes cannot share them evenly

LEARNS = "resnet18"  # learns the colours in a few epochs
NORMALISED = "shufflenet_v2_x0_5"  # the smallest with batch normalisation
SMALL = "squeezenet1_1"  # the quickest to build

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch was built without torch.distributed"
)


@pytest.fixture(scope="module")
def finetune() -> ModuleType:
    return script


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of noise images in three colours."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in PER_CLASS.items():
        for colour in COLOURS:
            (folder / part / colour).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., CHANNEL[colour]] += 100
                Image.fromarray(pixels).save(folder / part / colour / f"{number}.png")
    return folder


def options_of(images: Path, out: Path, *more: str) -> list[str]:
    """Return the options of a quick run; later options override earlier ones."""
    small = (
        "--image-size",
        "32",
        "--batch-size",
        "8",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--epochs",
        "2",
    )
    return ["--data-dir", str(images), "--out", str(out), *small, *more]


def random_weights(name: str, path: Path, classes: int = 3) -> Path:
    torch.manual_seed(7)
    torch.save(
        torchvision.models.get_model(name, weights=None, num_classes=classes).state_dict(), path
    )
    return path


def build(name: str, classes: int = 3) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=classes).eval()


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text(encoding="utf-8"))


def without_times(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in epoch.items() if key != "seconds"}
        for epoch in metrics["epochs"]
    ]


def accuracy(finetune: Any, model: nn.Module, images: Path) -> float:
    """Return a model's accuracy in percent; only the transform is shared with the script."""
    data = ImageFolder(str(images / "val"), finetune.validation_transform(32, 37))
    with torch.no_grad():
        right = [model(image[None]).argmax().item() == label for image, label in data]
    assert len(right) == 15
    return 100 * sum(right) / len(right)


# -- one process


@pytest.fixture(scope="module")
def dense(finetune: Any, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the weights of a dense model that the script has fine-tuned without pruning.

    This is how a user gets a teacher for their own classes.
    """
    out = tmp_path_factory.mktemp("dense") / "run"
    more = ("--channels", "1.0", "--epochs", "6", "--rate", "0.05", "--clip", "1")
    metrics = finetune.main([LEARNS, *options_of(images, out, *more)])
    assert metrics["parameters"]["before"] == metrics["parameters"]["after"]
    assert metrics["epochs"][-1]["top1"] == 100
    return out / "pruned" / "model.safetensors"


@pytest.mark.long
def test_it_prunes_distills_averages_and_saves(
    finetune: Any, images: Path, dense: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs" / "half"
    arguments = options_of(
        images,
        out,
        "--checkpoint",
        str(dense),
        "--macs",
        "0.5",
        "--distill",
        "0.5",
        "--temperature",
        "3",
    )
    arguments += [
        "--ema",
        "0.5",
        "--amp",
        "bf16",
        "--rate",
        "0.04",
        "--clip",
        "1",
        "--epochs",
        "4",
    ]
    returned = finetune.main([LEARNS, *arguments])
    metrics = read(out)
    assert metrics == json.loads(json.dumps(returned))
    assert metrics["command"].startswith(f"python examples/finetune.py {LEARNS} --data-dir ")
    assert (metrics["classes"], metrics["processes"], metrics["parallel"]) == (3, 1, None)
    assert metrics["macs"]["after"] <= 0.5 * metrics["macs"]["before"]
    assert metrics["dense"] == {"top1": 100, "top5": 100, "images": 15}
    assert [epoch["epoch"] for epoch in metrics["epochs"]] == [1, 2, 3, 4]
    assert [epoch["rate"] for epoch in metrics["epochs"]] == pytest.approx(
        [0.01, 0.04, 0.03, 0.01]
    )
    for epoch in metrics["epochs"]:
        assert np.isfinite(epoch["loss"])
        # the top 5 of 3 classes are all of them
        assert (epoch["images"], epoch["top5"]) == (15, 100)
    assert metrics["epochs"][-1]["top1"] > 60, "it must not forget what the dense model knew"
    loaded = fxprune.load(out / "pruned", build(LEARNS))
    assert (
        loaded.report.params_after
        == metrics["parameters"]["after"]
        == sum(p.numel() for p in loaded.model.parameters())
    )
    assert loaded.report.macs_after == metrics["macs"]["after"]
    assert accuracy(finetune, loaded.model, images) == pytest.approx(metrics["epochs"][-1]["top1"])
    last = torch.load(out / "last.pt", weights_only=True)
    state = loaded.model.state_dict()
    assert all(
        torch.equal(last["ema"][f"module.{name}"], tensor) for name, tensor in state.items()
    )
    assert not all(torch.equal(last["model"][name], tensor) for name, tensor in state.items())
    assert sorted(path.name for path in out.iterdir()) == ["last.pt", "metrics.json", "pruned"]


@pytest.mark.long
def test_an_earlier_result_is_fine_tuned(
    finetune: Any, images: Path, dense: Path, tmp_path: Path
) -> None:
    model = build(LEARNS)()
    model.load_state_dict(finetune._read_checkpoint(dense))
    pruned = fxprune.prune(model, torch.zeros(1, 3, 32, 32), params=0.6)
    pruned.save(tmp_path / "earlier")
    before = accuracy(finetune, pruned.model, images)
    arguments = options_of(
        images, tmp_path / "out", "--saved", str(tmp_path / "earlier"), "--epochs", "1"
    )
    subprocess.run(
        [sys.executable, str(SCRIPT), LEARNS, *arguments],
        check=True,
        env=environment(),
        timeout=300,
    )
    metrics = read(tmp_path / "out")
    assert metrics["dense"] is None, "the dense model's weights were not given"
    assert metrics["pruned"]["top1"] == pytest.approx(before)
    assert fxprune.load(tmp_path / "out" / "pruned", build(LEARNS)).plan == pruned.plan


EVERYTHING = (
    "--distill",
    "0.5",
    "--ema",
    "0.8",
    "--clip",
    "1",
    "--accumulate",
    "2",
    "--augment",
    "rand",
    "--rate",
    "0.05",
)


@pytest.mark.long
@pytest.mark.parametrize(
    "more", [("--amp", "bf16", *EVERYTHING), ("--amp", "fp16")], ids=["everything", "fp16"]
)
def test_a_resumed_run_ends_with_the_same_bits(
    more: tuple[str, ...], finetune: Any, images: Path, tmp_path: Path
) -> None:
    checkpoint = str(random_weights(NORMALISED, tmp_path / "dense.pt"))
    arguments = ("--checkpoint", checkpoint, "--channels", "0.5", "--epochs", "3", *more)
    whole = finetune.main([NORMALISED, *options_of(images, tmp_path / "whole", *arguments)])
    in_parts = [NORMALISED, *options_of(images, tmp_path / "parts", *arguments)]
    part = finetune.main([*in_parts, "--stop-after-epoch", "1"])
    assert without_times(part) == without_times(whole)[:1]
    assert not (tmp_path / "parts" / "pruned").exists()
    torch.rand(5)  # other draws in the process must not matter
    resumed = finetune.main([*in_parts, "--resume"])
    assert without_times(resumed) == without_times(whole)
    assert resumed["dense"] == whole["dense"]
    check_same_end(tmp_path / "whole", tmp_path / "parts")


def check_same_end(whole: Path, parts: Path) -> None:
    """Check that two runs end with the same bytes of weights and the same training state."""
    first, second = ((out / "pruned" / "model.safetensors").read_bytes() for out in (whole, parts))
    assert first == second
    one, other = (torch.load(out / "last.pt", weights_only=True) for out in (whole, parts))
    for key in ("model", "ema", "optimizer", "schedule", "scaler", "random", "epoch", "plan"):
        same, others = (torch.utils._pytree.tree_flatten(state[key]) for state in (one, other))
        assert same[1] == others[1], key
        for a, b in zip(same[0], others[0], strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, key


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills by a signal")
def test_a_run_that_was_killed_goes_on(images: Path, tmp_path: Path) -> None:
    def command(out: str, *more: str) -> list[str]:
        arguments = options_of(
            images,
            tmp_path / out,
            "--macs",
            "0.5",
            "--epochs",
            "20",
            "--ema",
            "0.9",
            "--workers",
            "1",
        )
        arguments += more
        return [sys.executable, str(SCRIPT), NORMALISED, *arguments]

    subprocess.run(command("whole"), check=True, env=environment(), timeout=300)
    last = tmp_path / "parts" / "last.pt"
    with subprocess.Popen(command("parts"), env=environment()) as process:
        end = time.monotonic() + 300
        while not last.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert 0 < torch.load(last, weights_only=True)["epoch"] < 20
    subprocess.run(command("parts", "--resume"), check=True, env=environment(), timeout=300)
    check_same_end(tmp_path / "whole", tmp_path / "parts")


def environment() -> dict[str, str]:
    """Return the environment of a process with one thread, as torchrun sets it."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


# -- several processes

DRIVER = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch, finetune
torch.set_default_dtype(getattr(torch, sys.argv[3]))
distribute, save, seen = finetune.distribute, finetune.save_pruned, {}
@torch.no_grad()
def nudging(plain, *others):
    for parameter in plain.parameters():
        parameter.mul_(1 + float(sys.argv[4]))
    return distribute(plain, *others)
finetune.distribute = nudging
def noting(run):
    seen["buffers"] = [buffer.double().sum().item() for buffer in run.judged.buffers()]
    save(run)
finetune.save_pruned = noting
metrics = finetune.main(sys.argv[5:])
Path(sys.argv[2], f"rank{os.environ['RANK']}.json").write_text(json.dumps({**metrics, **seen}))
"""


def launched(
    folder: Path, *arguments: str, precision: str = "float32", nudge: float = 0.0
) -> list[dict[str, Any]]:
    """Return the metrics of each of two processes, and the sums of its buffers at the end.

    ``nudge`` is the share of itself by which every weight is enlarged before the training.
    """
    (folder / "driver.py").write_text(DRIVER)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command = [
        *launcher,
        str(folder / "driver.py"),
        str(SCRIPT.parent),
        str(folder),
        precision,
        repr(nudge),
        *arguments,
    ]
    found = subprocess.run(
        command, check=False, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def needs_fsdp(parallel: str) -> None:
    if parallel == "fsdp" and not fsdp_is_there():
        pytest.skip("this PyTorch has no FSDP2 for CPUs")


WAYS = {"ddp": ("--ema", "0.8"), "fsdp": ("--parallel", "fsdp")}


@pytest.mark.long
@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_agree(
    parallel: str, finetune: Any, images: Path, dense: Path, tmp_path: Path
) -> None:
    needs_fsdp(parallel)
    arguments = (
        "--checkpoint",
        str(dense),
        "--macs",
        "0.5",
        "--distill",
        "0.5",
        "--rate",
        "0.01",
        "--batch-size",
        "4",
    )
    more = ("--clip", "1", "--accumulate", "2", *WAYS[parallel])
    first, second = launched(
        tmp_path, LEARNS, *options_of(images, tmp_path / "out", *arguments, *more)
    )
    assert without_times(first) == without_times(second) == without_times(read(tmp_path / "out"))
    assert first["dense"] == second["dense"] == {"top1": 100, "top5": 100, "images": 15}
    assert first["pruned"] == second["pruned"]
    assert len(first["buffers"]) == 60
    assert first["buffers"] == second["buffers"], (
        "the processes must not judge models with statistics of their own"
    )
    assert first["command"].startswith("torchrun --nproc-per-node 2 examples/finetune.py ")
    assert [epoch["images"] for epoch in first["epochs"]] == [15, 15]
    loaded = fxprune.load(tmp_path / "out" / "pruned", build(LEARNS))
    assert accuracy(finetune, loaded.model, images) == pytest.approx(first["epochs"][-1]["top1"])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", WAYS)
def test_two_processes_resume(parallel: str, images: Path, tmp_path: Path) -> None:
    needs_fsdp(parallel)
    arguments = (
        "--macs",
        "0.5",
        "--batch-size",
        "4",
        "--rate",
        "0.05",
        "--amp",
        "bf16",
        *WAYS[parallel],
    )
    whole, _ = launched(tmp_path, NORMALISED, *options_of(images, tmp_path / "whole", *arguments))
    in_parts = (NORMALISED, *options_of(images, tmp_path / "parts", *arguments))
    launched(tmp_path, *in_parts, "--stop-after-epoch", "1")
    first, second = launched(tmp_path, *in_parts, "--resume")
    assert without_times(first) == without_times(second) == without_times(whole)
    check_same_end(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_ddp_and_fsdp_train_alike(images: Path, tmp_path: Path) -> None:
    """DDP and FSDP give the same losses up to rounding, in double precision.

    They must differ by less than two DDP runs whose first weights are one rounding apart. Because
    it normalises over four images, the network amplifies such a rounding to 1e-11 in the first
    epoch and to 1e-3 in the second.
    """
    needs_fsdp("fsdp")
    arguments = (
        "--macs",
        "0.5",
        "--batch-size",
        "4",
        "--rate",
        "0.01",
        "--clip",
        "1",
        "--no-channels-last",
    )

    def losses(way: str, nudge: float = 0.0) -> list[float]:
        options = options_of(images, tmp_path / f"{way}{nudge}", *arguments, "--parallel", way)
        found, _ = launched(tmp_path, NORMALISED, *options, precision="float64", nudge=nudge)
        return [epoch["loss"] for epoch in found["epochs"]]

    ddp, fsdp, rounded = losses("ddp"), losses("fsdp"), losses("ddp", sys.float_info.epsilon)
    assert ddp[0] == pytest.approx(fsdp[0], rel=1e-12)
    assert ddp != rounded
    for one, other, away in zip(ddp, fsdp, rounded, strict=True):
        assert abs(one - other) < abs(one - away)


# -- parts


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine(finetune: Any) -> None:
    shares = [finetune.share_of_rate(step, 4, 24) for step in range(24)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert shares[14] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(shares[4:]))
    assert 0 < shares[-1] < 0.01
    assert finetune.share_of_rate(0, 0, 1) == 1


def test_normalisations_and_biases_do_not_decay(finetune: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    decaying, others = finetune.parameter_groups(model, 0.1)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0)
    assert [*map(id, decaying["params"])] == [id(model[0].weight), id(model[2].weight)]
    assert len(others["params"]) == 4


def prepared(finetune: Any, model: nn.Module, teacher: nn.Module | None, **options: Any) -> Any:
    """Return a run with only the parts that its loss depends on."""
    settings = {"amp": "none", "smoothing": 0.1, "distill": 0.25, "temperature": 2.0, **options}
    world = finetune.World(0, 1, torch.device("cpu"), False)
    none: Any = None
    run = finetune.Run(
        none, world, none, none, none, teacher, model, model, none, none, none, none, ""
    )
    run.options = finetune.argparse.Namespace(**settings)
    return run


def test_the_loss_weighs_labels_and_teacher(finetune: Any) -> None:
    model, teacher = nn.Linear(6, 4), nn.Linear(6, 4)
    images, labels = torch.randn(5, 6), torch.randint(4, (5,))
    plain = F.cross_entropy(model(images), labels, label_smoothing=0.1)
    torch.testing.assert_close(
        finetune.objective(prepared(finetune, model, None), images, labels), plain
    )
    soft = soft_target_loss(model(images), teacher(images), 2.0)
    torch.testing.assert_close(
        finetune.objective(prepared(finetune, model, teacher), images, labels),
        0.75 * plain + 0.25 * soft,
    )


def test_steps_average_their_batches_however_many_are_left(finetune: Any) -> None:
    """With three batches and two per step, the second step averages over one batch."""
    batches = [(torch.randn(2, 6), torch.randint(4, (2,))) for _ in range(3)]
    torch.manual_seed(0)
    model, expected = nn.Linear(6, 4), nn.Linear(6, 4)
    expected.load_state_dict(model.state_dict())
    losses = []
    for group in (batches[:2], batches[2:]):
        each = [F.cross_entropy(expected(images), labels) for images, labels in group]
        gradients = torch.autograd.grad(torch.stack(each).mean(), [*expected.parameters()])
        with torch.no_grad():
            for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
        losses += [loss.item() for loss in each]

    class Loader(list):
        sampler = torch.utils.data.DistributedSampler([0], num_replicas=1, rank=0)

    run = prepared(
        finetune,
        model,
        None,
        smoothing=0.0,
        accumulate=2,
        clip=None,
        print_every=0,
        layout=torch.preserve_format,
    )
    run.data = finetune.Data(4, Loader(batches), None, 0)
    run.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda _: 1.0)
    run.scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert finetune.train_epoch(run, 0) == pytest.approx(sum(losses) / 3)
    torch.testing.assert_close(model.state_dict(), expected.state_dict())


def test_auxiliary_classifiers_count_less(finetune: Any) -> None:
    class WithAuxiliary(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            logits = super().forward(x)
            return torchvision.models.GoogLeNetOutputs(logits, None, -logits)

    model = WithAuxiliary(6, 4)
    images, labels = torch.randn(5, 6), torch.randint(4, (5,))
    logits = model(images).logits
    expected = F.cross_entropy(logits, labels) + 0.3 * F.cross_entropy(-logits, labels)
    found = finetune.objective(prepared(finetune, model, None, smoothing=0.0), images, labels)
    torch.testing.assert_close(found, expected)


def namespace(finetune: Any, model: str, **options: Any) -> Any:
    return finetune.argparse.Namespace(
        **{"model": model, "seed": 0, "weights": None, "checkpoint": None, **options}
    )


def test_weights_for_other_classes_lose_their_classifier_alone(
    finetune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_weights(SMALL, tmp_path / "five.pt", classes=5)
    weights = build(SMALL, 1000)().state_dict()
    monkeypatch.setattr(
        torchvision.models.SqueezeNet1_1_Weights,
        "get_state_dict",
        lambda *_, **__: copy.copy(weights),
    )
    for options, source in (
        ({"checkpoint": path}, torch.load(path, weights_only=True)),
        ({"weights": "DEFAULT"}, weights),
    ):
        model, knowing = finetune.dense_model(namespace(finetune, SMALL, **options), 3)
        assert not knowing
        state = model.state_dict()
        assert len(state["classifier.1.weight"]) == 3
        assert all(
            torch.equal(state[name], value)
            for name, value in source.items()
            if not name.startswith("classifier")
        )
        _, knowing = finetune.dense_model(
            namespace(finetune, SMALL, **options), len(source["classifier.1.bias"])
        )
        assert knowing


def test_a_checkpoint_may_be_wrapped_and_must_fit(finetune: Any, tmp_path: Path) -> None:
    state = torch.load(random_weights(NORMALISED, tmp_path / "dense.pt"), weights_only=True)
    torch.save({"state_dict": state, "epoch": 7}, tmp_path / "wrapped.pt")
    model, knowing = finetune.dense_model(
        namespace(finetune, NORMALISED, checkpoint=tmp_path / "wrapped.pt"), 3
    )
    assert knowing
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    for name in ("dense.pt", "nothing.pt", "nothing.safetensors"):
        with pytest.raises(
            finetune.Refusal, match=r"--checkpoint .*(does not fit|cannot be read)"
        ):
            finetune.dense_model(namespace(finetune, SMALL, checkpoint=tmp_path / name), 3)


def test_a_file_is_replaced_whole_or_not_at_all(finetune: Any, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    finetune.write_atomically(path, lambda new: new.write_text("old"))

    def torn(new: Path) -> None:
        new.write_text("ne")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        finetune.write_atomically(path, torn)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [
        ("last.pt", "old")
    ]


# -- refusals

HALF = ("--macs", "0.5")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("resnet81", *HALF), "try resnet18"),
        ((SMALL,), "--macs, --params or --channels"),
        ((SMALL, *HALF, "--saved", "there"), "leave out --macs"),
        ((SMALL, *HALF, "--weights", "DEFAULT", "--checkpoint", "there"), "choose one"),
        ((SMALL, *HALF, "--weights", "IMAGENET"), "choose from IMAGENET1K_V1, DEFAULT"),
        ((SMALL, "--macs", "1.5"), "1.5 is not a share"),
        ((SMALL, *HALF, "--epochs", "0"), "0 is not a whole number from 1 on"),
        ((SMALL, *HALF, "--rate", "nan"), "nan is not a number above 0"),
        ((SMALL, *HALF, "--criterion", "magic"), "invalid choice"),
        ((SMALL, *HALF, "--distill", "0.5"), "give it some with --weights or --checkpoint"),
        ((SMALL, *HALF, "--ema", "1"), "choose less"),
        ((SMALL, *HALF, "--smoothing", "1"), "choose less"),
        ((SMALL, *HALF, "--parallel", "fsdp"), "torchrun"),
        ((SMALL, *HALF, "--parallel", "fsdp", "--ema", "0.9"), "leave one of them out"),
        ((SMALL, *HALF, "--device", "tpu"), "choose cuda or cpu"),
        ((SMALL, *HALF, "--resume"), "has no last.pt yet"),
        (
            (SMALL, *HALF, "--data-dir", "nowhere"),
            "train must hold one folder of images per class",
        ),
        ((SMALL, *HALF, "--batch-size", "25"), "only 24 training images: choose less"),
        ((SMALL, *HALF, "--image-size", "5"), "--input|input"),
        ((SMALL, "--macs", "0.0001"), "smallest|least|below"),
        ((SMALL, "--saved", "nowhere"), "there is no folder nowhere"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, tuple) else "",
)
def test_bad_options_are_refused_with_the_way_out(
    arguments: tuple[str, ...],
    words: str,
    finetune: Any,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, *more = arguments
    with pytest.raises(SystemExit) as refused:
        finetune.main([name, *options_of(images, tmp_path / "out", *more)])
    assert refused.value.code == 2
    said = capsys.readouterr().err
    assert "usage: finetune.py MODEL" in said
    assert "error: " in said
    assert any(word in said for word in words.split("|")), said
    assert not (tmp_path / "out").exists()


def refused(finetune: Any, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    with pytest.raises(SystemExit):
        finetune.main(arguments)
    return capsys.readouterr().err


def test_a_run_is_neither_overwritten_nor_resumed_as_another(
    finetune: Any, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(random_weights(SMALL, tmp_path / "dense.pt"))
    distilled = ("--checkpoint", checkpoint, *HALF, "--distill", "0.5")
    arguments = [SMALL, *options_of(images, tmp_path / "out", *distilled)]
    finetune.main([*arguments, "--stop-after-epoch", "1"])
    before = (tmp_path / "out" / "last.pt").read_bytes()
    assert "go on with --resume" in refused(finetune, capsys, arguments)
    assert "--rate was 0.02 and is 0.5" in refused(
        finetune, capsys, [*arguments, "--resume", "--rate", "0.5"]
    )
    torch.save(build(SMALL)().state_dict(), checkpoint)
    assert "other weights than before" in refused(finetune, capsys, [*arguments, "--resume"])
    assert (tmp_path / "out" / "last.pt").read_bytes() == before
    (tmp_path / "out" / "last.pt").write_bytes(before[:1000])
    assert "cannot be read" in refused(finetune, capsys, [*arguments, "--resume"])


def test_a_model_for_other_classes_neither_teaches_nor_is_read(
    finetune: Any, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    five = random_weights(SMALL, tmp_path / "five.pt", classes=5)
    distilled = options_of(
        images, tmp_path / "out", "--checkpoint", str(five), *HALF, "--distill", "0.5"
    )
    assert "fine-tune it first, with --channels 1.0" in refused(
        finetune, capsys, [SMALL, *distilled]
    )
    fxprune.prune(build(SMALL, 5)(), torch.zeros(1, 3, 32, 32), channels=0.5).save(
        tmp_path / "five"
    )
    saved = options_of(images, tmp_path / "out", "--saved", str(tmp_path / "five"))
    assert "for another one, prune here" in refused(finetune, capsys, [SMALL, *saved])


def test_classes_must_be_the_same_in_both_parts(
    finetune: Any, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(images / "train", tmp_path / "train")
    (tmp_path / "val" / "red").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "val" / "red" / "0.png")
    assert "only one of them has blue, green" in refused(
        finetune, capsys, [SMALL, *options_of(tmp_path, tmp_path / "out", *HALF)]
    )


def test_a_loss_that_is_not_finite_ends_the_run(
    finetune: Any, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options_of(images, tmp_path / "out", *HALF, "--rate", "1e30", "--warmup", "0")
    assert "lower --rate" in refused(finetune, capsys, [SMALL, *arguments])
    assert not (tmp_path / "out" / "last.pt").exists()


def test_processes_with_different_weights_are_noticed(
    finetune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = fxprune.prune(build(SMALL)(), torch.zeros(1, 3, 32, 32), channels=0.5)
    said: list[str] = []
    monkeypatch.setattr(
        finetune.World, "gathered", lambda _, value: [*said, said.append(value) or value]
    )
    world = finetune.World(0, 2, torch.device("cpu"), True)
    finetune.check_alike(world, pruned)
    finetune.check_alike(world, copy.deepcopy(pruned))
    with torch.no_grad():
        pruned.model.get_parameter("classifier.1.bias")[1] += 1e-6
    with pytest.raises(finetune.Refusal, match="the same pruned model"):
        finetune.check_alike(world, pruned)


def test_help_names_every_option_and_shows_commands(finetune: Any) -> None:
    text = finetune.parser().format_help()
    for words in (
        "torchrun --nproc-per-node 8",
        "--resume",
        "--distill ALPHA",
        "training:",
        "Hinton",
    ):
        assert words in text
