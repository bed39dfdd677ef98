"""Penalties on single units and on scales, and growing regularisation."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import ArgumentError
from fxprune.training import BNScaleSparsity, GroupSparsity, GrowingRegularisation, Linear


def network() -> nn.Sequential:
    """Return two groups of two units each; the units of the first have a scale each."""
    model = nn.Sequential(
        nn.Linear(1, 2, bias=False),
        nn.BatchNorm1d(2),
        nn.Linear(2, 2, bias=False),
        nn.ReLU(),
        nn.Linear(2, 1, bias=False),
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [2.0]]))
        model[1].weight.copy_(torch.tensor([3.0, -4.0]))
        model[2].weight.copy_(torch.tensor([[5.0, 6.0], [7.0, 8.0]]))
        model[4].weight.copy_(torch.tensor([[9.0, 10.0]]))
    return model


def analysed(model: nn.Module) -> fxprune.Coupling:
    coupling = fxprune.analyze(model, torch.zeros(2, 1))
    assert [group.name for group in coupling.groups] == ["0.weight:0", "2.weight:0"]
    assert coupling.units.tolist() == [u for g in coupling.groups for u in g.units.tolist()]
    return coupling


# own weight, scale (the shift is zero), and the column of the next weight
FIRST = [1 + 9 + 25 + 49, 4 + 16 + 36 + 64]
# own row and the next weight
SECOND = [25 + 36 + 81, 49 + 64 + 100]


def test_group_lasso_with_a_strength_for_each_unit() -> None:
    model = network()
    penalty = GroupSparsity(
        model, analysed(model), unit_strengths=[0.5, 0.0, 2.0, 1.0], strength=Linear(0, 1, 4)
    )
    norms = [square**0.5 for square in (*FIRST, *SECOND)]
    expected = 0.5 * norms[0] + 2 * norms[2] + norms[3]
    assert [penalty.strength, penalty().item()] == [0, 0]
    penalty.step()
    assert penalty().item() == pytest.approx(0.25 * expected, rel=1e-6)
    penalty.steps = 9  # as after an interruption
    assert penalty().item() == pytest.approx(expected, rel=1e-6)


def test_a_unit_without_strength_gets_no_gradient() -> None:
    model = network()
    GroupSparsity(model, analysed(model), unit_strengths=[1, 0, 0, 0])().backward()
    gradient = model[0].weight.grad
    assert gradient is not None
    assert gradient.flatten().tolist() == pytest.approx([1 / FIRST[0] ** 0.5, 0])


def test_scales_alone_are_penalised() -> None:
    model = network()
    penalty = BNScaleSparsity(model, analysed(model), unit_strengths=[1, 3, 1, 1], strength=0.1)
    assert penalty().item() == pytest.approx(0.1 * (3 + 3 * 4))
    penalty().backward()
    assert model[1].weight.grad is not None
    assert model[1].weight.grad.tolist() == pytest.approx([0.1, -0.3])
    assert all(p.grad is None or not p.grad.any() for p in (model[0].weight, model[2].weight))
    assert penalty.without_scale == {"2.weight:0": (0, 1)}


class Handmade(nn.Module):
    """Normalises without a module: the graph alone knows which parameter is the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.scale = nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 4.0]))
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.batch_norm(
            self.first(x), None, None, self.scale, self.shift, training=True
        )
        return self.second(x.relu())


def test_scales_are_found_in_the_graph() -> None:
    model = Handmade()
    penalty = BNScaleSparsity(model, fxprune.analyze(model, torch.randn(2, 3, 4, 4)))
    assert penalty().item() == 10
    assert not penalty.without_scale


def test_a_model_without_scales_is_refused() -> None:
    model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
    with pytest.raises(ArgumentError, match=r"no unit.*scale.*GroupSparsity"):
        BNScaleSparsity(model, fxprune.analyze(model, torch.zeros(1, 1)))


def plan_of(model: nn.Module, kept: tuple[int, int]) -> fxprune.Plan:
    """Return a plan that keeps one unit of each group of ``network()``."""

    def scores(view: fxprune.criteria.UnitView) -> Tensor:
        group = view.views.coupling.groups.index(view.group)
        return torch.arange(2) == kept[group]

    return fxprune.prune(model, torch.zeros(2, 1), channels=0.5, criterion=scores).plan


def test_growing_regularisation_reaches_what_the_plan_removes() -> None:
    model = network()
    coupling, plan = analysed(model), plan_of(model, (1, 0))
    penalty = GrowingRegularisation(model, coupling, plan, delta=0.5, every=2, ceiling=1)
    # the weight 7 lies on a removed row and on a removed column, so it counts for both units
    half = (FIRST[0] + SECOND[1]) / 2
    found, done = [], []
    for _ in range(4):
        found.append(penalty().item())
        done.append(penalty.done)
        penalty.step()
    assert found == pytest.approx([0.5 * half, 0.5 * half, half, half])
    assert done == [False, False, True, True]


def test_growing_regularisation_empties_the_units_before_they_go() -> None:
    """Afterwards, the plan removes nothing that the outputs depend on."""
    errors = []
    for ceiling in (1e-9, 1.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        x = torch.randn(64, 2)
        coupling = fxprune.analyze(model, x)
        plan = fxprune.prune(model, x, channels=0.5, criterion="random").plan
        penalty = GrowingRegularisation(
            model, coupling, plan, delta=ceiling / 20, every=10, ceiling=ceiling
        )
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(250):
            optimiser.zero_grad()
            ((model(x) - x.prod(1, keepdim=True)).square().mean() + penalty()).backward()
            optimiser.step()
            penalty.step()
        pruned = fxprune.apply(plan, model).model
        with torch.no_grad():
            errors.append(float((pruned(x) - model(x)).norm() / model(x).norm()))
    assert errors[1] < 1e-6 < 1e-1 < errors[0]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("half", "plan is a str"),
        (fxprune.prune(network(), torch.zeros(2, 1), channels=1.0).plan, "removes no unit"),
        (
            fxprune.prune(network(), torch.zeros(2, 1), channels=0.5, keep="0").plan,
            "other groups than the coupling.*keep=",
        ),
    ],
)
def test_plans_that_do_not_fit(plan: Any, message: str) -> None:
    model = network()
    with pytest.raises(ArgumentError, match=message):
        GrowingRegularisation(model, analysed(model), plan)


@pytest.mark.parametrize(
    ("strengths", "message"),
    [
        ([1, 2], r"shape \(2,\).*shape \(4,\)"),
        ([1, 2, -1, 0], "below 0"),
        ("four", "no array of numbers"),
    ],
)
def test_strengths_that_do_not_fit(strengths: Any, message: str) -> None:
    model = network()
    with pytest.raises(ArgumentError, match=message):
        GroupSparsity(model, analysed(model), unit_strengths=strengths)
