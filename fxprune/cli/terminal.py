"""Text in and out: files, standard error, errors without a traceback."""

from __future__ import annotations

import functools
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from fxprune.common.public import guarded
from fxprune.errors import ArgumentError, FxpruneError, FxpruneWarning, InternalError

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
    """Say on standard error what is going on, with a spinner on a terminal, and how long it
    took.
    """
    console = stderr()
    start = time.perf_counter()
    with console.status(f"{escape(text)} ..."):
        yield
    console.print(f"{escape(text)}: {time.perf_counter() - start:.1f} s", style="dim")


@contextmanager
def errors_to_stderr() -> Iterator[None]:
    """Say what went wrong in a sentence, and end with status 2, or 1 for what nobody foresaw;
    warnings of fxprune are said alike.

    With FXPRUNE_DEBUG set in the environment, errors keep their traceback.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", FxpruneWarning)
        warnings.showwarning = functools.partial(_show, warnings.showwarning)
        try:
            with guarded("fxprune"):
                yield
        except SystemExit as error:
            _say(
                "error:",
                "bold red",
                f"code of yours ended the program: sys.exit({error.code!r}). fxprune imports and "
                "calls it.",
            )
            raise typer.Exit(2) from None
        except FxpruneError as error:
            if isinstance(error.__cause__, BrokenPipeError):
                raise error.__cause__ from None  # whoever read the output has enough
            if os.environ.get("FXPRUNE_DEBUG"):
                raise
            unforeseen = isinstance(error, InternalError)
            _say(
                "error:",
                "bold red",
                f"{error} Set FXPRUNE_DEBUG=1 to see the traceback." if unforeseen else str(error),
            )
            raise typer.Exit(1 if unforeseen else 2) from None


def _show(
    otherwise: Callable[..., None],
    message: Warning | str,
    category: type[Warning],
    *where: Any,
    **options: Any,
) -> None:
    if issubclass(category, FxpruneWarning):
        _say("warning:", "bold yellow", str(message))
    else:
        otherwise(message, category, *where, **options)


def _say(what: str, style: str, text: str) -> None:
    console = stderr()
    console.print(what, style=style, end=" ")
    console.print(text, markup=False, emoji=False, soft_wrap=True)
