"""Plans: the surviving units of a pruning, as data.

A plan can be printed, stored, and applied to any model of the same architecture. The plan of a
model that was pruned several times holds the plan before it. This chain leads back to the original
architecture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxprune.common.public import public, short_repr
from fxprune.errors import PlanError

__all__ = [
    "GroupPlan",
    "Plan",
    "check_groups",
    "fingerprint",
    "store_plan",
    "stored_plan",
]

SCHEMA = 4
_READABLE = (1, 2, 3, 4)  # 1 has no earlier plans, 2 no heads, 3 no values of inputs


@public
@dataclass(frozen=True)
class GroupPlan:
    """The surviving units of one group.

    Attributes
    ----------
    name:
        The name of the group, as in the analysis.
    size:
        How many units the group has.
    kept:
        Indices of the surviving units, ascending, from 0 to ``size - 1``.

    Raises
    ------
    PlanError
        If an attribute has another type.

    Examples
    --------
    >>> group = GroupPlan("conv1.weight:0", 4, (0, 3))
    >>> len(group.kept) / group.size
    0.5
    """

    name: str
    size: int
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        with _type_errors("a group of a plan"):
            _checked_text(self.name)
            _checked_whole(self.size)
            for unit in _tuple(self.kept):
                _checked_whole(unit)


@public
@dataclass(frozen=True)
class Plan:
    """The surviving units of each group, and the architecture that they belong to.

    :func:`prune` makes a plan, :func:`apply` prunes another model of the same architecture by it.
    A plan is frozen and compares by value. ``print`` it to see how many units each group keeps.

    Attributes
    ----------
    groups:
        One entry for each group of the analysis.
    inputs:
        The example as JSON text (see :func:`pack_inputs`), so that the plan can be applied without
        one: shapes, dtypes and constants, and, for a model that is not one graph, the values that
        its Python code reads.
    keep:
        Names of parameters that were kept whole.
    pinned_nodes:
        Names of graph nodes whose operands were kept whole, because the nodes could not be
        rewritten; ``name@axis`` if only one axis of the first operand was kept.
    fingerprint:
        A digest of the names and shapes of the model's parameters and buffers. It identifies the
        architecture, and does not depend on the version of torch or torchvision.
    previous:
        The plan that made the model that this plan is for; None if that model was not pruned.
    heads:
        Names of parameters whose attention heads were removed as a whole or not at all.

    Raises
    ------
    PlanError
        If an attribute has another type.

    Examples
    --------
    >>> import fxprune, torch
    >>> from torch import nn
    >>> def net():
    ...     return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> plan = fxprune.prune(net(), torch.zeros(1, 3, 8, 8), channels=0.5).plan
    >>> print(plan)
    0.weight:0: 4 of 8
    >>> fxprune.apply(plan, net()).model.get_parameter("0.weight").shape
    torch.Size([4, 3, 3, 3])
    """

    groups: tuple[GroupPlan, ...]
    inputs: str
    keep: tuple[str, ...]
    pinned_nodes: tuple[str, ...]
    fingerprint: str
    previous: Plan | None = None
    heads: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        with _type_errors("a plan"):
            for group in _tuple(self.groups):
                _of_type(group, GroupPlan)
            for text in (
                self.inputs,
                self.fingerprint,
                *_tuple(self.keep),
                *_tuple(self.pinned_nodes),
                *_tuple(self.heads),
            ):
                _checked_text(text)
            if self.previous is not None:
                _of_type(self.previous, Plan)

    @property
    def chain(self) -> tuple[Plan, ...]:
        """This plan and all earlier ones, the oldest first."""
        plans = [self]
        while plans[-1].previous is not None:
            plans.append(plans[-1].previous)
        return tuple(reversed(plans))

    @public
    def to_json(self) -> str:
        """Return the plan as JSON text; :meth:`from_json` is the inverse.

        >>> plan = Plan((GroupPlan("conv.weight:0", 4, (0, 3)),), "{}", (), (), "")
        >>> Plan.from_json(plan.to_json()) == plan
        True
        """
        *earlier, last = (_pack(plan) for plan in self.chain)
        return json.dumps({"schema": SCHEMA, **last, "previous": earlier}, indent=1)

    @classmethod
    @public
    def from_json(cls, text: str) -> Plan:
        """Return the plan that :meth:`to_json` of this or an earlier version of fxprune wrote.

        Raises
        ------
        PlanError
            If the text is damaged, or was written by a later version.
        """
        plan: Plan | None = None
        try:
            data = json.loads(text)
            schema = data.pop("schema")
            if type(schema) is int and schema in _READABLE:
                for stage in [*([] if schema == 1 else _as_list(data.pop("previous"))), data]:
                    plan = _unpack(stage if schema > 2 else {**stage, "heads": []}, plan)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PlanError(
                f"this is not a plan: {type(error).__name__}: {error}. Write plans with "
                "Plan.to_json()."
            ) from error
        if type(schema) is not int or schema not in _READABLE:
            raise PlanError(
                f"the plan has schema {schema}, this version of fxprune reads {_READABLE[0]} to "
                f"{SCHEMA}: upgrade fxprune, or prune anew."
            )
        assert plan is not None  # the last stage is the file itself
        check_groups(plan)
        return plan

    def __str__(self) -> str:
        before = len(self.chain) - 1
        after = [f"after {before} earlier plan{'s' if before > 1 else ''}"] if before else []
        return "\n".join([*after, *(f"{g.name}: {len(g.kept)} of {g.size}" for g in self.groups)])

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self  # immutable, and copying thousands of units would take time


def _pack(plan: Plan) -> dict[str, Any]:
    """Return one plan of a chain as a dict, without the plans before it."""
    return {
        "groups": [{"name": g.name, "size": g.size, "kept": list(g.kept)} for g in plan.groups],
        "inputs": plan.inputs,
        "keep": list(plan.keep),
        "pinned_nodes": list(plan.pinned_nodes),
        "heads": list(plan.heads),
        "fingerprint": plan.fingerprint,
    }


def _unpack(data: dict[str, Any], previous: Plan | None) -> Plan:
    """Return the plan that :func:`_pack` packed.

    Damaged data raises one of Python's own errors.
    """
    return Plan(
        groups=tuple(map(_unpack_group, data["groups"])),
        inputs=_checked_text(data["inputs"]),
        keep=tuple(map(_checked_text, _as_list(data["keep"]))),
        pinned_nodes=tuple(map(_checked_text, _as_list(data["pinned_nodes"]))),
        fingerprint=_checked_text(data["fingerprint"]),
        previous=previous,
        heads=tuple(map(_checked_text, _as_list(data["heads"]))),
    )


def _unpack_group(data: dict[str, Any]) -> GroupPlan:
    """Return one group of a plan that :func:`_pack` packed."""
    name, size = _checked_text(data["name"]), _checked_whole(data["size"])
    return GroupPlan(name, size, tuple(map(_checked_whole, _as_list(data["kept"]))))


@contextmanager
def _type_errors(what: str) -> Iterator[None]:
    """Turn a ``TypeError`` into a :class:`PlanError` that says what cannot be made."""
    try:
        yield
    except TypeError as error:
        raise PlanError(
            f"{what} cannot be made of this: {error}. prune(...).plan and Plan.from_json(text) "
            "give plans."
        ) from error


def _checked_text(value: Any) -> str:
    return _of_type(value, str)


def _checked_whole(value: Any) -> int:
    return _of_type(value, int)


def _tuple(value: Any) -> tuple[Any, ...]:
    return _of_type(value, tuple)


def _as_list(value: Any) -> list[Any]:
    return _of_type(value, list)


def _of_type(value: Any, kind: type) -> Any:
    """Return a value of exactly this type, or raise a ``TypeError``."""
    # not isinstance: True is an int
    if type(value) is not kind:
        raise TypeError(f"{short_repr(value, 40)} is no {kind.__name__}")
    return value


def check_groups(plan: Plan) -> None:
    """Check the groups and pinned nodes of a plan and of all plans before it.

    Raises
    ------
    PlanError
        If two groups have the same name, if a group keeps no unit, a unit that it does not have or
        one twice, or if a pinned axis is not a number.
    """
    for stage in plan.chain:
        if len({group.name for group in stage.groups}) < len(stage.groups):
            raise PlanError(
                "the plan has two groups of one name. Write plans with Plan.to_json()."
            )
        for group in stage.groups:
            _check_group(group)
        for name in stage.pinned_nodes:
            if "@" in name and not name.rpartition("@")[2].isdecimal():
                raise PlanError(
                    f"the plan pins an axis of a node as {name!r}, where a number is missing. "
                    "Prune anew."
                )


def _check_group(group: GroupPlan) -> None:
    """Check that the units of a group exist, are in order, and are at least one."""
    if (
        not group.kept
        or list(group.kept) != sorted(set(group.kept))
        or group.kept[0] < 0
        or group.kept[-1] >= group.size
    ):
        raise PlanError(
            f"group {group.name!r} of the plan keeps units outside 0..{group.size - 1}, none, or "
            "one twice."
        )


# ---- the architecture that a plan is for --------------------------------------------------------


def fingerprint(model: nn.Module) -> str:
    """Return a digest of the architecture: names and shapes of all parameters and buffers.

    Their values do not count.
    """
    lines = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = "." if prefix else ""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                lines.append(f"{prefix}{dot}{name} {tuple(tensor.shape)}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


# attribute of a pruned model that holds its plan, and its fingerprint right after pruning
_MARK = "_fxprune_plan"


def store_plan(model: nn.Module, plan: Plan) -> None:
    """Store the plan of a model that was just pruned on the model.

    The plan of its next pruning then refers to it.
    """
    vars(model)[_MARK] = (plan, fingerprint(model))


def stored_plan(model: nn.Module) -> Plan | None:
    """Return the plan that made a model.

    None if the model was not pruned, or if the shape or name of a tensor has changed since: the
    plan would not lead to this model.
    """
    plan, recorded = vars(model).get(_MARK, (None, ""))
    return plan if plan is not None and fingerprint(model) == recorded else None
