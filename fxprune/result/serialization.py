"""Pruned models on disk: a folder with the plan, the weights and the report, written whole or not
at all.

Nothing is pickled and nothing unpickled: the plan and the report are JSON, the weights are
safetensors. ``manifest.json`` names the SHA-256 of each file, so that a folder which is not what
was written is refused. That finds accidents; it is not a signature.

How a save cannot tear: all files are written into a folder of their own and flushed to the disk.
Where the target is new, one rename puts that folder in its place. Where it exists, one rename to
``.committed`` inside it makes the new state count, and then the files move to their places;
readers look into ``.committed`` first. So a save which is killed before the rename leaves the old
state, and one killed after it the new one. Other files in the folder are left alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fxprune.common.identity import IdentityMap
from fxprune.common.numbers import path_of
from fxprune.errors import ArgumentError, ModelError, PlanError
from fxprune.result.plan import Plan
from fxprune.result.report import Report

__all__ = [
    "load_tensors",
    "read_files",
    "read_pruned",
    "save_pruned",
    "save_tensors",
    "write_files",
]

PLAN, WEIGHTS, REPORT, TEXT = "plan.json", "model.safetensors", "report.json", "report.txt"
MANIFEST = "manifest.json"
FOLDER_SCHEMA = 1

_COMMITTED = ".committed"  # a complete save whose files are not all in their places yet
_WRITING_SUFFIX = ".writing-"  # an incomplete one

Folder = str | os.PathLike[str]


# ---- pruned models ------------------------------------------------------------------------------


def save_pruned(folder: Folder, model: nn.Module, plan: Plan, report: Report) -> None:
    """Write ``plan.json``, ``model.safetensors``, ``report.json``, ``report.txt`` and the
    manifest; see :func:`write_files`.
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
    """The plan, the path of the weights (for :func:`load_tensors`) and the report of a folder that
    :func:`save_pruned` wrote.

    Raises
    ------
    PlanError
        If the folder is not what was written.
    """
    files = read_files(folder, (PLAN, WEIGHTS, REPORT))
    plan = Plan.from_json(_read_text(files[PLAN]))
    try:
        report = Report.from_dict(json.loads(_read_text(files[REPORT])))
    except (ValueError, RecursionError) as error:  # of JSON, or a PlanError
        raise PlanError(f"{files[REPORT]} is not a report: {error}") from error
    return plan, files[WEIGHTS], report


def _text_writer(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text + "\n", encoding="utf-8", newline="\n")


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PlanError(f"{path} is not text: {error}.") from error


# ---- weights ------------------------------------------------------------------------------------


def save_tensors(model: nn.Module, path: Path) -> None:
    """Write a module's state dict as safetensors, each tied tensor once.

    The file's metadata names, for each tied name that is left out, the one it is stored under, as
    ``safetensors.torch.save_model`` does, whose ``load_model`` reads the file too.

    Raises
    ------
    ModelError
        If the state holds something that is no tensor, or of a dtype that safetensors does not
        know.
    """
    # the parameters themselves, so that their identity tells which are tied
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ModelError(
                f"{name!r} of the state dict is a {kind}, which only a pickle could hold: make "
                "it a buffer."
            )
        if value.is_meta:
            raise ModelError(
                f"{name!r} is on the meta device and has no values to save: load the weights "
                "first."
            )
    aliases = _aliases(state)
    stored = {name: value.detach() for name, value in state.items() if name not in aliases}
    storages = Counter(value.untyped_storage().data_ptr() for value in stored.values())
    try:
        save_file(
            # Different views of one storage are stored apart, each whole.
            {
                n: (v.clone() if storages[v.untyped_storage().data_ptr()] > 1 else v)
                .cpu()
                .contiguous()
                for n, v in stored.items()
            },
            path,
            metadata={"format": "pt", **aliases},
        )
    except SafetensorError as error:
        # of the library's core, which writes; what may be written has been checked before
        raise ArgumentError(
            f"{path} cannot be written: {error}. Name a folder that can be written to, on a disk "
            "with room."
        ) from error
    except (ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"the weights cannot be stored as safetensors: {error}") from error


