"""Example inputs in the form in which a plan stores them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxprune.common.dispatch import META
from fxprune.errors import PlanError
from fxprune.inputs import (
    Call,
    decode_tensor,
    encode_tensor,
    is_plain,
    random_in_range,
    value_range,
)

__all__ = ["holds_objects", "pack_inputs", "unpack_inputs"]


def pack_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return example inputs as JSON text.

    Meta tensors are stored as shapes and dtypes, others with their values. If the values are those
    that :func:`fxprune.inputs.random_in_range` draws from a range, a large tensor is stored as
    that range.

    Parameters
    ----------
    args, kwargs:
        Positional and keyword arguments of the model's forward.

    >>> pack_inputs((torch.ones(2, 3, device="meta"),), {"scale": 2})
    '{"args": {"tuple": [{"shape": [2, 3], "dtype": "float32"}]}, "kwargs": {"dict": {"scale":
    {"value": 2}}}}'
    """
    return json.dumps({"args": _packed(tuple(args)), "kwargs": _packed(dict(kwargs))})


def _packed(value: Any) -> Any:
    """Return a value as data for JSON; an object of an unknown type as its type's name."""
    if isinstance(value, Tensor):
        return {
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            **_stored_values(value),
        }
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _packed(item) for key, item in value.items()}}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_packed(item) for item in value]}
    if type(value) in (type(None), bool, int, float, str):
        return {"value": value}
    if isinstance(value, torch.dtype):
        return {"torch": str(value).removeprefix("torch.")}
    return {"object": type(value).__name__}


def _stored_values(tensor: Tensor) -> dict[str, Any]:
    """Return the entry that stores a tensor's values: ``data``, ``range``, or none."""
    if not is_plain(tensor):
        return {}
    data = encode_tensor(tensor)
    if not data:
        low, high = value_range(tensor)
        if torch.equal(
            random_in_range(tuple(tensor.shape), tensor.dtype, low, high), tensor.cpu()
        ):
            return {"range": [low, high]}
    return {"data": data or encode_tensor(tensor, math.inf)}


def holds_objects(text: str) -> bool:
    """Tell whether the example of :func:`pack_inputs` had an object that no plan can store."""
    return '"object": ' in text


def unpack_inputs(text: str) -> Call:
    """Return the example inputs that :func:`pack_inputs` packed.

    Tensors without stored values become meta tensors.

    Raises
    ------
    PlanError
        If the text is damaged, or the example had an object that no plan can store.
    """
    try:
        data = json.loads(text)
        return Call(_unpacked(data["args"]), _unpacked(data["kwargs"]))
    except PlanError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        # RecursionError is a RuntimeError
        raise PlanError(
            f"the plan's inputs are damaged: {error}. Write plans with Plan.to_json()."
        ) from error


def _unpacked(value: Any) -> Any:
    """Return the value that :func:`_packed` packed."""
    if "shape" in value:
        shape, dtype = tuple(value["shape"]), getattr(torch, value["dtype"])
        if "data" in value:
            return decode_tensor(value["data"], shape, dtype)
        return (
            random_in_range(shape, dtype, *value["range"])
            if "range" in value
            else torch.empty(shape, dtype=dtype, device=META)
        )
    if "dict" in value:
        return {key: _unpacked(item) for key, item in value["dict"].items()}
    if "value" in value:
        return value["value"]
    if "torch" in value:
        return getattr(torch, value["torch"])
    if "object" in value:
        kind = value["object"]
        raise PlanError(
            f"the model was pruned on an example with {kind} in it, which no plan can hold: "
            "prune anew."
        )
    kind = "tuple" if "tuple" in value else "list"
    return (tuple if kind == "tuple" else list)(_unpacked(item) for item in value[kind])
