"""Records of a labelled run: its tensors, and the ops that ran."""

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
    "FIRST_REASONS",
    "INPUT",
    "READS_INPUT",
    "Contraction",
    "Event",
    "Met",
    "Operand",
    "Record",
    "Rectangle",
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
"""The reason why the input axes of a model's first layers stay."""


FIRST_REASONS = (("", ""), ("meets a part that stays", ""), ("is an input of the model", ""))
"""The reasons that every run knows: none, and the two that no op gives."""

INPUT = 2  # number of the reason of an input itself; a tensor that meets one has its own reason


@dataclass(slots=True, eq=False)
class Record:
    """What is known about one tensor.

    Attributes
    ----------
    tensor:
        The tensor.
    fields:
        Its fields.
    version:
        Version of the units for which the fields are up to date.
    base:
        Record of the tensor that this one is a view of.
    overwritten:
        Whether an in-place op may have left non-zeros at removed elements.
    name, axes:
        For parameters and buffers: the name, and the number of each axis.
    unlabelled:
        For parameters and buffers: axes that no op has met yet.
    own_fields:
        For parameters and buffers: every field that they ever had, for the report of pins.
    lost:
        Dimension -> number of the reason why the labels there were pinned.
    """

    tensor: Tensor
    fields: list[Field]
    version: int = -1
    base: Record | None = None
    overwritten: bool = False
    name: str = ""
    axes: tuple[int, ...] = ()
    unlabelled: set[int] = field(default_factory=set)
    own_fields: list[Field] = field(default_factory=list)
    lost: dict[int, int] = field(default_factory=dict)

    @property
    def unmet(self) -> bool:
        """Whether this is a parameter that no op has met."""
        axes = {axis for axis, size in enumerate(self.tensor.shape) if size > 1}
        return not self.fields and bool(axes) and self.unlabelled == axes


@dataclass(frozen=True, slots=True, eq=False)
class Rectangle:
    """A field that varies along several dimensions, whose survivors must form a rectangle.

    Attributes
    ----------
    labels:
        The field's labels.
    fixed:
        Dimensions that cannot shrink here.
    merged:
        Dimensions that a reshape merges into one, or splits from one. Their survivors must keep
        their order in the merged dimension.
    node:
        The fx node at which the field was seen.
    """

    labels: Array
    fixed: frozenset[int]
    merged: tuple[int, ...]
    node: str


@dataclass(slots=True, eq=False)
class Operand:
    """A tensor laid into the virtual dimensions of a rule.

    Attributes
    ----------
    fields:
        Its fields over the virtual dimensions.
    sized:
        Virtual dimensions in which it is larger than 1.
    unlabelled:
        Virtual dimension -> axis of the parameter, for axes that no op has met yet.
    record:
        The record of the tensor.
    dims:
        The virtual dimension of each dimension of the tensor.
    tensor:
        The tensor; None if the fields were laid out by hand.
    carrier:
        The tensor that the fields come from if they were laid out by hand.
    """

    fields: list[Field]
    sized: set[int]
    unlabelled: dict[int, int]
    record: Record | None = None
    dims: tuple[int, ...] = ()
    tensor: Tensor | None = None
    carrier: Tensor | None = None

    @property
    def source(self) -> Tensor | None:
        """The tensor that the fields come from."""
        return self.carrier if self.tensor is None else self.tensor


@dataclass(slots=True, eq=False)
class Met:
    """A field of the result of a merge.

    Attributes
    ----------
    labels:
        Its labels.
    zero:
        Index of each operand that has the field -> whether that operand is zero at removed
        elements.
    """

    labels: Array
    zero: dict[int, bool]


