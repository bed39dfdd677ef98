"""Costs of a model with other widths, without building it.

They are polynomials in the number of surviving units of each kind.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune.cost import count_parameters
from fxprune.rewrite import Survivors
from fxprune.select.kinds import Kinds, Pool, kinds_of, pools_of
from fxprune.select.polynomials import Polynomial, macs_of, params_of
from tests.specs import build, example, networks
from tests.zoo import CASES
from tests.zoo.case import Case

Kept = dict[str, tuple[int, ...]]
few = settings(
    max_examples=max(1, settings.default.max_examples // 3),
    suppress_health_check=list(HealthCheck),
    deadline=None,
)


class Costs:
    """The analysis of a model, with everything that ``fxprune.select`` derives from it."""

    def __init__(self, coupling: fxprune.Coupling) -> None:
        self.coupling = coupling
        self.pools: tuple[Pool, ...] = pools_of(coupling)
        self.kinds: Kinds = kinds_of(coupling, self.pools)
        self.macs, self.params = macs_of(coupling, self.kinds), params_of(coupling, self.kinds)

    def draw(self, rng: np.random.Generator, widths: list[int] | None = None) -> Kept:
        """Return random survivors that the balance allows, with the given or random widths."""
        kept: dict[str, list[int]] = {group.name: [] for group in self.coupling.groups}
        for number, pool in enumerate(self.pools):
            width = int(rng.integers(1, pool.width + 1)) if widths is None else widths[number]
            for row in pool.units:
                kept[self.coupling.groups[pool.group].name] += rng.permutation(row)[
                    :width
                ].tolist()
        return {name: tuple(sorted(units)) for name, units in kept.items()}

    def counts(self, kept: Kept) -> np.ndarray:
        """Return how many units of each kind survive."""
        left = [
            self.kinds.of_unit[np.array(g.units)[list(kept[g.name])]] for g in self.coupling.groups
        ]
        return (
            np.bincount(np.concatenate(left), minlength=len(self.kinds.pool))
            if left
            else np.zeros(0, dtype=np.int64)
        )

    def measured(self, kept: Kept) -> tuple[int, int]:
        """Return MACs and parameters, counted on the shapes of the smaller model."""
        left = Survivors(self.coupling, kept)
        learnable = [t for t in self.coupling.parameters.values() if isinstance(t, nn.Parameter)]
        return self.coupling.macs(left.shape), sum(int(np.prod(left.shape(t))) for t in learnable)


def check(costs: Costs, seed: int) -> None:
    """Check that the polynomials equal the cost of the smaller model's shapes.

    Widths are full at first, then random.
    """
    rng = np.random.default_rng(seed)
    for kept in (
        costs.draw(rng, [pool.width for pool in costs.pools]),
        costs.draw(rng),
        costs.draw(rng),
    ):
        counts = costs.counts(kept)
        assert (costs.macs.at(counts), costs.params.at(counts)) == costs.measured(kept)


def check_saved(costs: Costs, seed: int) -> None:
    """Check that removing one unit of each block saves the difference of two values.

    This holds for each pool until one unit per block is left.
    """
    kept = costs.draw(np.random.default_rng(seed))
    counts = costs.counts(kept)
    for number, pool in enumerate(costs.pools):
        lost = counts - _one_less(costs, kept, number)
        if counts[costs.kinds.pool == number].sum() > pool.blocks:
            for polynomial in (costs.macs, costs.params):
                assert polynomial.saved(counts, lost)[number] == polynomial.at(
                    counts
                ) - polynomial.at(counts - lost)


def _one_less(costs: Costs, kept: Kept, number: int) -> np.ndarray:
    """Return the counts after the pool loses the first survivor of each block."""
    pool = costs.pools[number]
    name = costs.coupling.groups[pool.group].name
    gone = {
        next((unit for unit in row.tolist() if unit in set(kept[name])), -1) for row in pool.units
    }
    return costs.counts({**kept, name: tuple(unit for unit in kept[name] if unit not in gone)})


def check_partition(costs: Costs) -> None:
    """Check that every unit is in one pool and of one kind.

    Units of a row lie in one block, and kinds ascend with their pools.
    """
    for index, group in enumerate(costs.coupling.groups):
        members = [
            unit
            for pool in costs.pools
            if pool.group == index
            for unit in pool.units.ravel().tolist()
        ]
        assert sorted(members) == list(range(group.size))
        blocks = costs.coupling.blocks(group).numpy()
        for pool in costs.pools:
            if pool.group == index:
                assert all(len(set(blocks[row])) == 1 for row in pool.units)
                kinds = costs.kinds.of_unit[np.array(group.units)[pool.units]]
                assert {int(costs.kinds.pool[k]) for k in kinds.ravel()} == {
                    costs.pools.index(pool)
                }
    assert (np.diff(costs.kinds.pool) >= 0).all()
    assert costs.kinds.size.sum() == sum(group.size for group in costs.coupling.groups)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_zoo(case: Case) -> None:
    costs = Costs(fxprune.analyze(case.build(case.width).eval(), case.inputs(2)))
    check_partition(costs)
    check(costs, 0)
    check_saved(costs, 1)


@few
@given(net=networks(), seed=st.integers(0, 1000))
def test_random_networks(net, seed: int) -> None:
    costs = Costs(fxprune.analyze(build(net), example(net)))
    event(f"kinds beside their pool's first: {min(len(costs.kinds.pool) - len(costs.pools), 3)}")
    check_partition(costs)
    check(costs, seed)
    check_saved(costs, seed + 1)


# -- cases that a product of full-width dimensions would miss


class Between(nn.Module):
    """Two convolutions with a function between them."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int, out: int) -> None:
        super().__init__()
        self.first, self.last, self.function = (
            nn.Conv2d(3, width, 1),
            nn.Conv2d(out, 5, 1),
            function,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def between(function: Callable[[Tensor], Tensor], width: int = 6, out: int = 6) -> Costs:
    return Costs(fxprune.analyze(Between(function, width, out).eval(), torch.randn(2, 3, 4, 4)))


class Stream(nn.Module):
    """A convolution from a residual stream to itself: both of its axes hold the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inside, self.last = (
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Conv2d(6, 5, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        stream = self.first(x)
        return self.last(stream + self.inside(stream))


def test_a_width_that_counts_twice() -> None:
    """MACs per pixel are 3 n + 9 n n + 5 n, parameters 3 n + n + 9 n n + n + 5 n + 5."""
    costs = Costs(fxprune.analyze(Stream(), torch.randn(2, 3, 4, 4)))
    assert len(costs.pools) == 1
    for width in range(1, 7):
        (counts,) = [costs.counts(costs.draw(np.random.default_rng(0), [width]))]
        assert costs.macs.at(counts) == 2 * 16 * (3 * width + 9 * width**2 + 5 * width)
        assert costs.params.at(counts) == 3 * width + width + 9 * width**2 + width + 5 * width + 5


def test_units_that_are_read_more_often_than_others_are_of_another_kind() -> None:
    """The last layer reads units 0 and 1 twice, so each of them costs more than another unit."""
    costs = between(lambda x: torch.cat([x, x[:, :2]], dim=1), out=8)
    ((pool,), group) = costs.pools, costs.coupling.groups[0]
    kinds = costs.kinds.of_unit[list(group.units)]
    assert len(set(kinds.tolist())) == 2
    assert kinds[:2].tolist() == [kinds[0]] * 2
    assert len(set(kinds[2:].tolist())) == 1
    assert pool.units.shape == (1, 6)
    for kept, macs in (((0, 1, 2), 3 * 3 + 5 * 5), ((2, 3, 4), 3 * 3 + 5 * 3)):
        assert costs.macs.at(costs.counts({group.name: kept})) == 2 * 16 * macs
    check(costs, 0)


def test_an_axis_of_two_labellings_is_their_product() -> None:
    """Every unit occurs twice, and the two copies can be pruned: there are n m channels."""
    costs = between(
        lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1, -1).reshape(x.shape[0], -1, 4, 4), out=12
    )
    assert sorted(pool.width for pool in costs.pools) == [2, 6]
    for _ in range(4):
        check(costs, 3)


def test_blocks_count_once_for_each() -> None:
    """A convolution of three groups has n and m units per group, on 3 n and 3 m channels."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 9, 1, groups=3), nn.Conv2d(9, 5, 1))
    costs = Costs(fxprune.analyze(model, torch.randn(2, 3, 4, 4)))
    assert [pool.units.shape for pool in costs.pools] == [(3, 2), (3, 3)]
    for n, m in ((1, 1), (1, 3), (2, 2)):
        macs = 2 * 16 * (3 * 3 * n + 3 * n * m + 5 * 3 * m)
        assert costs.macs.at(costs.counts(costs.draw(np.random.default_rng(0), [n, m]))) == macs


def test_nothing_to_prune_is_a_constant() -> None:
    model = nn.Linear(3, 4)
    costs = Costs(fxprune.analyze(model, torch.randn(2, 3)))
    assert costs.pools == ()
    nothing = np.zeros(0, dtype=np.int64)
    assert (costs.macs.at(nothing), costs.params.at(nothing)) == (
        2 * 3 * 4,
        count_parameters(model),
    )
    assert costs.macs.saved(nothing, nothing).shape == (0,)


@given(
    rows=st.lists(st.tuples(*[st.integers(0, 5)] * 4), min_size=1, max_size=4),
    terms=st.lists(
        st.tuples(st.integers(-5, 5), st.lists(st.integers(0, 3), max_size=3)), max_size=5
    ),
    counts=st.tuples(*[st.integers(0, 9)] * 3),
)
def test_against_a_loop(rows, terms, counts) -> None:
    """Compare ``at`` and ``saved`` of random polynomials with plain loops.

    Pool 0 has two kinds, pool 1 has one.
    """
    kinds = Kinds(np.array([-1, 0, 1, 2]), np.array([0, 0, 1]), np.array([1, 1, 1]))
    terms = [(c, tuple(f % len(rows) for f in factors)) for c, factors in terms]
    polynomial = Polynomial(kinds, np.array(rows, dtype=np.float64), terms)

    def value(n) -> int:
        sizes = [row[0] + sum(a * k for a, k in zip(row[1:], n, strict=True)) for row in rows]
        return sum(
            c * int(np.prod([sizes[f] for f in factors], initial=1)) for c, factors in terms
        )

    lost = (1, 2, 3)
    assert polynomial.at(np.array(counts)) == value(counts)
    first = value(counts) - value((counts[0] - 1, counts[1] - 2, counts[2]))
    second = value(counts) - value((counts[0], counts[1], counts[2] - 3))
    assert polynomial.saved(np.array(counts), np.array(lost)).tolist() == [first, second]
