"""Tests of the order of the package's layers: imports go one way only."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

import fxprune

PACKAGE = Path(fxprune.__file__).parent

# In order. A layer may import from the layers before it, and from inside itself.
LAYERS = [
    "version",
    "errors",
    "common",
    "inputs",
    "resized",
    "calibration",
    "labels",
    "moments",
    "ops",
    "cost",
    "trace",
    "coupling",
    "criteria",
    "select",
    "rewrite",
    "result",
    "verification",
    "inference",
    "runtimes",
    "latency",
    "emission",
    "stages",
    "training",
    "latency_budget",
    "evaluation",
    "options",
    "pipeline",
    "api",
    "api_pruned",
    "api_sensitivity",
    "steps",
    "cli",
    "__main__",
]
PACKAGE_FILE = "__init__"  # re-exports from any layer except those of the command line
# packages of the extra "cli", which only the layer cli may import
EXTRA = {"typer", "rich", "click", "torchvision"}


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> list[tuple[int, str]]:
    """Return line and absolute dotted name of each import in a file, also inside functions."""
    package = ["fxprune", *path.relative_to(PACKAGE).parent.parts]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parts = [*base, *(node.module.split(".") if node.module else [])]
            if parts == ["fxprune"]:  # from fxprune import api
                found += [(node.lineno, f"fxprune.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, ".".join(parts)))
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_go_one_way(path):
    here = layer_of(path)
    assert here in [*LAYERS, PACKAGE_FILE], (
        f"{path.name} is in no layer: add it to LAYERS, in its place"
    )
    allowed = (
        {*LAYERS[: LAYERS.index(here)], here}
        if here != PACKAGE_FILE
        else {*LAYERS} - {"cli", "__main__"}
    )
    for line, name in imported_modules(path):
        if name.split(".")[0] == "fxprune":
            parts = name.split(".")
            assert len(parts) > 1, f"{path.name}:{line} imports the package; import the layer"
            assert parts[1] in allowed, (
                f"{path.name}:{line} imports {name}, which does not come before {here}"
            )
        elif here != "cli":
            assert name.split(".")[0] not in EXTRA, (
                f"{path.name}:{line} imports {name}, which only cli may"
            )


def test_every_layer_in_the_list_is_there():
    for layer in LAYERS:
        there = (PACKAGE / f"{layer}.py").exists() or (PACKAGE / layer).is_dir()
        assert there, f"layer {layer} is gone; take it out of LAYERS"


def test_the_check_sees_a_wrong_import(tmp_path, monkeypatch):
    folder = tmp_path / "ops"
    folder.mkdir()
    (folder / "bad.py").write_text(
        "from ..api import prune\nfrom .table import op\nfrom .. import cli\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert imported_modules(folder / "bad.py") == [
        (1, "fxprune.api"),
        (2, "fxprune.ops.table"),
        (3, "fxprune.cli"),
    ]


def test_no_stub_of_another_package_decides_whether_the_types_are_right():
    """mypy skips every package that fxprune imports, so their stubs cannot change its verdict."""
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))[
        "tool"
    ]["mypy"]
    (override,) = settings["overrides"]
    assert (override["follow_imports"], override["follow_imports_for_stubs"]) == ("skip", True)
    others = (
        {name.split(".")[0] for path in FILES for _, name in imported_modules(path)}
        - sys.stdlib_module_names
        - {"fxprune"}
    )
    assert {f"{name}.*" for name in others} == set(override["module"])
