"""Tests of axes that are split: the blocks they form, and the units that must go together."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.coupling.balance import shrinking_dim


class Split(nn.Module):
    """Two linear layers with a function between them, on 12 units by default."""

    def __init__(
        self, function: Callable[[Tensor], Tensor], width: int = 12, out: int = 12
    ) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(5, width), nn.Linear(out, 5), function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)))


def between(
    function: Callable[[Tensor], Tensor], width: int = 12, out: int = 12
) -> fxprune.Coupling:
    return fxprune.analyze(Split(function, width, out), torch.randn(2, 5))


def only(coupling: fxprune.Coupling) -> Any:
    (group,) = coupling.groups
    return group


def positions(coupling: fxprune.Coupling, name: str) -> list[int]:
    """Return the unit at each position of a parameter's first axis, numbered in order."""
    (labels,) = (a for a in coupling.parameter_labels(name) if a.shape[0] > 1)
    return np.unique(labels.ravel(), return_inverse=True)[1].tolist()


def attend(x: Tensor) -> Tensor:
    q, k, v = x.view(x.shape[0], x.shape[1], 3, 3, 4).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_no_split_no_blocks() -> None:
    coupling = between(torch.relu)
    assert (only(coupling).size, only(coupling).blocks) == (12, 0)
    assert not coupling.blocks(only(coupling)).any()


def test_a_head_dimension_loses_as_many_in_each_head() -> None:
    """A sum over the head dimension of three heads makes three blocks."""
    coupling = between(
        lambda x: (
            (x.view(-1, 3, 4) * x.view(-1, 3, 4)).sum(2, keepdim=True).expand(-1, 3, 4).flatten(1)
        )
    )
    assert all(group.blocks in (0, 3) for group in coupling.groups)
    assert any(group.blocks == 3 for group in coupling.groups)


def test_a_packed_projection_has_a_block_for_each_head_of_each_part() -> None:
    """Each of three heads has a block of queries with their keys, and a block of values."""
    coupling = fxprune.analyze(Split(attend, 36), torch.randn(2, 6, 5))
    group = only(coupling)
    assert (group.size, group.blocks) == (24, 6)
    units = positions(coupling, "a.weight")
    assert units[:12] == units[12:24]
    assert not set(units[24:]) & set(units[:12])
    assert torch.bincount(coupling.blocks(group)).tolist() == [4] * 6


@pytest.mark.parametrize("channels", [0.25, 0.5, 0.75])
def test_blocks_keep_equally_many(channels: float) -> None:
    model, x = Split(attend, 36), torch.randn(2, 6, 5)
    pruned = fxprune.prune(model, x, channels=channels)
    coupling = fxprune.analyze(model, x)
    for group, planned in zip(coupling.groups, pruned.plan.groups, strict=True):
        counts = torch.bincount(coupling.blocks(group)[list(planned.kept)], minlength=group.blocks)
        assert set(counts.tolist()) == {int(4 * channels)}
    assert fxprune.verify(model, pruned).error < 1e-9


def test_a_shuffle_ties_the_positions_of_blocks() -> None:
    """A shuffle couples position i of each block with position i of the other blocks.

    Transposing the blocks puts these positions next to each other.
    """
    coupling = between(lambda x: x.view(-1, 3, 4).transpose(1, 2).flatten(1))
    group = only(coupling)
    assert (group.size, group.blocks) == (4, 0)
    assert positions(coupling, "a.weight") == [0, 1, 2, 3] * 3


def test_a_shuffle_ties_the_smaller_side() -> None:
    """A shuffle of six blocks of two ties the two positions of each block: 6 units are left."""
    coupling = between(lambda x: x.view(-1, 6, 2).transpose(1, 2).flatten(1))
    assert {group.size for group in coupling.groups} == {6}
    assert len(set(positions(coupling, "a.weight"))) == sum(
        group.size for group in coupling.groups
    )


