"""The table of rules: ATen op -> how labels pass through it. What is not in it is decomposed,
pointwise, or pinned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fxprune.doors import door
from fxprune.errors import ArgumentError
from fxprune.rules.context import Context

__all__ = ["REGISTRY", "Rule", "bind", "find", "register_rule", "rule"]

Handler = Callable[[Context, Any, dict[str, Any], Any], None]
"""``handler(context, op, arguments by name, result)``: reads the fields of the arguments, puts
those of the result.
"""


@dataclass(frozen=True)
class Rule:
    """How labels pass through an op, and who says so."""

    handler: Handler
    family: str
    doc: str
    of_user: bool = False


REGISTRY: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for ATen ops, by the name of their overload packet (``"convolution"`` or
    ``"library::op"``).
    """

    def register(handler: Handler) -> Handler:
        family = handler.__module__.rsplit(".", 1)[-1]
        doc = _first_paragraph(handler)
        for name in names:
            if name in REGISTRY:
                raise ValueError(f"{name} has two rules")
            REGISTRY[name] = Rule(handler, family, doc)
        return handler

    return register


def _first_paragraph(handler: Handler) -> str:
    return " ".join((handler.__doc__ or "").strip().partition("\n\n")[0].split())


@door
def register_rule(name: str, *, like: str | None = None) -> Callable[[Handler], Handler]:
    """Say how channels pass through an op of your own; see ``docs/extending.md`` for the verbs of
    a rule.

    :func:`fxprune.prune` proves every model in which such a rule takes part against the masked
    original.

    Parameters
    ----------
    name:
        ``"library::op"``, as the op is registered with ``torch.library``; all its overloads have
        the rule.
    like:
        The name of an op whose rule serves for this one too, its arguments being called the same:
        ``"linear"``; ``"pointwise"`` for any op that works element by element, broadcast included.
        Without it, use the result as a decorator of a function ``rule(context, op, arguments by
        name, result)``.

    Raises
    ------
    ArgumentError
        If the name has no library, is one of PyTorch's own, or has a rule already; if ``like`` has
        none.

    Examples
    --------
    >>> import fxprune, torch
    >>> @torch.library.custom_op("fxprune_doc::halve", mutates_args=())
    ... def halve(x: torch.Tensor) -> torch.Tensor:
    ...     return x / 2
    >>> halve.register_fake(torch.empty_like)  # doctest: +ELLIPSIS
    <...>
    >>> _ = fxprune.register_rule("fxprune_doc::halve", like="pointwise")
    >>> class Net(torch.nn.Sequential):
    ...     def forward(self, x):
    ...         return self[1](halve(self[0](x)))
    >>> net = Net(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2))
    >>> fxprune.prune(net, torch.zeros(1, 3), channels=0.5).model.get_submodule("1").weight.shape
    torch.Size([2, 4])
    """
    library, _, op = name.partition("::") if isinstance(name, str) else ("", "", "")
    if not library or not op or library in ("aten", "prims", "prim"):
        raise ArgumentError(
            f'register_rule: {name!r} is no op of your own: give its name as "library::op".'
        )
    if name in REGISTRY:
        raise ArgumentError(f"register_rule: {name} has a rule already.")
    if like is not None and (not isinstance(like, str) or like not in REGISTRY):
        raise ArgumentError(
            f"register_rule: {like!r} has no rule that {name} could share; docs/rules.md lists "
            "those that have."
        )

    def register(handler: Handler, family: str = "user") -> Handler:
        if not callable(handler):
            raise ArgumentError(
                f"register_rule: a rule of {name} is a function rule(context, op, arguments by "
                f"name, result), not a {type(handler).__name__}."
            )
        REGISTRY[name] = Rule(handler, family, _first_paragraph(handler), of_user=True)
        find.cache_clear()
        return handler

    if like is not None:
        register(REGISTRY[like].handler, REGISTRY[like].family)
    return register


@functools.cache
def find(func: Any) -> Rule | None:
    """The rule for an ATen overload: its own, that of its functional form or of the view that it
    copies, or by its tag.
    """
    name = func._schema.name.removeprefix("aten::")
    own = REGISTRY.get(name) or REGISTRY.get(name.removesuffix("_copy"))
    if own is None and name.endswith("_") and not name.endswith("__"):
        own = REGISTRY.get(name[:-1])
    # torch.equal is tagged, too
    gives_tensors = all(isinstance(given.type, torch.TensorType) for given in func._schema.returns)
    if own is None and torch.Tag.pointwise in func.tags and gives_tensors:
        own = REGISTRY["pointwise"]
    return own


@functools.cache
def _schema_arguments(func: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (a.name, a.default_value if a.has_default_value() else None)
        for a in func._schema.arguments
    )


def bind(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, defaults filled in."""
    named = _schema_arguments(func)
    bound = {
        name: args[i] if i < len(args) else default for i, (name, default) in enumerate(named)
    }
    bound.update(kwargs)
    return bound
