"""Descriptions of models and settings, by which a later run knows that they are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.common.contents import named_tensors
from fxprune.common.numbers import as_number

__all__ = ["describe", "digest_of"]


def digest_of(model: nn.Module) -> str:
    """Return a hash of the names, shapes, types and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors(model).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if not tensor.is_meta:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def describe(value: Any) -> Any:
    """Return a setting as JSON data that identifies it, the same in every process.

    Tensors are described by type and shape, dataclasses by their type and fields, and other
    objects by the name of their function or type.

    Parameters
    ----------
    value:
        The setting: a number, a string, a tensor, a container of settings, or an object.

    Examples
    --------
    >>> describe((torch.zeros(2, 3), {"share": 0.5})), describe(torch.relu)
    (['float32 (2, 3)', {'share': 0.5}], 'torch.relu')
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)) or as_number(value) is not None:
        return value if isinstance(value, bool) else as_number(value)
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        settings = {field.name: describe(getattr(value, field.name)) for field in fields(value)}
        return {"kind": describe(type(value)), **settings}
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', None) or 'torch'}.{named.__name__}"
