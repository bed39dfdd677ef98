"""The context in which a rule runs: it reads and writes fields, unites labels and pins them.

The methods know no op. A rule describes an op with them: which operands meet element by element
(:meth:`Context.merge`), which dimensions are summed (:meth:`Context.contract`), which labels must
stay (:meth:`Context.pin`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from fxprune.labels import Array, Field, varied
from fxprune.ops.found import Found
from fxprune.ops.labelled import Labelled
from fxprune.ops.records import (
    Met,
    Operand,
    Record,
    partner_of,
    place,
    take,
)

__all__ = ["Context"]


@dataclass(slots=True, eq=False)
class _Merged:
    """The operands merged so far.

    Attributes
    ----------
    read:
        Dimensions of a weight's product over which a contraction sums afterwards.
    fields:
        The merged fields.
    sized:
        Virtual dimensions in which an operand is larger than 1.
    sources:
        The tensors from which the operands' fields come.
    """

    read: set[int]
    fields: list[Met] = field(default_factory=list)
    sized: set[int] = field(default_factory=set)
    sources: list[Any] = field(default_factory=list)

    def has_alone(self, dims: set[int]) -> bool:
        """Tell whether exactly one merged field varies along exactly these dimensions."""
        return sum(set(varied(met.labels)) == dims for met in self.fields) == 1


class Context(Labelled):
    """The state of one labelling run.

    Attributes
    ----------
    found:
        The ops that ran, and constraints on them.
    weights:
        A second context, with its own labels, for parameters and tensors computed from parameters
        alone. None: such tensors are not followed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = Found()
        self.weights: Context | None = None

    def statistic(self, labels: list[Array], *, taken: bool = True) -> None:
        """Note that the op takes a statistic over the survivors of these labels.

        Parameters
        ----------
        labels:
            Labels of the elements; empty if the statistic runs over fixed dimensions only.
        taken:
            Whether the op takes the statistic in this mode (training or evaluation).
        """
        self.found.note_statistic(self.node, labels, taken)

    def fix_axis_met_by(self, record: Record, axis: int, tensors: Iterable[Any]) -> None:
        """Fix a parameter's axis that meets tensors without labels there."""
        read = record.axes[axis] in self.found.summed_axes
        self.fix_axis(record, axis, self.why_fixed(tensors, read=read))

    def note_read_axes(self, operands: Sequence[tuple[Tensor | None, Iterable[int]]]) -> None:
        """Note the parameter axes that a contraction sums over.

        A product of weights alone gives another weight, so only axes of its own operands count;
        otherwise axes behind computed weights count too.

        Parameters
        ----------
        operands:
            Pairs of an operand and its summed dimensions.
        """
        weights = self.weights
        of_weights = [self.is_from_weights(tensor) for tensor, _ in operands]
        for (tensor, dims), of_weight in zip(operands, of_weights, strict=True):
            record = self.records.get(tensor)
            if record is not None and record.axes:
                self.found.summed_axes.update(record.axes[d] for d in dims)
            elif weights is not None and tensor is not None and of_weight and not all(of_weights):
                self.found.summed_axes.update(weights._axes_behind(tensor, set(dims)))

    def is_from_weights(self, tensor: Any) -> bool:
        """Tell whether a tensor is a parameter or buffer, or computed from these alone."""
        record = self.records.get(tensor)
        return bool(record and record.axes) or (
            self.weights is not None and tensor in self.weights.records
        )

    def _axes_behind(self, tensor: Tensor, dims: set[int]) -> Iterator[int]:
        """Yield the numbers of the parameter axes whose labels a tensor has along ``dims``."""
        carried = [self.units.find(f.labels) for f in self.fields(tensor) if f.dims & dims]
        for record in self.records.values():
            for f in record.own_fields:
                if any(np.isin(self.units.find(f.labels), labels).any() for labels in carried):
                    yield from (record.axes[d] for d in f.dims)

    def note_scale(self, tensor: Any) -> None:
        """Note that a tensor is the scale of a normalisation."""
        record = self.records.get(tensor)
        if record is not None:
            self.found.scale_axes.update(record.axes)

    def meet_vector(self, labels: Array, vector: Tensor) -> bool:
        """Give a parameter of one axis the 1-D labels that it meets, and tell whether it was done.

        This is a shortcut for the usual bias or scale. It does nothing if the parameter already
        has other labels, or if it may not be zero at removed elements.
        """
        record = self.records.get(vector)
        if record is None or vector.dim() != 1 or record.overwritten:
            return False
        if record.unlabelled:
            self.label_axis(record, 0, labels)
            return True
        return len(record.fields) == 1 and np.array_equal(record.fields[0].labels, labels)

    def operand(
        self, tensor: Tensor, dims: Sequence[int], rank: int, *, as_labelled: bool = False
    ) -> Operand:
        """Lay a tensor's fields into virtual dimensions.

        Parameters
        ----------
        tensor:
            The operand.
        dims:
            The virtual dimension of each dimension of the tensor.
        rank:
            The number of virtual dimensions.
        as_labelled:
            Whether axes of a parameter without labels get new labels here, rather than the labels
            that they meet.
        """
        record = self.records.get(tensor)
        unlabelled: dict[int, int] = {}
        if record is not None and record.unlabelled and not as_labelled:
            unlabelled = {dims[a]: a for a in record.unlabelled}
            fields = self._refresh(record.fields)
        else:
            fields = self.fields(tensor)
        laid = [Field(place(f.labels, dims, rank), f.zero) for f in fields]
        sized = {dims[d] for d, size in enumerate(tensor.shape) if size > 1}
        return Operand(laid, sized, unlabelled, record, tuple(dims), tensor)

    def merge(
        self, operands: Sequence[Operand], rank: int, summed: Collection[int] = ()
    ) -> list[Met]:
        """Unite the labels of operands that meet element by element, with broadcasting.

        Fields are paired by the dimensions along which they vary. A field is pinned if another
        operand has the full size of its dimensions but no labels there. If the other operand has
        the full size on some of the dimensions only, each position on these must keep the same
        number of survivors.

        Parameters
        ----------
        operands:
            The operands, laid out by :meth:`operand`.
        rank:
            The number of virtual dimensions.
        summed:
            Virtual dimensions over which a contraction sums afterwards; they matter for the reason
            of a pin only.

        Returns
        -------
        list of Met
            The fields of the result, each with the operands in which it is zero.
        """
        order = sorted(range(len(operands)), key=lambda i: len(operands[i].unlabelled) > 0)
        reads = any(self.is_from_weights(operand.source) for operand in operands)
        merged = _Merged(read=set(summed) if reads else set())
        for i in order:
            self._merge_one(merged, operands[i], i, rank)
        return merged.fields

    def _merge_one(self, merged: _Merged, operand: Operand, index: int, rank: int) -> None:
        """Merge one more operand, the one at ``index``, into those merged so far."""
        free = list(operand.fields)
        fields: list[Met] = []
        for met in merged.fields:
            fields += self._pair(merged, met, operand, index, free)
        fields += self._unpaired(merged, free, index)
        for f in self._label_rest(merged, operand, rank):
            fields.append(Met(f.labels, {index: f.zero}))
        merged.fields = fields
        merged.sized |= operand.sized
        merged.sources.append(operand.source)

    def _pair(
        self, merged: _Merged, met: Met, operand: Operand, index: int, free: list[Field]
    ) -> Iterator[Met]:
        """Yield a merged field after it met an operand; take its partner out of ``free``."""
        dims = set(varied(met.labels))
        common = dims & operand.sized
        if not common:
            yield met
            return
        partner = partner_of(self.units, met.labels, dims, free, merged.has_alone(dims))
        if partner is not None:
            free.remove(partner)
            self.unite(met.labels, partner.labels)
            labels = self._more_useful(met.labels, partner.labels)
            yield Met(labels, {**met.zero, index: partner.zero})
        elif operand.record is not None and max(dims) in common & set(operand.unlabelled):
            yield from self._label_from(met, dims, common, operand, index)
        elif dims <= operand.sized:
            self.pin(met.labels, self.why_fixed([operand.source], read=dims <= merged.read))
        else:
            for f in [f for f in free if f.dims & dims]:
                self.pin(f.labels, "acts on whole blocks of a channel axis that is split")
                free.remove(f)
            self.require_rectangle(met.labels, fixed=common)
            yield met

    def _label_from(
        self, met: Met, dims: set[int], common: set[int], operand: Operand, index: int
    ) -> Iterator[Met]:
        """Give an unlabelled axis of a parameter the labels that it meets.

        The labels are tied so that they vary along the last of their dimensions only.
        """
        last = max(dims)
        assert operand.record is not None
        for v in common - {last}:  # one value serves many positions, so they go together
            if v in operand.unlabelled:
                axis = operand.unlabelled[v]
                self.fix_axis(operand.record, axis, "meets a channel axis that is split")
        labels = self.tie(met.labels, dims - {last})
        if labels.size > 1:
            own_labels = take(labels, operand.dims)
            self.label_axis(operand.record, operand.unlabelled[last], own_labels)
            zero = {**met.zero, index: not operand.record.overwritten}
            yield Met(self._more_useful(labels, met.labels), zero)

    def _unpaired(self, merged: _Merged, free: list[Field], index: int) -> Iterator[Met]:
        """Yield the fields that met no field of another operand; pin those that met a size."""
        for f in free:
            common = set(f.dims) & merged.sized
            if not common:
                yield Met(f.labels, {index: f.zero})
            elif f.dims <= merged.sized:
                self.pin(f.labels, self.why_fixed(merged.sources, read=f.dims <= merged.read))
            else:
                self.require_rectangle(f.labels, fixed=common)
                yield Met(f.labels, {index: f.zero})

    def _more_useful(self, a: Array, b: Array) -> Array:
        """Return one of two paired arrays of labels.

        It is the smaller one if they were united. If this context does not unite labels, it is the
        larger one, because the smaller one would lose labels.
        """
        return a if (a.size <= b.size) == self.units.uniting else b

    def _label_rest(self, merged: _Merged, operand: Operand, rank: int) -> list[Field]:
        """Fix or label the axes of a parameter that met no labels, and return the new fields.

        An axis that met a tensor's size is fixed; an axis that met nothing gets new labels.
        """
        fresh: list[Field] = []
        if operand.record is None:
            return fresh
        for v, axis in list(operand.unlabelled.items()):
            if axis not in operand.record.unlabelled:
                continue
            if v in merged.sized:
                self.fix_axis_met_by(operand.record, axis, merged.sources)
            else:
                f = self.label_anew(operand.record, axis)
                fresh.append(Field(place(f.labels, operand.dims, rank), f.zero))
        operand.fields = operand.fields + fresh
        operand.unlabelled = {}
        return fresh

    def contract(
        self, operands: Sequence[Operand], rank: int, summed: Iterable[int]
    ) -> list[Field]:
        """Merge the operands of a sum of products and return the fields of the result.

        A removed element must add nothing: a field along a summed dimension is pinned unless it is
        zero in some operand.

        Parameters
        ----------
        operands:
            The operands, laid out by :meth:`operand`.
        rank:
            The number of virtual dimensions.
        summed:
            The virtual dimensions that are summed. They have size 1 in the result's fields.
        """
        summed = set(summed)
        self._note_contraction(operands, summed)
        out = []
        for met in self.merge(operands, rank, summed):
            dims = set(varied(met.labels))
            zero = any(met.zero.values())
            if dims & summed:
                if not zero:
                    self.pin(met.labels, "is summed although removed elements are not zero")
                elif dims - summed:
                    self.require_rectangle(met.labels, fixed=dims - summed)
            elif dims:
                out.append(Field(met.labels, zero))
        return out

    def _note_contraction(self, operands: Sequence[Operand], summed: set[int]) -> None:
        """Note which parameter axes a contraction sums over, which it keeps, and its heads."""
        self.note_read_axes(
            [(o.tensor, [d for d, v in enumerate(o.dims) if v in summed]) for o in operands]
        )
        for o in operands:
            if o.dims and self.is_from_weights(o.tensor):
                kept = [d for d, v in enumerate(o.dims) if v not in summed]
                self.note_kept_axes(o.tensor, kept)
        if len(operands) > 1 and not any(self.is_from_weights(o.tensor) for o in operands):
            for f in [f for operand in operands for f in operand.fields]:
                if f.dims & summed and f.dims - summed:
                    self.found.heads.append((f.labels, sorted(f.dims & summed)))
