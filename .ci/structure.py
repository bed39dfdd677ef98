#!/usr/bin/env python
"""Measure how the package is built: lengths, imports, names, and tables of operations.

python .ci/structure.py          the figures
python .ci/structure.py --list   with what exceeds them
"""

from __future__ import annotations

import argparse
import ast
import collections
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import torch

ROOT = Path(__file__).resolve().parent.parent / "fxprune"
Found = list[str]


def functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the name and the number of lines of every function, without its docstring."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0]
            said = (
                (first.end_lineno or 0) - first.lineno + 1
                if ast.get_docstring(node) is not None
                else 0
            )
            yield node.name, (node.end_lineno or 0) - node.lineno + 1 - said


def module_of(path: Path) -> str:
    """Return the dotted name of the module in a file."""
    parts = ("fxprune", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.Module) -> Iterator[tuple[str, str, int]]:
    """Yield module, name and line of each import from the package.

    Imports for type checkers only are left out.
    """
    for node in _run(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fxprune":
            for alias in node.names:
                yield node.module or "", alias.name, node.lineno


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below a node, except those that only type checkers read."""
    for below in ast.iter_child_nodes(node):
        if not (
            isinstance(below, ast.If)
            and isinstance(below.test, ast.Name)
            and below.test.id == "TYPE_CHECKING"
        ):
            yield below
            yield from _run(below)


def defined(tree: ast.Module) -> Iterator[str]:
    """Yield the names of the functions, classes and variables that a module defines."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        for target in (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        ):
            if isinstance(target, ast.Name) and not target.id.startswith("__"):
                yield target.id


def words_of(node: ast.AST) -> list[str]:
    """Return the words in all string constants below a node."""
    found = [
        own.value
        for own in ast.walk(node)
        if isinstance(own, ast.Constant) and isinstance(own.value, str)
    ]
    return [word for text in found for word in text.split()]


def tables_of_operations(tree: ast.Module) -> Iterator[tuple[int, int]]:
    """Yield line and size of each table in a module that consists of names of ATen operations."""
    for node in tree.body:
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        exported = isinstance(node, ast.Assign) and "__all__" in targets(node)
        if value is not None and not exported:
            words = words_of(value)
            known = [
                word
                for word in words
                if hasattr(torch.ops.aten, re.sub(r"^aten::|\.\w+$", "", word)) and word.islower()
            ]
            named = [
                own
                for own in ast.walk(value)
                if isinstance(own, ast.Attribute) and is_aten(own.value)
            ]
            if len(known) + len(named) >= 3 and (len(known) + len(named)) * 2 >= len(words):
                yield node.lineno, len(known) + len(named)


def is_aten(node: ast.AST) -> bool:
    """Tell whether a node is ``aten`` or ends in ``.aten``."""
    return (isinstance(node, ast.Name) and node.id == "aten") or (
        isinstance(node, ast.Attribute) and node.attr == "aten"
    )


def says_any(annotation: ast.expr | None) -> bool:
    """Tell whether an annotation contains ``Any``."""
    return annotation is not None and any(
        isinstance(own, ast.Name) and own.id == "Any" for own in ast.walk(annotation)
    )


PUBLIC_FILES = (
    "__init__.py",
    "criteria/__init__.py",
    "latency/__init__.py",
    "training/__init__.py",
    "cost.py",
)
"""The files whose ``__all__`` users import from."""


def listed(tree: ast.Module) -> list[str]:
    """Return the names in ``__all__``."""
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    return next((words_of(node.value) for node in assigned if targets(node) == ["__all__"]), [])


def with_any(tree: ast.Module, names: set[str], path: Path) -> Iterator[str]:
    """Yield the functions of these names with ``Any`` among their parameter or result types."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in names & set(listed(tree)):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            said = [own.arg for own in arguments if says_any(own.annotation)]
            said += ["return"] if says_any(node.returns) else []
            if said:
                yield f"{path.relative_to(ROOT)}: {node.name}({', '.join(said)})"


def targets(node: ast.Assign) -> list[str]:
    """Return the names that an assignment sets."""
    return [own.id for own in node.targets if isinstance(own, ast.Name)]


def measured() -> dict[str, tuple[str, Found]]:
    """Return each figure together with what it consists of."""
    files = sorted(ROOT.rglob("*.py"))
    trees = {path: ast.parse(path.read_text()) for path in files}
    lines = {path: path.read_text().splitlines() for path in files}
    every = (
        (length, path, name) for path, tree in trees.items() for name, length in functions(tree)
    )
    lengths = sorted((length, f"{path.relative_to(ROOT)}: {name}") for length, path, name in every)
    sizes = [length for length, _ in lengths]
    places = collections.defaultdict(list)
    graph = nx.DiGraph()
    private: Found = []
    modules = {module_of(path) for path in files}
    for path, tree in trees.items():
        for name in defined(tree):
            places[name].append(str(path.relative_to(ROOT)))
        for module, name, line in imports(tree):
            graph.add_edge(
                module_of(path), f"{module}.{name}" if f"{module}.{name}" in modules else module
            )
            if name.startswith("_") and not name.startswith("__"):
                private.append(f"{path.relative_to(ROOT)}:{line}: {module}.{name}")
    twice = [
        f"{name}: {', '.join(where)}" for name, where in sorted(places.items()) if len(where) > 1
    ]
    cycles = [
        " -> ".join(sorted(group))
        for group in nx.strongly_connected_components(graph)
        if len(group) > 1
    ]
    long = [
        f"{path.relative_to(ROOT)}: {len(own)}" for path, own in lines.items() if len(own) > 450
    ]
    wide = [
        f"{path.relative_to(ROOT)}:{n}"
        for path, own in lines.items()
        for n, text in enumerate(own, 1)
        if len(text) >= 100
    ]
    ids = [
        str(path.relative_to(ROOT))
        for path, own in lines.items()
        if re.search(r"\bid\(", "\n".join(own))
    ]
    tables = [
        f"{path.relative_to(ROOT)}:{line}: {size} operations"
        for path, tree in trees.items()
        if path.relative_to(ROOT).parts[0] not in ("ops", "rules")
        for line, size in tables_of_operations(tree)
    ]
    public = {name for file in PUBLIC_FILES for name in listed(trees[ROOT / file])}
    anys = [name for path, tree in trees.items() for name in with_any(tree, public, path)]
    percentile = sizes[int(len(sizes) * 0.95)]
    return {
        "functions": (
            f"median {statistics.median(sizes):g} lines, 95 % at most {percentile}, longest "
            f"{sizes[-1]}",
            [],
        ),
        "functions above 60 lines": _counted(
            [f"{name} {length}" for length, name in lengths if length > 60]
        ),
        "files above 450 lines": _counted(long),
        "lines of 100 characters and more": (str(len(wide)), wide),
        "private names imported from another module": _counted(private),
        "import cycles": _counted(cycles),
        "names defined in two modules": _counted(twice),
        "files that use id()": _counted(ids),
        "tables of operations outside of ops/": _counted(tables),
        "public functions with Any in their signature": _counted(anys),
    }


def _counted(found: Found) -> tuple[str, Found]:
    return str(len(found)), found


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="what each figure consists of")
    arguments = parser.parse_args()
    for name, (figure, found) in measured().items():
        print(f"{name}: {figure}")
        for line in found if arguments.list else ():
            print(f"    {line}")


if __name__ == "__main__":
    main()
