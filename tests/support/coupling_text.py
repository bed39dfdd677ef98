"""How one op couples its operands, as one line of text.

``linear: (i,j),(k,j),(k)->(i,k)`` reads like an einsum: a letter is an axis, a letter that stands
twice is united, the first one wins.

======================  ========================================================================
``i``, ``j``, ...       the units of an operand's axis, in order
``a``, ``b``, ...       units of a dimension that a literal made (``expand``, ``zeros``, padding)
``5``                   a dimension (or stretch) of fixed size: nothing removable
``!``                   pinned by this op
``?``                   an axis of a weight that the op did not meet
``i[1:3]``, ``i+j``     a range of units; one after the other
``i*j``, ``i*4``        laid out row by row: ``j`` (or four positions) for every unit of ``i``
``2*i``                 all of ``i`` twice, one after the other
``i1,i2``               the units of one axis, spread over two dimensions, row by row
``[i j]``               two labels on each position, that lie in no such order
``i~``                  removed elements are not exactly zero here
``with (i1!,i2)``       survivors must form a rectangle; ``!``: this side of it cannot shrink;
                        ``*``: and their order counts
======================  ========================================================================
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fxprune import ops
from fxprune.coupling.propagation import LabelMode
from fxprune.labels import Array, Units
from fxprune.ops import Context

__all__ = ["Operand", "Seen", "constant", "couple_one", "labelled", "weight"]

PINNED = -1


@dataclass(frozen=True)
class Operand:
    """A tensor on which an op is tried.

    ``kind`` is ``labelled`` (every axis has labels), ``weight`` (labelled when an op meets it) or
    ``constant`` (no labels).
    """

    shape: tuple[int, ...]
    kind: str
    dtype: torch.dtype = torch.float32

    @property
    def tensor(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def labelled(*shape: int) -> Operand:
    return Operand(shape, "labelled")


def weight(*shape: int) -> Operand:
    return Operand(shape, "weight")


def constant(*shape: int, dtype: torch.dtype = torch.float32) -> Operand:
    return Operand(shape, "constant", dtype)


@dataclass(frozen=True)
class Seen:
    """The coupling as text, and the ATen ops that ran: their names, and their registry entries."""

    text: str
    executed: frozenset[str]
    served: frozenset[str]


def couple_one(function: Callable[..., Any], operands: Sequence[Any], target: Any = None) -> Seen:
    """Run a function on labels and return the coupling as text.

    ``operands`` may hold :class:`Operand` in nested lists. Anything else is passed as it is.
    """
    context = Context()
    context.units = units = _RecordedUnits()
    context.node, context.target = "op", target
    given: list[tuple[Operand, Tensor]] = []
    number = itertools.count()

    def make(leaf: Any) -> Any:
        if not isinstance(leaf, Operand):
            return leaf
        tensor = leaf.tensor
        if leaf.kind != "constant":
            context.parameter(
                tensor, f"operand{len(given)}", tuple(next(number) for _ in leaf.shape)
            )
        if leaf.kind == "labelled":
            context.fields(tensor)
        given.append((leaf, tensor))
        return tensor

    mode = _RecordedMode(context)
    with (
        torch.inference_mode(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        arguments = tree_map(make, list(operands))
        with mode:
            out = function(*arguments)
    results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    for _ in range(2):  # reading a result may pin what became a single label
        for result in results:
            context.fields(result)
    text = _Text(context, units)
    left = ",".join(text.operand(operand, tensor) for operand, tensor in given)
    right = ",".join(text.result(result) for result in results)
    return Seen(
        f"{left}->{right}{text.conditions()}", frozenset(mode.executed), frozenset(mode.served)
    )


class _RecordedUnits(Units):
    """Units that record which labels were made together."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[tuple[int, int, int]] = []  # start, stop, owner

    def fresh(self, n: int, owner: int) -> Array:
        labels = super().fresh(n, owner)
        self.runs.append((self.count - n, self.count, owner))
        return labels