def load_tensors(model: nn.Module, path: Path) -> None:
    """Read what :func:`save_tensors` wrote into a module: the same names, shapes and ties; dtypes
    become those of the file.

    Raises
    ------
    PlanError
        If the file is damaged, or of another model.
    """
    stored, aliases = _read_tensors(path)
    own, named = model.state_dict(keep_vars=True), {*stored, *aliases}
    problems = [f"{name!r} is not in the model" for name in sorted(named) if name not in own]
    problems += [f"{name!r} is not in the file" for name in own if name not in named]
    problems += [
        f"{name!r} has shape {tuple(stored[name].shape)}, the model's {tuple(own[name].shape)}"
        for name in stored
        if name in own and stored[name].shape != own[name].shape
    ]
    problems += [
        f"{name!r} is {value.dtype}, the model's {own[name].dtype}"
        for name, value in stored.items()
        if name in own and _kind(value) != _kind(own[name])
    ]
    if not problems and _aliases(own) != aliases:
        differ = sorted(
            {n for pair in set(_aliases(own).items()) ^ set(aliases.items()) for n in pair}
        )
        problems = [f"{', '.join(differ)} are tied on one side only"]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise PlanError(
            f"{path} does not hold the weights of this model: {'; '.join(problems[:3])}{more}."
        )
    _cast(model, own, stored)
    with torch.no_grad():
        for name, value in stored.items():
            target = own[name]
            if target.dtype != value.dtype:
                target.data = target.data.to(value.dtype)
            target.copy_(value)


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    """What no change of the dtype may change."""
    return tensor.is_floating_point(), tensor.is_complex()


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are another's -> that one's name, the first in alphabetical order."""
    first: IdentityMap[Tensor, str] = IdentityMap()
    for name in sorted(state):
        first.setdefault(state[name], name)
    return {name: first[tensor] for name, tensor in state.items() if first[tensor] != name}


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            aliases = {
                name: kept for name, kept in (file.metadata() or {}).items() if name != "format"
            }
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise PlanError(
            f"{path} is not a complete safetensors file: {error}. Save the model again."
        ) from error
    if not set(aliases.values()) <= set(stored):
        raise PlanError(f"{path} names tied tensors that it does not hold. Save the model again.")
    return stored, aliases


def _cast(model: nn.Module, own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """A model that was cast as a whole, as by ``half()``, has buffers that are not saved: they are
    cast with it.
    """
    theirs = {value.dtype for value in stored.values() if value.is_floating_point()}
    if (
        len(theirs) == 1
        and {value.dtype for value in own.values() if value.is_floating_point()} != theirs
    ):
        model.to(theirs.pop())


# ---- folders ------------------------------------------------------------------------------------


def write_files(folder: Folder, files: Mapping[str, Callable[[Path], object]]) -> None:
    """Write all of some files, or none, and their manifest; the state before stays until the new
    one is complete on the disk.

    Parameters
    ----------
    folder:
        Made if missing. Other files in it are left alone. One process writes to it at a time.
    files:
        File name -> a function that writes it to the path that it is given.

    Raises
    ------
    ArgumentError
        If the folder cannot be written to.
    """
    folder = path_of("the folder", folder)
    with _disk_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise ArgumentError(f"{folder} is a file, not a folder: name another.")
        if folder.exists():
            _settle(folder)  # an earlier save that was killed on its way
            parent, prefix, target = folder, _WRITING_SUFFIX, folder / _COMMITTED
        else:
            parent, prefix, target = folder.parent, f".{folder.name}{_WRITING_SUFFIX}", folder
            parent.mkdir(parents=True, exist_ok=True)
        _discard(parent, prefix)
        try:
            os.replace(_stage(parent, prefix, files), target)  # from here on the new state counts
        except BaseException:
            _discard(parent, prefix)
            raise
        _flush(parent)
        _settle(folder)


def read_files(folder: Folder, needed: tuple[str, ...]) -> dict[str, Path]:
    """The paths of the files that :func:`write_files` wrote, each checked against the manifest.

    Raises
    ------
    ArgumentError
        If there is no such folder.
    PlanError
        If a file is missing, was cut short or changed, or the manifest lacks one that is
        ``needed``.
    """
    folder = path_of("the folder", folder)
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
    """A complete save in a folder of its own, on the disk."""
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
    """Remove what saves left that did not come to their end."""
    for left in parent.iterdir():
        if left.name.startswith(prefix):
            shutil.rmtree(left, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Move the files of a committed save to their places."""
    committed = folder / _COMMITTED
    if not committed.is_dir():
        return
    for path in sorted(committed.iterdir()):
        os.replace(path, folder / path.name)
    _flush(folder)
    committed.rmdir()


def _path_in(folder: Path, name: str) -> Path:
    committed = folder / _COMMITTED / name
    return committed if committed.exists() else folder / name


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            "bytes": path.stat().st_size,
        }


def _manifest_text(listed: Mapping[str, Mapping[str, Any]]) -> str:
    return json.dumps({"schema": FOLDER_SCHEMA, "files": listed}, indent=1) + "\n"


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    path = _path_in(folder, MANIFEST)
    if not path.exists():
        raise PlanError(
            f"{folder} has no {MANIFEST}: it is not a pruned model that was saved whole. Save it "
            "again."
        )
    text = _read_text(path)
    try:
        data = json.loads(text)
        schema, listed = (
            data["schema"],
            {str(name): dict(entry) for name, entry in data["files"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PlanError(
            f"{path} is damaged: {type(error).__name__}: {error}. Save the model again."
        ) from error
    if schema != FOLDER_SCHEMA:
        raise PlanError(
            f"{path} has schema {schema}, this version of fxprune reads {FOLDER_SCHEMA}: upgrade "
            "fxprune, or save anew."
        )
    # The manifest has no digest of its own: it must be exactly the text that would be written for
    # what it says.
    if text != _manifest_text(listed) or any(Path(name).name != name for name in listed):
        raise PlanError(
            f"{path} is damaged: it was changed after it was written. Save the model again."
        )
    return listed


def _check_file(path: Path, listed: Mapping[str, Any]) -> None:
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
    """Have the disk hold a file, or the names in a folder."""
    if path.is_dir() and os.name != "posix":
        return  # Windows has no such call for folders
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        raise ArgumentError(
            f"{where}: {error.strerror or error}. Name a folder that can be read and written."
        ) from error
