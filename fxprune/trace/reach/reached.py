"""What the code of a model can reach, found once and reused for many calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fxprune.common.contents import every_leaf
from fxprune.trace.reach.holders import keys_of
from fxprune.trace.reach.walk import Reach

__all__ = ["Reached"]


class Reached:
    """What the code of a model and of all its submodules can reach.

    The code is searched once, and the result serves all calls that change nothing.

    Parameters
    ----------
    model:
        The model, usually a meta copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found: Reach | None = None

    def now(self) -> Reach:
        """Return what the code can reach, for a comparison after a call of the model."""
        if self._found is None or not self._found.begin():
            self._found = Reach(self._model)
        return self._found

    def trusts(self, module: str) -> bool:
        """Tell whether the code of a module only computes, so that what it caches does not matter.

        Parameters
        ----------
        module:
            The name of a Python module.
        """
        return self._found is not None and self._found._trusts(module)

    @property
    def made(self) -> int:
        """The number of results that caching functions (``functools.lru_cache``) have computed."""
        return (
            0
            if self._found is None
            else sum(memo.cache_info().misses for memo in self._found._memos)
        )

    def keys(self, is_foreign: Callable[[Any], bool]) -> list[tuple[Any, Any]]:
        """Return each dict and set that has a key which holds something foreign, with that key.

        A table is returned once for each such key.
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
        """Remove foreign values that a call has put into containers and objects.

        See :meth:`Reach.take_out`.

        Returns
        -------
        The foreign values that were found.
        """
        return [] if self._found is None else self._found.take_out(is_foreign)

    def begin_anew(self) -> None:
        """Search the code again, because attributes of the modules have changed."""
        self._found = Reach(self._model)
