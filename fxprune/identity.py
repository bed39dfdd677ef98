"""Tables of what is known of tensors, looked up by which tensor it is and not by its values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar, overload

from torch import Tensor

__all__ = ["TensorMap"]

V = TypeVar("V")
D = TypeVar("D")


class TensorMap(Generic[V]):
    """A dictionary from tensors to values. Two tensors are one key only if they are the same
    object.

    The ``id`` of an object that died is given to a new one. The map keeps its tensors alive, so
    that a new tensor never finds what was noted for an old one.

    Examples
    --------
    >>> import torch
    >>> noted, x = TensorMap(), torch.zeros(2)
    >>> noted[x] = "x"
    >>> noted.get(x), noted.get(torch.zeros(2)), x in noted, len(noted)
    ('x', None, True, 1)
    """

    __slots__ = ("_entries",)

    def __init__(self, items: Iterable[tuple[Tensor, V]] = ()) -> None:
        self._entries: dict[int, tuple[Tensor, V]] = {
            id(tensor): (tensor, value) for tensor, value in items
        }

    def __setitem__(self, tensor: Tensor, value: V) -> None:
        self._entries[id(tensor)] = tensor, value

    def __getitem__(self, tensor: Tensor) -> V:
        return self._entries[id(tensor)][1]

    def __contains__(self, tensor: object) -> bool:
        return id(tensor) in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Tensor]:
        return (tensor for tensor, _ in self._entries.values())

    @overload
    def get(self, tensor: object) -> V | None: ...
    @overload
    def get(self, tensor: object, default: D) -> V | D: ...
    def get(self, tensor: object, default: D | None = None) -> V | D | None:
        """What is noted for this very object; ``default`` where nothing is."""
        entry = self._entries.get(id(tensor))
        return default if entry is None else entry[1]

    def setdefault(self, tensor: Tensor, value: V) -> V:
        return self._entries.setdefault(id(tensor), (tensor, value))[1]

    def discard(self, tensor: Tensor) -> None:
        """Forget a tensor, and let it go."""
        self._entries.pop(id(tensor), None)

    def values(self) -> Iterator[V]:
        return (value for _, value in self._entries.values())

    def items(self) -> Iterator[tuple[Tensor, V]]:
        return iter(self._entries.values())
