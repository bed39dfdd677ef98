"""Movement pruning: what training does to the weights of a unit."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.criteria import Movement, rank
from fxprune.errors import ArgumentError, ModelError
from tests.support.checking import assert_unharmed, snapshot
from tests.zoo import CASES

BY_NAME = {case.name: case for case in CASES}


def of_group(movement: Movement, model: nn.Module, x: Tensor) -> list[float]:
    coupling = fxprune.analyze(model, x)
    return movement.scores(coupling, model)[list(coupling.groups[0].units)].tolist()


def trained(model: nn.Module, batches: list[Tensor]) -> Iterator[None]:
    """Train with plain gradient descent, and yield after each backward pass."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        yield
        optimizer.step()


def test_two_steps_by_hand() -> None:
    """The loss is the sum of b a x over the units. By a and by b, gradient times weight is b a x.

    So a step for x adds - 2 b a x. The first one, of 0.5, leaves a - 0.5 b x and b - 0.5 a x.
    """
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    a, b = np.array([1.0, 1.0]), np.array([-0.5, -2.0])
    model[0].load_state_dict({"weight": torch.tensor(a)[:, None]})
    model[1].load_state_dict({"weight": torch.tensor(b)[None]})
    movement = Movement(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for x in (1.0, 2.0):
        optimizer.zero_grad()
        model(torch.full((1, 1), x, dtype=torch.float64)).sum().backward()
        movement.update()
        optimizer.step()
    # 2 b a x is -1 and -4 for x = 1; then a is 1.25 and 2, b is -1 and -2.5: -5 and -20 for x = 2
    assert of_group(movement, model, torch.zeros(1, 1, dtype=torch.float64)) == [6.0, 24.0]


def test_a_convolution_against_loops() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 2)).double()
    batches = list(torch.randn(3, 4, 2, 6, 6, dtype=torch.float64))
    movement, expected = Movement(model), torch.zeros(3, dtype=torch.float64)
    for _ in trained(model, batches):
        movement.update()
        for unit in range(3):
            for part in (
                (model[0].weight, (unit,)),
                (model[0].bias, (unit,)),
                (model[2].weight, (slice(None), unit)),
            ):
                weight, where = part
                expected[unit] -= (weight * weight.grad)[where].sum().detach()
    np.testing.assert_allclose(of_group(movement, model, batches[0]), expected, rtol=1e-9)


def test_units_that_training_shrinks_go_first() -> None:
    """The first two inputs are noise to the target, and weight decay shrinks what reads them."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[1].weight.fill_(0.5)
    optimizer, movement = torch.optim.SGD(model.parameters(), lr=0.05), Movement(model)
    for _ in range(50):
        x = torch.randn(32, 4, dtype=torch.float64)
        optimizer.zero_grad()
        (model(x)[:, 0] - x[:, 2] - x[:, 3]).square().mean().backward()
        movement.update()
        optimizer.step()
    pruned = fxprune.prune(model, x, channels=0.5, criterion=movement)
    assert pruned.plan.groups[0].kept == (2, 3)


@pytest.mark.parametrize("name", ["residual", "grouped"])
def test_networks_are_pruned(name: str) -> None:
    case = BY_NAME[name]
    model, x = case.build(case.width), case.inputs(4)
    movement = Movement(model)
    for _ in trained(model, [x, x]):
        movement.update()
    model.eval()
    before = snapshot(model)
    pruned = fxprune.prune(model, x, macs=0.6, criterion=movement, verify=True)
    assert pruned.report.macs_after <= 0.6 * pruned.report.macs_before
    assert_unharmed(model, before)


def test_scores_below_zero_keep_their_order() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(6, 3)
    movement = Movement(model)
    for _ in trained(model, [x]):
        movement.update()
    coupling = fxprune.analyze(model, x)
    value = rank(movement, coupling, model).value
    np.testing.assert_array_equal(value, movement.scores(coupling, model))
    assert value.min() < 0


def test_a_compiled_model_is_followed_by_its_own_names() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(6, 3)
    movement = Movement(torch.compile(model))
    for _ in trained(model, [x]):
        movement.update()
    assert np.any(of_group(movement, model, x))


def test_sparse_gradients() -> None:
    class Sparse(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(5, 4, sparse=sparse), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embedding(x))

    x, found = torch.tensor([[1, 3], [3, 3]]), []
    for sparse in (False, True):
        model = Sparse(sparse)
        movement = Movement(model)
        for _ in trained(model, [x]):
            movement.update()
        found.append(of_group(movement, model, x))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)


def test_what_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(6, 3)
    coupling = fxprune.analyze(model, x)
    with pytest.raises(ModelError, match="Module"):
        Movement(3)  # type: ignore[arg-type]
    movement = Movement(model)
    with pytest.raises(ArgumentError, match=r"no step .*update\(\)"):
        movement.scores(coupling, model)
    with pytest.raises(ArgumentError, match=r"no parameter .* gradient: call update\(\) after"):
        movement.update()
    for _ in trained(model, [x]):
        movement.update()
    smaller = fxprune.prune(model, x, channels=0.5).model
    with pytest.raises(ArgumentError, match=r"another model.*'0\.weight' of shape \(4, 3\)"):
        movement.scores(fxprune.analyze(smaller, x), smaller)
    model[0].weight.grad.fill_(float("inf"))
    with pytest.raises(ArgumentError, match=r"'0\.weight' holds infinity.*unscale_"):
        movement.update()
