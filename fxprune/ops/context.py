"""What a rule can see and do: read and write fields, unite labels, pin them, and note what must
stay rectangular.

The verbs here know no op. A rule describes an op in their terms: which operands meet element by
element (:meth:`Context.merge`), what is summed (:meth:`Context.contract`), what cannot be followed
(:meth:`Context.pin`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fxprune.dispatch import META, map_tensors
from fxprune.identity import IdentityMap
from fxprune.labels import Array, Field, Units, compact, varied
from fxprune.ops.macs import op_macs

__all__ = [
    "READS_INPUT",
    "Context",
    "Contraction",
    "Event",
    "Met",
    "Operand",
    "Record",
    "Sighting",
]

READS_INPUT = "reads an input of the model"
"""Why the axes stay with which a model's first layers read what it is called with."""

_INPUT = 2  # the number of the reason of an input itself; who meets one has its own


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


class Context:
    """The state of one labelling run."""

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
        self.statistics: dict[
            tuple[str, int], list[Array]
        ] = {}  # (node, how many-th in it) -> labels whose elements leave the statistics
        self._statistics_in_node: dict[str, int] = {}
        # of the op that runs: labels of its input that its statistics go over
        self.noted: tuple[Array, ...] = ()
        self.events: list[Event] = []  # in the order of execution
        self.moved: set[str] = set()  # nodes in which labelled positions were laid out anew
        # nodes with an op that tells positions apart: these, slices, groups, look-ups
        self.positional: set[str] = set()
        # numbers of the parameter axes that a contraction sums over: what a consumer reads
        self.summed_axes: set[int] = set()
        # nodes with a convolution whose groups sum over several input channels
        self.summed_groups: set[str] = set()
        self.scale_axes: set[int] = set()  # numbers of the axes of normalisations' scales
        # labels of axes that Python code, which is not traced, has to see as wide as they were
        self.wide: list[Array] = []
        # parameters, and what is computed from them alone, under labels of their own
        self.weights: Context | None = None
        # fields that a product of activations sums over, head by head, along what
        self.heads: list[tuple[Array, list[int]]] = []
        # nodes with an op that writes into a tensor or draws random numbers
        self.writes: set[str] = set()
        # axis number -> for each position the first that it goes with, whatever it meets
        self.ties: dict[int, Array] = {}
        # ops whose rules the user gave: what they say is to be proved
        self.trusted: set[str] = set()
        # everything that ran and costs multiply-accumulates
        self.contractions: list[Contraction] = []
        # nodes that are a mean or a variance -> labels of the averaged elements
        self.rescaled: dict[str, list[Array]] = {}
        # labels of which every block keeps two, because of one value alone no statistic is taken
        self.pairs: list[Array] = []
        # node -> the ops that it ran, their arguments
        self.ran: dict[str, list[tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {}

    # -- tensors

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
        kept = [f if f.labels.ndim == tensor.dim() else _wrong_rank(f, tensor) for f in fields]
        root = self.records.get(base) if base is not None else None
        if root is not None and tensor is base and _same_fields(root.fields, kept):
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

    # -- new labels

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

    def fix_axis_by(self, record: Record, axis: int, met: Iterable[Any]) -> None:
        """A parameter's axis met tensors that have no labels there."""
        self.fix_axis(
            record, axis, self.why_fixed(met, read=record.axes[axis] in self.summed_axes)
        )

    # -- why there are no labels

    def is_input(self, tensor: Tensor) -> None:
        """Note that the model is called with this tensor."""
        self.causes[tensor] = {None: _INPUT}

    def gives(self, weight: Tensor | None, dims: Iterable[int]) -> None:
        """Note which dimensions of its weight a layer hands on: why they stay is why what it gives
        has no labels.
        """
        self._given = _first_reason(
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
            else pinned or _first_reason(self.cause(tensor) for tensor in tensors)
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
            return _first_reason(known.values())
        return next((known[d] for d in sorted(dims) if d in known), known.get(None, 0))

    def why_fixed(
        self, tensors: Iterable[Any], dims: Iterable[int] | None = None, *, read: bool = False
    ) -> tuple[str, str]:
        """The reason, and its node, of what meets tensors that have no labels; ``read``: of an
        axis that is summed.
        """
        found = _first_reason(self.cause(tensor, dims) for tensor in tensors)
        if found == _INPUT:
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

    # -- unions, pins, notes

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

    def statistic(self, labels: list[Array], *, taken: bool = True) -> None:
        """An op takes statistics over the survivors of these labels (none: over fixed dimensions
        only).

        ``taken=False``: in another mode than this it would.
        """
        self.noted = tuple(labels)
        index = self._statistics_in_node.get(self.node, 0)
        self._statistics_in_node[self.node] = index + 1
        if labels and taken:
            self.statistics[self.node, index] = labels

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
                self.summed_axes.update(record.axes[d] for d in dims)
            elif (
                weights is not None and consumes and tensor is not None and self.of_weights(tensor)
            ):
                self.summed_axes.update(weights._axes_behind(tensor, set(dims)))

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
            self.scale_axes.update(record.axes)

    # -- operands that meet

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
            partner = _partner(
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
                for v in common - {max(dims)}:  # one value for many: those go together
                    if v in b.unlabelled:
                        self.fix_axis(
                            b.record, b.unlabelled[v], "meets a channel axis that is split"
                        )
                labels = self.tie(met.labels, dims - {max(dims)})
                if labels.size > 1:
                    self.label_axis(b.record, unlabelled_axis, take(labels, b.dims))
                    out.append(
                        Met(
                            self._either(labels, met.labels),
                            {**met.zero, index: not b.record.overwritten},
                        )
                    )
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
            self.heads += [
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


def _same_fields(fields: Sequence[Field], others: Sequence[Field]) -> bool:
    return len(fields) == len(others) and all(
        np.array_equal(f.labels, g.labels) for f, g in zip(fields, others, strict=True)
    )


def _first_reason(numbers: Iterable[int]) -> int:
    """Of several reasons the first pin there was; without any, that it is an input."""
    found = list(numbers)
    return min((number for number in found if number > _INPUT), default=max(found, default=0))


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


def _partner(
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


def _wrong_rank(f: Field, tensor: Tensor) -> Field:
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
