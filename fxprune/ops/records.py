"""What is known of the tensors of a labelled run, and of the ops that ran."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.common.dispatch import META, map_tensors
from fxprune.labels import Array, Field, Units, compact
from fxprune.ops.macs import op_macs

__all__ = [
    "INPUT",
    "READS_INPUT",
    "Contraction",
    "Event",
    "Met",
    "Operand",
    "Record",
    "Sighting",
    "as_torch",
    "first_reason",
    "from_torch",
    "partner_of",
    "place",
    "refuse_rank",
    "same_fields",
    "take",
]


READS_INPUT = "reads an input of the model"
"""Why the axes stay with which a model's first layers read what it is called with."""


INPUT = 2  # the number of the reason of an input itself; who meets one has its own


@dataclass(slots=True, eq=False)
class Record:
    """What is known of one tensor. ``unlabelled``: axes of a parameter that no op has met yet."""

    tensor: Tensor
    fields: list[Field]
    version: int = -1
    base: Record | None = None  # the tensor that this one is a view of
    overwritten: bool = False  # an in-place op may have left non-zeros at removed elements
    name: str = ""  # parameters and buffers: their name
    axes: tuple[int, ...] = ()  # parameters and buffers: the number of each axis
    unlabelled: set[int] = field(default_factory=set)
    # parameters: every field there ever was, for the report of pins
    own_fields: list[Field] = field(default_factory=list)
    # dimension -> why the labels there were pinned
    lost: dict[int, int] = field(default_factory=dict)

    @property
    def unmet(self) -> bool:
        """Whether this is a parameter that no op has met."""
        axes = {axis for axis, size in enumerate(self.tensor.shape) if size > 1}
        return not self.fields and bool(axes) and self.unlabelled == axes


@dataclass(frozen=True, slots=True, eq=False)
class Sighting:
    """A field that varies along several dimensions of some tensor: its survivors must form a
    rectangle.

    ``fixed`` dimensions cannot shrink here. ``merged`` dimensions are (or were) one dimension on
    the other side of a reshape, so survivors must keep their order when they are laid out one
    after the other.
    """

    labels: Array
    fixed: frozenset[int]
    merged: tuple[int, ...]
    node: str


@dataclass(slots=True, eq=False)
class Operand:
    """A tensor laid into a rule's virtual dimensions: ``dims[i]`` is the virtual dimension of the
    tensor's i-th one.
    """

    fields: list[Field]
    sized: set[int]
    unlabelled: dict[int, int]  # virtual dimension -> axis of the parameter
    record: Record | None = None
    dims: tuple[int, ...] = ()
    tensor: Tensor | None = None
    # the tensor that the fields come from, where they are laid out by hand
    carrier: Tensor | None = None

    @property
    def source(self) -> Tensor | None:
        """The tensor that the fields come from."""
        return self.carrier if self.tensor is None else self.tensor


@dataclass(slots=True, eq=False)
class Met:
    """A field after operands met: its labels, and for each operand that carries it whether it is
    zero there.
    """

    labels: Array
    zero: dict[int, bool]


@dataclass(frozen=True, slots=True, eq=False)
class Contraction:
    """An executed ATen op that costs multiply-accumulates, with its arguments and its result.

    The labelled batch can be larger than the example's: ``share`` is the part of the costs that
    the example has.
    """

    node: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    share: Fraction = Fraction(1)

    @property
    def read(self) -> list[Tensor]:
        """Everything it read."""
        found: list[Tensor] = []
        map_tensors(found.append, (self.args, self.kwargs))
        return found

    @property
    def tensors(self) -> list[Tensor]:
        """Everything it read and gave."""
        found: list[Tensor] = []
        map_tensors(found.append, (self.args, self.kwargs, self.out))
        return found

    def macs(self, shape: Callable[[Tensor], Sequence[int]] | None = None) -> int:
        """Multiply-accumulates of the labelled batch; ``shape`` gives another size to each
        tensor.
        """

        def resized(tensor: Tensor) -> Tensor:
            return (
                tensor
                if shape is None
                else torch.empty(tuple(shape(tensor)), dtype=tensor.dtype, device=META)
            )

        return op_macs(self.func, *map_tensors(resized, (self.args, self.kwargs, self.out))) or 0


