"""Scopes rank units apart, and relative floors leave every group a share of its units."""

import fnmatch
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.criteria import CPMC, DividingCosts, Random
from fxprune.errors import ArgumentError, BudgetError, FxpruneWarning
from fxprune.select.scopes import isomorphism_classes
from tests.support.checking import call
from tests.zoo import CASES

CHAIN = nn.Sequential(
    nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8), nn.Linear(8, 2)
).requires_grad_(False)
INPUT = torch.randn(2, 3)
BY_NAME = {case.name: case for case in CASES}


def kept(model: nn.Module, x: Any, **options: Any) -> dict[str, int]:
    plan = fxprune.prune(model, x, **options).plan
    return {group.name: len(group.kept) for group in plan.groups}


def widths(**options: Any) -> list[int]:
    return [*kept(CHAIN, INPUT, **options).values()]


def first_is_small(view: Any) -> Tensor:
    """Return scores by which all units of a layer go before any of the next layer."""
    return torch.arange(float(view.group.size)) + 100 * int(view.group.name[0])


# -- which groups are alike


class Block(nn.Module):
    """A bottleneck: two units that differ in their kernels only, added to a stream."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down, self.norm = nn.Conv2d(width, hidden, 1), nn.BatchNorm2d(hidden)
        self.up = nn.Conv2d(hidden, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.norm(self.down(x)).relu())


class SameBlock(nn.Module):
    """What :class:`Block` computes, by functions, with parameters in another order."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        block = Block(width, hidden)
        self.norm = block.norm
        self.second = nn.Parameter(block.up.weight.detach())
        self.second_bias = nn.Parameter(block.up.bias.detach())
        self.first = nn.Parameter(block.down.weight.detach())
        self.first_bias = nn.Parameter(block.down.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.conv2d(x, self.first, self.first_bias)
        hidden = self.norm(hidden).relu()
        return x + nn.functional.conv2d(hidden, self.second, self.second_bias, padding=1)


def classes(model: nn.Module, x: Tensor) -> dict[str, int]:
    coupling = fxprune.analyze(model, x)
    numbers = isomorphism_classes(coupling)
    return {group.name: n for group, n in zip(coupling.groups, numbers, strict=True)}


def test_blocks_of_other_sizes_are_alike_and_the_stream_is_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Block(8, 6), Block(8, 4), nn.Conv2d(8, 2, 1))
    assert classes(model, torch.zeros(2, 3, 6, 6)) == {
        "0.weight:0": 0,
        "1.down.weight:0": 1,
        "2.down.weight:0": 1,
    }


def test_the_graph_counts_and_not_the_class_of_a_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Block(8, 6), SameBlock(8, 4), nn.Conv2d(8, 2, 1))
    found = classes(model, torch.zeros(2, 3, 6, 6))
    inner = [number for name, number in found.items() if name != "0.weight:0"]
    assert len(inner) == 2
    assert len(set(inner)) == 1


@pytest.mark.parametrize(
    "other",
    [
        [nn.Conv2d(8, 6, 1, bias=False), nn.Conv2d(6, 8, 1)],  # no bias
        [nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1)],
        [nn.Conv2d(8, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 8, 1)],
        [nn.Conv2d(8, 6, 1), nn.ConvTranspose2d(6, 8, 1)],
        [nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1, groups=2)],
    ],
    ids=["bias", "norm", "depthwise", "transposed", "groups"],
)
def test_other_structures_are_not_alike(other: list[nn.Module]) -> None:
    plain = [nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)]
    alike = [nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)]
    model = nn.Sequential(*plain, nn.Sigmoid(), *alike, nn.Sigmoid(), *other)
    found = classes(model, torch.zeros(2, 8, 5, 5))
    assert found["0.weight:0"] == found["3.weight:0"]
    assert found["6.weight:0"] != found["0.weight:0"]


def test_attention_and_the_hidden_units_of_its_network_are_apart() -> None:
    case = BY_NAME["encoder_layer"]
    model = case.build(case.width).eval()
    coupling = fxprune.analyze(model, case.inputs(2))
    balanced = {
        number
        for group, number in zip(coupling.groups, isomorphism_classes(coupling), strict=True)
        if group.blocks
    }
    others = {
        number
        for group, number in zip(coupling.groups, isomorphism_classes(coupling), strict=True)
        if not group.blocks
    }
    assert balanced
    assert others
    assert not balanced & others


