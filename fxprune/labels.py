"""Labels: which positions of a tensor can only be removed together.

Every position of a parameter axis carries a label, an integer. Labels that must go together are
united (union-find); a class of united labels is a *unit*. A label that may not be removed is
*pinned*; position value 0 means "nothing removable here".

A tensor carries *fields*. A field is an integer array broadcastable to the tensor's shape: the
label at each element. An element vanishes when one of its fields' labels does. Along a dimension
of size 1 a field does not vary, whatever the tensor's size there, so an activation of any
resolution costs as many integers as it has channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Field", "Units", "alive_mask", "compact", "varied"]

Array: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Field:
    """One labelling of a tensor.

    Attributes
    ----------
    labels:
        Integer array with as many dimensions as the tensor; size 1 where the labels do not vary.
    zero:
        Whether the tensor is exactly 0 at removed elements of the masked original. A sum over
        removed zeros is exact; a sum over ``sigmoid(0)`` is not.
    """

    labels: Array
    zero: bool

    @property
    def dims(self) -> frozenset[int]:
        return frozenset(d for d, size in enumerate(self.labels.shape) if size > 1)


class Units:
    """Disjoint sets of labels, with pins.

    >>> units = Units()
    >>> a, b = units.fresh(3, owner=0), units.fresh(3, owner=1)
    >>> units.unite(a, b[::-1])
    >>> bool((units.find(a) == units.find(b[::-1])).all())
    True
    >>> units.pin(b[:1], reason=7)
    >>> units.live(a).tolist()        # a[2] went with b[0]
    [1, 2, 0]
    """

    def __init__(self) -> None:
        self._parent = np.zeros(1024, dtype=np.int64)
        self._pin = np.zeros(1024, dtype=np.int32)  # at roots: 0, or the reason's number
        self._owner = np.full(1024, -1, dtype=np.int32)
        self.count = 1  # label 0 stands for "nothing removable"
        self.pinning = True  # a check of an emitted model looks for wrong unions only
        self.uniting = True  # without it labels say on which axis they began, and nothing else
        self.version = 0  # grows whenever an earlier answer of find or live may have become stale

    def fresh(self, n: int, owner: int) -> Array:
        """``n`` new labels, each a unit of its own, of the parameter axis numbered ``owner``
        (-1: on none).
        """
        end = self.count + n
        if end > len(self._parent):
            room = max(end, 2 * len(self._parent))
            self._parent = np.concatenate(
                [self._parent, np.zeros(room - len(self._parent), dtype=np.int64)]
            )
            self._pin = np.concatenate(
                [self._pin, np.zeros(room - len(self._pin), dtype=np.int32)]
            )
            self._owner = np.concatenate(
                [self._owner, np.full(room - len(self._owner), -1, dtype=np.int32)]
            )
        labels = np.arange(self.count, end, dtype=np.int64)
        self._parent[self.count : end] = labels
        self._owner[self.count : end] = owner
        self.count = end
        return labels

    def owners(self, labels: Array) -> list[int]:
        """The parameter axes on which these labels began."""
        owners = self._owner[labels.ravel()]
        if owners.size and owners[0] == owners[-1] and bool((owners == owners[0]).all()):
            return [int(owners[0])]
        return [int(o) for o in np.unique(owners)]

    def find(self, labels: Array) -> Array:
        """The representative of each label's unit (its smallest label)."""
        parent = self._parent
        root = parent[labels]
        up = parent[root]
        if (up == root).all():
            return root
        while True:
            root, up = up, parent[up]
            if (up == root).all():
                break
        parent[labels] = root  # path compression
        return root

    def live(self, labels: Array) -> Array:
        """Like :meth:`find`, with 0 for every pinned unit."""
        root = self.find(labels)
        pinned = self._pin[root]
        return np.where(pinned > 0, 0, root) if pinned.any() else root

    def unite(self, a: Array, b: Array) -> None:
        """Make ``a[i]`` and ``b[i]`` one unit for every i (broadcast). A 0 on one side pins the
        other.
        """
        if not self.uniting:
            return
        a, b = np.broadcast_arrays(a, b)
        a, b = a.ravel(), b.ravel()
        if not (a.all() and b.all()):
            fixed = (a == 0) != (b == 0)
            if fixed.any():
                self.pin(np.where(a == 0, b, a)[fixed], reason=1)
            both = (a != 0) & (b != 0)
            a, b = a[both], b[both]
        while a.size:
            ra, rb = self.find(a), self.find(b)
            differ = ra != rb
            if not differ.any():
                return
            a, b, ra, rb = a[differ], b[differ], ra[differ], rb[differ]
            low, high = np.minimum(ra, rb), np.maximum(ra, rb)
            # Hook each larger root below the smallest partner; what that missed is done in the
            # next round.
            np.minimum.at(self._parent, high, low)
            pins = self._pin[high]
            if pins.any():
                roots = self.find(high)
                new = (pins > 0) & (self._pin[roots] == 0)
                self._pin[roots[new]] = pins[new]
            self.version += 1

    def pin(self, labels: Array, reason: int) -> None:
        """Forbid the removal of these labels' units. The first reason (a positive number)
        stays.
        """
        if not self.pinning:
            return
        roots = self.find(np.asarray(labels).ravel())
        roots = roots[(roots != 0)]
        roots = roots[self._pin[roots] == 0]
        if roots.size:
            self._pin[roots] = reason
            self.version += 1

    def reasons(self, labels: Array) -> npt.NDArray[np.int32]:
        """The number of the reason for which each label's unit is pinned, 0 where it is not."""
        return self._pin[self.find(labels)]


def varied(labels: npt.NDArray[Any]) -> tuple[int, ...]:
    """The dimensions along which an array of labels varies."""
    # a generator takes twice as long
    return tuple([d for d, size in enumerate(labels.shape) if size > 1])


def compact(labels: Array) -> Array:
    """Reduce every dimension along which the labels are constant to size 1.

    >>> compact(np.array([[1, 2], [1, 2]])).shape
    (1, 2)
    """
    for d, size in enumerate(labels.shape):
        if size > 1:
            first = labels[(slice(None),) * d + (slice(0, 1),)]
            if (
                labels.strides[d] != 0
                and labels[(0,) * labels.ndim]
                != labels[(0,) * d + (-1,) + (0,) * (labels.ndim - d - 1)]
            ):
                continue  # the usual case, seen at two corners
            if labels.strides[d] == 0 or np.array_equal(
                np.broadcast_to(first, labels.shape), labels
            ):
                labels = first
    return labels


def alive_mask(labels: Iterable[Array], alive: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which elements survive: the conjunction over fields of ``alive[label]``, compact
    (broadcastable to the tensor).
    """
    mask: npt.NDArray[np.bool_] | None = None
    for array in labels:
        own = alive[array]
        mask = own if mask is None else mask & own
    if mask is None:
        return np.ones((), dtype=bool)
    return mask
