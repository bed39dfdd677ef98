"""The table of rules: ATen op -> how labels pass through it. What is not in it is decomposed, pointwise, or pinned."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fxprune.rules.context import Context

__all__ = ["REGISTRY", "Rule", "bind", "find", "rule"]

Handler = Callable[[Context, Any, dict[str, Any], Any], None]
"""``handler(context, op, arguments by name, result)``: reads the fields of the arguments, puts those of the result."""


@dataclass(frozen=True)
class Rule:
    handler: Handler
    family: str
    doc: str


REGISTRY: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for ATen ops, by the name of their overload packet (``"convolution"`` or ``"library::op"``)."""

    def register(handler: Handler) -> Handler:
        family = handler.__module__.rsplit(".", 1)[-1]
        doc = (handler.__doc__ or "").strip().split("\n")[0]
        for name in names:
            if name in REGISTRY:
                raise ValueError(f"{name} has two rules")
            REGISTRY[name] = Rule(handler, family, doc)
        return handler

    return register


@functools.cache
def find(func: Any) -> Rule | None:
    """The rule for an ATen overload: its own, that of its functional form, or the pointwise one by its tag."""
    name = func._schema.name.removeprefix("aten::")
    own = REGISTRY.get(name)
    if own is None and name.endswith("_") and not name.endswith("__"):
        own = REGISTRY.get(name[:-1])
    if own is None and torch.Tag.pointwise in func.tags:
        own = REGISTRY["pointwise"]
    return own


@functools.cache
def _arguments(func: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((a.name, a.default_value if a.has_default_value() else None) for a in func._schema.arguments)


def bind(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, defaults filled in."""
    named = _arguments(func)
    bound = {name: args[i] if i < len(args) else default for i, (name, default) in enumerate(named)}
    bound.update(kwargs)
    return bound