# -- what scopes do


def test_without_scopes_one_layer_loses_everything_first() -> None:
    assert widths(channels=0.75, scope="global", criterion=first_is_small) == [2, 20, 8]


def test_every_scope_loses_the_same_share() -> None:
    """A quarter of 12, of 20 and of 8 units; and a half of them."""
    scopes = {"first": "0", "second": "2"}
    options: dict[str, Any] = {"scope": "global", "criterion": first_is_small, "scopes": scopes}
    assert widths(channels=0.75, **options) == [9, 15, 6]
    assert widths(channels=0.5, **options) == [6, 10, 4]


def test_units_of_one_scope_compete() -> None:
    """The first two layers lose 16 of 32 together, all but one of the first; the last loses 4."""
    options: dict[str, Any] = {"scope": "global", "criterion": first_is_small}
    assert widths(channels=0.5, scopes={"both": ["0", "2"]}, **options) == [1, 15, 4]


@pytest.mark.parametrize("criterion", [first_is_small, CPMC(), Random(3)])
@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"params": 0.3}, {"macs": 0.7, "params": 0.6}])
def test_shares_differ_by_one_removal_at_most(criterion: Any, budget: dict[str, float]) -> None:
    scopes = {"a": "0", "b": "2", "c": "4"}
    pruned = fxprune.prune(CHAIN, INPUT, criterion=criterion, scopes=scopes, **budget)
    lost = [1 - len(group.kept) / group.size for group in pruned.plan.groups]
    assert max(lost) - min(lost) <= 1 / 8 + 1e-9  # the smallest layer has 8 units
    report = pruned.report
    assert report.macs_after <= budget.get("macs", 1) * report.macs_before
    assert report.params_after <= budget.get("params", 1) * report.params_before


def test_nothing_more_of_the_next_scope_fits() -> None:
    """One more unit of the layer that has lost most is above the budget.

    The layers have a, b, 8 units and 3 a + a b + 8 b + 16 multiply-accumulates: 452 of them, so
    that 226 may stay.
    """
    scopes = {"first": "0", "second": "2"}
    first, second = widths(macs=0.5, scopes=scopes, layers={"4": 1.0}, criterion="l1")[:2]

    def macs(a: int, b: int) -> int:
        return 3 * a + a * b + 8 * b + 16

    assert macs(12, 20) == 452
    assert macs(first, second) <= 226
    if 1 - first / 12 >= 1 - second / 20:
        assert macs(first + 1, second) > 226
    if 1 - second / 20 >= 1 - first / 12:
        assert macs(first, second + 1) > 226


def test_cheap_units_do_not_come_back_before_it_is_their_turn() -> None:
    """A dear unit takes 16 * (3 * 25 + 2) = 1232 multiply-accumulates, a cheap one 16 * 5 = 80.

    With 3 of 4 dear units and 30 of 40 cheap ones, a quarter of both is gone. The budget is one
    below that, so the next dear unit goes. For the rest of its 1232, all 10 cheap units would fit,
    but the dear ones have lost the larger share.
    """

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dear, self.cheap = nn.Conv2d(3, 4, 5, padding=2), nn.Conv2d(3, 40, 1)
            self.ends = nn.ModuleList([nn.Conv2d(4, 2, 1), nn.Conv2d(40, 2, 1)])

        def forward(self, x: Tensor) -> Tensor:
            return self.ends[0](self.dear(x)) + self.ends[1](self.cheap(x))

    model, x = Two().eval(), torch.zeros(1, 3, 4, 4)
    budget = (3 * 1232 + 30 * 80 - 1) / (4 * 1232 + 40 * 80)
    options: dict[str, Any] = {"macs": budget, "criterion": "l1"}
    found = kept(model, x, scopes={"dear": "dear", "cheap": "cheap"}, **options)
    assert found == {"dear.weight:0": 2, "cheap.weight:0": 30}


