"""Operations that lay their tensor out anew, in place, and the views that they give."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fxprune.common.dispatch import aten

__all__ = ["lays_out_anew", "view_instead"]


@functools.cache
def view_instead(kind: str, target: Any) -> Any:
    """What gives a view as which a call lays out its tensor anew, in place: ``x.squeeze(1)`` for
    ``x.squeeze_(1)``; else None.
    """
    name = _target_name(kind, target)
    views = _overloads(name[:-1])
    if not lays_out_anew(kind, target) or not all(
        given.alias_info is not None for own in views for given in own._schema.returns
    ):
        return None
    if isinstance(target, torch._ops.OpOverload):
        return next((overload for overload in views if _takes(overload) == _takes(target)), None)
    return name[:-1] if kind == "call_method" else getattr(torch, name[:-1], None)


@functools.cache
def lays_out_anew(kind: str, target: Any) -> bool:
    """Whether a call gives its tensor another shape, other strides or other memory, in place."""
    name = _target_name(kind, target)
    return name.endswith("_") and any(
        torch.Tag.inplace_view in overload.tags for overload in _overloads(name)
    )


def _target_name(kind: str, target: Any) -> str:
    name = target if kind == "call_method" else getattr(target, "__name__", "")
    return str(getattr(getattr(target, "_schema", None), "name", name)).removeprefix("aten::")


def _takes(overload: Any) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in overload._schema.arguments]


def _overloads(name: str) -> list[Any]:
    """The overloads of an ATen operation that give their result."""
    packet = (
        getattr(aten, name, None) if name.isidentifier() and not name.startswith("__") else None
    )
    return (
        []
        if packet is None
        else [getattr(packet, own) for own in packet.overloads() if "out" not in own]
    )