@dataclass(frozen=True, slots=True, eq=False)
class Contraction:
    """An executed ATen op that costs multiply-accumulates.

    Attributes
    ----------
    node:
        The node that executed it.
    func, args, kwargs, out:
        The op, its arguments and its result.
    share:
        The example's part of the cost. It is less than 1 if the labelled batch is larger than the
        example's.
    """

    node: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    share: Fraction = Fraction(1)

    @property
    def read(self) -> list[Tensor]:
        """The tensors among its arguments."""
        found: list[Tensor] = []
        map_tensors(found.append, (self.args, self.kwargs))
        return found

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among its arguments and results."""
        found: list[Tensor] = []
        map_tensors(found.append, (self.args, self.kwargs, self.out))
        return found

    def macs(self, shape: Callable[[Tensor], Sequence[int]] | None = None) -> int:
        """Return the multiply-accumulates for the labelled batch.

        ``shape``, if given, replaces the shape of each tensor.
        """

        def resized(tensor: Tensor) -> Tensor:
            """Return the tensor itself, or an empty one of its new shape."""
            if shape is None:
                return tensor
            return torch.empty(tuple(shape(tensor)), dtype=tensor.dtype, device=META)

        return op_macs(self.func, *map_tensors(resized, (self.args, self.kwargs, self.out))) or 0


@dataclass(frozen=True, slots=True, eq=False)
class Event:
    """An executed ATen op that a run with data must recognise.

    It is an op that takes statistics or draws random numbers.

    Attributes
    ----------
    node, op:
        The node that executed it, and the op.
    out:
        Its result: a tensor, or several.
    removed_labels:
        For statistics: labels of the input whose removed elements leave the statistics.
    run:
        An object that identifies the run; a part that is called several times has several runs.
    """

    node: str
    op: Any
    out: Any
    removed_labels: tuple[Array, ...]
    run: object


def same_fields(fields: Sequence[Field], others: Sequence[Field]) -> bool:
    """Tell whether two lists of fields have the same labels, one by one."""
    if len(fields) != len(others):
        return False
    pairs = zip(fields, others, strict=True)
    return all(np.array_equal(f.labels, g.labels) for f, g in pairs)


def first_reason(numbers: Iterable[int]) -> int:
    """Return the earliest reason of a pin; INPUT if there is only that; 0 if there is none."""
    found = list(numbers)
    return min((number for number in found if number > INPUT), default=max(found, default=0))


def place(labels: Array, dims: Sequence[int], rank: int) -> Array:
    """Lay an array into virtual dimensions: its i-th dimension becomes dimension ``dims[i]``.

    >>> place(np.arange(6).reshape(2, 3), (2, 0), 4).shape
    (3, 1, 2, 1)
    """
    shape = [1] * rank
    for d, v in enumerate(dims):
        shape[v] = labels.shape[d]
    order = sorted(range(len(dims)), key=lambda d: dims[d])
    return labels.transpose(order).reshape(shape)


def take(labels: Array, dims: Sequence[int]) -> Array:
    """Invert :func:`place`: read the given virtual dimensions; all others have size 1."""
    kept = sorted(dims)
    reduced = labels.reshape([labels.shape[v] for v in kept])
    return reduced.transpose([kept.index(v) for v in dims])


def partner_of(
    units: Units, labels: Array, dims: set[int], free: list[Field], alone: bool
) -> Field | None:
    """Return the field that pairs with some labels, or None.

    Parameters
    ----------
    units:
        The units of the run.
    labels, dims:
        The labels, and the dimensions along which they vary.
    free:
        The candidates.
    alone:
        Whether no other labels vary along exactly these dimensions.
    """
    same = [f for f in free if f.dims == dims]
    inner = [f for f in free if max(dims) in f.dims and (f.dims < dims or f.dims > dims)]
    # prefer a field that already has some of these labels
    if len(same) + len(inner) > 1:
        related = [f for f in same + inner if np.isin(f.labels, labels[labels > 0]).any()]
        if related:
            return related[0]
    if alone and len(same) == 1 and not inner:
        return same[0]
    for f in same:  # several fields on one axis: pair equal patterns of repetition
        if f.labels.shape == labels.shape and _same_pattern(f.labels, labels):
            return f
    # prefer labels of parameters to those that a literal size made
    of_weights = [f for f in same if units.owners(f.labels) != [-1]]
    if alone and len(of_weights) == 1:
        return of_weights[0]
    return inner[0] if inner and (alone or not same) else None


def _same_pattern(a: Array, b: Array) -> bool:
    """Tell whether equal labels in one array are equal in the other, and the reverse."""
    unique_a, inverse_a = np.unique(a, return_inverse=True)
    unique_b, inverse_b = np.unique(b, return_inverse=True)
    if np.array_equal(inverse_a.ravel(), inverse_b.ravel()):
        return True
    pairs = set(zip(a.ravel().tolist(), b.ravel().tolist(), strict=True))
    return len(unique_a) == len(unique_b) == len(pairs)


def refuse_rank(f: Field, tensor: Tensor) -> Field:
    """Raise an error about a field with another number of dimensions than its tensor."""
    raise AssertionError(
        f"a rule gave labels of shape {f.labels.shape} to a tensor of shape {tuple(tensor.shape)}"
    )


def as_torch(labels: Array, shape: Sequence[int]) -> Tensor:
    """Return labels as an integer tensor of the full shape, expanded with stride 0.

    Ops that move positions are executed on it.
    """
    return torch.from_numpy(np.ascontiguousarray(labels)).expand(tuple(shape))


def from_torch(labels: Tensor) -> Array:
    """Return labels in a tensor as a compact array."""
    return compact(labels.numpy())
