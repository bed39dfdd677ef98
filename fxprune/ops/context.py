"""The context in which a rule runs: it reads and writes fields, unites labels and pins them.

The methods know no op. A rule describes an op with them: which operands meet element by element
(:meth:`Context.merge`), which dimensions are summed (:meth:`Context.contract`), which labels must
stay (:meth:`Context.pin`).
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

    def fix_axis_by(self, record: Record, axis: int, met: Iterable[Any]) -> None:
        """Fix a parameter's axis that meets tensors without labels there."""
        self.fix_axis(
            record, axis, self.why_fixed(met, read=record.axes[axis] in self.found.summed_axes)
        )

    def reads(self, operands: Sequence[tuple[Tensor | None, Iterable[int]]]) -> None:
        """Note the parameter axes that a contraction sums over.

        A product of weights alone gives another weight, so only axes of its own operands count;
        otherwise axes behind computed weights count too.

        Parameters
        ----------
        operands:
            Pairs of an operand and its summed dimensions.
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

    def is_scale(self, tensor: Any) -> None:
        """Note that a tensor is the scale of a normalisation."""
        record = self.records.get(tensor)
        if record is not None:
            self.found.scale_axes.update(record.axes)

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
        """Give an unlabelled axis of a parameter the labels that it meets.

        The labels are tied so that they vary along the last of their dimensions only.
        """
        last = max(dims)
        assert b.record is not None
        for v in common - {last}:  # one value serves many positions, so they go together
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
        """Yield the fields that met no field of another operand; pin those that met a size."""
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
        """Return one of two paired arrays of labels.

        It is the smaller one if they were united. If this context does not unite labels, it is the
        larger one, because the smaller one would lose labels.
        """
        return a if (a.size <= b.size) == self.units.uniting else b

    def _label_rest(
        self, b: Operand, met_sizes: set[int], met: Iterable[Any], rank: int
    ) -> list[Field]:
        """Fix or label the axes of a parameter that met no labels, and return the new fields.

        An axis that met a tensor's size is fixed; an axis that met nothing gets new labels.
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
