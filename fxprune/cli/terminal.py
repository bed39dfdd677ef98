"""Text in and out: files, standard error, errors without a traceback."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from fxprune.errors import ArgumentError, FxpruneError

__all__ = [
    "dumps",
    "errors_to_stderr",
    "read_text",
    "stage",
    "stderr",
    "write_text",
]


def dumps(data: Any) -> str:
    return json.dumps(data, indent=2) + "\n"


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"Cannot read {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path} is not text: {error}.") from error


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise ArgumentError(f"Cannot write to --out {path}: {error.strerror or error}.") from error


def stderr() -> Console:
    # Made anew each time: standard error may have been replaced since the import.
    return Console(stderr=True, highlight=False)


@contextmanager
def stage(text: str) -> Iterator[None]:
    """Say on standard error what is going on, with a spinner on a terminal, and how long it took."""
    console = stderr()
    start = time.perf_counter()
    with console.status(f"{escape(text)} ..."):
        yield
    console.print(f"{escape(text)}: {time.perf_counter() - start:.1f} s", style="dim")


@contextmanager
def errors_to_stderr() -> Iterator[None]:
    try:
        yield
    except FxpruneError as error:
        console = stderr()
        console.print("error:", style="bold red", end=" ")
        console.print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