@pytest.mark.parametrize("share", [0.8, 0.61, 0.5, 0.333, 0.11])
def test_wide_layers_lose_the_same_share_too(share: float) -> None:
    """With many units, several are removed before costs are computed again."""
    model = nn.Sequential(
        nn.Linear(3, 1500), nn.ReLU(), nn.Linear(1500, 900), nn.ReLU(), nn.Linear(900, 2)
    )
    first, second = kept(model, INPUT, params=share, scopes={"first": "0"}).values()
    assert abs(first / 1500 - second / 900) <= 1 / 900 + 1e-9


def test_costs_still_rank_within_a_scope() -> None:
    """Within one scope the costly layer goes first, and the other scope pays its share."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dear, self.cheap = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
            self.apart = nn.Conv2d(3, 8, 1)
            self.ends = nn.ModuleList(nn.Conv2d(8, 2, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            layers = self.dear, self.cheap, self.apart
            return sum(end(layer(x)) for end, layer in zip(self.ends, layers, strict=True))

    class Given:
        costs = DividingCosts(computation=1.0)

        def scores(self, coupling: fxprune.Coupling, model: nn.Module) -> Any:
            return torch.ones(coupling.context.units.count)

    found = kept(
        Two().eval(),
        torch.zeros(1, 3, 4, 4),
        channels=0.75,
        scope="global",
        criterion=Given(),
        scopes={"apart": "apart"},
    )
    # 6 of 24 units go: 4 of the 16 units of the two layers, and 2 of the 8 of the other
    assert found == {"dear.weight:0": 4, "cheap.weight:0": 8, "apart.weight:0": 6}


def test_isomorphic_scopes_are_those_of_the_same_names() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Block(8, 6), Block(8, 4), nn.Conv2d(8, 2, 1)).eval()
    x = torch.zeros(2, 3, 6, 6)
    options: dict[str, Any] = {"macs": 0.5, "criterion": first_is_small}
    by_structure = fxprune.prune(model, x, scopes="isomorphic", verify=True, **options)
    by_name = fxprune.prune(model, x, scopes={"blocks": ["?.down"]}, **options)
    assert by_structure.plan == by_name.plan
    assert fxprune.apply(fxprune.Plan.from_json(by_structure.plan.to_json()), model).plan == (
        by_structure.plan
    )
    alike = {"a": "1.down", "b": "2.down"}
    assert fxprune.prune(model, x, scopes=alike, **options).plan != by_name.plan


@pytest.mark.parametrize("name", ["residual", "grouped", "encoder_layer", "dense_block"])
def test_networks_reach_their_budget_with_isomorphic_scopes(name: str) -> None:
    case = BY_NAME[name]
    model, x = case.build(case.width).eval(), case.inputs(2)
    pruned = fxprune.prune(model, x, macs=0.6, scopes="isomorphic", verify=True)
    assert pruned.report.macs_after <= 0.6 * pruned.report.macs_before
    call(pruned.model, x)


def test_scopes_that_are_refused() -> None:
    for given, words in (
        ("isomorphous", 'give "isomorphic", or a dict'),
        (["0"], 'give "isomorphic", or a dict'),
        ({"a": 3}, "give the name of a scope"),
        ({3: "0"}, "give the name of a scope"),
        ({"a": ["0", 3]}, "give the name of a scope"),
        ({"a": "nothing*"}, r"scopes: 'nothing\*' matches no layer .* There are: 0\.weight"),
    ):
        with pytest.raises(ArgumentError, match=words):
            widths(macs=0.5, scopes=given)
    with pytest.raises(ArgumentError, match=r"scopes= .* give macs="):
        widths(channels=0.5, scopes="isomorphic")


# -- relative floors


def test_no_group_loses_more_than_it_may() -> None:
    """Of 12 units 3 stay, and of 20 and 8 as many as the budget leaves: 20 - 9 + 8 - 2."""
    options: dict[str, Any] = {"channels": 0.6, "scope": "global", "criterion": first_is_small}
    assert widths(max_ratio=0.75, **options) == [3, 13, 8]
    assert widths(max_ratio={"0": 0.5}, **options) == [6, 10, 8]
    assert widths(max_ratio={"*": 0.25, "0": 1.0}, **options) == [1, 15, 8]


def test_floats_that_miss_a_share() -> None:
    """Of 10 units 3 stay: 1 - 0.7 is above 0.3, and 10 times as much above 3."""
    model = nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 2))
    assert kept(model, INPUT, params=0.35, max_ratio=0.7) == {"0.weight:0": 3}
    assert kept(model, INPUT, channels=0.3, max_ratio=0.7) == {"0.weight:0": 3}


def test_floors_are_kept_in_multiples() -> None:
    """Half of 12 is 6, which 8 is the next multiple of 4 above; 6 is above the floor of 5."""
    options: dict[str, Any] = {"channels": 0.7, "scope": "global", "criterion": first_is_small}
    assert widths(max_ratio=0.5, round_to=4, **options)[0] == 8
    assert widths(max_ratio=0.5, min_channels=7, **options)[0] == 7
    assert widths(max_ratio=0.5, min_channels=5, **options)[0] == 6


def test_floors_hold_back_groups_that_channels_would_cut() -> None:
    assert widths(channels=0.25, max_ratio={"2": 0.5}) == [3, 10, 2]


def test_what_cannot_be_reached_above_the_floors() -> None:
    """A sample takes 3 * 12 + 12 * 20 + 20 * 8 + 8 * 2 = 452 multiply-accumulates.

    With half of the units it takes 3 * 6 + 6 * 10 + 10 * 4 + 4 * 2 = 126; there are two samples.
    """
    with pytest.raises(BudgetError, match=r"macs=0\.2 .* \(252 of 904\).*max_ratio="):
        widths(macs=0.2, max_ratio=0.5)
    assert widths(macs=126 / 452, max_ratio=0.5) == [6, 10, 4]
    with pytest.raises(BudgetError, match=r"channels=0\.3 cannot be reached: max_ratio=0\.5"):
        widths(channels=0.3, max_ratio=0.5)
    with pytest.raises(BudgetError, match=r"layers=0\.3 .*max_ratio=0\.5 .*'2\.weight:0'"):
        widths(macs=0.9, layers={"2": 0.3}, max_ratio={"2": 0.5})


def test_ratios_that_are_refused() -> None:
    for given, words in (
        (0, r"max_ratio=0 is outside \(0, 1\]"),
        (1.5, "max_ratio=1.5 is outside"),
        ("0.5", "is outside"),
        ({"0": 2}, r"max_ratio\['0'\]=2 is outside"),
        ({0: 0.5}, "max_ratio: a int is no name"),
        ({"nothing": 0.5}, "max_ratio: 'nothing' matches no layer"),
    ):
        with pytest.raises(ArgumentError, match=words):
            widths(macs=0.5, max_ratio=given)
    with pytest.raises(ArgumentError, match="max_ratio= count what the model at hand has"):
        fxprune.Steps(CHAIN, INPUT, count=2, macs=0.5, max_ratio=0.5)


def test_a_floor_that_leaves_everything_is_told() -> None:
    """Of 5 units 4.5 must stay, so all do."""
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.warns(FxpruneWarning, match=r"none of the 5 units went.*max_ratio="):
        kept(model, INPUT, channels=0.9, max_ratio=0.1)


def test_ratios_of_balanced_groups() -> None:
    """The 3 blocks of 4 and of 3 units keep 2 units each.

    That are 6 * 3 + 6 + 6 * 2 + 6 + 2 * 6 + 2 = 56 of 113 parameters.
    """
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 9, 1, groups=3), nn.Conv2d(9, 2, 1))
    found = kept(model, torch.zeros(2, 3, 4, 4), params=0.5, max_ratio=0.5)
    assert found == {"0.weight:0": 6, "1.weight:0": 6}


def test_globs_match_as_those_of_layers() -> None:
    for glob in ("0", "2.weight", "*"):
        named = {"0.weight", "0", "2.weight", "2", "4.weight", "4"}
        matched = {name[0] for name in named if fnmatch.fnmatchcase(name, glob)}
        with_floor = widths(channels=0.25, max_ratio={glob: 0.5}) if glob != "*" else [6, 10, 4]
        for name, width, size in zip("024", with_floor, (12, 20, 8), strict=True):
            assert width == (size // 2 if name in matched else size // 4)
