"""How the cost of a model follows from the widths of its groups.

Every multiply-accumulate count and every parameter count is a product of dimensions, and every dimension that can shrink is an
affine function of how many units survive in each pool. So the cost of a whole model is a polynomial in the pools' widths: it is
read off the analysis once, and then answers what a model of other widths costs, and what one more unit costs at any of them,
without a model of these widths.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxprune.balance import shrinking_dim
from fxprune.cost import op_macs
from fxprune.coupling import Coupling
from fxprune.labels import Array
from fxprune.shapes import META, map_tensors

__all__ = ["Polynomial", "Pool", "macs_of", "params_of", "pools_of"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Pool:
    """Units of one group that are alike: they lie in blocks of which every one keeps equally many.

    Attributes
    ----------
    group:
        The group's position in ``coupling.groups``.
    units:
        Indices into the group's units, shape (blocks, width): one row per block; one row in all where the group is not split.
    """

    group: int
    units: npt.NDArray[np.int64]

    @property
    def blocks(self) -> int:
        return self.units.shape[0]

    @property
    def width(self) -> int:
        """Units per block: what can be removed, one from each block at a time, down to one."""
        return self.units.shape[1]


def pools_of(coupling: Coupling) -> tuple[Pool, ...]:
    """The pools of all groups, in the order of the groups."""
    out = []
    for index, group in enumerate(coupling.groups):
        cells = coupling.balance.cell[list(group.units)]
        kinds = np.where(cells >= 0, coupling.balance.kind[cells] if len(coupling.balance.kind) else -1, -1)
        for kind in np.unique(kinds):
            members = np.flatnonzero(kinds == kind)
            if kind < 0:
                out.append(Pool(index, members[np.newaxis]))
            else:
                out.append(Pool(index, np.stack([members[cells[members] == cell] for cell in np.unique(cells[members])])))
    return tuple(out)


class Polynomial:
    r""":math:`\sum_t c_t \prod_{f \in t} s_f(n)` with affine sizes :math:`s_f(n) = b_f + \sum_p a_{fp} n_p` of the pools' widths.

    Parameters
    ----------
    sizes:
        Rows (b, a_1, ..., a_P), one for each size that occurs.
    terms:
        (coefficient, indices of the sizes that are multiplied).
    """

    def __init__(self, sizes: Floats, terms: Sequence[tuple[float, tuple[int, ...]]]) -> None:
        pools = sizes.shape[1] - 1
        one = np.zeros((1, pools + 1))
        one[0, 0] = 1.0
        table = np.concatenate([one, sizes])  # size 0 is the constant 1, for terms of fewer factors than the longest
        order = max((len(factors) for _, factors in terms), default=0)
        self._constant, self._slope = table[:, 0], table[:, 1:]
        self._coefficient = np.array([c for c, _ in terms], dtype=np.float64)
        self._factors = np.array([[f + 1 for f in factors] + [0] * (order - len(factors)) for _, factors in terms], dtype=np.int64)
        self._factors = self._factors.reshape(len(terms), order)
        # Which terms a pool has a part in.
        touched = (self._slope[self._factors] != 0).any(axis=1) if terms else np.zeros((0, pools), dtype=bool)
        self._term, self._pool = np.nonzero(touched)
        self._steps = self._slope[self._factors[self._term], self._pool[:, np.newaxis]]
        self._pools = pools

    def at(self, widths: Floats) -> float:
        """The value at these widths (one per pool)."""
        sizes = self._constant + self._slope @ widths
        return float(self._coefficient @ sizes[self._factors].prod(axis=1))

    def saved(self, widths: Floats, by: Floats | float = 1.0) -> Floats:
        """For each pool: by how much the value falls when its width alone falls ``by`` so many."""
        sizes = self._constant + self._slope @ widths
        now = sizes[self._factors[self._term]]
        step = self._steps * (np.broadcast_to(by, (self._pools,))[self._pool][:, np.newaxis])
        change = self._coefficient[self._term] * (now.prod(axis=1) - (now - step).prod(axis=1))
        saved: Floats = np.bincount(self._pool, weights=change, minlength=self._pools).astype(np.float64)
        return saved


class _Sizes:
    """Collects the distinct sizes of dimensions, each as an affine function of the pools' widths."""

    def __init__(self, coupling: Coupling, pools: Sequence[Pool]) -> None:
        self.coupling, self.pools = coupling, pools
        self.widths = np.array([pool.width for pool in pools], dtype=np.float64)
        count = coupling.context.units.count
        self.pool_of = np.full(count, -1, dtype=np.int64)
        for number, pool in enumerate(pools):
            self.pool_of[np.array(coupling.groups[pool.group].units)[pool.units.ravel()]] = number
        self.rows: list[Floats] = []
        self._known: dict[bytes, int] = {}
        self._of_labels: dict[tuple[int, int, int], int | None] = {}

    def dims(self, tensor: Tensor) -> dict[int, int]:
        """Dimensions of a tensor that can shrink -> the number of their size."""
        found: dict[int, list[Array]] = {}
        for labels in self.coupling.labels(tensor):
            found.setdefault(shrinking_dim(labels, self.coupling.balance.block), []).append(labels)
        out = {}
        for dim, fields in found.items():
            number = self._size(fields, dim, tensor.shape[dim])
            if number is not None:
                out[dim] = number
        return out

    def _size(self, fields: list[Array], dim: int, full: int) -> int | None:
        if len(fields) == 1:
            key = (id(fields[0]), dim, full)
            if key not in self._of_labels:
                self._of_labels[key] = self._affine(fields, dim, full)
            return self._of_labels[key]
        return self._affine(fields, dim, full)

    def _affine(self, fields: list[Array], dim: int, full: int) -> int | None:
        row = np.zeros(len(self.pools) + 1)
        for labels in fields:
            # All rows along the dimension keep equally many, so one of them tells.
            line = np.moveaxis(labels, dim, -1).reshape(-1, labels.shape[dim])[0]
            pool = self.pool_of[line]
            row[1:] += np.bincount(pool[pool >= 0], minlength=len(self.pools))
        row[0] = full - row[1:].sum()
        row[1:] /= self.widths
        if not row[1:].any():
            return None
        key = np.round(row, 9).tobytes()
        if key not in self._known:
            self._known[key] = len(self.rows)
            self.rows.append(row)
        return self._known[key]

    def polynomial(self, terms: Sequence[tuple[float, tuple[int, ...]]]) -> Polynomial:
        return Polynomial(np.array(self.rows).reshape(-1, len(self.pools) + 1), terms)