@dataclass(frozen=True, slots=True, eq=False)
class Event:
    """An executed ATen op that a run with data has to know again: one that takes statistics, or
    one that draws random numbers.

    Attributes
    ----------
    node, op:
        The node that executed it, and the op.
    out:
        What it gave: a tensor, or several.
    gone:
        For statistics: labels of the input whose removed elements leave them.
    run:
        What tells the runs of one graph apart, of which a part that is called several times has
        several.
    """

    node: str
    op: Any
    out: Any
    gone: tuple[Array, ...]
    run: object


def same_fields(fields: Sequence[Field], others: Sequence[Field]) -> bool:
    return len(fields) == len(others) and all(
        np.array_equal(f.labels, g.labels) for f, g in zip(fields, others, strict=True)
    )


def first_reason(numbers: Iterable[int]) -> int:
    """Of several reasons the first pin there was; without any, that it is an input."""
    found = list(numbers)
    return min((number for number in found if number > INPUT), default=max(found, default=0))


def place(labels: Array, dims: Sequence[int], rank: int) -> Array:
    """Lay an array's dimensions at the given virtual dimensions.

    >>> place(np.arange(6).reshape(2, 3), (2, 0), 4).shape
    (3, 1, 2, 1)
    """
    shape = [1] * rank
    for d, v in enumerate(dims):
        shape[v] = labels.shape[d]
    order = sorted(range(len(dims)), key=lambda d: dims[d])
    return labels.transpose(order).reshape(shape)


def take(labels: Array, dims: Sequence[int]) -> Array:
    """The inverse of :func:`place`: read virtual dimensions (all others have size 1)."""
    kept = sorted(dims)
    reduced = labels.reshape([labels.shape[v] for v in kept])
    return reduced.transpose([kept.index(v) for v in dims])


def partner_of(
    units: Units, labels: Array, dims: set[int], free: list[Field], alone: bool
) -> Field | None:
    """The field among ``free`` that pairs with these labels."""
    same = [f for f in free if f.dims == dims]
    inner = [f for f in free if max(dims) in f.dims and (f.dims < dims or f.dims > dims)]
    # provenance decides: a field that already holds some of these labels
    if len(same) + len(inner) > 1:
        related = [f for f in same + inner if np.isin(f.labels, labels[labels > 0]).any()]
        if related:
            return related[0]
    if alone and len(same) == 1 and not inner:
        return same[0]
    for f in same:  # several fields on one axis: pair those that repeat in the same pattern
        if f.labels.shape == labels.shape and _same_pattern(f.labels, labels):
            return f
    # rather than the copies that a size made
    of_weights = [f for f in same if units.owners(f.labels) != [-1]]
    if alone and len(of_weights) == 1:
        return of_weights[0]
    return inner[0] if inner and (alone or not same) else None


def _same_pattern(a: Array, b: Array) -> bool:
    return bool(
        np.array_equal(
            np.unique(a, return_inverse=True)[1].ravel(),
            np.unique(b, return_inverse=True)[1].ravel(),
        )
    ) or (
        len(np.unique(a))
        == len(np.unique(b))
        == len({(x, y) for x, y in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)})
    )


def refuse_rank(f: Field, tensor: Tensor) -> Field:
    raise AssertionError(
        f"a rule gave labels of shape {f.labels.shape} to a tensor of shape {tuple(tensor.shape)}"
    )


def as_torch(labels: Array, shape: Sequence[int]) -> Tensor:
    """An array of labels as an expanded (stride 0) integer tensor of the full shape, for movement
    ops to run on.
    """
    return torch.from_numpy(np.ascontiguousarray(labels)).expand(tuple(shape))


def from_torch(labels: Tensor) -> Array:
    return compact(labels.numpy())
