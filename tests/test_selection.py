"""How many units are kept, and which."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune.cost import count_parameters
from fxprune.criteria import Ranking
from fxprune.rewrite import Survivors
from fxprune.select.budget import Budget, keep_count
from fxprune.select.selection import select
from tests.specs import Concat, Conv, Network, TransposedConv, build, example, networks
from tests.specs.profiles import networks_drawn
from tests.support.checking import call
from tests.support.counting import CheckedCounter
from tests.zoo import CASES
from tests.zoo.case import Case

# some random networks allow no removal
pytestmark = pytest.mark.filterwarnings("ignore::fxprune.FxpruneWarning")

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


# -- which units

PLAIN = fxprune.analyze(
    nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 2)), torch.randn(2, 3)
)
GROUPED = fxprune.analyze(
    nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 9, 1, groups=3), nn.Conv2d(9, 2, 1)),
    torch.randn(2, 3, 4, 4),
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
    survivors = select(
        GROUPED, Ranking(scores(GROUPED, seed)), Budget(share, round_to=step, min_channels=least)
    )
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
        kept, blocks = (
            select(GROUPED, Ranking(values), Budget(share))[group.name],
            GROUPED.blocks(group),
        )
        for block in range(3):
            members = (blocks == block).nonzero().flatten().tolist()
            ranked = sorted(members, key=lambda i: -values[group.units[i]])
            mine = set(kept) & set(members)
            assert mine == set(ranked[: len(mine)])


def test_equal_scores_keep_the_first() -> None:
    (group,) = PLAIN.groups
    assert select(PLAIN, Ranking(np.ones(PLAIN.context.units.count)), Budget(0.3))[group.name] == (
        0,
        1,
        2,
    )


# -- budgets for the whole network

CHAIN = nn.Sequential(
    nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 2)
).requires_grad_(False)
INPUT = torch.randn(2, 3)


def widths(**options: Any) -> list[int]:
    return [len(group.kept) for group in fxprune.prune(CHAIN, INPUT, **options).plan.groups]


def test_nothing_to_remove_leaves_everything() -> None:
    for kind in ("macs", "params", "channels"):
        assert widths(**{kind: 1.0}, scope="global", round_to=8) == [12, 20]


def test_a_hair_less_than_everything() -> None:
    """The first multiples below everything already meet the budget.

    Units beyond them are not restored, because counts are rounded down.
    """
    assert widths(macs=0.999, round_to=8) == [8, 16]
    assert sum(widths(channels=0.999, scope="global")) == 31


@pytest.mark.parametrize("share", [0.8, 0.61, 0.5, 0.333, 0.11])
def test_wide_layers_stop_at_the_budget_too(share: float) -> None:
    """With many units, costs are recomputed only after several removals.

    The last unit removed must still be one that had to be removed.
    """
    model = nn.Sequential(
        nn.Linear(3, 1500), nn.ReLU(), nn.Linear(1500, 900), nn.ReLU(), nn.Linear(900, 2)
    )

    def parameters(first: int, second: int) -> int:
        return 4 * first + (first + 1) * second + 2 * second + 2

    first, second = (
        len(group.kept) for group in fxprune.prune(model, INPUT, params=share).plan.groups
    )
    limit = share * parameters(1500, 900)
    assert parameters(first, second) <= limit
    assert max(parameters(first + 1, second), parameters(first, second + 1)) > limit


def test_shares_that_floats_miss_in_all_together() -> None:
    model = nn.Sequential(nn.Linear(3, 100), nn.ReLU(), nn.Linear(100, 2))
    for share, left in ((0.29, 29), (1 / 3, 33), (0.57, 57), (0.07, 7)):
        (group,) = fxprune.prune(model, INPUT, channels=share, scope="global").plan.groups
        assert len(group.kept) == left


def test_global_channels_go_by_rank_alone() -> None:
    """The units of one layer all have the lowest scores.

    The layer loses all units but one before the other layer loses any.
    """
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    def first_is_small(view: Any) -> Tensor:
        return torch.arange(8.0) + (0 if view.group.name.startswith("0.") else 100)

    pruned = fxprune.prune(model, INPUT, channels=9 / 16, scope="global", criterion=first_is_small)
    assert [group.kept for group in pruned.plan.groups] == [(7,), tuple(range(8))]


def test_layers_keep_their_share_and_the_others_pay() -> None:
    assert widths(layers={"0": 0.5}) == [6, 20]
    assert widths(layers={"*": 0.5, "2": 0.25}) == [6, 5]
    assert widths(channels=0.5, layers={"2*": 1.0}) == [6, 20]
    first, second = widths(params=0.5, layers={"0": 0.75})
    assert first == 9
    # 3 * 12 + 12 + 12 * 20 + 20 + 20 * 2 + 2 = 350 before; 4 * 9 + 2 + (9 + 1 + 2) * n after.
    assert second == (175 - 38) // 12
    assert sum(widths(channels=0.5, scope="global", layers={"0": 1.0})[1:]) == 10


def test_a_glob_that_matches_nothing_prunable() -> None:
    for glob in ("1", "4", "nothing*"):
        with pytest.raises(
            fxprune.ArgumentError, match=r"layers: .* matches no layer .* There are: 0\.weight"
        ):
            widths(layers={glob: 0.5})


def test_an_unreachable_budget_says_what_is_reachable() -> None:
    """In parameters, one unit of each layer leaves 4 + 2 + 4 = 10 of 350."""
    with pytest.raises(
        fxprune.BudgetError, match=r"^params=0\.02 .* has params=0\.02858 \(10 of 350\)"
    ):
        widths(params=0.02)
    assert widths(params=0.02858) == [1, 1]
    with pytest.raises(fxprune.BudgetError, match=r"has channels=0\.375 \(12 of 32\)"):
        widths(channels=0.3, scope="global", min_channels=6)
    assert widths(channels=0.375, scope="global", min_channels=6) == [6, 6]


def test_the_second_of_two_budgets_is_named() -> None:
    with pytest.raises(fxprune.BudgetError, match=r"^params=0\.01 "):
        widths(macs=0.9, params=0.01)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_zoo_reaches_its_budget(case: Case) -> None:
    """The budgets are met, no group is empty, and the smaller model runs on the example."""
    model = case.build(case.width).eval()
    budgets = {"macs": 0.6, "params": 0.6}
    pruned = _within(model, case.inputs(2), budgets)
    assert _inside(pruned, budgets)
    assert all(group.kept for group in pruned.plan.groups)
    call(pruned.model, case.inputs(2))


# -- budgets of random networks

SHARE = st.sampled_from((1.0, 0.9, 0.7, 0.5, 0.35))


def _survivors(pruned: fxprune.Pruned) -> dict[str, set[int]]:
    return {group.name: set(group.kept) for group in pruned.plan.groups}


def _spent(pruned: fxprune.Pruned) -> dict[str, tuple[int, int]]:
    """Return (after, before) for each quantity that a budget can limit."""
    report, groups = pruned.report, pruned.plan.groups
    return {
        "macs": (report.macs_after, report.macs_before),
        "params": (report.params_after, report.params_before),
        "channels": (sum(len(g.kept) for g in groups), sum(g.size for g in groups)),
    }


def _inside(pruned: fxprune.Pruned, budgets: dict[str, float]) -> bool:
    spent = _spent(pruned)
    return all(
        spent[name][0] <= share * spent[name][1] * (1 + 1e-12) for name, share in budgets.items()
    )


def _within(
    model: nn.Module, x: Tensor, budgets: dict[str, float], **options: Any
) -> fxprune.Pruned:
    """Prune to the budgets, or, if one cannot be reached, to the least that the error names."""
    for _ in range(len(budgets) + 1):
        try:
            return fxprune.prune(model, x, scope="global", **budgets, **options)
        except fxprune.BudgetError as error:
            # The error reads "macs=0.35 cannot be reached: the smallest model that ... has
            # macs=0.41 (...)", and the second number is reachable.
            name, least = re.findall(r"(macs|params|channels)=([0-9.e-]+)", str(error))[-1]
            event("the least reachable was asked for")
            assert float(least) > budgets[name]
            budgets[name] = float(least)
    raise AssertionError("what an error named as reachable was not")


@networks_drawn(2)
@given(
    net=networks(),
    budgets=st.dictionaries(st.sampled_from(("macs", "params", "channels")), SHARE, min_size=1),
    round_to=st.sampled_from((1, 1, 2, 4)),
    least=st.sampled_from((1, 1, 2, 3)),
)
def test_budgets_hold(net: Network, budgets: dict[str, float], round_to: int, least: int) -> None:
    """Every budget is met, and no group is empty.

    Counts are multiples of ``round_to`` where the group is large enough, at least the minimum, and
    the report counts the pruned model's own cost.
    """
    model, x = build(net), example(net)
    pruned = _within(model, x, budgets, round_to=round_to, min_channels=least)
    assert _inside(pruned, budgets)
    whole = all(len(group.kept) == group.size for group in pruned.plan.groups)
    event("everything was kept" if whole else "something was removed")
    for group in fxprune.analyze(model, x).groups:
        kept, blocks = len(_survivors(pruned)[group.name]), max(1, group.blocks)
        assert kept >= min(least, group.size)
        # per block, so that the total is a multiple
        step = round_to // math.gcd(round_to, blocks)
        smallest = -(-max(least, blocks) // (step * blocks)) * step * blocks
        assert whole or kept % round_to == 0 or (kept == group.size and group.size < smallest)
    assert count_parameters(pruned.model) == pruned.report.params_after
    assert pruned.report.macs_after == _macs(pruned.model, x)


def _macs(model: nn.Module, x: Tensor) -> int:
    """Count the MACs of the kernels that run."""
    with torch.no_grad(), CheckedCounter() as counter:
        model(x)
    return counter.macs


@networks_drawn(3)
@given(
    net=networks(),
    kind=st.sampled_from(("macs", "params", "channels")),
    shares=st.tuples(SHARE, SHARE),
    criterion=st.sampled_from(("cpmc", "l2", "random")),
)
def test_units_of_a_group_go_in_one_order(
    net: Network, kind: str, shares: tuple[float, float], criterion: str
) -> None:
    """Whatever the budget, units of a group go in one order: what is kept of it is nested.

    The same budget gives the same plan.
    """
    model, x = build(net), example(net)
    one, other = (_within(model, x, {kind: s}, criterion=criterion) for s in shares)
    wider = _survivors(other)
    for name, kept in _survivors(one).items():
        assert name not in wider or kept <= wider[name] or wider[name] <= kept
    if shares[0] == shares[1]:
        assert one.plan == other.plan


@networks_drawn(2)
@given(
    net=networks(),
    budgets=st.dictionaries(st.sampled_from(("macs", "params", "channels")), SHARE, min_size=1),
    criterion=st.sampled_from(("cpmc", "l2", "random")),
)
def test_nothing_is_removed_in_vain(
    net: Network, budgets: dict[str, float], criterion: str
) -> None:
    """With one more unit of any group, or one in each of its blocks, a budget is exceeded."""
    model, x = build(net), example(net)
    pruned = _within(model, x, budgets, criterion=criterion)
    coupling = fxprune.analyze(model, x)
    kept = {group.name: set(range(group.size)) for group in coupling.groups}
    kept |= _survivors(pruned)  # without groups that could not be emitted smaller
    for group in coupling.groups:
        gone = [unit for unit in range(group.size) if unit not in kept[group.name]]
        blocks = coupling.blocks(group).tolist()
        breaks = not gone
        for first in gone:
            if blocks[first] == min(blocks[u] for u in gone):
                # Restore this unit, and any unit in each other block.
                others = {blocks[u]: u for u in reversed(gone)}
                back = {**others, blocks[first]: first}.values()
                restored = {**kept, group.name: kept[group.name] | set(back)}
                breaks |= not _holds(coupling, restored, budgets)
        assert breaks, group.name


def _holds(
    coupling: fxprune.Coupling, kept: dict[str, set[int]], budgets: dict[str, float]
) -> bool:
    """Tell whether these survivors meet the budgets, by the shapes that they leave."""

    def spent(survivors: dict[str, set[int]]) -> dict[str, int]:
        left = Survivors(
            coupling, {name: tuple(sorted(units)) for name, units in survivors.items()}
        )
        learnable = [
            tensor for tensor in coupling.parameters.values() if isinstance(tensor, nn.Parameter)
        ]
        return {
            "macs": coupling.macs(left.shape),
            "params": sum(math.prod(left.shape(tensor)) for tensor in learnable),
            "channels": sum(map(len, survivors.values())),
        }

    found, whole = (
        spent(kept),
        spent({group.name: set(range(group.size)) for group in coupling.groups}),
    )
    return all(found[name] <= share * whole[name] * (1 + 1e-12) for name, share in budgets.items())


@networks_drawn(10)
@given(net=networks(), macs=SHARE, params=SHARE)
def test_pruned_to_budgets_equals_the_masked_original(
    net: Network, macs: float, params: float
) -> None:
    model, x = build(net), example(net)
    pruned = _within(model, x, {"macs": macs, "params": params})
    assert fxprune.verify(model, pruned, x).error <= 1e-9


def test_no_layer_loses_all_to_others_it_shares_blocks_with() -> None:
    """Both channels of the second layer share blocks with channels of other layers.

    They have the lower scores in both blocks, but the layer must keep one of them.
    """
    network = Network(
        input=(3, 4, 4),
        nodes=(
            *(Conv(i, out=2) for i in range(4)),
            Concat((4, 3, 2)),
            TransposedConv(5, out=2, groups=2),
        ),
        outputs=(6,),
    )
    torch.manual_seed(0)
    pruned = fxprune.prune(build(network), example(network), channels=0.5, verify=True)
    assert pruned.report.error is not None
    assert pruned.report.error <= 1e-9
    assert not pruned.plan.pinned_nodes
    assert all(min(p.shape) > 0 for p in pruned.model.parameters())
    assert pruned.report.params_after <= 0.6 * pruned.report.params_before


def test_a_recurrent_network_is_counted_too() -> None:
    """Random networks seldom have one, and torch's own counter counts no MACs of it on a CPU."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = (
                nn.LSTM(6, 8, batch_first=True, bidirectional=True),
                nn.Linear(16, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0])

    x = torch.randn(2, 5, 6)
    pruned = fxprune.prune(Recurrent().eval(), x, macs=0.5)
    assert pruned.report.macs_before == 10 * 2 * (32 * 6 + 32 * 8) + 10 * 16 * 3
    assert pruned.report.macs_after == _macs(pruned.model, x)


