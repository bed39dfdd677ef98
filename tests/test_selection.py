"""How many survive, and which."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxprune
from fxprune.criteria import Ranking
from fxprune.selection import Budget, keep_count, select

sizes, shares = st.integers(1, 300), st.floats(0.001, 1.0)


@given(size=sizes, share=shares)
def test_never_above_the_share_and_never_none(size: int, share: float) -> None:
    count = keep_count(size, share, 1, 1)
    assert 1 <= count <= size
    assert count == 1 or count <= size * share + 1e-6
    assert count + 1 > size * share - 1e-6


@given(size=sizes, share=shares, step=st.integers(1, 32))
def test_multiples_where_there_are_as_many(size: int, share: float, step: int) -> None:
    count = keep_count(size, share, step, 1)
    assert 1 <= count <= size
    assert count % step == 0 or count == size
    assert count <= max(size * share + 1e-6, min(step, size))


@given(size=sizes, share=shares, least=st.integers(1, 300))
def test_at_least_min_channels(size: int, share: float, least: int) -> None:
    count = keep_count(size, share, 1, least)
    assert count >= min(least, size)
    assert count <= max(size * share + 1e-6, least)


@given(size=sizes, share=shares, step=st.integers(1, 16), least=st.integers(1, 64))
def test_both_together(size: int, share: float, step: int, least: int) -> None:
    count = keep_count(size, share, step, least)
    assert min(least, size) <= count <= size
    assert count % step == 0 or count == size


@given(size=sizes, step=st.integers(1, 64))
def test_all_is_all(size: int, step: int) -> None:
    assert keep_count(size, 1.0, step, 1) == size


@given(size=sizes, low=shares, high=shares, step=st.integers(1, 16))
def test_a_larger_share_keeps_no_fewer(size: int, low: float, high: float, step: int) -> None:
    low, high = min(low, high), max(low, high)
    assert keep_count(size, low, step, 1) <= keep_count(size, high, step, 1)


def test_shares_that_floats_miss() -> None:
    assert [keep_count(n, 0.1, 1, 1) for n in (10, 30, 70)] == [1, 3, 7]
    assert keep_count(100, 0.29, 1, 1) == 29


# -- which

PLAIN = fxprune.analyze(nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 2)), torch.randn(2, 3))
GROUPED = fxprune.analyze(
    nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 9, 1, groups=3), nn.Conv2d(9, 2, 1)), torch.randn(2, 3, 4, 4)
)


def scores(coupling: fxprune.Coupling, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(coupling.context.units.count)


@settings(max_examples=40)
@given(share=shares, seed=st.integers(0, 1000))
def test_the_highest_scores_survive(share: float, seed: int) -> None:
    (group,), values = PLAIN.groups, scores(PLAIN, seed)
    kept = list(select(PLAIN, Ranking(values), Budget(share))[group.name])
    own = values[list(group.units)]
    gone = sorted(set(range(group.size)) - set(kept))
    assert kept == sorted(kept)
    assert len(kept) == keep_count(10, share, 1, 1)
    assert not gone or own[kept].min() >= own[gone].max()


@settings(max_examples=40)
@given(share=shares, seed=st.integers(0, 1000), step=st.integers(1, 6), least=st.integers(1, 4))
def test_balanced_blocks_keep_equally_many(share: float, seed: int, step: int, least: int) -> None:
    survivors = select(GROUPED, Ranking(scores(GROUPED, seed)), Budget(share, round_to=step, min_channels=least))
    for group in GROUPED.groups:
        assert group.blocks == 3
        counts = torch.bincount(GROUPED.blocks(group)[list(survivors[group.name])], minlength=3)
        assert len(set(counts.tolist())) == 1
        assert counts[0] > 0
        assert len(survivors[group.name]) % step == 0 or len(survivors[group.name]) == group.size


@settings(max_examples=20)
@given(share=shares, seed=st.integers(0, 1000))
def test_within_a_block_the_highest_survive(share: float, seed: int) -> None:
    values = scores(GROUPED, seed)
    for group in GROUPED.groups:
        kept, blocks = select(GROUPED, Ranking(values), Budget(share))[group.name], GROUPED.blocks(group)
        for block in range(3):
            members = (blocks == block).nonzero().flatten().tolist()
            ranked = sorted(members, key=lambda i: -values[group.units[i]])
            mine = set(kept) & set(members)
            assert mine == set(ranked[: len(mine)])


def test_equal_scores_keep_the_first() -> None:
    (group,) = PLAIN.groups
    assert select(PLAIN, Ranking(np.ones(PLAIN.context.units.count)), Budget(0.3))[group.name] == (0, 1, 2)
