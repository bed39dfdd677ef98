"""What a rule can see and do: read and write fields, unite labels, pin them, and note what must
stay rectangular.

The verbs here know no op. A rule describes an op in their terms: which operands meet element by
element (:meth:`Context.merge`), what is summed (:meth:`Context.contract`), what cannot be followed
(:meth:`Context.pin`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
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


class Context(Labelled):
    """The state of one labelling run.

    Attributes
    ----------
    found:
        What ran, and what else is known of it.
    weights:
        Parameters, and what is computed from them alone, under labels of their own; None where
        that is not followed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = Found()
        self.weights: Context | None = None

    def statistic(self, labels: list[Array], *, taken: bool = True) -> None:
        """An op takes statistics over the survivors of these labels (none: over fixed dimensions
        only).

        ``taken=False``: in another mode than this it would.
        """
        self.found.note_statistic(self.node, labels, taken)

    def fix_axis_by(self, record: Record, axis: int, met: Iterable[Any]) -> None:
        """A parameter's axis met tensors that have no labels there."""
        self.fix_axis(
            record, axis, self.why_fixed(met, read=record.axes[axis] in self.found.summed_axes)
        )

    def reads(self, operands: Sequence[tuple[Tensor | None, Iterable[int]]]) -> None:
        """A contraction sums over these dimensions of its operands: note the parameter axes that
        are read so.

        A product of weights alone makes a weight and reads none but its own operands.
        """
        weights = self.weights
        consumes = weights is not None and not all(
            self.of_weights(tensor) for tensor, _ in operands
        )
        for tensor, dims in operands:
            record = self.records.get(tensor)
            if record is not None and record.axes:
                self.found.summed_axes.update(record.axes[d] for d in dims)
            elif (
                weights is not None and consumes and tensor is not None and self.of_weights(tensor)
            ):
                self.found.summed_axes.update(weights._axes_behind(tensor, set(dims)))

    def of_weights(self, tensor: Any) -> bool:
        """Whether a tensor is a parameter or buffer, or computed from such alone."""
        record = self.records.get(tensor)
        return bool(record and record.axes) or (
            self.weights is not None and tensor in self.weights.records
        )

    def _axes_behind(self, tensor: Tensor, dims: set[int]) -> Iterator[int]:
        """The numbers of the parameter axes whose labels a tensor carries along some of its
        dimensions.
        """
        carried = [self.units.find(f.labels) for f in self.fields(tensor) if f.dims & dims]
        for record in self.records.values():
            for f in record.own_fields:
                if any(np.isin(self.units.find(f.labels), labels).any() for labels in carried):
                    yield from (record.axes[d] for d in f.dims)

    def is_scale(self, tensor: Any) -> None:
        """Note the scale of a normalisation."""
        record = self.records.get(tensor)
        if record is not None:
            self.found.scale_axes.update(record.axes)

    def operand(
        self, tensor: Tensor, dims: Sequence[int], rank: int, *, as_labelled: bool = False
    ) -> Operand:
        """Lay a tensor's fields into ``rank`` virtual dimensions."""
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
        """Operands meet element by element on a virtual broadcast: pair their fields and unite the
        labels that meet.

        Fields pair by the dimensions along which they vary. A field whose partner has the full
        size of its dimensions but no labels there is pinned. Where the partner is sized on some of
        the dimensions only, the survivors must be equally many for each position there. ``summed``
        are dimensions that a contraction sums over then.
        """
        order = sorted(range(len(operands)), key=lambda i: len(operands[i].unlabelled) > 0)
        acc: list[Met] = []
        sized: set[int] = set()
        read = (
            set(summed) if any(self.of_weights(operand.source) for operand in operands) else set()
        )
        before: list[Any] = []
        for turn, i in enumerate(order):
            b = operands[i]
            if turn == 0:
                self._label_rest(b, set(), (), rank)
                acc = [Met(f.labels, {i: f.zero}) for f in b.fields]
            else:
                acc = self._pair(acc, sized, before, b, i, rank, read)
            sized |= b.sized
            before.append(b.source)
        return acc

    def _pair(
        self,
        acc: list[Met],
        sized: set[int],
        before: list[Any],
        b: Operand,
        index: int,
        rank: int,
        read: set[int],
    ) -> list[Met]:
        free = list(b.fields)
        out: list[Met] = []
        for met in acc:
            dims = set(varied(met.labels))
            common = dims & b.sized
            if not common:
                out.append(met)
                continue
            partner = partner_of(
                self.units,
                met.labels,
                dims,
                free,
                alone=sum(set(varied(m.labels)) == dims for m in acc) == 1,
            )
            unlabelled_axis = b.unlabelled.get(max(dims)) if max(dims) in common else None
            if partner is not None:
                free.remove(partner)
                self.unite(met.labels, partner.labels)
                out.append(
                    Met(
                        self._either(met.labels, partner.labels), {**met.zero, index: partner.zero}
                    )
                )
            elif unlabelled_axis is not None and b.record is not None:
                out += self._take_over(met, dims, common, b, index)
            elif dims <= b.sized:
                self.pin(met.labels, self.why_fixed([b.source], read=dims <= read))
            else:
                for f in list(free):
                    if f.dims & dims:
                        self.pin(f.labels, "acts on whole blocks of a channel axis that is split")
                        free.remove(f)
                self.sight(met.labels, fixed=common)
                out.append(met)
        out += self._unmet(free, sized, before, index, read)
        for f in self._label_rest(b, sized, before, rank):
            out.append(Met(f.labels, {index: f.zero}))
        return out

    def _take_over(
        self, met: Met, dims: set[int], common: set[int], b: Operand, index: int
    ) -> Iterator[Met]:
        """An axis of a parameter that no op has met takes over the labels that it meets, those
        along the last of their dimensions.
        """
        last = max(dims)
        assert b.record is not None
        for v in common - {last}:  # one value for many: those go together
            if v in b.unlabelled:
                self.fix_axis(b.record, b.unlabelled[v], "meets a channel axis that is split")
        labels = self.tie(met.labels, dims - {last})
        if labels.size > 1:
            self.label_axis(b.record, b.unlabelled[last], take(labels, b.dims))
            zero = {**met.zero, index: not b.record.overwritten}
            yield Met(self._either(labels, met.labels), zero)

    def _unmet(
        self, free: list[Field], sized: set[int], before: list[Any], index: int, read: set[int]
    ) -> Iterator[Met]:
        """The fields of an operand that have met no other's."""
        for f in free:
            common = set(f.dims) & sized
            if not common:
                yield Met(f.labels, {index: f.zero})
            elif f.dims <= sized:
                self.pin(f.labels, self.why_fixed(before, read=f.dims <= read))
            else:
                self.sight(f.labels, fixed=common)
                yield Met(f.labels, {index: f.zero})

    def _either(self, a: Array, b: Array) -> Array:
        """One for two arrays of labels that were united: the smaller. If they were not, the one
        that says more.
        """
        return a if (a.size <= b.size) == self.units.uniting else b

    def _label_rest(
        self, b: Operand, met_sizes: set[int], met: Iterable[Any], rank: int
    ) -> list[Field]:
        """Axes of a parameter that met no labels: pinned where they met a size, labelled where
        they met nothing.
        """
        fresh: list[Field] = []
        if b.record is None:
            return fresh
        for v, axis in list(b.unlabelled.items()):
            if axis not in b.record.unlabelled:
                continue
            if v in met_sizes:
                self.fix_axis_by(b.record, axis, met)
            else:
                f = self.label_anew(b.record, axis)
                fresh.append(Field(place(f.labels, b.dims, rank), f.zero))
        b.fields = b.fields + fresh
        b.unlabelled = {}
        return fresh

    def contract(
        self, operands: Sequence[Operand], rank: int, summed: Iterable[int]
    ) -> list[Field]:
        """A sum of products: meet element by element, then drop the summed dimensions (they stay,
        with size 1).
        """
        summed = set(summed)
        self.reads(
            [(o.tensor, [d for d, v in enumerate(o.dims) if v in summed]) for o in operands]
        )
        for o in operands:
            if o.dims and self.of_weights(o.tensor):
                self.gives(o.tensor, [d for d, v in enumerate(o.dims) if v not in summed])
        if len(operands) > 1 and not any(self.of_weights(o.tensor) for o in operands):
            fields = [f for operand in operands for f in operand.fields]
            self.found.heads += [
                (f.labels, sorted(f.dims & summed))
                for f in fields
                if f.dims & summed and f.dims - summed
            ]
        out = []
        for met in self.merge(operands, rank, summed):
            dims = set(varied(met.labels))
            zero = any(met.zero.values())
            if dims & summed:
                if not zero:
                    self.pin(met.labels, "is summed although removed elements are not zero")
                elif dims - summed:
                    self.sight(met.labels, fixed=dims - summed)
            elif dims:
                out.append(Field(met.labels, zero))
        return out
