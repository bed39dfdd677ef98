"""What survives, as data: a plan is frozen, printable, and replays on any model of the same architecture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import PlanError
from fxprune.shapes import META

__all__ = ["GroupPlan", "Plan", "fingerprint", "pack_inputs", "unpack_inputs"]

SCHEMA = 1


@dataclass(frozen=True)
class GroupPlan:
    """The survivors of one group: ``kept`` are indices into its ``size`` units, ascending."""

    name: str
    size: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What survives, group by group, and for which model.

    Attributes
    ----------
    groups:
        One entry per group of the analysis.
    inputs:
        Shapes and dtypes of the example (see :func:`pack_inputs`), so that a plan can be replayed without one.
    keep, pinned_nodes:
        What the analysis was told to leave alone.
    fingerprint:
        Of the architecture: names and shapes of its tensors.
    """

    groups: tuple[GroupPlan, ...]
    inputs: str
    keep: tuple[str, ...]
    pinned_nodes: tuple[str, ...]
    fingerprint: str

    def to_json(self) -> str:
        """The plan as JSON text; :meth:`from_json` is its inverse.

        >>> plan = Plan((GroupPlan("conv.weight:0", 4, (0, 3)),), "{}", (), (), "")
        >>> Plan.from_json(plan.to_json()) == plan
        True
        """
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan.

        Raises
        ------
        PlanError
            If the text is damaged, or was written by a later version.
        """
        try:
            data = json.loads(text)
            schema = data.pop("schema")
            groups = tuple(GroupPlan(str(g["name"]), int(g["size"]), tuple(map(int, g["kept"]))) for g in data.pop("groups"))
            plan = cls(
                groups=groups,
                inputs=str(data.pop("inputs")),
                keep=tuple(map(str, data.pop("keep"))),
                pinned_nodes=tuple(map(str, data.pop("pinned_nodes"))),
                fingerprint=str(data.pop("fingerprint")),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"this is not a plan: {type(error).__name__}: {error}. Write plans with Plan.to_json().") from error
        if schema != SCHEMA:
            raise PlanError(
                f"the plan has schema {schema}, this version of fxprune reads {SCHEMA}: upgrade fxprune, or prune anew."
            )
        for group in plan.groups:
            if not group.kept or list(group.kept) != sorted(set(group.kept)) or group.kept[0] < 0 or group.kept[-1] >= group.size:
                raise PlanError(f"group {group.name!r} of the plan keeps units outside 0..{group.size - 1}, none, or one twice.")
        return plan

    def __str__(self) -> str:
        return "\n".join(f"{g.name}: {len(g.kept)} of {g.size}" for g in self.groups)


def fingerprint(model: nn.Module) -> str:
    """A digest of the architecture: names and shapes of all parameters and buffers, not their values."""
    tensors: list[tuple[str, Tensor]] = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    lines = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def pack_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Shapes and dtypes of example inputs as JSON text.

    >>> pack_inputs((torch.ones(2, 3),), {})
    '{"args": {"tuple": [{"shape": [2, 3], "dtype": "float32"}]}, "kwargs": {"dict": {}}}'
    """

    def pack(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if isinstance(value, dict):
            return {"dict": {key: pack(item) for key, item in value.items()}}
        if isinstance(value, (list, tuple)):
            return {type(value).__name__: [pack(item) for item in value]}
        raise PlanError(f"inputs of type {type(value).__name__} cannot be stored in a plan")

    return json.dumps({"args": pack(tuple(args)), "kwargs": pack(dict(kwargs))})


def unpack_inputs(text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inverse of :func:`pack_inputs`, with meta tensors."""

    def unpack(value: Any) -> Any:
        if "shape" in value:
            return torch.empty(value["shape"], dtype=getattr(torch, value["dtype"]), device=META)
        if "dict" in value:
            return {key: unpack(item) for key, item in value["dict"].items()}
        kind = "tuple" if "tuple" in value else "list"
        return (tuple if kind == "tuple" else list)(unpack(item) for item in value[kind])

    try:
        data = json.loads(text)
        return unpack(data["args"]), unpack(data["kwargs"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise PlanError(f"the plan's inputs are damaged: {error}. Write plans with Plan.to_json().") from error
