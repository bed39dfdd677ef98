"""Pruned models on disk: round trips, damaged folders, and saves interrupted at any step."""

import copy
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fxprune
from fxprune.errors import ArgumentError, FxpruneError, ModelError, PlanError
from fxprune.result import serialization as saving
from fxprune.result import tensor_files
from tests.zoo import CASES
from tests.zoo.case import Case

FILES = ["manifest.json", "model.safetensors", "plan.json", "report.json", "report.txt"]


def build(width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 3)
    )


IMAGE = torch.zeros(1, 3, 8, 8)


def pruned_net(channels: float = 0.5) -> fxprune.Pruned:
    pruned = fxprune.prune(build(), IMAGE, channels=channels)
    with torch.no_grad():
        # change all values, as training would, so that none equals what the factory makes
        for tensor in pruned.model.state_dict().values():
            tensor.copy_(torch.randint(1, 100, tensor.shape))
    return pruned


def same_state(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


# ---- round trips


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_zoo_comes_back(case: Case, tmp_path: Path) -> None:
    pruned = fxprune.prune(case.build(case.width), case.inputs(2), channels=0.5)
    pruned.save(tmp_path)
    loaded = fxprune.load(tmp_path, lambda: case.build(case.width))
    assert same_state(loaded.model, pruned.model)
    assert loaded.model.code == pruned.model.code
    assert loaded.plan == pruned.plan
    assert loaded.report == pruned.report


def test_the_loaded_model_computes_the_same(tmp_path: Path) -> None:
    pruned = pruned_net()
    pruned.save(tmp_path / "deep" / "out")
    assert sorted(path.name for path in (tmp_path / "deep" / "out").iterdir()) == FILES
    loaded, x = fxprune.load(tmp_path / "deep" / "out", build), torch.randn(2, 3, 9, 9)
    assert torch.equal(loaded.model.eval()(x), pruned.model.eval()(x))
    assert (tmp_path / "deep" / "out" / "report.txt").read_text() == str(pruned.report) + "\n"


def test_a_ready_made_model_serves_as_well_and_stays_as_it_is(tmp_path: Path) -> None:
    pruned, model = pruned_net(), build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned.save(tmp_path)
    assert same_state(fxprune.load(tmp_path, model).model, pruned.model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_pruned_three_times_and_trained_in_between(tmp_path: Path) -> None:
    pruned = pruned_net(0.8)
    for _ in range(2):
        pruned = fxprune.prune(pruned.model, IMAGE, channels=0.7)
        nn.init.normal_(pruned.model.get_parameter("0.weight"))
    pruned.save(tmp_path)
    loaded = fxprune.load(tmp_path, build)
    assert len(loaded.plan.chain) == 3
    assert loaded.plan == pruned.plan
    assert same_state(loaded.model, pruned.model)


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed, self.mix, self.head = (
            nn.Embedding(11, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 11, bias=False),
        )
        self.register_buffer("scale", torch.arange(8.0))
        self.register_buffer("table", torch.arange(11), persistent=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        table: Tensor = self.table
        return self.head(torch.relu(self.mix(self.embed(table[tokens]) * self.scale)))


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    pruned = fxprune.prune(Tied(), torch.zeros(1, 5, dtype=torch.long), channels=0.5)
    pruned.save(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert ("embed.weight" in stored) != ("head.weight" in stored)
    loaded = fxprune.load(tmp_path, Tied).model
    assert loaded.get_parameter("embed.weight") is loaded.get_parameter("head.weight")
    assert same_state(loaded, pruned.model)
    assert torch.equal(loaded.get_buffer("table"), torch.arange(11))


def test_the_library_of_the_format_reads_the_weights_too(tmp_path: Path) -> None:
    pruned = fxprune.prune(Tied(), torch.zeros(1, 5, dtype=torch.long), channels=0.5)
    pruned.save(tmp_path)
    other = fxprune.apply(pruned.plan, Tied()).model
    safetensors.torch.load_model(other, tmp_path / "model.safetensors")
    assert same_state(other, pruned.model)


def test_ties_that_the_architecture_has_not(tmp_path: Path) -> None:
    """Both models have the same names and shapes, but only one of them ties two tensors.

    Loading without a check would silently lose a tensor.
    """
    tied, apart = tmp_path / "tied.safetensors", tmp_path / "apart.safetensors"
    tensor_files.save_tensors(Tied(), tied)
    tensor_files.save_tensors(Tied(tied=False), apart)
    with pytest.raises(PlanError, match=r"head\.weight.*tied on one side"):
        tensor_files.load_tensors(Tied(tied=False), tied)
    with pytest.raises(PlanError, match=r"head\.weight.*tied on one side"):
        tensor_files.load_tensors(Tied(), apart)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    pruned = fxprune.prune(Tied(), torch.zeros(1, 5, dtype=torch.long), channels=0.5)
    pruned.model.to(dtype)
    pruned.save(tmp_path)
    loaded = fxprune.load(tmp_path, Tied).model
    assert loaded.get_parameter("mix.weight").dtype == dtype
    assert loaded.get_parameter("embed.weight") is loaded.get_parameter("head.weight")
    assert same_state(loaded, pruned.model)
    tokens = torch.arange(5)[None]
    assert torch.equal(loaded(tokens), pruned.model(tokens))


def test_one_module_of_another_dtype(tmp_path: Path) -> None:
    pruned = pruned_net()
    pruned.model.get_submodule("3").double()
    pruned.save(tmp_path)
    loaded = fxprune.load(tmp_path, build).model
    assert loaded.get_parameter("0.weight").dtype == torch.float32
    assert loaded.get_parameter("3.weight").dtype == torch.float64
    assert same_state(loaded, pruned.model)


def test_a_model_cast_as_a_whole_takes_its_unsaved_buffers_along(tmp_path: Path) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
            self.register_buffer("shift", torch.ones(8), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) + self.shift)

    pruned = fxprune.prune(Shifted(), torch.zeros(2, 4), channels=0.5)
    pruned.model.double().requires_grad_(False)
    pruned.save(tmp_path)
    loaded, x = fxprune.load(tmp_path, Shifted).model, torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(loaded(x), pruned.model(x))


def test_memory_formats_and_shared_storage(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            both = torch.randn(2, 6)
            self.register_buffer("one", both[0])
            self.register_buffer("two", both[1])
            self.register_buffer("wide", torch.randn(1).expand(4))
            self.register_buffer(
                "last", torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
            )

    model, other = Views(), Views()
    tensor_files.save_tensors(model, tmp_path / "views.safetensors")
    other.wide = other.wide.clone()
    tensor_files.load_tensors(other, tmp_path / "views.safetensors")
    assert same_state(model, other)


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    pruned_net().save(tmp_path)
    assert (
        fxprune.load(tmp_path, build, device="cpu").model.get_parameter("0.weight").device.type
        == "cpu"
    )
    with pytest.raises(ArgumentError, match="device='nonsense'"):
        fxprune.load(tmp_path, build, device="nonsense")


def test_what_no_file_can_hold(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"a": 1}

    with pytest.raises(ModelError, match=r"_extra_state.*dict.*pickle"):
        tensor_files.save_tensors(Extra(2, 2), tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"weight.*meta device"):
        tensor_files.save_tensors(nn.Linear(2, 2, device="meta"), tmp_path / "a.safetensors")
    sparse = nn.Linear(2, 2)
    sparse.register_buffer("table", torch.eye(2).to_sparse())
    with pytest.raises(ModelError, match=r"table.*sparse_coo tensor.*make it dense"):
        tensor_files.save_tensors(sparse, tmp_path / "a.safetensors")


def test_nothing_is_pickled_or_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = pruned_net()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a pickle")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, refuse)
    pruned.save(tmp_path)
    assert same_state(fxprune.load(tmp_path, build).model, pruned.model)
    monkeypatch.undo()
    for path in tmp_path.iterdir():
        assert not zipfile.is_zipfile(path)  # what torch.save writes
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError)):
            pickle.loads(path.read_bytes())
    for name in ("plan.json", "report.json", "manifest.json"):
        json.loads((tmp_path / name).read_text())


# ---- damage


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    pruned_net().save(folder)
    return folder


@pytest.fixture
def copied(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copied"))


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(PlanError) as found:
        fxprune.load(folder, build)
    for part in (str(folder), *parts):
        assert part in str(found.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", [0, 1, 0.5, -1])
def test_a_file_cut_short(name: str, left: float, copied: Path) -> None:
    data = (copied / name).read_bytes()
    (copied / name).write_bytes(data[: int(len(data) * left) if isinstance(left, float) else left])
    refused(copied, name)


@pytest.mark.parametrize("name", FILES)
def test_a_file_removed(name: str, copied: Path) -> None:
    (copied / name).unlink()
    refused(copied, name)


@pytest.mark.parametrize("name", FILES)
def test_one_bit_flipped_anywhere(name: str, copied: Path) -> None:
    """Try every byte of the manifest, which no digest protects, and some bytes of other files."""
    data = (copied / name).read_bytes()
    step = 1 if name == "manifest.json" else max(1, len(data) // 25)
    for position in range(0, len(data), step):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        (copied / name).write_bytes(changed)
        # A changed digest or name in the manifest makes the error name another file.
        with pytest.raises(
            PlanError, match=re.escape(str(copied) if name == "manifest.json" else name)
        ):
            saving.read_pruned(copied)
    (copied / name).write_bytes(data)
    saving.read_pruned(copied)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_save(name: str, copied: Path, tmp_path: Path) -> None:
    fxprune.prune(build(), IMAGE, channels=0.25).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / name, copied / name)
    refused(copied)


def resigned(folder: Path, name: str, data: bytes) -> None:
    """Change a file and update the manifest to match, as a person could on purpose."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def test_weights_of_another_model_with_a_manifest_that_agrees(
    copied: Path, tmp_path: Path
) -> None:
    for model, message in (
        (build(5), "has shape"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), "'1.weight' is not in the file"),
        (nn.Sequential(*build(4), nn.Linear(2, 2)), "'4.bias' is not in the model"),
    ):
        tensor_files.save_tensors(model, tmp_path / "other.safetensors")
        resigned(copied, "model.safetensors", (tmp_path / "other.safetensors").read_bytes())
        refused(copied, "model.safetensors", message)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("model.safetensors", b"nonsense", "not a complete safetensors file"),
        ("model.safetensors", b"", "not a complete safetensors file"),
        ("plan.json", b"{}", "not a plan"),
        ("plan.json", b"\xff\xfe", "is not text"),
        ("report.json", b"[]", "not a report"),
        ("report.json", b'{"groups": [], "pinned": [], "unknown": 1}', "not a report"),
    ],
)
def test_nonsense_with_a_manifest_that_agrees(
    name: str, data: bytes, message: str, copied: Path
) -> None:
    resigned(copied, name, data)
    with pytest.raises(PlanError, match=message):
        fxprune.load(copied, build)


def edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((folder / "plan.json").read_text())
    change(data)
    resigned(folder, "plan.json", json.dumps(data).encode())


def test_a_plan_that_keeps_what_the_model_has_not(copied: Path) -> None:
    edited(copied, lambda data: data["keep"].append("9.weight"))
    with pytest.raises(PlanError, match=r"names '9\.weight'"):
        fxprune.load(copied, build)


def test_a_plan_with_other_survivors_does_not_fit_the_weights(copied: Path) -> None:
    edited(copied, lambda data: data["groups"][0]["kept"].pop())
    with pytest.raises(PlanError, match=r"model\.safetensors.*has shape"):
        fxprune.load(copied, build)


def test_a_plan_that_breaks_a_balance(tmp_path: Path) -> None:
    def grouped() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 2, 3))

    pruned = fxprune.prune(grouped(), torch.zeros(1, 3, 9, 9), channels=0.5)
    assert any(
        group.blocks for group in fxprune.analyze(grouped(), torch.zeros(1, 3, 9, 9)).groups
    )
    pruned.save(tmp_path)

    def unbalance(data: dict[str, Any]) -> None:
        for group in data["groups"]:
            group["kept"] = list(range(len(group["kept"])))

    edited(tmp_path, unbalance)
    with pytest.raises(FxpruneError):
        fxprune.load(tmp_path, grouped)


def test_a_manifest_of_a_later_version(copied: Path) -> None:
    text = (copied / "manifest.json").read_text()
    (copied / "manifest.json").write_text(text.replace('"schema": 1', '"schema": 2'))
    refused(copied, "schema 2", "upgrade")


@pytest.mark.parametrize("name", ["../plan.json", "/etc/hostname", "sub/plan.json"])
def test_a_manifest_that_points_elsewhere(name: str, copied: Path) -> None:
    data = json.loads((copied / "manifest.json").read_text())
    data["files"][name] = data["files"].pop("report.txt")
    (copied / "manifest.json").write_text(json.dumps(data, indent=1) + "\n")
    refused(copied, "manifest.json", "damaged")


def test_a_manifest_that_lacks_the_weights(copied: Path) -> None:
    data = json.loads((copied / "manifest.json").read_text())
    del data["files"]["model.safetensors"]
    (copied / "manifest.json").write_text(json.dumps(data, indent=1) + "\n")
    refused(copied, "does not list model.safetensors")


def test_another_architecture(good: Path) -> None:
    with pytest.raises(PlanError, match="another architecture than this Sequential"):
        fxprune.load(good, lambda: build(9))


@pytest.mark.parametrize("factory", [lambda: None, lambda: "text", None, 3])
def test_a_factory_that_builds_no_model(factory: Any, good: Path) -> None:
    with pytest.raises(ModelError, match=r"expected a torch\.nn\.Module"):
        fxprune.load(good, factory)


def test_no_folder_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for name in ("nowhere", "file"):
        with pytest.raises(ArgumentError, match=f"no folder.*{name}"):
            fxprune.load(tmp_path / name, build)
    with pytest.raises(ArgumentError, match="is a file, not a folder"):
        pruned_net().save(tmp_path / "file")
    with pytest.raises(ArgumentError, match=r"file.*Name a folder"):
        pruned_net().save(tmp_path / "file" / "below")


# ---- saves that are interrupted


def texts(state: str) -> dict[str, Callable[[Path], object]]:
    """Return writers of two files that belong together."""
    return {name: lambda path: path.write_text(state) for name in ("a.txt", "b.txt")}


def state_of(folder: Path) -> str:
    """Return the text that both files have, as a reader finds them."""
    paths = saving.read_files(folder, ("a.txt", "b.txt"))
    (state,) = {path.read_text() for path in paths.values()}
    return state


class KilledError(BaseException):
    """The simulated end of the process, after which nothing can be cleaned up."""


STEPS = [(os, "replace"), (os, "fsync"), (os, "rmdir")]


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int, after: bool) -> list[str]:
    """Raise ``KilledError`` at one call that reaches the disk, before or after its effect."""
    calls: list[str] = []

    def watched(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) > step:
                if after and len(calls) == step + 1:
                    real(*args, **kwargs)
                raise KilledError
            return real(*args, **kwargs)

        return call

    for module, name in STEPS:
        monkeypatch.setattr(module, name, watched(getattr(module, name), name))
    # a killed process cleans up nothing
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    return calls


@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
def test_killed_at_every_step(after: bool, tmp_path: Path) -> None:
    found = []
    for step in range(100):
        folder = tmp_path / str(step)
        saving.write_files(folder, texts("old"))
        with pytest.MonkeyPatch.context() as patch:
            calls = kill_at(patch, step, after)
            try:
                saving.write_files(folder, texts("new"))
                finished = True
            except KilledError:
                finished = False
        found.append(state_of(folder))
        saving.write_files(folder, texts("third"))  # the next save repairs the folder
        assert state_of(folder) == "third"
        assert sorted(path.name for path in folder.iterdir()) == [
            "a.txt",
            "b.txt",
            "manifest.json",
        ]
        if finished:
            break
    assert finished
    assert {"replace", "fsync"} <= set(calls)
    # the old state up to one step, the new one from there on
    assert found == sorted(found, key=["old", "new"].index)
    assert set(found) == {"old", "new"}


@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
def test_a_first_save_that_is_killed(after: bool, tmp_path: Path) -> None:
    """The folder appears only when it is complete."""
    found = []
    for step in range(100):
        folder = tmp_path / f"[{step}]"  # brackets must not be read as a glob pattern
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, step, after)
            try:
                saving.write_files(folder, texts("new"))
                finished = True
            except KilledError:
                finished = False
        found.append(folder.exists())
        if folder.exists():
            assert state_of(folder) == "new"
        saving.write_files(folder, texts("next"))
        assert state_of(folder) == "next"
        assert not list(tmp_path.glob(".*"))
        if finished:
            break
    assert finished
    assert found == sorted(found)
    assert set(found) == {False, True}


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_new_folder_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    saving.write_files(tmp_path / "saved", texts("new"))
    assert (tmp_path / "saved").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_killed_twice_in_a_row(tmp_path: Path) -> None:
    """The second save may find the first one committed but with some files not yet moved."""
    committed = 0
    for first in range(4, 10):
        for second in range(6):
            folder = tmp_path / f"{first}-{second}"
            saving.write_files(folder, texts("old"))
            for step, state in ((first, "new"), (second, "third")):
                with pytest.MonkeyPatch.context() as patch:
                    kill_at(patch, step, after=False)
                    with suppress(KilledError):
                        saving.write_files(folder, texts(state))
                if state == "new":
                    committed += (folder / ".committed").exists()
                    seen = state_of(folder)
            assert state_of(folder) in (seen, "third")
    assert committed > 6


def test_an_exception_between_two_files(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise RuntimeError("the disk caught fire")

    saving.write_files(tmp_path / "out", texts("old"))
    for folder in (tmp_path / "out", tmp_path / "fresh"):
        with pytest.raises(RuntimeError, match="fire"):
            saving.write_files(folder, {**texts("new"), "c.txt": fail})
    assert state_of(tmp_path / "out") == "old"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.txt",
        "b.txt",
        "manifest.json",
    ]
    assert not (tmp_path / "fresh").exists()


def test_a_pruned_model_whose_save_fails_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, later = pruned_net(0.5), pruned_net(0.25)
    earlier.save(tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "model.safetensors"))

    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(ArgumentError, match=r"model\.safetensors: No space left"):
        later.save(tmp_path)
    monkeypatch.undo()
    assert same_state(fxprune.load(tmp_path, build).model, earlier.model)
    later.save(tmp_path)
    assert same_state(fxprune.load(tmp_path, build).model, later.model)


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "sub").mkdir()
    for share in (0.5, 0.25):
        pruned_net(share).save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FILES, "notes.txt", "sub"])


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="kills a process by signal")
def test_a_process_that_is_really_killed(tmp_path: Path) -> None:
    """Write two states in turn until SIGKILL; one complete state must be left."""
    script = textwrap.dedent(
        """
        import itertools, sys
        from fxprune.result import serialization as saving
        for number in itertools.count():
            write = lambda path: path.write_text(str(number) * 100_000)
            saving.write_files(sys.argv[1], {"a.txt": write, "b.txt": write})
            print(number, flush=True)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()  # at least one save is complete
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert state_of(tmp_path)
    saving.write_files(tmp_path, texts("next"))
    assert state_of(tmp_path) == "next"


# ---- disks that are full, names that are none


@pytest.mark.skipif(os.name != "posix", reason="limits of files are those of POSIX")
@pytest.mark.parametrize("room", [0, 100, 5_000])
def test_a_full_disk_is_told_and_leaves_the_earlier_state(room: int, tmp_path: Path) -> None:
    """A limit on file sizes acts like a full disk.

    The write fails either in the weights or in a file written before them.
    """
    import resource

    small, large = pruned_net(), fxprune.prune(build(64), IMAGE, channels=1.0)
    small.save(tmp_path / "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        for folder in ("old", "new"):
            with pytest.raises(ArgumentError, match=r"Name a folder that can be"):
                large.save(tmp_path / folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert same_state(fxprune.load(tmp_path / "old", build).model, small.model)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == FILES


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")]
)
def test_an_error_of_the_system_on_the_way(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(ArgumentError, match=str(error.strerror)):
        pruned_net().save(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["a\0b", "a\ud800b", None, 3, b"bytes"])
def test_a_name_that_is_none(folder: Any) -> None:
    with pytest.raises(ArgumentError, match="folder"):
        pruned_net().save(folder)
    with pytest.raises(ArgumentError, match="folder"):
        fxprune.load(folder, build)


def test_a_result_that_someone_put_together(tmp_path: Path) -> None:
    pruned = pruned_net()
    for broken in (
        replace(pruned, plan=None),
        replace(pruned, model=pruned),
        replace(pruned, report={}),
    ):  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="a Pruned holds a module, a Plan and a Report"):
            broken.save(tmp_path / "new")


# ---- the whole model as one file of torch.save


class TwoPaths(nn.Module):
    """Another output in training, a region without gradients, and a branch by size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.aux = nn.Linear(3, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.tables = [torch.arange(3.0)]

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            scale = x.square().mean()
        hidden = (self.stem(x + self.tables[0]) * scale).relu()
        if x.shape[0] > 3:
            hidden = hidden * 2
        return (self.head(hidden), self.aux(hidden)) if self.training else self.head(hidden)


def _noted(module: nn.Module, args: Any, output: Any) -> None:
    vars(module)["calls"] = vars(module).get("calls", 0) + 1


class Doubled(torch.autograd.Function):
    """A function with a custom gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


class WithFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.ops.aten.relu.default(Doubled.apply(self.a(x)))[:, :])


class InParts(nn.Module):
    """Parts that differ between training and evaluation, with a branch on values between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = WithFunction(), TwoPathsInside()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y if y.sum().item() > 0 else -y)


class TwoPathsInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.b(h) + self.c(h) if self.training else self.b(h)


def through_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.save": through_torch,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "twice": lambda model: through_torch(copy.deepcopy(through_torch(model))),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [TwoPaths, WithFunction, InParts])
def test_the_whole_model_comes_back_in_both_modes(kind: type[nn.Module], way: str) -> None:
    torch.manual_seed(0)
    pruned, x = fxprune.prune(kind(), torch.randn(4, 3), channels=0.5), torch.randn(5, 3)
    for again in (
        (WAYS[way](pruned.model), WAYS[way](pruned).model)
        if way != "copy"
        else (copy.copy(pruned.model),)
    ):
        assert type(again).__name__ == type(pruned.model).__name__
        assert same_state(again, pruned.model)
        for training in (True, False):
            results, gradients = [], []
            for model in (pruned.model.train(training), again.train(training)):
                given = x.clone().requires_grad_()
                leaves = tree_leaves(model(given))
                results.append(leaves)
                gradients.append(torch.autograd.grad(sum(leaf.sum() for leaf in leaves), given)[0])
            assert len(results[0]) == len(results[1])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
            assert torch.equal(*gradients)
        assert (
            fxprune.verify(kind(), replace(pruned, model=again.eval()), x, numeric=False).outputs
            == 0
        )
    if kind is TwoPaths:
        with pytest.raises(AssertionError):
            again(torch.randn(2, 3))


def test_a_part_behaves_like_its_class_after_it_was_saved() -> None:
    model = through_torch(fxprune.prune(InParts(), torch.randn(4, 3), channels=0.5).model)
    assert isinstance(model, InParts)
    assert isinstance(model.second, TwoPathsInside)
    deployed = fxprune.deploy(model)
    x = torch.randn(5, 3)
    torch.testing.assert_close(through_torch(deployed)(x), model.eval()(x))


def test_what_is_added_to_a_pruned_model_is_kept() -> None:
    """Hooks, attributes, and the plan that later pruning extends are kept."""
    model = fxprune.prune(build(), IMAGE, channels=0.5).model
    model.register_forward_hook(_noted)
    model.note = {"epoch": 3}
    for again in (through_torch(model), copy.deepcopy(model)):
        again(IMAGE)
        assert vars(again)["calls"] == 1
        assert again.note == {"epoch": 3}
        again._forward_hooks.clear()  # with a hook, the model would be pruned in parts
        twice = fxprune.prune(again, IMAGE, channels=0.5)
        assert len(twice.plan.chain) == 2
        assert fxprune.apply(twice.plan, build()).plan == twice.plan
    assert "calls" not in vars(model)


@pytest.mark.long
def test_a_graph_longer_than_the_stack() -> None:
    deep = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(1500)))
    model = fxprune.prune(deep, torch.randn(1, 2), channels=1.0).model
    assert len(through_torch(model).graph.nodes) == len(model.graph.nodes)


def test_a_node_of_a_plan_without_the_number_of_its_axis(copied: Path) -> None:
    edited(copied, lambda plan: plan["pinned_nodes"].append("relu@x"))
    with pytest.raises(PlanError, match=r"relu@x.*number"):
        fxprune.load(copied, build)


def test_whole_numbers_in_the_place_of_weights(copied: Path) -> None:
    state = safetensors.torch.load_file(copied / "model.safetensors")
    state["0.weight"] = state["0.weight"].long()
    resigned(copied, "model.safetensors", safetensors.torch.save(state, metadata={"format": "pt"}))
    refused(copied, r"0.weight", "int64")


def test_a_report_that_is_nested_without_end(copied: Path) -> None:
    resigned(copied, "report.json", b"[" * 100_000)
    refused(copied, "report.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [("params_before", "many"), ("seconds", 3), ("error", [1.0]), ("parts", [3])],
)
def test_a_report_that_could_not_be_shown(name: str, value: Any, copied: Path) -> None:
    data = json.loads((copied / "report.json").read_text())
    resigned(copied, "report.json", json.dumps({**data, name: value}).encode())
    refused(copied, "report", name)


def test_a_name_that_is_too_long() -> None:
    with pytest.raises(fxprune.ArgumentError, match=r"(?i)too long"):
        fxprune.load("x" * 5000, build)
