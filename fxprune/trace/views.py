"""In-place operations that change a tensor's layout, and their counterparts that return a view."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fxprune.common.dispatch import aten

__all__ = ["changes_layout", "view_counterpart"]


@functools.cache
def view_counterpart(kind: str, target: Any) -> Any:
    """Return the call that returns as a view what this call does in place.

    It is ``x.squeeze(1)`` for ``x.squeeze_(1)``.

    Parameters
    ----------
    kind, target:
        The node's ``op`` and ``target``.

    Returns
    -------
    object or None
        The other target; None if the call does not change the layout in place, or if there is no
        such view.
    """
    name = _target_name(kind, target)
    views = _overloads(name[:-1])
    returns = [value for overload in views for value in overload._schema.returns]
    returns_views = all(value.alias_info is not None for value in returns)
    if not changes_layout(kind, target) or not returns_views:
        return None
    if isinstance(target, torch._ops.OpOverload):
        same = [overload for overload in views if _signature(overload) == _signature(target)]
        return same[0] if same else None
    return name[:-1] if kind == "call_method" else getattr(torch, name[:-1], None)


@functools.cache
def changes_layout(kind: str, target: Any) -> bool:
    """Tell whether a call changes its tensor's shape, strides or memory in place."""
    name = _target_name(kind, target)
    if not name.endswith("_"):
        return False
    return any(torch.Tag.inplace_view in overload.tags for overload in _overloads(name))


def _target_name(kind: str, target: Any) -> str:
    """Return the name of the method, function or ATen operation that a node calls."""
    name = target if kind == "call_method" else getattr(target, "__name__", "")
    return str(getattr(getattr(target, "_schema", None), "name", name)).removeprefix("aten::")


def _signature(overload: Any) -> list[tuple[str, str]]:
    """Return the names and types of an overload's arguments."""
    return [(argument.name, str(argument.type)) for argument in overload._schema.arguments]


def _overloads(name: str) -> list[Any]:
    """Return the overloads of an ATen operation that do not write into ``out``."""
    if not name.isidentifier() or name.startswith("__") or not hasattr(aten, name):
        return []
    packet = getattr(aten, name)
    return [getattr(packet, overload) for overload in packet.overloads() if "out" not in overload]
