"""Labels: which positions of a tensor can only be removed together.

Every position of a parameter axis carries a label, a positive integer. Labels that must be removed
together are united (union-find). A set of united labels is a *unit*. A unit that may not be
removed is *pinned*. Label 0 means "nothing can be removed here".

A tensor carries *fields*. A field is an integer array that broadcasts to the tensor's shape and
holds the label of each element. An element is removed when the label of any of its fields is
removed. Where a field has size 1, it does not vary along that dimension, whatever the tensor's
size. So an activation costs as many integers as it has channels, at any resolution.
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
    """One label array of a tensor.

    Attributes
    ----------
    labels:
        Integer array with as many dimensions as the tensor; size 1 where the labels do not vary.
    zero:
        Whether the tensor is exactly 0 at removed elements in the masked original. If it is, a sum
        over removed elements is exact. A sum over ``sigmoid(0)`` is not.
    """

    labels: Array
    zero: bool

    @property
    def dims(self) -> frozenset[int]:
        """The dimensions along which the labels vary."""
        return frozenset(d for d, size in enumerate(self.labels.shape) if size > 1)


class Units:
    """Disjoint sets of labels (union-find), each of which can be pinned.

    Attributes
    ----------
    count:
        Number of labels, label 0 included. Labels are the integers below it.
    pinning:
        Whether :meth:`pin` has an effect. It is switched off to check an emitted model, where only
        wrong unions matter.
    uniting:
        Whether :meth:`unite` has an effect. Without it, labels only tell on which axis they
        originate.
    version:
        Grows whenever an earlier answer of :meth:`find` or :meth:`live` may have become stale.

    >>> units = Units()
    >>> a, b = units.fresh(3, owner=0), units.fresh(3, owner=1)
    >>> units.unite(a, b[::-1])
    >>> bool((units.find(a) == units.find(b[::-1])).all())
    True
    >>> units.pin(b[:1], reason=7)
    >>> units.live(a).tolist()  # a[2] is in one unit with b[0]
    [1, 2, 0]
    """

    def __init__(self) -> None:
        self._parent = np.zeros(1024, dtype=np.int64)
        # valid at the root of each unit: 0, or the number of the reason why it is pinned
        self._pin = np.zeros(1024, dtype=np.int32)
        self._owner = np.full(1024, -1, dtype=np.int32)
        self.count = 1  # label 0 means "nothing can be removed here"
        self.pinning = True
        self.uniting = True
        self.version = 0

    def fresh(self, n: int, owner: int) -> Array:
        """Return new labels, each a unit of its own.

        Parameters
        ----------
        n:
            Number of labels.
        owner:
            Number of the parameter axis on which the labels lie, -1 if on none.

        Returns
        -------
        numpy.ndarray
            Consecutive integers, shape (n,).
        """
        end = self.count + n
        if end > len(self._parent):
            self._extend(max(end, 2 * len(self._parent)))
        labels = np.arange(self.count, end, dtype=np.int64)
        self._parent[self.count : end] = labels
        self._owner[self.count : end] = owner
        self.count = end
        return labels

    def _extend(self, capacity: int) -> None:
        """Make room for labels below ``capacity``."""
        more = capacity - len(self._parent)
        self._parent = np.concatenate([self._parent, np.zeros(more, dtype=np.int64)])
        self._pin = np.concatenate([self._pin, np.zeros(more, dtype=np.int32)])
        self._owner = np.concatenate([self._owner, np.full(more, -1, dtype=np.int32)])

    def owners(self, labels: Array) -> list[int]:
        """Return the numbers of the parameter axes for which these labels were made, ascending.

        -1 is among them if some labels were made for no parameter.
        """
        owners = self._owner[labels.ravel()]
        if owners.size and owners[0] == owners[-1] and bool((owners == owners[0]).all()):
            return [int(owners[0])]
        return [int(owner) for owner in np.unique(owners)]

    def find(self, labels: Array) -> Array:
        """Return the representative of each label's unit, which is its smallest label.

        The result has the shape of ``labels``.
        """
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
        """Return the representative of each label's unit, and 0 where the unit is pinned."""
        root = self.find(labels)
        pinned = self._pin[root]
        return np.where(pinned > 0, 0, root) if pinned.any() else root

    def unite(self, a: Array, b: Array) -> None:
        """Put ``a[i]`` and ``b[i]`` into one unit for every i.

        Parameters
        ----------
        a, b:
            Labels, broadcast against each other. Where one of the two is 0, the other is pinned.
        """
        if not self.uniting:
            return
        a, b = np.broadcast_arrays(a, b)
        a, b = self._pin_partners_of_zero(a.ravel(), b.ravel())
        while a.size:
            roots_a, roots_b = self.find(a), self.find(b)
            differ = roots_a != roots_b
            if not differ.any():
                return
            # The next round unites the pairs that are still apart.
            a, b = a[differ], b[differ]
            self._attach(roots_a[differ], roots_b[differ])

    def _pin_partners_of_zero(self, a: Array, b: Array) -> tuple[Array, Array]:
        """Pin labels whose partner is 0, and return the pairs in which none is."""
        if a.all() and b.all():
            return a, b
        fixed = (a == 0) != (b == 0)
        if fixed.any():
            self.pin(np.where(a == 0, b, a)[fixed], reason=1)
        both = (a != 0) & (b != 0)
        return a[both], b[both]

    def _attach(self, roots_a: Array, roots_b: Array) -> None:
        """Attach the larger root of each pair to its smallest partner, and hand its pin on."""
        low, high = np.minimum(roots_a, roots_b), np.maximum(roots_a, roots_b)
        np.minimum.at(self._parent, high, low)
        pins = self._pin[high]
        if pins.any():
            roots = self.find(high)
            new = (pins > 0) & (self._pin[roots] == 0)
            self._pin[roots[new]] = pins[new]
        self.version += 1

    def pin(self, labels: Array, reason: int) -> None:
        """Forbid the removal of the units of these labels.

        Parameters
        ----------
        labels:
            Any array of labels; 0 is ignored.
        reason:
            Number of the reason, positive. A unit that is pinned already keeps its first reason.
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
        """Return the number of the reason why each label's unit is pinned, 0 where it is not."""
        return self._pin[self.find(labels)]


def varied(labels: npt.NDArray[Any]) -> tuple[int, ...]:
    """Return the dimensions along which an array of labels varies: those of size above 1."""
    # a list is twice as fast as a generator here
    return tuple([d for d, size in enumerate(labels.shape) if size > 1])


def compact(labels: Array) -> Array:
    """Reduce every dimension along which the labels are constant to size 1.

    The result may be a view of ``labels``.

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
                continue  # the usual case: comparing two corners is enough
            if labels.strides[d] == 0 or np.array_equal(
                np.broadcast_to(first, labels.shape), labels
            ):
                labels = first
    return labels


def alive_mask(labels: Iterable[Array], alive: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return which elements of a tensor survive.

    Parameters
    ----------
    labels:
        The label arrays of the tensor's fields.
    alive:
        For each label, whether it survives.

    Returns
    -------
    numpy.ndarray
        True where the labels of all fields survive. It broadcasts to the tensor's shape. A tensor
        without fields survives as a whole: the result then has no dimensions.
    """
    mask: npt.NDArray[np.bool_] | None = None
    for array in labels:
        survives = alive[array]
        mask = survives if mask is None else mask & survives
    if mask is None:
        return np.ones((), dtype=bool)
    return mask
