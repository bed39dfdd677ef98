"""Pruned models on disk: a folder with the plan, the weights and the report.

Nothing is pickled or unpickled: the plan and the report are JSON, the weights are safetensors.
``manifest.json`` holds the SHA-256 of each file, so a folder that differs from what was written is
refused. This detects accidents; it is not a signature.

A save is complete or has no effect:

1. All files are written to a temporary folder and flushed to the disk.
2. If the target folder is new, one rename moves the temporary folder there. If it exists, one
   rename moves the temporary folder to ``.committed`` inside it. From then on, the new state
   counts: readers look into ``.committed`` first.
3. The files in ``.committed`` move to their places in the target folder.

A save that is killed before the rename leaves the old state, one that is killed later the new
state. Other files in the folder stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fxprune.common.numbers import as_path
from fxprune.errors import ArgumentError, PlanError
from fxprune.result.plan import Plan
from fxprune.result.report import Report
from fxprune.result.tensor_files import save_tensors

__all__ = [
    "read_files",
    "read_pruned",
    "save_pruned",
    "write_files",
]

PLAN, WEIGHTS, REPORT, TEXT = "plan.json", "model.safetensors", "report.json", "report.txt"
MANIFEST = "manifest.json"
FOLDER_SCHEMA = 1

_COMMITTED = ".committed"  # folder with a complete save whose files have not all been moved yet
_WRITING_SUFFIX = ".writing-"  # part of the name of a folder with an incomplete save

Folder = str | os.PathLike[str]


# ---- pruned models ------------------------------------------------------------------------------


def save_pruned(folder: Folder, model: nn.Module, plan: Plan, report: Report) -> None:
    """Write a pruned model to a folder; :func:`read_pruned` reads it.

    The files are ``plan.json``, ``model.safetensors``, ``report.json``, ``report.txt`` and the
    manifest.

    Raises
    ------
    ArgumentError
        If the folder cannot be written to.
    ModelError
        If the state dict holds something that is not a tensor with values, or is of a dtype that
        safetensors does not support.
    """
    write_files(
        folder,
        {
            PLAN: _text_writer(plan.to_json()),
            WEIGHTS: lambda path: save_tensors(model, path),
            REPORT: _text_writer(json.dumps(report.to_dict(), indent=2)),
            TEXT: _text_writer(str(report)),
        },
    )


def read_pruned(folder: Folder) -> tuple[Plan, Path, Report]:
    """Read a folder that :func:`save_pruned` wrote.

    Returns
    -------
    The plan, the path of the weights (for :func:`load_tensors`), and the report.

    Raises
    ------
    ArgumentError
        If there is no such folder.
    PlanError
        If the folder is not what was written.
    """
    files = read_files(folder, (PLAN, WEIGHTS, REPORT))
    plan = Plan.from_json(_read_text(files[PLAN]))
    try:
        report = Report.from_dict(json.loads(_read_text(files[REPORT])))
    except (ValueError, RecursionError) as error:  # raised by json, or a PlanError
        raise PlanError(f"{files[REPORT]} is not a report: {error}") from error
    return plan, files[WEIGHTS], report


def _text_writer(text: str) -> Callable[[Path], object]:
    """Return a function that writes a text to a path, the same bytes on every system."""
    return lambda path: path.write_text(text + "\n", encoding="utf-8", newline="\n")


def _read_text(path: Path) -> str:
    """Return the text of a file, or raise a :class:`PlanError` if it is not text."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PlanError(f"{path} is not text: {error}.") from error


# ---- weights ------------------------------------------------------------------------------------


# ---- folders ------------------------------------------------------------------------------------


def write_files(folder: Folder, files: Mapping[str, Callable[[Path], object]]) -> None:
    """Write files and their manifest to a folder, all of them or none.

    The previous state stays until the new one is complete on the disk.

    Parameters
    ----------
    folder:
        Created if missing. Other files in it stay as they are. Only one process may write to it at
        a time.
    files:
        File name -> function that writes the file to a given path.

    Raises
    ------
    ArgumentError
        If the folder cannot be written to.
    """
    folder = as_path("the folder", folder)
    with _disk_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise ArgumentError(f"{folder} is a file, not a folder: name another.")
        if folder.exists():
            _finish_write(folder)  # completes an earlier save that was killed after its rename
            parent, prefix, target = folder, _WRITING_SUFFIX, folder / _COMMITTED
        else:
            parent, prefix, target = folder.parent, f".{folder.name}{_WRITING_SUFFIX}", folder
            parent.mkdir(parents=True, exist_ok=True)
        _discard(parent, prefix)
        try:
            os.replace(_stage(parent, prefix, files), target)  # from now on, the new state counts
        except BaseException:
            _discard(parent, prefix)
            raise
        _flush(parent)
        _finish_write(folder)