class Pooled(nn.Module):
    """A group norm over features without positions.

    The features have shape (batch, channels) or (batch, channels, 1, 1).
    """

    def __init__(self, groups: int, spatial: bool) -> None:
        super().__init__()
        self.a, self.norm, self.b = (
            nn.Conv2d(3, 12, 3),
            nn.GroupNorm(groups, 12),
            nn.Conv2d(12, 2, 1),
        )
        self.spatial = spatial

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).mean((2, 3), keepdim=True)
        h = self.norm(h) if self.spatial else self.norm(h.flatten(1))[..., None, None]
        return self.b(h)


@pytest.mark.parametrize(
    "budget",
    [
        {"channels": 0.05},
        {"params": 0.6},
        {"channels": 0.6, "scope": "global"},
        {"layers": {"a": 0.01}},
    ],
)
@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_no_group_norm_is_left_with_one_value(
    groups: int, spatial: bool, budget: dict[str, Any]
) -> None:
    model = Pooled(groups, spatial)
    pruned = fxprune.prune(model, torch.randn(2, 3, 6, 6), **budget)
    left = pruned.model.get_parameter("norm.weight").numel()
    assert 2 * groups <= left < 12
    assert pruned.model(torch.randn(1, 3, 6, 6)).shape == (1, 2, 1, 1)


def test_a_group_norm_over_positions_keeps_one_channel() -> None:
    net = nn.Sequential(nn.Conv2d(3, 12, 3), nn.GroupNorm(3, 12), nn.Conv2d(12, 2, 1))
    assert (
        fxprune.prune(net, torch.randn(2, 3, 6, 6), channels=0.1)
        .model.get_parameter("1.weight")
        .numel()
        == 3
    )
