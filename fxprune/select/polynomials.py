"""Parameters and multiply-accumulates as polynomials in the surviving units of each kind."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import factorial, prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxprune.common.arrays import Counts, Floats
from fxprune.common.identity import IdentityMap
from fxprune.coupling import Coupling
from fxprune.labels import Array
from fxprune.ops import Contraction
from fxprune.select.kinds import Kinds, labels_along_dims

__all__ = ["Factors", "Polynomial", "Sizes", "Sum", "macs_of", "params_of", "products_of"]


Factors = tuple[int, ...]
"""A product of affine factors, by their indices; an index occurs once for each power."""


Sum = tuple[tuple[float, Factors], ...]
"""A sum of products, each a pair of a coefficient and its factors."""


class Polynomial:
    r"""A sum of products of affine functions of the numbers of surviving units.

    .. math:: \sum_t c_t \prod_{f \in t} s_f(n), \qquad s_f(n) = b_f + \sum_k a_{fk} n_k

    :math:`n_k` is the number of surviving units of kind k.

    Parameters
    ----------
    kinds:
        The kinds of units; the variables are how many of each survive.
    sizes:
        The affine factors, one row (b, a_1, ..., a_K) for each.
    terms:
        Each product as (coefficient, indices of its factors).
    """

    def __init__(
        self, kinds: Kinds, sizes: Floats, terms: Sequence[tuple[float, Factors]]
    ) -> None:
        constant_one = np.zeros((1, len(kinds.pool) + 1))
        constant_one[0, 0] = 1.0
        table = np.concatenate([constant_one, sizes])
        self._constant, self._slope = table[:, 0], table[:, 1:]
        self._coefficient = np.array([c for c, _ in terms], dtype=np.float64)
        self._factors = _factor_table([factors for _, factors in terms])
        self._starts = np.flatnonzero(np.diff(kinds.pool, prepend=-1))
        self._pools = len(self._starts)
        # The terms that depend on each pool.
        moved = self._by_pool(np.abs(self._slope)) > 0
        touched = (
            moved[self._factors].any(axis=1) if terms else np.zeros((0, self._pools), dtype=bool)
        )
        self._term, self._pool = np.nonzero(touched)

    def _by_pool(self, columns: Floats) -> Floats:
        """Return the sums over the kinds of each pool."""
        return np.add.reduceat(columns, self._starts, axis=1) if self._pools else columns

    def at(self, counts: npt.NDArray[np.int64]) -> int:
        """Return the value for these numbers of surviving units, shape (kinds,)."""
        sizes = self._constant + self._slope @ counts
        return round(float(self._coefficient @ sizes[self._factors].prod(axis=1)))

    def saved(
        self, counts: npt.NDArray[np.int64], lost: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Return for each pool how much the value falls if only this pool loses units.

        Parameters
        ----------
        counts:
            How many units of each kind survive before, shape (kinds,).
        lost:
            How many units of each kind its pool loses, shape (kinds,).

        Returns
        -------
        Counts
            The differences, rounded to whole numbers, shape (pools,).
        """
        sizes = self._constant + self._slope @ counts
        now = sizes[self._factors[self._term]]
        step = self._by_pool(self._slope * lost)[
            self._factors[self._term], self._pool[:, np.newaxis]
        ]
        change = self._coefficient[self._term] * (now.prod(axis=1) - (now - step).prod(axis=1))
        return np.rint(np.bincount(self._pool, weights=change, minlength=self._pools)).astype(
            np.int64
        )


