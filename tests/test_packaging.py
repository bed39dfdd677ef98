"""The packages that fxprune requires, and what it does without the optional ones."""

import importlib.metadata
import os
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fxprune
from fxprune import version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRA = ("rich", "torchvision", "typer")

PRUNE = """
import torch, fxprune
model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2))
pruned = fxprune.prune(model, torch.zeros(1, 3), channels=0.5)
assert pruned.report.params_after < pruned.report.params_before
"""
COMMAND = """
from fxprune.__main__ import main
sys.argv = ["fxprune", *{arguments!r}]
main()
"""


def without(
    packages: tuple[str, ...], program: str, folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run a program in a new process that cannot import the packages."""
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({packages!r}))\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", blocked + program],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment,
    )


def names(requirements: list[str]) -> set[str]:
    return {requirement.partition(">")[0] for requirement in requirements}


def test_fxprune_itself_needs_four_packages() -> None:
    assert names(PROJECT["dependencies"]) == {"networkx", "numpy", "safetensors", "torch"}
    assert names(PROJECT["optional-dependencies"]["cli"]) == set(EXTRA)


@pytest.mark.long
def test_a_model_is_pruned_without_the_packages_of_the_command_line(tmp_path: Path) -> None:
    ran = without((*EXTRA, "click"), PRUNE, tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.long
@pytest.mark.parametrize("package", ["typer", "rich"])
def test_the_command_line_names_its_extra(package: str, tmp_path: Path) -> None:
    ran = without((package,), COMMAND.format(arguments=["--version"]), tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f'error: the command line needs {package}: pip install "fxprune[cli]".\n'


@pytest.mark.long
def test_python_runs_the_package_as_the_command() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "fxprune", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert "Usage: fxprune [OPTIONS] COMMAND" in ran.stdout


def test_the_version_is_that_of_the_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fxprune.__version__ == version.__version__

    def nothing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    assert runpy.run_path(version.__file__)["__version__"] == "0+unknown"
