"""Tests of the optimal-brain-surgeon order, against refits of every selection by hand."""

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.criteria import SurgeonOrder


def error_of(x: Tensor, y: Tensor, kept: list[int]) -> float:
    """Return the squared error of a refit with a constant, as a share of the variance of y."""
    columns = torch.cat([x[:, kept].flatten(1), torch.ones(len(x), 1)], dim=1)
    fitted = columns @ torch.linalg.lstsq(columns, y, driver="gelsd").solution
    return float((y - fitted).square().sum() / (y - y.mean(0)).square().sum())


def greedy(readers: list[tuple[Tensor, Tensor]], units: int) -> dict[int, float]:
    """Return each unit's cost in the order of removal.

    ``readers`` are the inputs, shape (positions, units, taps), and outputs of each layer.
    """
    kept, costs, last = list(range(units)), {}, 0.0
    while kept:
        errors = {}
        for unit in kept:
            rest = [other for other in kept if other != unit]
            errors[unit] = sum(error_of(x, y, rest) for x, y in readers)
        best = min(errors, key=errors.__getitem__)
        before = sum(error_of(x, y, kept) for x, y in readers)
        costs[best] = last = max(errors[best] - before, last)
        kept.remove(best)
    return costs


class Two(nn.Module):
    """Two layers read the same units."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return torch.cat([self.a(h), self.b(h)], dim=1)


def test_order_and_scores_are_those_of_brute_force() -> None:
    model, x = Two().double().eval(), torch.randn(80, 4).double()
    coupling = fxprune.analyze(model, x[:2])
    batches = [(x[:30],), (x[30:],)]
    scores = SurgeonOrder(batches, ridge=0).scores(coupling, model)[coupling.groups[0].units]
    hidden = torch.tanh(model.first(x)).detach()
    readers = [(hidden[:, :, None], layer(hidden).detach()) for layer in (model.a, model.b)]
    expected = greedy(readers, 6)
    assert scores.argsort().tolist() == list(expected)
    for unit, cost in expected.items():
        assert scores[unit] == pytest.approx(cost, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
def test_units_are_blocks_of_taps(groups: int) -> None:
    """In a convolution a unit has an input for each element of the kernel."""
    torch.manual_seed(2)
    second = nn.Conv1d(4, 4, 3, groups=groups)
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.Tanh(), second).double().eval()
    x = torch.randn(40, 2, 7).double()
    coupling = fxprune.analyze(model, x[:2])
    scores = SurgeonOrder([(x,)], ridge=0).scores(coupling, model)[coupling.groups[0].units]
    hidden, y = model[:2](x).detach(), model(x).detach()
    windows = hidden.unfold(2, 3, 1).transpose(1, 2).flatten(0, 1)  # (positions, units, taps)
    y = y.transpose(1, 2).flatten(0, 1)
    size, width = 4 // groups, y.shape[1] // groups
    variance = (y - y.mean(0)).square().sum()
    order = {}
    if groups == 1:
        order = greedy([(windows, y)], 4)
        assert scores.argsort().tolist() == list(order)
    for group in range(groups):
        part = slice(size * group, size * (group + 1))
        outputs = y[:, width * group : width * (group + 1)]
        share = (outputs - outputs.mean(0)).square().sum() / variance
        within = greedy([(windows[:, part], outputs)], size)
        found = scores[part]
        assert found.argsort().tolist() == list(within)
        first = next(iter(within))
        if groups > 1 and found[first] == scores.min():  # later ones rise over both groups
            assert found[first] == pytest.approx(float(share) * within[first], rel=1e-6)
    assert sorted(scores.tolist()) == scores[scores.argsort()].tolist()


def test_with_least_squares_it_loses_less_than_magnitude() -> None:
    """Pruning in this order, then refitting, is nearer to the original on fresh inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 3)
    )
    model = model.double().eval()
    x, fresh = torch.randn(400, 6).double(), torch.randn(400, 6).double()
    errors = []
    for criterion in (SurgeonOrder([(x,)]), "l1"):
        pruned = fxprune.prune(model, x[:2], channels=0.5, criterion=criterion, data=[(x,)])
        errors.append((pruned.model(fresh) - model(fresh)).norm().item())
    assert errors[0] < 0.8 * errors[1]


def test_a_loop_over_a_part_is_read() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2 if float(x.detach().sum()) < 1e9 else 1):
                x = x + self.body(x)
            return x

    model, x = Loop().double().eval(), torch.randn(40, 3).double()
    coupling = fxprune.analyze(model, x[:2])
    assert coupling.parts
    (group,) = coupling.groups
    scores = SurgeonOrder([(x,)], ridge=0).scores(coupling, model)[group.units]
    read, y = [], x
    for _ in range(2):
        read.append(model.body[:2](y).detach())
        y = (y + model.body(y)).detach()
    hidden = torch.cat(read)
    expected = greedy([(hidden[:, :, None], model.body[2](hidden).detach())], 5)
    assert scores.argsort().tolist() == list(expected)


def test_too_few_samples_are_refused_with_the_number_that_is_needed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 35), nn.Tanh(), nn.Linear(35, 2)).double().eval()
    x = torch.randn(4, 4).double()
    coupling = fxprune.analyze(model, x)
    # ten numbers for each position: 35 numbers need four
    with pytest.raises(fxprune.ArgumentError, match=r"reads 35 numbers .* at least 4 samples"):
        SurgeonOrder([(x[:3],)]).scores(coupling, model)
    assert SurgeonOrder([(x,)]).scores(coupling, model).any()


def test_units_that_no_layer_reads_are_refused() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(3, 8), nn.Linear(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.query(x) @ self.key(x).mT

    model, x = Scores().eval(), torch.randn(64, 5, 3)
    with pytest.raises(fxprune.ArgumentError, match="no matrix product or convolution reads"):
        fxprune.prune(model, x[:2], channels=0.5, criterion=SurgeonOrder([(x,)]))


@pytest.mark.parametrize("ridge", [-1, "much", float("nan")])
def test_a_ridge_that_is_no_number_is_refused(ridge: object) -> None:
    with pytest.raises(fxprune.ArgumentError, match="ridge="):
        SurgeonOrder([(torch.zeros(1),)], ridge=ridge)


def test_inputs_that_do_not_vary_need_a_ridge() -> None:
    model = Two().double().eval()
    coupling = fxprune.analyze(model, torch.zeros(2, 4).double())
    constant = [(torch.ones(40, 4).double(),)]
    with pytest.raises(fxprune.ArgumentError, match="a larger ridge"):
        SurgeonOrder(constant, ridge=0).scores(coupling, model)
    assert (SurgeonOrder(constant).scores(coupling, model)[coupling.units] < 1e-9).all()
