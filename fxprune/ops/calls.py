"""Calls in a graph as ATen ops with named arguments, whatever their spelling.

``x.narrow(1, 0, 4)``, ``torch.narrow(x, dim=1, start=0, length=4)`` and
``torch.ops.aten.narrow.default(x, 1, 0, 4)`` are the same op with the arguments ``self``, ``dim``,
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
"""The target, positional arguments and keyword arguments of a node."""


@dataclass(frozen=True)
class OpCall:
    """A node that calls one ATen op.

    Attributes
    ----------
    node:
        The node that calls it.
    name:
        The op's name, without ``_copy``: ``view`` for ``view_copy``.
    ran:
        The op's arguments in the original by name, with defaults filled in.
    given:
        The arguments that the node passes, by name. Arguments that the graph computes are nodes.
    """

    node: fx.Node
    name: str
    ran: Mapping[str, Any]
    given: Mapping[str, Any]
    _places: Mapping[str, int | str]  # name -> index of the positional argument, or keyword

    @property
    def unchanged(self) -> NewCall:
        """The call as it is."""
        return self.node.target, self.node.args, self.node.kwargs

    def with_(self, changed: Mapping[str, Any]) -> NewCall:
        """Return the call in its own spelling with new values for some arguments."""
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
    """Return a list in the form of the earlier value: a list, a tuple or a single number."""
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
    """Return the op that a node calls.

    Parameters
    ----------
    node:
        The node.
    ran:
        The ops that the node ran in the original, each with its arguments.
    old:
        Function that returns the original's value of an argument of the node.

    Returns
    -------
    OpCall or None
        None if the node ran several ops, or if its arguments are not the op's arguments.
    """
    if len(ran) > 1:  # torch.ones detaches its result
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
        return None  # the node computes it, as fftshift computes the shifts of a roll
    name = name_of_op(func).removesuffix("_copy")
    return OpCall(node, name, values, given, places)


def _is_given(given: Any, ran: Any) -> bool:
    """Tell whether a given value is the one an op ran with; one number may stand for a list."""
    if isinstance(given, Tensor) or isinstance(ran, Tensor):
        return given is ran
    if isinstance(ran, (list, tuple)):
        items = list(given) if isinstance(given, (list, tuple)) else [given] * len(ran)
        return len(items) == len(ran) and all(map(_is_given, items, ran))
    numbers = isinstance(given, (int, float)) and isinstance(ran, (int, float))
    return isinstance(ran, torch.device) or bool(
        (numbers or type(given) is type(ran)) and given == ran
    )
