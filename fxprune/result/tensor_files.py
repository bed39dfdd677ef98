"""Tensors of a model in a safetensors file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fxprune.common.identity import IdentityMap
from fxprune.errors import ArgumentError, ModelError, PlanError

__all__ = ["load_tensors", "save_tensors"]


def save_tensors(model: nn.Module, path: Path) -> None:
    """Write a module's state dict as safetensors, each tied tensor once.

    A tied tensor is stored under one name. The file's metadata leads from its other names to this
    one, as ``safetensors.torch.save_model`` writes it. Therefore
    ``safetensors.torch.load_model`` can read the file, too.

    Raises
    ------
    ArgumentError
        If the file cannot be written.
    ModelError
        If the state dict holds something that is not a tensor with values, or is of a dtype that
        safetensors does not support.
    """
    # keep_vars=True gives the parameters themselves: their identity tells which are tied
    state = model.state_dict(keep_vars=True)
    _check_state(state)
    aliases = _aliases(state)
    stored = {name: value.detach() for name, value in state.items() if name not in aliases}
    storages = Counter(value.untyped_storage().data_ptr() for value in stored.values())
    try:
        save_file(_separated(stored, storages), path, metadata={"format": "pt", **aliases})
    except SafetensorError as error:
        # The library's core raises it while it writes; the tensors have been checked before.
        raise ArgumentError(
            f"{path} cannot be written: {error}. Name a folder that can be written to, on a disk "
            "with room."
        ) from error
    except (ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"the weights cannot be stored as safetensors: {error}") from error


def _check_state(state: Mapping[str, Any]) -> None:
    """Raise a :class:`ModelError` for an entry of a state dict that cannot be stored."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ModelError(
                f"{name!r} of the state dict is a {kind}, which only a pickle could hold: make "
                "it a buffer."
            )
        if value.layout is not torch.strided:
            raise ModelError(
                f"{name!r} is a {value.layout} tensor, which safetensors cannot hold: make it "
                "dense, or store the model with torch.save."
            )
        if value.is_meta:
            raise ModelError(
                f"{name!r} is on the meta device and has no values to save: load the weights "
                "first."
            )


def _separated(tensors: Mapping[str, Tensor], storages: Counter[int]) -> dict[str, Tensor]:
    """Return tensors contiguous on the CPU, and views of one storage as tensors of their own.

    ``storages`` counts the tensors on each storage.
    """
    separated = {}
    for name, value in tensors.items():
        is_shared = storages[value.untyped_storage().data_ptr()] > 1
        separated[name] = (value.clone() if is_shared else value).cpu().contiguous()
    return separated


def load_tensors(model: nn.Module, path: Path) -> None:
    """Load a file that :func:`save_tensors` wrote into a module.

    Names, shapes and ties must be those of the file. Dtypes become those of the file.

    Raises
    ------
    PlanError
        If the file is damaged, or belongs to another model.
    """
    stored, aliases = _read_tensors(path)
    state = model.state_dict(keep_vars=True)
    problems = _mismatches(state, stored, aliases)
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise PlanError(
            f"{path} does not hold the weights of this model: {'; '.join(problems[:3])}{more}."
        )
    _cast(model, state, stored)
    with torch.no_grad():
        for name, value in stored.items():
            target = state[name]
            if target.dtype != value.dtype:
                target.data = target.data.to(value.dtype)
            target.copy_(value)


def _mismatches(
    state: Mapping[str, Tensor], stored: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> list[str]:
    """Return a text for each difference between a model's state dict and a file."""
    in_file, common = {*stored, *aliases}, [name for name in stored if name in state]
    problems = [f"{name!r} is not in the model" for name in sorted(in_file) if name not in state]
    problems += [f"{name!r} is not in the file" for name in state if name not in in_file]
    for name in common:
        found, wanted = tuple(stored[name].shape), tuple(state[name].shape)
        if found != wanted:
            problems.append(f"{name!r} has shape {found}, the model's {wanted}")
    for name in common:
        if _number_kind(stored[name]) != _number_kind(state[name]):
            dtypes = stored[name].dtype, state[name].dtype
            problems.append(f"{name!r} is {dtypes[0]}, the model's {dtypes[1]}")
    if not problems and _aliases(state) != aliases:
        pairs = set(_aliases(state).items()) ^ set(aliases.items())
        differ = sorted({name for pair in pairs for name in pair})
        problems = [f"{', '.join(differ)} are tied on one side only"]
    return problems


def _number_kind(tensor: Tensor) -> tuple[bool, bool]:
    """Return what a change of dtype must not change: whether values are real floats or complex."""
    return tensor.is_floating_point(), tensor.is_complex()


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names of tied tensors: each further name -> the first one alphabetically."""
    first: IdentityMap[Tensor, str] = IdentityMap()
    for name in sorted(state):
        first.setdefault(state[name], name)
    return {name: first[tensor] for name, tensor in state.items() if first[tensor] != name}


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file by name, and the further names of tied ones."""
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            aliases = dict(file.metadata() or {})
            aliases.pop("format", None)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise PlanError(
            f"{path} is not a complete safetensors file: {error}. Save the model again."
        ) from error
    if not set(aliases.values()) <= set(stored):
        raise PlanError(f"{path} names tied tensors that it does not hold. Save the model again.")
    return stored, aliases


def _cast(model: nn.Module, state: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Cast the model if the saved one was cast as a whole, such as by ``half()``.

    This also casts the buffers that are not saved.
    """
    saved = {value.dtype for value in stored.values() if value.is_floating_point()}
    present = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(saved) == 1 and present != saved:
        model.to(saved.pop())
