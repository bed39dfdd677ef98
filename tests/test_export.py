"""Tests of export: a file gives in its own process what the model gives here."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxprune
from fxprune.errors import ArgumentError, ExportError, VerificationError
from fxprune.runtimes import packages_of, runner
from tests.support.checking import assert_unharmed, randomise, snapshot


def small() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
    return randomise(net, torch.float32).eval()


def pruned_small() -> nn.Module:
    torch.manual_seed(0)
    return fxprune.deploy(fxprune.prune(small(), torch.zeros(1, 3, 9, 9), channels=0.5).model)


@pytest.mark.long
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_pruned_model_in_a_fresh_process(suffix: str, tmp_path: Path) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    model = pruned_small()
    before = snapshot(model)
    error = fxprune.export(model, torch.zeros(1, 3, 9, 9), tmp_path / "out" / f"net{suffix}")
    assert error is not None
    assert error < 1e-5
    assert_unharmed(model, before)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"net{suffix}"]


@pytest.mark.long
def test_a_model_with_keywords(tmp_path: Path) -> None:
    """A model with keyword arguments and a dict as output can be exported."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Linear(4, 16), nn.Linear(6, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor, scale: Tensor, *, y: Tensor) -> dict[str, Tensor]:
            return {"sum": self.head(torch.relu(self.left(x) + scale * self.right(y)))}

    inputs = {"y": torch.zeros(2, 6), "x": torch.zeros(2, 4), "scale": torch.tensor(2.0)}
    pruned = fxprune.prune(Two().eval(), inputs, channels=0.5).model
    for suffix in (".pt2", ".onnx"):
        error = fxprune.export(pruned, inputs, tmp_path / f"two{suffix}")
        assert error is not None
        assert error < 1e-5


@pytest.mark.long
def test_without_a_dynamic_batch(tmp_path: Path) -> None:
    """A model that unrolls its batch in Python can be exported for one batch size only."""

    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.conv(image[None])[0] * (i + 1) for i, image in enumerate(x)])

    x = torch.zeros(3, 3, 4, 4)
    with pytest.raises(
        ExportError,
        match=r"Unrolled cannot be exported as an exported program: .*dynamic_batch=False",
    ):
        fxprune.export(Unrolled(), x, tmp_path / "net.pt2")
    assert list(tmp_path.iterdir()) == []
    error = fxprune.export(Unrolled(), x, tmp_path / "net.pt2", dynamic_batch=False)
    assert error is not None
    assert error < 1e-5


@pytest.mark.long
def test_a_file_that_gives_something_else_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose results differ from the model's is refused and removed."""
    program = (
        Path(runner.__file__)
        .read_text()
        .replace("leaf.detach().cpu()", "leaf.detach().cpu() * 1.001")
    )
    (tmp_path / "wrong.py").write_text(program)
    monkeypatch.setattr(sys.modules["fxprune.runtimes"], "_RUNNER", tmp_path / "wrong.py")
    with pytest.raises(VerificationError, match=r"net\.pt2 differs from the model by 1\.0e-03"):
        fxprune.export(pruned_small(), torch.zeros(1, 3, 9, 9), tmp_path / "net.pt2")
    assert not (tmp_path / "net.pt2").exists()


def test_a_file_that_gives_no_number_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in a file's results counts as an infinite difference."""
    runtimes = sys.modules["fxprune.runtimes"]
    given = torch.tensor([1.0, math.nan])
    monkeypatch.setattr(runtimes, "_run_apart", lambda *_: [[given]])
    call = fxprune.inputs.as_call(torch.ones(2))
    with pytest.raises(VerificationError, match=r"net\.pt2 differs from the model by inf"):
        runtimes._check(nn.Identity(), [call], Path("net.pt2"), [])


@pytest.mark.long
def test_a_file_that_needs_fxprune_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that imports fxprune when it runs is refused."""
    program = (
        Path(runner.__file__)
        .read_text()
        .replace("import sys\n", "import sys\nimport fxprune\n", 1)
    )
    (tmp_path / "bringing.py").write_text(program)
    monkeypatch.setattr(sys.modules["fxprune.runtimes"], "_RUNNER", tmp_path / "bringing.py")
    monkeypatch.setenv("PYTHONPATH", str(Path(fxprune.__file__).parent.parent))
    with pytest.raises(
        VerificationError,
        match="does not run in a process of its own: RuntimeError: the file brought fxprune",
    ):
        fxprune.export(pruned_small(), torch.zeros(1, 3, 9, 9), tmp_path / "net.pt2")


@pytest.mark.long
def test_operations_of_torchvision(tmp_path: Path) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Any:
            boxes = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])
            return torchvision.ops.roi_align(torch.relu(self.conv(x)), boxes, 2)

    pruned = fxprune.prune(Pooled().eval(), torch.zeros(2, 3, 8, 8), channels=1.0).model
    error = fxprune.export(
        pruned, torch.zeros(2, 3, 8, 8), tmp_path / "net.pt2", dynamic_batch=False
    )
    assert error is not None
    assert error < 1e-5


@pytest.mark.long
def test_packages_are_those_that_define_operations_of_the_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Packages that define operations of a program are listed, also those used in a branch.

    Packages that are only loaded here are not.
    """

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: fresh(x), (x,))

    @torch.library.custom_op("fxprune_package::fresh", mutates_args=())
    def fresh(x: Tensor) -> Tensor:
        return x.clone()

    fresh.register_fake(torch.empty_like)
    assert packages_of(torch.export.export(small(), (torch.zeros(1, 3, 9, 9),))) == []
    program = torch.export.export(Branching(), (torch.zeros(3),))
    assert packages_of(program) == []  # no package of this name can be imported
    monkeypatch.setitem(sys.modules, "fxprune_package", sys)
    assert packages_of(program) == ["fxprune_package"]


@pytest.mark.parametrize("name", ["net.pt", "net"])
def test_other_suffixes(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=rf"{name} ends with neither \.onnx nor \.pt2"):
        fxprune.export(small(), torch.zeros(1, 3, 9, 9), tmp_path / name)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "onnxscript" else object()
    )
    with pytest.raises(ArgumentError, match=r"ONNX needs onnxscript: pip install onnxscript"):
        fxprune.export(small(), torch.zeros(1, 3, 9, 9), tmp_path / "net.onnx")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk raises an error and leaves no file.

    torch's own writer of files would end the process. Therefore it writes to memory, and Python
    writes the file.
    """

    def full(self: Path, data: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(fxprune.ArgumentError, match="No space left"):
        fxprune.export(
            nn.Sequential(nn.Linear(3, 2)), torch.zeros(2, 3), tmp_path / "net.pt2", check=False
        )
    assert not list(tmp_path.iterdir())