def test_a_split_that_is_joined_again_ties_nothing() -> None:
    group = only(between(lambda x: x.view(-1, 3, 4).relu().flatten(1)))
    assert group.size == 12


# nothing can be removed here, which the test expects
@pytest.mark.filterwarnings("ignore::fxprune.FxpruneWarning")
def test_splits_that_disagree_are_tied() -> None:
    """Blocks of four and blocks of three together leave fewer units than one split alone."""

    def twice(x: Tensor) -> Tensor:
        fours = x.view(-1, 3, 4) * x.view(-1, 3, 4).sum(2, keepdim=True)
        return (fours.view(-1, 4, 3) * fours.view(-1, 4, 3).sum(2, keepdim=True)).flatten(1)

    model = Split(twice)
    one = between(lambda x: (x.view(-1, 3, 4) * x.view(-1, 3, 4).sum(2, keepdim=True)).flatten(1))
    coupling = fxprune.analyze(model, torch.randn(2, 5))
    assert sum(g.size for g in coupling.groups) < sum(g.size for g in one.groups) == 12
    assert (
        fxprune.verify(model, fxprune.prune(model, torch.randn(2, 5), channels=0.5)).error < 1e-9
    )


def test_splits_that_refine_each_other_stand_together() -> None:
    """Two blocks of six, each split into two blocks of three, make four balanced blocks."""

    def twice(x: Tensor) -> Tensor:
        sixes = x.view(-1, 2, 6) * x.view(-1, 2, 6).sum(2, keepdim=True)
        return (sixes.view(-1, 4, 3) * sixes.view(-1, 4, 3).sum(2, keepdim=True)).flatten(1)

    group = only(between(twice))
    assert (group.size, group.blocks) == (12, 4)


def test_a_grouped_convolution_balances_its_groups() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.Conv2d(12, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    coupling = fxprune.analyze(model, torch.randn(2, 3, 4, 4))
    assert [(g.size, g.blocks) for g in coupling.groups] == [(12, 2), (8, 2)]
    for group in coupling.groups:
        first, second = coupling.blocks(group).chunk(2)
        assert len(first.unique()) == len(second.unique()) == 1
        assert first[0] != second[0]


def test_a_depthwise_convolution_has_no_blocks() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 1, groups=12), nn.Conv2d(12, 2, 1)
    )
    group = only(fxprune.analyze(model, torch.randn(2, 3, 4, 4)))
    assert (group.size, group.blocks) == (12, 0)


# nothing can be removed here, which the test expects
@pytest.mark.filterwarnings("ignore::fxprune.FxpruneWarning")
def test_blocks_with_one_pinned_part_are_pinned() -> None:
    """A block with a pinned unit could not lose as many units as the other blocks."""
    model = Split(
        lambda x: (
            (x.view(-1, 3, 4) * x.view(-1, 3, 4).sum(2, keepdim=True)).flatten(1) + 0 * x[:, :1]
        )
    )
    coupling = fxprune.analyze(model, torch.randn(2, 5))
    assert (
        fxprune.verify(model, fxprune.prune(model, torch.randn(2, 5), channels=0.5)).error < 1e-9
    )
    assert coupling.groups == ()
    assert "lies in blocks of which some are partly pinned" in {p.reason for p in coupling.pinned}


@pytest.mark.parametrize(
    ("labels", "block", "dim"),
    [
        ([[1, 2, 3]], [-1] * 5, 1),
        ([[1], [2], [3]], [-1] * 5, 0),
        ([[1, 2], [3, 4]], [-1] * 5, 1),
        ([[1, 2], [3, 4]], [-1, 0, 0, 1, 1], 1),
        ([[1, 2], [3, 4]], [-1, 0, 1, 0, 1], 0),
    ],
)
def test_the_dimension_that_shrinks_is_the_one_within_a_block(
    labels: Any, block: list[int], dim: int
) -> None:
    assert shrinking_dim(np.array(labels), np.array(block)) == dim
