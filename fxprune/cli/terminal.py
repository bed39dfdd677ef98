"""Text files, messages on standard error, and errors without a traceback."""

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
    """Return data as indented JSON that ends with a newline."""
    return json.dumps(data, indent=2) + "\n"


def read_text(path: Path) -> str:
    """Return the content of a text file.

    Raises
    ------
    ArgumentError
        If the file cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"Cannot read {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path} is not text: {error}.") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all.

    Raises
    ------
    ArgumentError
        If the file or its folder cannot be written.
    """
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
    """Return a console that prints to standard error."""
    # a new one each time, because standard error may have been replaced since the import
    return Console(stderr=True, highlight=False)


@contextmanager
def stage(text: str) -> Iterator[None]:
    """Print on standard error what runs inside, and then how many seconds it took.

    A terminal shows a spinner meanwhile.
    """
    console = stderr()
    start = time.perf_counter()
    with console.status(f"{escape(text)} ..."):
        yield
    console.print(f"{escape(text)}: {time.perf_counter() - start:.1f} s", style="dim")


@contextmanager
def errors_to_stderr() -> Iterator[None]:
    """Print errors and warnings of fxprune as one sentence, without a traceback.

    An error ends the program with status 2, or with status 1 if it is a bug of fxprune. If
    FXPRUNE_DEBUG is set in the environment, errors keep their traceback.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", FxpruneWarning)
        warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)
        try:
            with guarded("fxprune"):
                yield
        except SystemExit as error:
            _print_message(
                "error:",
                "bold red",
                f"code of yours ended the program: sys.exit({error.code!r}). fxprune imports and "
                "calls it.",
            )
            raise typer.Exit(2) from None
        except FxpruneError as error:
            if isinstance(error.__cause__, BrokenPipeError):
                raise error.__cause__ from None  # the reader of the output has closed the pipe
            if os.environ.get("FXPRUNE_DEBUG"):
                raise
            is_bug = isinstance(error, InternalError)
            hint = " Set FXPRUNE_DEBUG=1 to see the traceback." if is_bug else ""
            _print_message("error:", "bold red", f"{error}{hint}")
            raise typer.Exit(1 if is_bug else 2) from None


def _show_warning(
    otherwise: Callable[..., None],
    message: Warning | str,
    category: type[Warning],
    *place: Any,
    **options: Any,
) -> None:
    """Print a warning of fxprune as a sentence; pass any other one to ``otherwise``."""
    if issubclass(category, FxpruneWarning):
        _print_message("warning:", "bold yellow", str(message))
    else:
        otherwise(message, category, *place, **options)


def _print_message(label: str, style: str, text: str) -> None:
    """Print a styled label and a text to standard error."""
    console = stderr()
    console.print(label, style=style, end=" ")
    console.print(text, markup=False, emoji=False, soft_wrap=True)
