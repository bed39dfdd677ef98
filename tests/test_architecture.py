"""The house: rooms import one way only, from rooms above them."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

import fxprune

PACKAGE = Path(fxprune.__file__).parent

# Top to bottom. A room may import from the rooms before it, and from inside itself.
ROOMS = [
    "version",
    "errors",
    "arrays",
    "contents",
    "turn",
    "chance",
    "identity",
    "doors",
    "values",
    "compiled",
    "prunable",
    "inputs",
    "resized",
    "hooks",
    "module_sizes",
    "references",
    "reach",
    "shapes",
    "macs",
    "cost",
    "lowering",
    "memory",
    "moments",
    "regions",
    "state",
    "trace",
    "labels",
    "rules",
    "balance",
    "propagation",
    "eager",
    "coupling",
    "analysis",
    "sparsity",
    "widths",
    "criteria",
    "plan",
    "budget",
    "knapsack",
    "descent",
    "selection",
    "rewrite",
    "compensation",
    "verification",
    "deploy",
    "export",
    "latency",
    "arguments",
    "report",
    "advice",
    "saving",
    "api",
    "steps",
    "cli",
    "__main__",
]
FRONT = "__init__"  # re-exports from any room but those of the command line
# what the extra "cli" brings, and cli alone may import
EXTRA = {"typer", "rich", "click", "torchvision"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of everything that a file imports, inside functions too."""
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
    here = room_of(path)
    assert here in [*ROOMS, FRONT], f"{path.name} is in no room: add it to ROOMS, in its place"
    allowed = (
        {*ROOMS[: ROOMS.index(here)], here} if here != FRONT else {*ROOMS} - {"cli", "__main__"}
    )
    for line, name in imported_modules(path):
        if name.split(".")[0] == "fxprune":
            parts = name.split(".")
            assert len(parts) > 1, f"{path.name}:{line} imports the front door; import the room"
            assert parts[1] in allowed, (
                f"{path.name}:{line} imports {name}, which is not above {here}"
            )
        elif here != "cli":
            assert name.split(".")[0] not in EXTRA, (
                f"{path.name}:{line} imports {name}, which only cli may"
            )


def test_every_room_in_the_list_is_there():
    for room in ROOMS:
        there = (PACKAGE / f"{room}.py").exists() or (PACKAGE / room).is_dir()
        assert there, f"room {room} is gone; take it out of ROOMS"


def test_the_check_sees_a_wrong_import(tmp_path, monkeypatch):
    room = tmp_path / "rules"
    room.mkdir()
    (room / "bad.py").write_text(
        "from ..api import prune\nfrom .registry import rule\nfrom .. import cli\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert imported_modules(room / "bad.py") == [
        (1, "fxprune.api"),
        (2, "fxprune.rules.registry"),
        (3, "fxprune.cli"),
    ]


def test_no_stub_of_another_package_decides_whether_the_types_are_right():
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
