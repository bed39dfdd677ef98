"""Labels of tensors, and what is constrained: which are one, which stay, and why."""

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
    INPUT,
    READS_INPUT,
    Record,
    Sighting,
    first_reason,
    refuse_rank,
    same_fields,
    take,
)

__all__ = ["Labelled"]


class Labelled:
    """The labels of one run, and what holds for them."""

    def __init__(self) -> None:
        self.units = Units()
        self.records: IdentityMap[Tensor, Record] = IdentityMap()
        self.node = ""
        self.target: Any = None
        self.sightings: list[Sighting] = []
        self._seen: set[tuple[Any, ...]] = set()
        self.reasons: list[tuple[str, str]] = [
            ("", ""),
            ("meets a part that stays", ""),
            ("is an input of the model", ""),
        ]
        # tensor -> dimension, or None: others -> the reason's number
        self.causes: Any = WeakTensorKeyDictionary()
        self._pinned_now = 0  # the first reason that the op which runs has given
        # why the channels stay that the layer gives; None: no layer runs
        self._given: int | None = None
        self._reason_numbers: dict[tuple[str, str], int] = {}
        self.edges: dict[tuple[int, int], dict[str, None]] = {}
        # axis number -> reason, for axes that met a fixed size before they got labels
        self.fixed_axes: dict[int, int] = {}
        # axis number -> for each position the first that it goes with, whatever it meets
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
        """Begin with a parameter or buffer; ``overwritten``: an earlier call may have left
        non-zeros at removed elements.
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
        return self.records.get(tensor)

    def fields(self, tensor: Any) -> list[Field]:
        """The live fields of a tensor. Pinned labels are gone; a field that is one single label is
        pinned on sight.
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
        for f in before:
            if not self.units.live(f.labels).any():
                record.lost.update(dict.fromkeys(f.dims, int(self.units.reasons(f.labels).max())))

    def settle(self) -> None:
        """Refresh the fields of every tensor there is, those of a parameter that no op has met
        left alone.
        """
        done: IdentityMap[Array, list[Field]] = IdentityMap()  # by the labels as they were
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
        """Say what an op's result carries. ``base``: the tensor that the result is a view of."""
        if not isinstance(tensor, Tensor):
            return
        kept = [f if f.labels.ndim == tensor.dim() else refuse_rank(f, tensor) for f in fields]
        root = self.records.get(base) if base is not None else None
        if root is not None and tensor is base and same_fields(root.fields, kept):
            return  # nothing to do, as in a flatten() of what is flat
        if root is not None and root.base is not None:
            root = root.base
        if not kept and root is None:
            self.records.discard(tensor)
            return
        for f in kept:
            if len(f.dims) > 1:
                self.sight(f.labels)
        self.records[tensor] = Record(tensor, kept, base=root)

    def give(self, out: Tensor, fields: Iterable[Field], dims: Sequence[int]) -> None:
        """Say what a result carries, from fields over virtual dimensions: its i-th dimension is
        the virtual one ``dims[i]``.
        """
        self.put(out, [Field(take(f.labels, dims), f.zero) for f in fields])

    def overwrite(self, tensor: Tensor, fields: list[Field]) -> None:
        """An in-place op wrote into a tensor (maybe a view); its labels were united with what was
        written.
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
        """Give an axis of a parameter its labels, one per position."""
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
        """A parameter's axis takes over the labels (laid out for that parameter) of what it met
        first.
        """
        record.unlabelled.discard(axis)
        record.fields.append(Field(labels, not record.overwritten))
        record.own_fields.append(record.fields[-1])
        for owner in self.units.owners(labels):
            self._edge(owner, record.axes[axis])

    def fix_axis(self, record: Record, axis: int, why: str | tuple[str, str]) -> None:
        """A parameter's axis met a size that cannot shrink; ``why``: the reason, with the node
        that gave it if not this one.
        """
        record.unlabelled.discard(axis)
        self.fixed_axes.setdefault(record.axes[axis], self._reason(why))

    def is_input(self, tensor: Tensor) -> None:
        """Note that the model is called with this tensor."""
        self.causes[tensor] = {None: INPUT}

    def gives(self, weight: Tensor | None, dims: Iterable[int]) -> None:
        """Note which dimensions of its weight a layer hands on: why they stay is why what it gives
        has no labels.
        """
        self._given = first_reason(
            number for number in (self._given or 0, self.cause(weight, dims))
        )

    def carry_causes(self, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Note, after an op, why its results may lack labels: what it has pinned, or what its
        operands lack them for.

        A dimension that an operand has as well lacks them for the same reason.
        """
        given, pinned = self._given, self._pinned_now
        self._given, self._pinned_now = None, 0
        whole = (
            given
            if given is not None
            else pinned or first_reason(self.cause(tensor) for tensor in tensors)
        )
        for result in results:
            own: dict[int | None, int] = {None: whole} if whole else {}
            for tensor in tensors if given is None and whole else ():
                if tensor.shape == result.shape:
                    own |= self._causes_along(tensor)
            if own:
                self.causes[result] = own

    def _causes_along(self, tensor: Any) -> dict[int | None, int]:
        """The numbers of the reasons why a tensor has no labels along its dimensions; None: along
        any other.
        """
        own: dict[int | None, int] = dict(self.causes.get(tensor, {}))
        record = self.records.get(tensor)
        if record is not None:
            self._renew(record)
            own.update(
                (d, self.fixed_axes[number])
                for d, number in enumerate(record.axes)
                if number in self.fixed_axes
            )
            own.update(record.lost.items())
        return own

    def cause(self, tensor: Any, dims: Iterable[int] | None = None) -> int:
        """The number of the reason why a tensor has no labels, along some of its dimensions; 0: it
        never had any.
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
        """The reason, and its node, of what meets tensors that have no labels; ``read``: of an
        axis that is summed.
        """
        found = first_reason(self.cause(tensor, dims) for tensor in tensors)
        if found == INPUT:
            return (READS_INPUT if read else "meets an input of the model"), self.node
        return self.reasons[found] if found else ("meets a tensor of fixed size", self.node)

    def virtual(self, shape: Sequence[int], dims: Iterable[int], zero: bool) -> list[Field]:
        """Labels for dimensions that a literal size made (``expand``, ``zeros``): they shrink with
        what they meet.
        """
        out = []
        for d in dims:
            if shape[d] > 1:
                form = [1] * len(shape)
                form[d] = shape[d]
                out.append(Field(self.units.fresh(shape[d], -1).reshape(form), zero))
        return out

    def unite(self, a: Array, b: Array) -> None:
        if a is b:
            return
        self.units.unite(a, b)
        if not self.units.pinning:
            return
        for x in self.units.owners(a):
            for y in self.units.owners(b):
                self._edge(x, y)

    def tie(self, labels: Array, along: Iterable[int]) -> Array:
        """Make labels constant along dimensions, by uniting; return them compact."""
        for d in along:
            first = labels[(slice(None),) * d + (slice(0, 1),)]
            self.unite(labels, first)
            labels = first
        return compact(self.units.live(labels))

    def pin(self, labels: Array, why: str | tuple[str, str]) -> None:
        """Forbid the removal of labels; ``why``: the reason, with the node that gave it if not
        this one.
        """
        number = self._reason(why)
        self._pinned_now = self._pinned_now or number
        self.units.pin(labels, number)

    def pin_all(self, fields: Iterable[Field], why: str) -> None:
        for f in fields:
            self.pin(f.labels, why)

    def spared(self, tensor: Any, dims: Collection[int], why: str) -> list[Field]:
        """The fields of a tensor that do not vary along some dimensions; the others are pinned."""
        left = []
        for f in self.fields(tensor):
            if f.dims.isdisjoint(dims):
                left.append(f)
            else:
                self.pin(f.labels, why)
        return left

    def sight(
        self, labels: Array, fixed: Iterable[int] = (), merged: tuple[int, ...] = ()
    ) -> None:
        if not self.units.pinning:
            return  # a check of an emitted model: the rectangles are there
        fixed = frozenset(fixed)
        labels = np.ascontiguousarray(labels)
        key = (labels.shape, hash(labels.tobytes()), fixed, merged)
        if key not in self._seen:
            self._seen.add(key)
            self.sightings.append(Sighting(labels, fixed, merged, self.node))

    def _reason(self, why: str | tuple[str, str]) -> int:
        key = (why, self.node) if isinstance(why, str) else why
        if key not in self._reason_numbers:
            self._reason_numbers[key] = len(self.reasons)
            self.reasons.append(key)
        return self._reason_numbers[key]

    def _edge(self, a: int, b: int) -> None:
        if a != b and a >= 0 and b >= 0:
            self.edges.setdefault((min(a, b), max(a, b)), {})[self.node] = None

    def meet_vector(self, labels: Array, vector: Tensor) -> bool:
        """A parameter of one axis meets 1-D labels, position by position: the usual case of a bias
        or a scale, done at once.

        False (and nothing done) where it has labels already that are not these, or may not be zero
        where it is removed.
        """
        record = self.records.get(vector)
        if record is None or vector.dim() != 1 or record.overwritten:
            return False
        if record.unlabelled:
            self.label_axis(record, 0, labels)
            return True
        return len(record.fields) == 1 and np.array_equal(record.fields[0].labels, labels)
