"""Calls in a graph as ATen ops with named arguments, whatever their spelling.

``x.narrow(1, 0, 4)``, ``torch.narrow(x, dim=1, start=0, length=4)`` and
``torch.ops.aten.narrow.default(x, 1, 0, 4)`` are the same op with the arguments ``self``, ``dim``,
``start`` and ``length``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        ran = [call for call in ran if call[0] is not torch.ops.aten.detach.default]
    if len(ran) != 1 or node.op not in ("call_function", "call_method"):
        return None
    func, args, kwargs = ran[0]
    values = bind(func, args, kwargs)
    matched = _MatchedArguments(func, values, old)
    fits = matched.add_positional(node.args) and matched.add_keywords(node.kwargs)
    if not fits or not matched.has_all_required():
        return None
    name = name_of_op(func).removesuffix("_copy")
    return OpCall(node, name, values, matched.given, matched.places)


class _MatchedArguments:
    """The arguments of a node, matched with those of the op that it ran.

    Attributes
    ----------
    places:
        Name -> index of the positional argument, or keyword.
    given:
        Name -> argument of the node.
    """

    def __init__(self, func: Any, values: Mapping[str, Any], old: Callable[[Any], Any]) -> None:
        self.places: dict[str, int | str] = {}
        self.given: dict[str, Any] = {}
        self._schema = func._schema.arguments
        self._values, self._old = values, old

    def add_positional(self, args: Sequence[Any]) -> bool:
        """Match positional arguments in order; return False if one is not the op's."""
        last = sum(not argument.kwarg_only for argument in self._schema) - 1
        for position, argument in enumerate(args):
            if position > last:
                return False
            name, rest = self._schema[position].name, list(args[position:])
            if position == last and len(rest) > 1:  # sizes given one by one: x.view(2, 3)
                return self._add(name, position - len(args), rest)
            if not self._add(name, position, argument):
                return False
        return True

    def add_keywords(self, kwargs: Mapping[str, Any]) -> bool:
        """Match keyword arguments by name, else by value; return False if one is not the op's."""
        for key, argument in kwargs.items():
            old = self._old(argument)
            names = [a.name for a in self._schema if a.name not in self.places]
            free = [name for name in names if _is_given(old, self._values[name])]
            if not free:
                return False
            name = key if key in free else free[0]
            self.places[name], self.given[name] = key, argument
        return True

    def has_all_required(self) -> bool:
        """Tell whether the node passes every argument without a default.

        Otherwise the node computes one, as ``fftshift`` computes the shifts of a roll.
        """
        required = (a.name for a in self._schema if not a.has_default_value())
        return all(name in self.given for name in required)

    def _add(self, name: str, place: int, argument: Any) -> bool:
        """Match one argument, or a list of them, if the op ran with its value."""
        old = list(map(self._old, argument)) if place < 0 else self._old(argument)
        if not _is_given(old, self._values[name]):
            return False
        self.places[name], self.given[name] = place, argument
        return True


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
