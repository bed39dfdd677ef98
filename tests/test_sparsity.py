"""The group lasso compared with plain loops, and its effect on training."""

import pytest
import torch
from torch import nn

import fxprune
from fxprune.training.sparsity import GroupSparsity
from tests.support.checking import as_dtype
from tests.zoo import CASES
from tests.zoo.case import Case

SOME = [
    case
    for case in CASES
    if case.name in ("residual", "vit_packed", "concat", "shared", "depthwise")
]


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_sum_over_units_of_norms(case: Case) -> None:
    model = case.build(8).double()
    coupling = fxprune.analyze(model, as_dtype(case.inputs(2), torch.float64))
    expected = 0.0
    for group in coupling.groups:
        squares = [0.0] * group.size
        for name, fields in coupling.elements(group).items():
            if name not in dict(model.named_parameters()):
                continue
            parameter = model.get_parameter(name)
            for field in fields:
                units = field.expand(parameter.shape).flatten().tolist()
                for unit, weight in zip(units, parameter.detach().flatten().tolist(), strict=True):
                    if unit >= 0:
                        squares[unit] += weight**2
        expected += sum(value**0.5 for value in squares)
    assert float(GroupSparsity(model, coupling)().detach()) == pytest.approx(expected, rel=1e-9)


def test_gradient() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    penalty = GroupSparsity(model, fxprune.analyze(model, torch.zeros(2, 3, dtype=torch.float64)))

    def value(weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            model[0].weight.copy_(weight)
        return penalty()

    start = model[0].weight.detach().clone()
    (gradient,) = torch.autograd.grad(penalty(), model[0].weight)
    step = 1e-6
    for i, j in ((0, 0), (3, 2)):
        above, below = start.clone(), start.clone()
        above[i, j] += step
        below[i, j] -= step
        assert float(gradient[i, j]) == pytest.approx(
            float((value(above) - value(below)).detach()) / (2 * step), rel=1e-6
        )


def test_a_unit_at_zero_has_a_finite_gradient() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    GroupSparsity(model, fxprune.analyze(model, torch.zeros(2, 3)))().backward()
    assert all(
        bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None
    )


@pytest.mark.long
def test_training_makes_units_vanish_together() -> None:
    """With the penalty, the weaker half of the units has a smaller share of the weight."""
    shares = []
    for strength in (0.0, 0.05):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
        x = torch.randn(64, 4)
        coupling = fxprune.analyze(model, x)
        penalty, optimiser = (
            GroupSparsity(model, coupling),
            torch.optim.SGD(model.parameters(), lr=0.05),
        )
        for _ in range(1000):
            optimiser.zero_grad()
            ((model(x) - x[:, :1]).square().mean() + strength * penalty()).backward()
            optimiser.step()
        norms = fxprune.criteria.rank("l2", coupling, model).value[list(coupling.groups[0].units)]
        ordered = sorted(norms.tolist())
        shares.append(sum(ordered[:8]) / sum(ordered))
    assert shares[1] < 0.5 * shares[0]


def test_parameters_that_have_changed() -> None:
    """The penalty uses the parameters that the model has now, and refuses other shapes."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    penalty = fxprune.GroupSparsity(model, fxprune.analyze(model, torch.zeros(1, 3)))
    before = penalty()
    model[0].weight = nn.Parameter(model[0].weight.detach() * 2)
    assert penalty() > before
    penalty().backward()
    assert model[0].weight.grad is not None
    model[0].weight = nn.Parameter(torch.randn(5, 3))
    with pytest.raises(fxprune.ArgumentError, match=r"'0\.weight' of shape \(4, 3\)"):
        penalty()
