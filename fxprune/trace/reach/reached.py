"""What the code of a model can reach, looked through once for all calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fxprune.common.contents import every_leaf
from fxprune.trace.reach.holders import keys_of
from fxprune.trace.reach.walk import Reach

__all__ = ["Reached"]


class Reached:
    """What the code of a model and of all modules below can reach: looked through once for all
    calls that change nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found: Reach | None = None

    def now(self) -> Reach:
        """To be compared with after a call of the model, or of a module below."""
        if self._found is None or not self._found.begin():
            self._found = Reach(self._model)
        return self._found

    def trusts(self, module: str) -> bool:
        """Whether the code of a module computes, and no more: what it remembers is its own
        business.
        """
        return self._found is not None and self._found._trusts(module)

    @property
    def made(self) -> int:
        """How many results functions that remember theirs have computed."""
        return (
            0
            if self._found is None
            else sum(memo.cache_info().misses for memo in self._found._memos)
        )

    def keys(self, is_foreign: Callable[[Any], bool]) -> list[tuple[Any, Any]]:
        """The dicts and sets that have keys which hold something of this kind, each with one of
        them.
        """
        found = self._found._holders if self._found is not None else []
        tables = [own for own in found if isinstance(own, (dict, set))]
        return [
            (own, key)
            for own in tables
            for key in keys_of(own)
            if any(map(is_foreign, every_leaf(key)))
        ]

    def take_out(self, is_foreign: Callable[[Any], bool]) -> list[Any]:
        """What a call since then has put into containers and objects, taken out (see
        :meth:`Reach.take_out`).
        """
        return [] if self._found is None else self._found.take_out(is_foreign)

    def begin_anew(self) -> None:
        """Look through the code anew: the attributes of the modules are others."""
        self._found = Reach(self._model)