class Sizes:
    """The sizes of dimensions as polynomials in the surviving units.

    It collects the sizes and their distinct affine factors, and numbers both.

    Parameters
    ----------
    coupling:
        The analysis.
    kinds:
        The kinds of its units.

    Attributes
    ----------
    sizes:
        The polynomial of each size, at its number.
    """

    def __init__(self, coupling: Coupling, kinds: Kinds) -> None:
        self.coupling, self.kinds = coupling, kinds
        self.sizes: list[Sum] = []
        self._rows: list[Floats] = []
        self._row_numbers: dict[bytes, int] = {}
        self._size_numbers: dict[Sum, int] = {}
        self._of_labels: dict[tuple[tuple[int, ...], tuple[int, ...]], dict[int, int]] = {}

    def dims(self, tensor: Tensor) -> dict[int, int]:
        """Return the number of the size of each dimension of a tensor that can shrink."""
        fields = self.coupling.labels(tensor)
        key = (tuple(map(id, fields)), tuple(tensor.shape))
        if key not in self._of_labels:
            sizes = {}
            for dim, rows in labels_along_dims(self.coupling, fields):
                number = self._size(rows, tensor.shape[dim])
                if number is not None:
                    sizes[dim] = number
            self._of_labels[key] = sizes
        return self._of_labels[key]

    def _size(self, rows: Array, full: int) -> int | None:
        """Return the number of a dimension's size; None if no unit lies on it.

        All rows along the dimension keep the same number of positions, so this number is their
        mean.

        Parameters
        ----------
        rows:
            The labels along the dimension, shape (fields, rows, positions).
        full:
            The size of the dimension when all units survive.
        """
        kinds = np.where(rows > 0, self.kinds.of_unit[rows], -1)
        affine, products = self._positions(kinds, full)
        size: list[tuple[float, Factors]] = []
        for live, positions in products.items():
            share = positions / rows.shape[1] / prod(int(self.kinds.size[k]) for k in live)
            size.append((share, tuple(self._factor(self._unit_row(k)) for k in live)))
        if affine[1:].any():
            size.append((1.0, (self._factor(affine),)))
        elif size and affine[0]:
            size.append((float(affine[0]), ()))
        if not size:
            return None
        number = self._size_numbers.setdefault(tuple(size), len(self.sizes))
        if number == len(self.sizes):
            self.sizes.append(tuple(size))
        return number

    def _positions(self, kinds: Array, full: int) -> tuple[Floats, Counter[Factors]]:
        """Return how the positions of a row depend on the survivors.

        Parameters
        ----------
        kinds:
            The kinds along the dimension, shape (fields, rows, positions); -1 for no unit.
        full:
            The size of the dimension when all units survive.

        Returns
        -------
        tuple
            The affine part (b, a_1, ..., a_K) of the mean number of positions per row; and for
            kinds that meet on positions how many such positions there are in all rows.
        """
        rows = kinds.shape[1]
        affine = np.zeros(len(self.kinds.pool) + 1)
        affine[0] = full
        products: Counter[Factors] = Counter()
        if len(kinds) == 1:
            affine[1:] = np.bincount(kinds[kinds >= 0], minlength=len(self.kinds.pool))
            affine[0] -= affine[1:].sum() / rows
        else:
            met, times = np.unique(kinds.reshape(len(kinds), -1), axis=1, return_counts=True)
            for column, positions in zip(met.T, times.tolist(), strict=True):
                live = tuple(int(k) for k in column if k >= 0)
                affine[0] -= positions / rows if live else 0
                if len(live) == 1:
                    affine[1 + live[0]] += positions
                elif live:
                    products[tuple(sorted(live))] += positions
        affine[1:] /= rows * self.kinds.size
        return affine, products

    def _unit_row(self, kind: int) -> Floats:
        """Return the affine factor that is the number of survivors of one kind."""
        row = np.zeros(len(self.kinds.pool) + 1)
        row[1 + kind] = 1.0
        return row

    def _factor(self, row: Floats) -> int:
        """Return the number of an affine factor; equal factors get the same number."""
        key = np.round(row, 9).tobytes()
        if key not in self._row_numbers:
            self._row_numbers[key] = len(self._rows)
            self._rows.append(row)
        return self._row_numbers[key]

    def values(self) -> Callable[[Floats], Floats]:
        """Return a function that evaluates all sizes.

        Returns
        -------
        callable
            Takes how many units of each kind survive, shape (n, kinds), for n models at once;
            returns their sizes, shape (n, sizes).
        """
        rows = np.array(self._rows).reshape(-1, len(self.kinds.pool) + 1)
        terms = [(number, *term) for number, size in enumerate(self.sizes) for term in size]
        starts = np.flatnonzero(np.diff([number for number, *_ in terms], prepend=-1))
        coefficient = np.array([c for _, c, _ in terms])
        factors = _factor_table([product for *_, product in terms])

        def at(counts: Floats) -> Floats:
            """Return all sizes, shape (n, sizes), for counts of shape (n, kinds)."""
            if not terms:
                return np.zeros((len(counts), 0))
            ones = np.ones((len(counts), 1))
            affine = np.concatenate([ones, rows[:, 0] + counts @ rows[:, 1:].T], axis=1)
            return np.add.reduceat(coefficient * affine[:, factors].prod(axis=2), starts, axis=1)

        return at

    def falling(self, size: int, degree: int) -> list[Sum]:
        """Return the factors s, s - 1, ..., s - degree + 1 of a falling factorial.

        Parameters
        ----------
        size:
            The number of the size s.
        degree:
            How many factors, at least 1.
        """
        (coefficient, factors), *others = self.sizes[size]
        if degree > 1 and not others and coefficient == 1.0 and len(factors) == 1:
            lowered = [self._rows[factors[0]].copy() for _ in range(degree)]
            for less, row in enumerate(lowered):
                row[0] -= less
            return [((1.0, (self._factor(row),)),) for row in lowered]
        lower: list[Sum] = [self.sizes[size]]
        for less in range(1, degree):
            lower.append((*self.sizes[size], (-float(less), ())))
        return lower

    def polynomial(self, products: Sequence[tuple[float, list[Sum]]]) -> Polynomial:
        """Return a sum of products of sizes, expanded.

        Parameters
        ----------
        products:
            Each product as (coefficient, its factors).
        """
        terms: dict[Factors, float] = {}
        for coefficient, sums in products:
            for chosen in itertools.product(*sums):
                factors = tuple(sorted(f for _, product in chosen for f in product))
                weight = coefficient * prod(c for c, _ in chosen)
                terms[factors] = terms.get(factors, 0.0) + weight
        rows = np.array(self._rows).reshape(-1, len(self.kinds.pool) + 1)
        return Polynomial(self.kinds, rows, [(float(c), factors) for factors, c in terms.items()])