class _RecordedMode(LabelMode):
    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.executed: set[str] = set()
        self.served: set[str] = set()

    def _execute(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.executed.add(name)
        rule = ops.find_row(func)
        if rule is not None:
            self.served.add(
                next(
                    n
                    for n in (name, name.removesuffix("_"), "pointwise")
                    if ops.OPS.get(n) is rule
                )
            )
        return super()._execute(func, args, kwargs)


@dataclass(frozen=True)
class _Factor:
    """What one field says about one dimension.

    It has ``outer`` copies of ``text`` over ``core`` positions, each repeated ``inner`` times.
    """

    outer: int
    text: str
    core: int
    inner: int


class _Text:
    def __init__(self, context: Context, units: _RecordedUnits) -> None:
        self.context = context
        self.units = units
        self.letters: dict[int, str] = {}
        self._own = iter("ijklmnopqrstuvwxyz")
        self._made = iter("abcdefgh")

    # -- tensors

    def operand(self, operand: Operand, tensor: Tensor) -> str:
        record = self.context.record(tensor)
        if operand.kind == "constant" or record is None:
            return _tuple(str(n) for n in operand.shape)
        factors: list[list[_Factor]] = [[] for _ in operand.shape]
        for f in record.own_fields:
            pinned = self.units.reasons(f.labels) > 0
            self._add(factors, np.where(pinned, PINNED, self.units.find(f.labels)), True)
        texts = []
        for d, n in enumerate(operand.shape):
            if n > 1 and not factors[d]:
                texts.append("!" if record.axes[d] in self.context.fixed_axes else "?")
            else:
                texts.append(_axis(n, factors[d]))
        return _tuple(texts)

    def result(self, tensor: Tensor) -> str:
        factors: list[list[_Factor]] = [[] for _ in tensor.shape]
        for f in self.context.fields(tensor):
            self._add(factors, f.labels, f.zero)
        return _tuple(_axis(n, factors[d]) for d, n in enumerate(tensor.shape))

    def conditions(self) -> str:
        rectangles: dict[str, tuple[list[str], set[int], set[int]]] = {}
        for rectangle in self.context.rectangles:
            labels = self.units.live(rectangle.labels)
            factors: list[list[_Factor]] = [[] for _ in labels.shape]
            self._add(factors, labels, True)
            dims = [d for d, own in enumerate(factors) if own]
            if len(dims) > 1 and labels.any():
                texts = [_axis(labels.shape[d], factors[d]) for d in dims]
                _, fixed, merged = rectangles.setdefault(",".join(texts), (texts, set(), set()))
                fixed |= {i for i, d in enumerate(dims) if d in rectangle.fixed}
                merged |= {
                    i
                    for i, d in enumerate(dims)
                    if d in rectangle.merged and dims[i - 1] in rectangle.merged and i
                }
        full = [
            "".join(
                ("*" if i in merged else "," if i else "") + t + "!" * (i in fixed)
                for i, t in enumerate(texts)
            )
            for texts, fixed, merged in rectangles.values()
        ]
        text = "".join(f" with ({rectangle})" for rectangle in full)
        for verb, arrays in (
            (
                "statistics over",
                [a for own in self.context.found.statistics.values() for a in own],
            ),
            ("mean over", [a for own in self.context.found.rescaled.values() for a in own]),
        ):
            names = {
                self._letter(self._run(int(root)))
                for a in arrays
                for root in np.unique(self.units.live(a))
                if root
            }
            if names:
                text += f"; {verb} {','.join(sorted(names))}"
        return text

    # -- fields

    def _add(self, factors: list[list[_Factor]], labels: Array, zero: bool) -> None:
        shape = labels.shape
        outers, inners = [1] * labels.ndim, [1] * labels.ndim
        for d in range(labels.ndim):
            labels, outers[d], inners[d] = _strip(labels, d)
        dims = [d for d in range(labels.ndim) if labels.shape[d] > 1]
        if not dims:
            for d, n in enumerate(shape):
                if n > 1:
                    factors[d].append(
                        _Factor(1, "!" if labels.flat[0] == PINNED else "{one}", n, 1)
                    )
            return
        core = labels.reshape([labels.shape[d] for d in dims])
        for d, text in zip(dims, self._spread(core), strict=True):
            factors[d].append(
                _Factor(outers[d], text + ("" if zero else "~"), labels.shape[d], inners[d])
            )

    def _spread(self, core: Array) -> list[str]:
        if core.ndim == 1:
            return [self._line(core)]
        for order in itertools.permutations(range(core.ndim)):
            grid = self._grid(core.transpose(order))
            if grid is not None:
                return [grid[order.index(d)] for d in range(core.ndim)]
        rows = "|".join(self._line(row) for row in core.reshape(core.shape[0], -1))
        return [f"{{{rows}}}", *["{..}"] * (core.ndim - 1)]

    def _grid(self, core: Array) -> list[str] | None:
        """Describe units of one axis that are laid out row by row, or a part of such a layout."""
        run = self._run(int(core.flat[0])) if (core > 0).all() else None
        ranks, count = (None, 0) if run is None else self._ranks(run, core)
        if run is None or ranks is None:
            return None
        first = int(ranks.flat[0])
        strides = [int(ranks.take(1, axis=d).flat[0]) - first for d in range(core.ndim)]
        grid = np.ogrid[[slice(n) for n in core.shape]]
        if strides[-1] != 1 or not np.array_equal(
            ranks - first, sum(grid[d] * s for d, s in enumerate(strides))
        ):
            return None
        texts, limit = [], count
        for d, (n, stride) in enumerate(zip(core.shape, strides, strict=True)):
            start, size = first % limit // stride if limit else 0, limit // max(stride, 1)
            if stride <= 0 or limit % stride or start + n > size:
                return None
            texts.append(
                f"{self._letter(run)}{d + 1}" + ("" if n == size else f"[{start}:{start + n}]")
            )
            limit = stride
        return texts

    def _ranks(self, run: int, roots: Array) -> tuple[Array | None, int]:
        """Return the positions of these units on their axis, and the number of its units.

        The positions are None if some of them belong to another axis.
        """
        start, stop, _ = self.units.runs[run]
        if (roots < start).any() or (roots >= stop).any():
            return None, 0
        members = np.unique(self.units.find(np.arange(start, stop)))
        members = members[members >= start]
        return np.searchsorted(members, roots), len(members)

    def _line(self, labels: Array) -> str:
        """Describe a row of labels: stretches of units, one after the other."""
        whole = self._stretch(labels)
        if whole is not None:
            return whole
        n = len(labels)
        for rows in range(2, n // 2 + 1):
            if (
                n % rows == 0
                and (stretch := self._stretch(labels.reshape(rows, -1).T.ravel())) is not None
            ):
                return f"{stretch}2*{stretch}1"
        parts, start = [], 0
        while start < n:
            stop = start + 1
            while stop < n and self._stretch(labels[start : stop + 1]) is not None:
                stop += 1
            times = (
                next((t for t in range(n - start, 1, -1) if self._repeats(labels[start:], t)), 1)
                if stop == start + 1
                else 1
            )
            if times > 1:
                while self._repeats(labels[stop - 1 + times :], times) and self._stretch(
                    labels[start : stop - 1 + 2 * times : times]
                ):
                    stop += times
                stop += times - 1
                parts.append(f"{self._stretch(labels[start:stop:times])}*{times}")
            else:
                parts.append(self._stretch(labels[start:stop]) or "{?}")
            start = stop
        return "+".join(parts)

    @staticmethod
    def _repeats(labels: Array, times: int) -> bool:
        return labels.size >= times and labels[0] > 0 and bool((labels[:times] == labels[0]).all())

    def _stretch(self, roots: Array) -> str | None:
        """Describe consecutive units of one axis, or positions without units."""
        if (roots == 0).all():
            return str(len(roots))
        if (roots == PINNED).all():
            return "!"
        if (roots <= 0).any():
            return None
        run = self._run(int(roots[0]))
        ranks, count = self._ranks(run, roots)
        if ranks is None:
            return None
        steps = np.diff(ranks)
        letter = self._letter(run)
        first, last = int(ranks[0]), int(ranks[-1])
        if len(ranks) == 1:
            return letter if count == 1 else f"{letter}[{first}]"
        if (steps == 1).all():
            return letter if len(ranks) == count else f"{letter}[{first}:{last + 1}]"
        if (steps == -1).all():
            return (
                f"{letter}[::-1]"
                if len(ranks) == count
                else f"{letter}[{first}:{last - 1 if last else ''}:-1]"
            )
        return None

    def _run(self, root: int) -> int:
        return next(
            i for i, (start, stop, _) in enumerate(self.units.runs) if start <= root < stop
        )

    def _letter(self, run: int) -> str:
        if run not in self.letters:
            self.letters[run] = next(self._own if self.units.runs[run][2] >= 0 else self._made)
        return self.letters[run]


def _strip(labels: Array, d: int) -> tuple[Array, int, int]:
    """Remove repeats from one dimension.

    Return the rest, the number of copies that lie one after the other, and how often each position
    is repeated.
    """
    n = labels.shape[d]
    rows = np.moveaxis(labels, d, 0)
    for inner in range(n, 0, -1):
        if (
            n % inner == 0
            and (
                rows.reshape(n // inner, inner, -1) == rows.reshape(n // inner, inner, -1)[:, :1]
            ).all()
        ):
            rows, n = rows[::inner], n // inner
            break
    for outer in range(n, 0, -1):
        if (
            n % outer == 0
            and (
                rows.reshape(outer, n // outer, -1) == rows.reshape(outer, n // outer, -1)[:1]
            ).all()
        ):
            rows = rows[: n // outer]
            break
    return np.moveaxis(rows, 0, d), outer, inner


def _axis(n: int, factors: list[_Factor]) -> str:
    """Describe a dimension of size n: a product of its fields, row by row, if they nest."""
    if not factors:
        return str(n)
    if all(f.text == "!" for f in factors):
        return "!"
    rest, parts = n, []
    for f in sorted(factors, key=lambda f: (-f.inner, -f.outer)):
        if rest % (f.core * f.inner):
            return "[" + " ".join(_alone(f) for f in factors) + "]"
        outer, rest = rest // (f.core * f.inner), f.inner
        parts += [str(outer)] if outer > 1 else []
        parts.append(
            f"({f.text})" if "+" in f.text and (len(factors) > 1 or n > f.core) else f.text
        )
    return "*".join([*parts, *([str(rest)] if rest > 1 else [])])


def _alone(f: _Factor) -> str:
    return "*".join(
        [
            *([str(f.outer)] if f.outer > 1 else []),
            f.text,
            *([str(f.inner)] if f.inner > 1 else []),
        ]
    )


def _tuple(texts: Any) -> str:
    return f"({','.join(texts)})"
