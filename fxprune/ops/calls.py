"""A node as the ATen op that it is, with its arguments by that op's own names, however the call is
spelled.

``x.narrow(1, 0, 4)``, ``torch.narrow(x, dim=1, start=0, length=4)`` and
``torch.ops.aten.narrow.default(x, 1, 0, 4)`` are one op with the arguments ``self``, ``dim``,
``start`` and ``length``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.ops.table import bind, name_of_op

__all__ = ["NewCall", "OpCall", "call_of"]

NewCall = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""Target, positional and keyword arguments of a node."""


@dataclass(frozen=True)
class OpCall:
    """One ATen op.

    Attributes
    ----------
    node:
        The node that calls it.
    name:
        The op's name; that of ``view`` for ``view_copy``.
    ran:
        What the op ran with in the original, by name, defaults filled in.
    given:
        What the node gives, by name; nodes stand in it where the graph computes an argument.
    """

    node: fx.Node
    name: str
    ran: Mapping[str, Any]
    given: Mapping[str, Any]
    _places: Mapping[str, int | str]  # by name: which positional argument, which keyword

    @property
    def unchanged(self) -> NewCall:
        return self.node.target, self.node.args, self.node.kwargs

    def with_(self, changed: Mapping[str, Any]) -> NewCall:
        """The same call, in its own spelling, with other values for some arguments."""
        args, kwargs = list(self.node.args), dict(self.node.kwargs)
        for name, value in changed.items():
            place = self._places.get(name, name)
            if isinstance(place, str):
                kwargs[place] = _in_form_of(value, kwargs.get(place))
            elif place < 0:
                args[place:] = value
            else:
                args[place] = _in_form_of(value, args[place])
        return self.node.target, tuple(args), kwargs


def _in_form_of(value: Any, before: Any) -> Any:
    """A value in the form in which it was given: a list, a tuple, or the one number that stands
    for either.
    """
    if not isinstance(value, list):
        return value
    if isinstance(before, tuple):
        return tuple(value)
    return value[0] if len(value) == 1 and isinstance(before, (int, fx.Node)) else value


def call_of(
    node: fx.Node,
    ran: list[tuple[Any, tuple[Any, ...], dict[str, Any]]],
    old: Callable[[Any], Any],
) -> OpCall | None:
    """The op that a node is; None if it is more than one, or if its arguments are not those of the
    op.

    Parameters
    ----------
    ran:
        What ran for the node in the original: each op with its arguments.
    old:
        Gives the value that an argument of the node had then.
    """
    if len(ran) > 1:  # what torch.ones makes is detached
        ran = [own for own in ran if own[0] is not torch.ops.aten.detach.default]
    if len(ran) != 1 or node.op not in ("call_function", "call_method"):
        return None
    func, args, kwargs = ran[0]
    values = bind(func, args, kwargs)
    places: dict[str, int | str] = {}
    given: dict[str, Any] = {}
    names = [argument.name for argument in func._schema.arguments]
    last = sum(not argument.kwarg_only for argument in func._schema.arguments) - 1
    for position, argument in enumerate(node.args):
        if position > last:
            return None
        name, rest = names[position], list(node.args[position:])
        if position == last and len(rest) > 1:  # sizes given one by one: x.view(2, 3)
            if not _is_given(list(map(old, rest)), values[name]):
                return None
            places[name], given[name] = position - len(node.args), rest
            break
        if not _is_given(old(argument), values[name]):
            return None
        places[name], given[name] = position, argument
    for key, argument in node.kwargs.items():
        free = [
            name for name in names if name not in places and _is_given(old(argument), values[name])
        ]
        if not free:
            return None
        name = key if key in free else free[0]
        places[name], given[name] = key, argument
    if any(
        not argument.has_default_value() and argument.name not in given
        for argument in func._schema.arguments
    ):
        return None  # the node works it out itself, as fftshift does with the shifts of a roll
    name = name_of_op(func).removesuffix("_copy")
    return OpCall(node, name, values, given, places)


def _is_given(given: Any, ran: Any) -> bool:
    """Whether an op ran with the value that was given; one number may stand for a list of such."""
    if isinstance(given, Tensor) or isinstance(ran, Tensor):
        return given is ran
    if isinstance(ran, (list, tuple)):
        items = list(given) if isinstance(given, (list, tuple)) else [given] * len(ran)
        return len(items) == len(ran) and all(map(_is_given, items, ran))
    numbers = isinstance(given, (int, float)) and isinstance(ran, (int, float))
    return isinstance(ran, torch.device) or bool(
        (numbers or type(given) is type(ran)) and given == ran
    )
