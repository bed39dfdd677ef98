"""Labels of tensors and their constraints: united labels, pinned labels, and the reasons."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fxprune.common.identity import IdentityMap
from fxprune.labels import Array, Field, Units, compact
from fxprune.ops.records import (
    FIRST_REASONS,
    INPUT,
    READS_INPUT,
    Record,
    Rectangle,
    first_reason,
    refuse_rank,
    same_fields,
    take,
)

__all__ = ["Labelled"]


class Labelled:
    """The labels of one run and their constraints.

    Attributes
    ----------
    units:
        The labels, united into units.
    records:
        What is known about each tensor.
    node, target:
        Name and target of the fx node that runs now.
    rectangles:
        Fields that vary along several dimensions.
    reasons:
        Reasons of pins, each with the name of its node. A reason's number is its index.
    causes:
        Tensor -> dimension -> number of the reason why the tensor has no labels there. The key
        None stands for all other dimensions.
    edges:
        Pair of axis numbers -> names of the nodes that coupled the two axes.
    fixed_axes:
        Axis number -> number of the reason, for axes that met a fixed size before they got labels.
    ties:
        Axis number -> for each position the first position that it must go with.
    """

    def __init__(self) -> None:
        self.units = Units()
        self.records: IdentityMap[Tensor, Record] = IdentityMap()
        self.node = ""
        self.target: Any = None
        self.rectangles: list[Rectangle] = []
        self._seen: set[tuple[Any, ...]] = set()
        self.reasons: list[tuple[str, str]] = [*FIRST_REASONS]
        self.causes: Any = WeakTensorKeyDictionary()
        self._first_reason = 0  # number of the first reason that the current op gave
        # reason why the output channels of the current layer stay; None: no layer runs
        self._layer_reason: int | None = None
        self._reason_numbers: dict[tuple[str, str], int] = {}
        self.edges: dict[tuple[int, int], dict[str, None]] = {}
        self.fixed_axes: dict[int, int] = {}
        self.ties: dict[int, Array] = {}

    @contextmanager
    def at(self, node: str, *, target: Any = None) -> Iterator[None]:
        """Attribute what is recorded inside this context to a node.

        Parameters
        ----------
        node:
            Name of the node, with the prefix of its part.
        target:
            What the node calls, if an operation is followed inside.
        """
        before = self.node, self.target
        self.node, self.target = node, target
        try:
            yield
        finally:
            self.node, self.target = before

    def parameter(
        self,
        tensor: Tensor,
        name: str,
        axes: tuple[int, ...],
        fields: list[Field] | None = None,
        overwritten: bool = False,
    ) -> None:
        """Add a parameter or buffer.

        Parameters
        ----------
        tensor, name:
            The parameter and its name.
        axes:
            The number of each axis.
        fields:
            Its fields, if it has any. Without them its axes get labels when an op meets them.
        overwritten:
            Whether an earlier call may have left non-zeros at removed elements.
        """
        unlabelled = (
            {a for a, size in enumerate(tensor.shape) if size > 1} if fields is None else set()
        )
        given = list(fields or ())
        self.records[tensor] = Record(
            tensor,
            given,
            name=name,
            axes=axes,
            unlabelled=unlabelled,
            own_fields=[*given],
            overwritten=overwritten,
        )

    def record(self, tensor: Tensor) -> Record | None:
        """Return what is known about a tensor."""
        return self.records.get(tensor)

    def fields(self, tensor: Any) -> list[Field]:
        """Return the fields of a tensor, without pinned labels.

        Axes of a parameter that have no labels yet get new ones. A field that consists of a single
        label is pinned.
        """
        record = self.records.get(tensor)
        if record is None:
            return []
        if record.unlabelled:
            for axis in sorted(record.unlabelled):
                self.label_anew(record, axis)
        self._renew(record)
        if record.base is not None and record.base.overwritten:
            return [Field(f.labels, False) for f in record.fields]
        return record.fields

    def _refresh(self, fields: Iterable[Field]) -> list[Field]:
        """Return fields with current labels; drop pinned ones and pin single labels."""
        out = []
        for f in fields:
            labels = self.units.live(f.labels)
            if labels.any():
                labels = compact(labels)
                if labels.size == 1:
                    self.pin(labels, "its removal would empty a tensor")
                else:
                    out.append(Field(labels, f.zero))
        return out

    def _renew(self, record: Record) -> None:
        """Bring the fields of a tensor up to date."""
        if record.version != self.units.version and record.fields:
            before, record.fields = record.fields, self._refresh(record.fields)
            self._note_lost(record, before)
            record.version = self.units.version

    def _note_lost(self, record: Record, before: Iterable[Field]) -> None:
        """Note why a tensor lost the fields whose labels were all pinned."""
        for f in before:
            if not self.units.live(f.labels).any():
                record.lost.update(dict.fromkeys(f.dims, int(self.units.reasons(f.labels).max())))

    def settle(self) -> None:
        """Bring the fields of all tensors up to date.

        Axes of parameters that no op has met stay unlabelled.
        """
        done: IdentityMap[Array, list[Field]] = IdentityMap()  # by the old labels
        for record in self.records.values():
            fields: list[Field] = []
            for f in record.fields:
                if f.labels not in done:
                    done[f.labels] = self._refresh([f])
                fields += [Field(new.labels, f.zero) for new in done[f.labels]]
            if len(fields) < len(record.fields):
                self._note_lost(record, record.fields)
            record.fields, record.version = fields, self.units.version

    def put(self, tensor: Any, fields: Iterable[Field], base: Any = None) -> None:
        """Set the fields of an op's result.

        Parameters
        ----------
        tensor:
            The result. Anything but a tensor is ignored.
        fields:
            Its fields, with as many dimensions as the tensor.
        base:
            The tensor that the result is a view of.
        """
        if not isinstance(tensor, Tensor):
            return
        kept = [f if f.labels.ndim == tensor.dim() else refuse_rank(f, tensor) for f in fields]
        root = self.records.get(base) if base is not None else None
        if root is not None and tensor is base and same_fields(root.fields, kept):
            return  # nothing changed, as in flatten() of a flat tensor
        if root is not None and root.base is not None:
            root = root.base
        if not kept and root is None:
            self.records.discard(tensor)
            return
        for f in kept:
            if len(f.dims) > 1:
                self.require_rectangle(f.labels)
        self.records[tensor] = Record(tensor, kept, base=root)

    def give(self, out: Tensor, fields: Iterable[Field], dims: Sequence[int]) -> None:
        """Set the fields of a result from fields over virtual dimensions.

        Parameters
        ----------
        out:
            The result.
        fields:
            Its fields over the virtual dimensions.
        dims:
            The virtual dimension of each dimension of the result.
        """
        self.put(out, [Field(take(f.labels, dims), f.zero) for f in fields])

    def overwrite(self, tensor: Tensor, fields: list[Field]) -> None:
        """Set the fields of a tensor that an in-place op wrote into; it may be a view.

        The rule has already united the tensor's labels with those of the written values.
        """
        record = self.records.get(tensor)
        if record is None:
            if fields:
                self.records[tensor] = Record(tensor, fields)
            return
        record.fields, record.version = fields, -1
        if not all(f.zero for f in fields):
            root = record.base or record
            root.overwritten = True
            root.fields = [Field(f.labels, False) for f in root.fields]

    def label_anew(self, record: Record, axis: int) -> Field:
        """Give an axis of a parameter new labels, one per position."""
        record.unlabelled.discard(axis)
        n = record.tensor.shape[axis]
        shape = [1] * record.tensor.dim()
        shape[axis] = n
        labels = self.units.fresh(n, record.axes[axis])
        if record.axes[axis] in self.ties:
            self.units.unite(labels, labels[self.ties[record.axes[axis]]])
        fresh = Field(labels.reshape(shape), not record.overwritten)
        record.fields.append(fresh)
        record.own_fields.append(fresh)
        return fresh

    def label_axis(self, record: Record, axis: int, labels: Array) -> None:
        """Give a parameter's axis the labels that it met first, laid out for the parameter."""
        record.unlabelled.discard(axis)
        record.fields.append(Field(labels, not record.overwritten))
        record.own_fields.append(record.fields[-1])
        for owner in self.units.owners(labels):
            self._edge(owner, record.axes[axis])

    def fix_axis(self, record: Record, axis: int, why: str | tuple[str, str]) -> None:
        """Fix a parameter's axis that met a size that cannot shrink.

        ``why`` is the reason, or a pair of the reason and the node that gave it (default: the
        current node).
        """
        record.unlabelled.discard(axis)
        self.fixed_axes.setdefault(record.axes[axis], self._reason(why))

    def note_input(self, tensor: Tensor) -> None:
        """Note that a tensor is an input of the model."""
        self.causes[tensor] = {None: INPUT}

    def note_kept_axes(self, weight: Tensor | None, dims: Iterable[int]) -> None:
        """Note which dimensions of its weight a layer's output keeps.

        If these dimensions stay, the output has no labels for the same reason.
        """
        self._layer_reason = first_reason((self._layer_reason or 0, self.cause(weight, dims)))

    def note_causes(self, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Note, after an op, why its results may lack labels.

        For a layer it is the reason of its weight (:meth:`note_kept_axes`). For any other op it is
        the reason of its first pin, or else that of its operands; a result of the same shape as an
        operand then has the operand's reasons, dimension by dimension.
        """
        of_layer, pinned = self._layer_reason, self._first_reason
        self._layer_reason, self._first_reason = None, 0
        if of_layer is not None:
            reason = of_layer
        else:
            reason = pinned or first_reason(self.cause(tensor) for tensor in tensors)
        for result in results:
            causes: dict[int | None, int] = {None: reason} if reason else {}
            for tensor in tensors if of_layer is None and reason else ():
                if tensor.shape == result.shape:
                    causes |= self._causes_along(tensor)
            if causes:
                self.causes[result] = causes

    def _causes_along(self, tensor: Any) -> dict[int | None, int]:
        """Return dimension -> number of the reason why a tensor has no labels there.

        The key None stands for all other dimensions.
        """
        causes: dict[int | None, int] = dict(self.causes.get(tensor, {}))
        record = self.records.get(tensor)
        if record is not None:
            self._renew(record)
            for d, number in enumerate(record.axes):
                if number in self.fixed_axes:
                    causes[d] = self.fixed_axes[number]
            causes.update(record.lost.items())
        return causes

    def cause(self, tensor: Any, dims: Iterable[int] | None = None) -> int:
        """Return the number of the reason why a tensor has no labels; 0 if it never had any.

        With ``dims``, only labels along these dimensions count.
        """
        if not isinstance(tensor, Tensor):
            return 0
        known = self._causes_along(tensor)
        if dims is None:
            return first_reason(known.values())
        return next((known[d] for d in sorted(dims) if d in known), known.get(None, 0))

    def why_fixed(
        self, tensors: Iterable[Any], dims: Iterable[int] | None = None, *, read: bool = False
    ) -> tuple[str, str]:
        """Return the reason, with its node, why labels that meet these tensors must stay.

        Parameters
        ----------
        tensors:
            Tensors without labels.
        dims:
            The dimensions in question; default: all.
        read:
            Whether the op sums over the labels.
        """
        found = first_reason(self.cause(tensor, dims) for tensor in tensors)
        if found == INPUT:
            return (READS_INPUT if read else "meets an input of the model"), self.node
        return self.reasons[found] if found else ("meets a tensor of fixed size", self.node)

    def new_fields(self, shape: Sequence[int], dims: Iterable[int], zero: bool) -> list[Field]:
        """Return fields for dimensions made by a literal size, as in ``expand`` or ``zeros``.

        No parameter owns their labels, so the dimensions shrink with what they meet.

        Parameters
        ----------
        shape:
            Shape of the tensor.
        dims:
            The dimensions in question; those of size 1 get no field.
        zero:
            Whether the tensor is zero.
        """
        out = []
        for d in dims:
            if shape[d] > 1:
                form = [1] * len(shape)
                form[d] = shape[d]
                out.append(Field(self.units.fresh(shape[d], -1).reshape(form), zero))
        return out

    def unite(self, a: Array, b: Array) -> None:
        """Unite labels position by position (broadcast), and connect the axes that own them."""
        if a is b:
            return
        self.units.unite(a, b)
        if not self.units.pinning:
            return
        for x in self.units.owners(a):
            for y in self.units.owners(b):
                self._edge(x, y)

    def tie(self, labels: Array, along: Iterable[int]) -> Array:
        """Unite labels along dimensions; return the current labels, compact."""
        for d in along:
            first = labels[(slice(None),) * d + (slice(0, 1),)]
            self.unite(labels, first)
            labels = first
        return compact(self.units.live(labels))

    def pin(self, labels: Array, why: str | tuple[str, str]) -> None:
        """Forbid the removal of labels.

        ``why`` is the reason, or a pair of the reason and the node that gave it (default: the
        current node).
        """
        number = self._reason(why)
        self._first_reason = self._first_reason or number
        self.units.pin(labels, number)

    def pin_all(self, fields: Iterable[Field], why: str) -> None:
        """Forbid the removal of all labels of some fields."""
        for f in fields:
            self.pin(f.labels, why)

    def spared(self, tensor: Any, dims: Collection[int], why: str) -> list[Field]:
        """Return the fields of a tensor that do not vary along ``dims``; pin the others."""
        kept = []
        for f in self.fields(tensor):
            if f.dims.isdisjoint(dims):
                kept.append(f)
            else:
                self.pin(f.labels, why)
        return kept

    def require_rectangle(
        self, labels: Array, fixed: Iterable[int] = (), merged: tuple[int, ...] = ()
    ) -> None:
        """Note that labels vary along several dimensions, so survivors must form a rectangle.

        ``fixed`` and ``merged`` are those of :class:`~fxprune.ops.records.Rectangle`.
        """
        if not self.units.pinning:
            return  # a check of an emitted model: its survivors form rectangles already
        fixed = frozenset(fixed)
        labels = np.ascontiguousarray(labels)
        key = (labels.shape, hash(labels.tobytes()), fixed, merged)
        if key not in self._seen:
            self._seen.add(key)
            self.rectangles.append(Rectangle(labels, fixed, merged, self.node))

    def _reason(self, why: str | tuple[str, str]) -> int:
        """Return the number of a reason, which is new if need be."""
        key = (why, self.node) if isinstance(why, str) else why
        if key not in self._reason_numbers:
            self._reason_numbers[key] = len(self.reasons)
            self.reasons.append(key)
        return self._reason_numbers[key]

    def _edge(self, a: int, b: int) -> None:
        """Note that the current node couples two parameter axes; -1 is no axis."""
        if a != b and a >= 0 and b >= 0:
            self.edges.setdefault((min(a, b), max(a, b)), {})[self.node] = None