def params_of(coupling: Coupling, pools: Sequence[Pool], names: Sequence[str] | None = None) -> Polynomial:
    """Number of parameters (elements of the tensors called ``names``; default: of everything learnable)."""
    sizes = _Sizes(coupling, pools)
    terms = []
    for name, tensor in coupling.parameters.items():
        if (isinstance(tensor, torch.nn.Parameter)) if names is None else (name in names):
            dims = sizes.dims(tensor)
            rest = prod(n for d, n in enumerate(tensor.shape) if d not in dims)
            terms.append((float(rest), tuple(dims.values())))
    return sizes.polynomial(terms)


def macs_of(coupling: Coupling, pools: Sequence[Pool]) -> Polynomial:
    """Multiply-accumulates of the traced batch.

    Each formula is a polynomial of first degree in each of the sizes it reads, so its values at all corners (every size 0 or 1)
    tell the coefficients.
    """
    sizes = _Sizes(coupling, pools)
    terms: list[tuple[float, tuple[int, ...]]] = []
    for ran in coupling.contractions:
        read: dict[int, dict[int, int]] = {}
        tensors: list[Tensor] = []
        map_tensors(tensors.append, (ran.args, ran.kwargs, ran.out))
        for tensor in tensors:
            read[id(tensor)] = sizes.dims(tensor)
        free = sorted({size for dims in read.values() for size in dims.values()})
        corners = {}
        for corner in itertools.product((0, 1), repeat=len(free)):
            at = dict(zip(free, corner, strict=True))

            def resized(tensor: Tensor, at: dict[int, int] = at, read: dict[int, dict[int, int]] = read) -> Tensor:
                dims = read[id(tensor)]
                shape = [at[dims[d]] if d in dims else n for d, n in enumerate(tensor.shape)]
                return torch.empty(shape, dtype=tensor.dtype, device=META)

            corners[corner] = op_macs(ran.func, *map_tensors(resized, (ran.args, ran.kwargs, ran.out))) or 0
        for corner in corners:
            below = itertools.product(*((0, 1) if bit else (0,) for bit in corner))
            coefficient = sum((-1) ** (sum(corner) - sum(b)) * corners[b] for b in below)
            if coefficient:
                terms.append((float(coefficient), tuple(f for f, bit in zip(free, corner, strict=True) if bit)))
    return sizes.polynomial(terms)