def read_files(folder: Folder, needed: tuple[str, ...]) -> dict[str, Path]:
    """Return the paths of the files that :func:`write_files` wrote, checked by the manifest.

    Parameters
    ----------
    folder:
        The folder that was written.
    needed:
        Names of files that must be in the manifest.

    Returns
    -------
    File name -> path, for all files in the manifest.

    Raises
    ------
    ArgumentError
        If there is no such folder.
    PlanError
        If a file is missing, or was truncated or changed, or if the manifest lacks a needed file.
    """
    folder = as_path("the folder", folder)
    with _disk_errors(folder):
        if not folder.is_dir():
            raise ArgumentError(
                f"there is no folder {folder}: name one that Pruned.save() or fxprune prune -o "
                "wrote."
            )
        listed = _read_manifest(folder)
        lacking = [name for name in needed if name not in listed]
        if lacking:
            raise PlanError(
                f"{folder / MANIFEST} does not list {', '.join(lacking)}: this is no pruned "
                "model. Save it again."
            )
        paths = {name: _path_in(folder, name) for name in listed}
        for name, path in paths.items():
            _check_file(path, listed[name])
    return paths


def _stage(parent: Path, prefix: str, files: Mapping[str, Callable[[Path], object]]) -> Path:
    """Write the files and their manifest to a new folder, flush it to the disk, and return it."""
    staging = parent / f"{prefix}{uuid.uuid4().hex}"
    staging.mkdir()
    for name, write in files.items():
        write(staging / name)
    listed = {name: _describe(staging / name) for name in files}
    (staging / MANIFEST).write_bytes(_manifest_text(listed).encode())
    for path in (*staging.iterdir(), staging):
        _flush(path)
    return staging


def _discard(parent: Path, prefix: str) -> None:
    """Remove the folders of incomplete saves."""
    for path in parent.iterdir():
        if path.name.startswith(prefix):
            shutil.rmtree(path, ignore_errors=True)


def _finish_write(folder: Path) -> None:
    """Move the files of a committed save to their places, if there is one."""
    committed = folder / _COMMITTED
    if not committed.is_dir():
        return
    for path in sorted(committed.iterdir()):
        os.replace(path, folder / path.name)
    _flush(folder)
    committed.rmdir()


def _path_in(folder: Path, name: str) -> Path:
    """Return the path of a saved file, which may still be in the committed save."""
    committed = folder / _COMMITTED / name
    return committed if committed.exists() else folder / name


def _describe(path: Path) -> dict[str, Any]:
    """Return the manifest's entry for a file: its SHA-256 and its size."""
    with path.open("rb") as file:
        return {
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            "bytes": path.stat().st_size,
        }


def _manifest_text(listed: Mapping[str, Mapping[str, Any]]) -> str:
    return json.dumps({"schema": FOLDER_SCHEMA, "files": listed}, indent=1) + "\n"


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of a folder's manifest by file name, or raise a :class:`PlanError`."""
    path = _path_in(folder, MANIFEST)
    if not path.exists():
        raise PlanError(
            f"{folder} has no {MANIFEST}: it is not a pruned model that was saved whole. Save it "
            "again."
        )
    text = _read_text(path)
    schema, listed = _parsed_manifest(path, text)
    if schema != FOLDER_SCHEMA:
        raise PlanError(
            f"{path} has schema {schema}, this version of fxprune reads {FOLDER_SCHEMA}: upgrade "
            "fxprune, or save anew."
        )
    # No digest covers the manifest itself. Instead, its text must be exactly what would be written
    # for its entries.
    if text != _manifest_text(listed) or any(Path(name).name != name for name in listed):
        raise PlanError(
            f"{path} is damaged: it was changed after it was written. Save the model again."
        )
    return listed


def _parsed_manifest(path: Path, text: str) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Return the schema and the entries in a manifest's text."""
    try:
        data = json.loads(text)
        schema = data["schema"]
        return schema, {str(name): dict(entry) for name, entry in data["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PlanError(
            f"{path} is damaged: {type(error).__name__}: {error}. Save the model again."
        ) from error


def _check_file(path: Path, listed: Mapping[str, Any]) -> None:
    """Raise a :class:`PlanError` if a file is not the one that its manifest entry describes."""
    if not path.is_file():
        raise PlanError(f"{path} is missing. Copy the folder whole, or save the model again.")
    found = _describe(path)
    if found["bytes"] != listed.get("bytes"):
        raise PlanError(
            f"{path} has {found['bytes']:,} bytes where {listed.get('bytes')} were written: it "
            "was cut short, or is of another model. Copy the folder whole, or save the model "
            "again."
        )
    if found["sha256"] != listed.get("sha256"):
        raise PlanError(
            f"{path} is not what was written: its SHA-256 differs. Copy the folder whole, or "
            "save the model again."
        )


def _flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot flush a folder
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn an ``OSError`` into an :class:`ArgumentError` that names the file or folder."""
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        raise ArgumentError(
            f"{where}: {error.strerror or error}. Name a folder that can be read and written."
        ) from error
