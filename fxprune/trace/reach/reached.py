"""What the code of a model can reach, found once and reused for many calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fxprune.common.contents import iterate_leaves
from fxprune.trace.reach.changes import Reach
from fxprune.trace.reach.holders import keys_of

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
        self._reach: Reach | None = None

    def now(self) -> Reach:
        """Return what the code can reach, for a comparison after a call of the model."""
        if self._reach is None or not self._reach.begin():
            self._reach = Reach(self._model)
        return self._reach

    def trusts(self, module: str) -> bool:
        """Tell whether the code of a module only computes, so that what it caches does not matter.

        Parameters
        ----------
        module:
            The name of a Python module.
        """
        return self._reach is not None and self._reach.trusts(module)

    @property
    def cache_misses(self) -> int:
        """The number of results that caching functions (``functools.lru_cache``) have computed."""
        if self._reach is None:
            return 0
        return sum(memo.cache_info().misses for memo in self._reach.memos)

    def foreign_keys(self, is_foreign: Callable[[Any], bool]) -> list[tuple[Any, Any]]:
        """Return each dict and set that has a key which holds something foreign, with that key.

        A table is returned once for each such key.
        """
        holders = self._reach.holders if self._reach is not None else []
        found = []
        for table in holders:
            if isinstance(table, (dict, set)):
                keys = [key for key in keys_of(table) if any(map(is_foreign, iterate_leaves(key)))]
                found += [(table, key) for key in keys]
        return found

    def remove_foreign(self, is_foreign: Callable[[Any], bool]) -> list[Any]:
        """Remove foreign values that a call has put into containers and objects.

        See :meth:`Reach.remove_foreign`.

        Returns
        -------
        The foreign values that were found.
        """
        return [] if self._reach is None else self._reach.remove_foreign(is_foreign)

    def search_again(self) -> None:
        """Search the code again, because attributes of the modules have changed."""
        self._reach = Reach(self._model)