def params_of(coupling: Coupling, kinds: Kinds) -> Polynomial:
    """Return the number of learnable parameters as a polynomial."""
    sizes, products = Sizes(coupling, kinds), []
    for tensor in coupling.parameters.values():
        if isinstance(tensor, torch.nn.Parameter):
            dims = sizes.dims(tensor)
            rest = prod(n for d, n in enumerate(tensor.shape) if d not in dims)
            products.append((float(rest), [sizes.sizes[number] for number in dims.values()]))
    return sizes.polynomial(products)


def macs_of(coupling: Coupling, kinds: Kinds) -> Polynomial:
    """Return the multiply-accumulates of the example's batch as a polynomial."""
    sizes, products = Sizes(coupling, kinds), []
    for ran in coupling.contractions:
        products += products_of(ran, sizes)
    return sizes.polynomial(products)


def products_of(ran: Contraction, sizes: Sizes) -> list[tuple[float, list[Sum]]]:
    """Return the multiply-accumulates of one operation as products of sizes.

    Parameters
    ----------
    ran:
        The operation, as it ran in the labelled run.
    sizes:
        The sizes of its tensors' dimensions.

    Returns
    -------
    list of (float, list of Sum)
        Each product as (coefficient, its factors).
    """
    found = []
    for coefficient, degrees in _interpolated(ran, sizes):
        factors = []
        for size, degree in degrees.items():
            factors += sizes.falling(size, degree)
        found.append((float(coefficient * ran.share), factors))
    return found


def _interpolated(ran: Contraction, sizes: Sizes) -> list[tuple[int, dict[int, int]]]:
    """Return the cost of one operation in falling factorials of the sizes that it reads.

    Each term is a pair (coefficient, {number of the size: degree}).

    The cost is a polynomial. Its degree in a size is at most the number of dimensions that have
    this size. Such dimensions hold the same units (a convolution from a residual stream to itself
    has two), so they are resized together. The values of the polynomial at 0, 1, ... up to the
    degree determine its coefficients, by Newton's forward differences, which are exact in
    integers.
    """
    tensors = ran.tensors
    dims = IdentityMap((tensor, sizes.dims(tensor)) for tensor in tensors)
    degrees = Counter(size for tensor in tensors for size in dims[tensor].values())
    free = sorted(degrees)
    values = np.zeros([degrees[size] + 1 for size in free], dtype=np.int64)
    for point in np.ndindex(values.shape):
        values[point] = _cost_at(ran, dims, dict(zip(free, point, strict=True)))
    found = []
    for point, difference in np.ndenumerate(_forward_differences(values)):
        if difference:
            coefficient, rest = divmod(int(difference), prod(map(factorial, point)))
            assert rest == 0, "the formula is no polynomial with integer coefficients"
            powers = {size: degree for size, degree in zip(free, point, strict=True) if degree}
            found.append((coefficient, powers))
    return found


def _cost_at(
    ran: Contraction, dims: IdentityMap[Tensor, dict[int, int]], sizes: Mapping[int, int]
) -> int:
    """Return the multiply-accumulates of an operation at given sizes.

    Parameters
    ----------
    ran:
        The operation.
    dims:
        For each of its tensors, the number of the size of each dimension that can shrink.
    sizes:
        The sizes, by their numbers.
    """

    def shape(tensor: Tensor) -> list[int]:
        """Return the shape of a tensor at these sizes."""
        numbers = dims[tensor]
        return [sizes[numbers[d]] if d in numbers else n for d, n in enumerate(tensor.shape)]

    return ran.macs(shape)


def _forward_differences(values: Counts) -> Counts:
    """Return Newton's forward differences at 0 of a polynomial, along every axis.

    Parameters
    ----------
    values:
        The values of the polynomial on the grid 0, 1, ... along each axis; changed in place.
    """
    for axis in range(values.ndim):
        along = np.moveaxis(values, axis, 0)  # a view
        for order in range(1, len(along)):
            along[order:] = along[order:] - along[order - 1 : -1]
    return values


def _factor_table(products: Sequence[Factors]) -> Counts:
    """Return a table with the factors of each product as a row.

    Indices are shifted by one, because factor 0 is the constant 1. It pads products that have
    fewer factors than the longest.
    """
    order = max(map(len, products), default=0)
    rows = [[f + 1 for f in factors] + [0] * (order - len(factors)) for factors in products]
    return np.array(rows, dtype=np.int64).reshape(len(products), order)
