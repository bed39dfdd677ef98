"""Widths chosen by a score: within the budget, never worse than the ranking, repeatable."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.cost import cost_of
from fxprune.criteria import Ranking, rank
from fxprune.errors import ArgumentError, CallbackError, RewriteError
from fxprune.evaluation.candidates import ranking_of_widths
from fxprune.evaluation.search import WidthSearch
from fxprune.result.report import CandidateRow, Report, SearchRow
from fxprune.select.budget import Budget
from fxprune.select.selection import select
from tests.support.checking import assert_unharmed, snapshot

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Branches(nn.Module):
    """Two branches of equal weights; the output of the second one hardly counts."""

    def __init__(self) -> None:
        super().__init__()
        self.a1, self.a2 = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)
        self.b1, self.b2 = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a2(self.a1(x).relu()) + 0.01 * self.b2(self.b1(x).relu())


def network() -> nn.Module:
    torch.manual_seed(0)
    return Branches().eval()


def closeness(model: nn.Module) -> Callable[[nn.Module], float]:
    """Return a score that is 0 for the model itself, and less for any other."""
    with torch.no_grad():
        wanted = model(X)

    def score(other: nn.Module) -> float:
        with torch.no_grad():
            return -(other(X) - wanted).norm().item()

    return score


# -- what a search promises


def test_the_best_candidate_is_the_result() -> None:
    model = network()
    score, before = closeness(model), snapshot(model)
    search = fxprune.Search(score, evaluations=30)
    plain = fxprune.prune(model, X, macs=0.5)
    found = fxprune.prune(model, X, macs=0.5, search=search, verify=True)
    assert_unharmed(model, before)
    row = found.report.search
    assert row is not None
    assert 5 < row.evaluations <= 30  # two groups have few widths within a budget
    assert row.before == score(plain.model)
    assert row.after == score(found.model) == max(one.score for one in row.candidates)
    assert row.candidates[0].kept == tuple(len(group.kept) for group in plain.plan.groups)
    assert row.candidates[row.chosen].kept == tuple(len(g.kept) for g in found.plan.groups)
    # the second branch is worth nothing, but its weights are as large as the first one's
    assert row.after > 0.5 * row.before
    (a, b) = found.plan.groups
    assert len(a.kept) > len(b.kept)
    assert found.report.error is not None
    assert found.report.error < 1e-9


BUDGETS: tuple[dict[str, Any], ...] = (
    {"macs": 0.5},
    {"params": 0.3, "macs": 0.6},
    {"channels": 0.4, "scope": "global"},
    {"macs": 0.5, "round_to": 4, "min_channels": 4},
    {"macs": 0.6, "layers": {"a1": 0.5}},
)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_every_candidate_meets_the_budget(budget: dict[str, Any]) -> None:
    model = network()
    whole, score, models = cost_of(model, X), closeness(model), []

    def watched(candidate: nn.Module) -> float:
        models.append(candidate)
        return score(candidate)

    found = fxprune.prune(model, X, search=fxprune.Search(watched, 10), **budget)
    assert len(models) == found.report.search.evaluations  # type: ignore[union-attr]
    for candidate in models:
        cost = cost_of(candidate, X)
        assert cost.macs <= budget.get("macs", 1.0) * whole.macs
        assert cost.params <= budget.get("params", 1.0) * whole.params
        a, b = (candidate.get_parameter(f"{name}.weight").shape[0] for name in ("a1", "b1"))
        assert a % budget.get("round_to", 1) == b % budget.get("round_to", 1) == 0
        if "channels" in budget:
            assert a + b <= 0.4 * 32
        if "layers" in budget:
            assert a == 8
    kept = {row.kept for row in found.report.search.candidates}  # type: ignore[union-attr]
    assert len(kept) == len(models), "no candidate is scored twice"


def test_equal_seeds_give_equal_candidates() -> None:
    model = network()

    def candidates(seed: int) -> tuple[CandidateRow, ...]:
        search = fxprune.Search(closeness(model), evaluations=8, seed=seed)
        row = fxprune.prune(model, X, macs=0.5, search=search).report.search
        assert row is not None
        return row.candidates

    assert candidates(0) == candidates(0)
    assert candidates(0)[0] == candidates(1)[0]
    assert candidates(0) != candidates(1)


@pytest.mark.parametrize("criterion", ["cpmc", "l1", "cpmc_flow"])
def test_the_criterion_orders_the_units_of_a_group(criterion: str) -> None:
    model = network()
    coupling = fxprune.analyze(model, X)
    values = rank(criterion, coupling, model).value
    search = fxprune.Search(closeness(model), evaluations=10)
    pruned = fxprune.prune(model, X, macs=0.5, criterion=criterion, search=search)
    for group, planned in zip(coupling.groups, pruned.plan.groups, strict=True):
        own = values[group.units]
        gone = sorted(set(range(group.size)) - set(planned.kept))
        assert not gone or own[list(planned.kept)].min() >= own[gone].max()


def test_one_evaluation_is_the_ranking_alone() -> None:
    model = network()
    search = fxprune.Search(closeness(model), evaluations=1)
    found = fxprune.prune(model, X, macs=0.5, search=search)
    assert found.plan == fxprune.prune(model, X, macs=0.5).plan
    assert found.report.search.evaluations == 1  # type: ignore[union-attr]


def test_a_search_without_a_choice_ends() -> None:
    """A single group has one width within the budget."""
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    search = fxprune.Search(lambda model: 0.0, evaluations=100)
    row = fxprune.prune(model, torch.ones(1, 3), macs=0.5, search=search).report.search
    assert row == SearchRow((CandidateRow(0.0, (4,)),), 0)


def test_candidates_are_corrected_on_data_as_the_result_is() -> None:
    model = network()
    score = closeness(model)
    search = fxprune.Search(score, evaluations=5)
    found = fxprune.prune(model, X, macs=0.5, search=search, data=[(X,)])
    assert found.report.search.after == pytest.approx(score(found.model), rel=1e-6)  # type: ignore[union-attr]
    plain = fxprune.prune(model, X, macs=0.5, data=[(X,)])
    assert found.report.search.before == pytest.approx(score(plain.model), rel=1e-6)  # type: ignore[union-attr]


def test_a_score_may_do_what_it_likes_to_a_candidate() -> None:
    model = network()
    score = closeness(model)

    def rude(candidate: nn.Module) -> float:
        found = score(candidate)
        with torch.no_grad():
            for parameter in candidate.parameters():
                parameter.zero_()
        candidate.train()
        return found

    found = fxprune.prune(model, X, macs=0.5, search=fxprune.Search(rude, 4), verify=True)
    assert not found.model.training
    assert score(found.model) == found.report.search.after  # type: ignore[union-attr]


def test_widths_that_cannot_be_emitted_are_passed_over() -> None:
    model = network()
    coupling = fxprune.analyze(model, X)
    ranking = rank("cpmc", coupling, model)
    first = select(coupling, ranking, Budget(macs=0.5))
    refused: list[Any] = []

    def scored(kept: Any) -> float:
        if kept != first and not refused:
            refused.append(kept)
            raise RewriteError("a node", "node")
        return float(len(kept["a1.weight:0"]))

    search = WidthSearch(fxprune.Search(closeness(model), 6), coupling, ranking, scored)
    better = search.better(first, lambda other: select(coupling, other, Budget(macs=0.5)))
    assert refused[0] not in better
    row = search.row(better[0])
    assert row.evaluations == 6
    assert row.after == max(one.score for one in row.candidates) > row.before


# -- candidates


@pytest.mark.parametrize("criterion", ["cpmc", "l2", "cpmc_flow"])
def test_no_change_gives_the_first_candidate(criterion: str) -> None:
    """Costs are part of the choice, so the new scores need none."""
    torch.manual_seed(0)
    widths = [3, 32, 16, 64, 8]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(8, 2, 1))
    coupling, budget = fxprune.analyze(model, X), Budget(macs=0.5)
    ranking = rank(criterion, coupling, model)
    first = select(coupling, ranking, budget)
    none = np.zeros(len(coupling.groups))
    again = select(coupling, ranking_of_widths(coupling, ranking, first, none), budget)
    for name, units in first.items():
        assert abs(len(again[name]) - len(units)) <= 1, "what is left over may go to another group"
        assert set(again[name]) <= set(units) or set(units) <= set(again[name])


def test_a_change_multiplies_the_width() -> None:
    """Of two groups with 8 of 16 units, one is to get twice the width of the other.

    All 32 units cost the same, so 16 units are left, and 10 to 5 is closest to 2 to 1 with 16.
    """
    model = network()
    coupling = fxprune.analyze(model, X)
    ranking = Ranking(np.random.default_rng(0).random(coupling.context.units.count))
    first = {group.name: tuple(range(8)) for group in coupling.groups}
    change = np.log([2.0, 1.0])
    other = ranking_of_widths(coupling, ranking, first, change)
    kept = select(coupling, other, Budget(channels=0.5, scope="global"))
    assert sorted(map(len, kept.values())) == [5, 11]


# -- the report


ROW = SearchRow(
    (CandidateRow(0.5, (4, 3)), CandidateRow(0.75, (5, 2)), CandidateRow(0.25, (3, 4))), 1
)


def test_the_report_tells_the_search(tmp_path: Path) -> None:
    report = Report(1000, 250, 4000, 1000, search=ROW)
    assert (ROW.evaluations, ROW.before, ROW.after) == (3, 0.5, 0.75)
    assert "score       0.5 -> 0.75 in 3 evaluations" in str(report)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["search"]["candidates"][2] == {"score": 0.25, "kept": [3, 4]}
    assert Report.from_dict(data) == report
    model = network()
    pruned = fxprune.prune(model, X, macs=0.5, search=fxprune.Search(closeness(model), 3))
    pruned.save(tmp_path)
    assert fxprune.load(tmp_path, model).report == pruned.report


@pytest.mark.parametrize("damaged", [3, {"candidates": []}, {"candidates": [], "chosen": 0}])
def test_a_report_whose_search_is_damaged(damaged: Any) -> None:
    data = {**Report(1000, 250, 4000, 1000, search=ROW).to_dict(), "search": damaged}
    with pytest.raises(fxprune.PlanError, match="not a report"):
        Report.from_dict(data)


# -- errors


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"search": lambda model: 0.0}, r"search is a function: give fxprune.Search"),
        ({"search": fxprune.Search, "macs": 0.5}, r"search is the class Search"),
        ({"channels": 0.5, "macs": None}, r'fix every width.*scope="global"'),
        ({"layers": {"a1": 0.5}, "macs": None}, r"fix every width"),
    ],
)
def test_what_cannot_be_searched(options: dict[str, Any], text: str) -> None:
    search = fxprune.Search(lambda model: 0.0)
    with pytest.raises(ArgumentError, match=text):
        fxprune.prune(network(), X, **{"macs": 0.5, "search": search, **options})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0.5,), "no function"),
        ((nn.Linear(1, 1),), "no function"),
        ((closeness, 0), "evaluations=0"),
        ((closeness, 2.5), r"evaluations=2\.5"),
        ((closeness, 5, -1), "seed=-1"),
    ],
)
def test_arguments_of_a_search(arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        fxprune.Search(*arguments)


def test_a_score_that_fails() -> None:
    def fails(model: nn.Module) -> float:
        raise KeyError("accuracy")

    with pytest.raises(CallbackError, match=r"score of a candidate raised KeyError"):
        fxprune.prune(network(), X, macs=0.5, search=fxprune.Search(fails))
    nan = fxprune.Search(lambda model: float("nan"))
    with pytest.raises(ArgumentError, match=r"score of a candidate is nan.*finite"):
        fxprune.prune(network(), X, macs=0.5, search=nan)
