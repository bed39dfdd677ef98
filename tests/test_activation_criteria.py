"""Variance-based pruning and Wanda, against activations that are measured by hand."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.coupling import Coupling
from fxprune.criteria import ActivationVariance, FlowCPMC, Wanda, rank
from fxprune.errors import ArgumentError
from tests.support.checking import as_dtype, randomise
from tests.zoo import CASES

BY_NAME = {case.name: case for case in CASES}
KINDS = [ActivationVariance, Wanda]


def of_group(scores: np.ndarray, coupling: Coupling, number: int = 0) -> list[float]:
    return scores[list(coupling.groups[number].units)].tolist()


def scored(criterion: Any, model: nn.Module, x: Any) -> list[float]:
    """Return the scores of the first group of a model."""
    coupling = fxprune.analyze(model, x)
    return of_group(criterion.scores(coupling, model), coupling)


# -- the variance of activations


def test_variance_of_a_two_layer_network_by_hand() -> None:
    """Units give x and 2 - x, with ReLU: 1, 0, 4 and 1, 5, 0.

    Their means are 5/3 and 2, their mean squares 17/3 and 26/3.
    """
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 3))
    weight, bias = torch.tensor([[1.0], [-1.0]]), torch.tensor([0.0, 2.0])
    model[0].load_state_dict({"weight": weight, "bias": bias})
    x = torch.tensor([[1.0], [-3.0], [4.0]])
    found = scored(ActivationVariance([(x,)]), model, x)
    np.testing.assert_allclose(found, [17 / 3 - 25 / 9, 26 / 3 - 4], rtol=1e-6)


def test_variance_of_a_convolution_goes_over_positions() -> None:
    """The channel is the image: 0, 2, 4, 6, whose variance is 5, and -2 times it."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 3, 1))
    model[0].load_state_dict({"weight": torch.tensor([1.0, -2.0]).reshape(2, 1, 1, 1)})
    x = torch.tensor([0.0, 2.0, 4.0, 6.0]).reshape(1, 1, 2, 2)
    np.testing.assert_allclose(scored(ActivationVariance([(x,)]), model, x), [5, 20], rtol=1e-6)


def test_each_place_of_a_flattened_map_has_a_mean_of_its_own() -> None:
    """A map that is the same for all samples is a constant to the layer that reads it."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(8, 3))
    model[0].load_state_dict({"weight": torch.tensor([1.0, -2.0]).reshape(2, 1, 1, 1)})
    x = torch.tensor([0.0, 2.0, 4.0, 6.0]).reshape(1, 1, 2, 2).repeat(3, 1, 1, 1)
    assert scored(ActivationVariance([(x,)]), model, x) == [0.0, 0.0]
    x[2] += 3  # at each position 0, 0, 3 above: a variance of 2
    np.testing.assert_allclose(scored(ActivationVariance([(x,)]), model, x), [2, 8], rtol=1e-6)


def test_large_means_do_not_hide_small_variances() -> None:
    """In single precision, squares of 1000 have errors of about 0.1."""
    model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 3))
    weight, bias = torch.tensor([[1.0], [2.0]]), torch.tensor([1000.0, 1000.0])
    model[0].load_state_dict({"weight": weight, "bias": bias})
    x = torch.tensor([[0.0], [0.25]])
    loaders = [[(x,)], [(x[:1],), (x[1:],)]]
    for loader in loaders:
        found = scored(ActivationVariance(loader), model, x)
        np.testing.assert_allclose(found, [1 / 64, 1 / 16], rtol=1e-6)


def test_a_unit_that_two_layers_read_gets_the_mean() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.a(x) + self.b(x.relu())

    model, x = Two().double(), torch.randn(6, 3, dtype=torch.float64)
    hidden = model.stem(x).detach()
    expected = (hidden.var(0, correction=0) + hidden.relu().var(0, correction=0)) / 2
    np.testing.assert_allclose(scored(ActivationVariance([(x,)]), model, x), expected, rtol=1e-9)


def test_a_constant_unit_costs_nothing_with_its_mean_moved() -> None:
    """The unit of variance 0 goes, its mean moves into the next bias, and nothing changes."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0.0, 5.0
    x = torch.randn(16, 3, dtype=torch.float64)
    loader = [(x,)]
    pruned = fxprune.prune(
        model,
        x,
        channels=0.75,
        criterion=ActivationVariance(loader),
        data=loader,
        compensate="constants",
    )
    assert pruned.plan.groups[0].kept == (0, 1, 3)
    torch.testing.assert_close(pruned.model(x), model(x), rtol=1e-9, atol=1e-9)


def test_variances_of_groups_compare_as_they_are() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(6, 3)
    coupling = fxprune.analyze(model, x)
    criterion = ActivationVariance([(x,)])
    expected = criterion.scores(coupling, model)
    np.testing.assert_array_equal(rank(criterion, coupling, model).value, expected)


# -- Wanda


def wanda_by_patches(second: Any, hidden: Tensor) -> list[float]:
    """Return the scores of the channels that a convolution reads, tap by tap."""
    scores = []
    for channel in range(hidden.shape[1]):
        total = 0.0
        groups = second.groups
        of_group = second.weight.shape[0] // groups
        group = channel // (hidden.shape[1] // groups)
        column = channel % (hidden.shape[1] // groups)
        columns = F.unfold(
            hidden[:, channel : channel + 1],
            second.kernel_size,
            second.dilation,
            second.padding,
            second.stride,
        )
        norms = columns.square().sum((0, 2)).sqrt()  # one for each tap
        for output in range(group * of_group, (group + 1) * of_group):
            total += float((second.weight[output, column].abs().flatten() * norms).sum())
        scores.append(total)
    return scores


@pytest.mark.parametrize(
    "second",
    [
        nn.Conv2d(4, 5, 3),
        nn.Conv2d(4, 5, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2),
        nn.Conv2d(4, 5, 1),
    ],
    ids=["plain", "strided", "dilated in groups", "pointwise"],
)
@torch.no_grad()
def test_wanda_of_a_convolution(second: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), second).double()
    x = torch.randn(3, 3, 9, 9, dtype=torch.float64)
    expected = wanda_by_patches(second, model[:2](x))
    np.testing.assert_allclose(scored(Wanda([(x[:2],), (x[2:],)]), model, x), expected, rtol=1e-9)


def test_wanda_of_a_convolution_by_hand() -> None:
    """The two taps of the second layer see 1, 2 and 2, 3 of the map 1, 2, 3, and twice as much."""
    model = nn.Sequential(nn.Conv1d(1, 2, 1, bias=False), nn.Conv1d(2, 1, 2, bias=False))
    model[0].load_state_dict({"weight": torch.tensor([1.0, 2.0]).reshape(2, 1, 1)})
    model[1].load_state_dict({"weight": torch.tensor([[[3.0, -1.0], [0.0, 4.0]]])})
    x = torch.tensor([[[1.0, 2.0, 3.0]]])
    expected = [3 * 5**0.5 + 13**0.5, 4 * 52**0.5]
    np.testing.assert_allclose(scored(Wanda([(x,)]), model, x), expected, rtol=1e-6)


class Spelled(nn.Module):
    """A product with a weight, spelled in some way; no module class says that it is a layer."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.first, self.spelling = nn.Linear(3, 4), spelling
        self.weight = nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.first(x).relu(), self.weight
        match self.spelling:
            case "matmul":
                return x @ weight
            case "linear":
                return F.linear(x, weight.t())
            case "left":
                return (weight.t() @ x.transpose(1, 2)).transpose(1, 2)
            case "addmm":
                return torch.addmm(torch.zeros(2, dtype=x.dtype), x.flatten(0, 1), weight)
            case _:
                return torch.einsum("bti,io->bto", x, weight)


@pytest.mark.parametrize("spelling", ["matmul", "linear", "left", "addmm", "einsum"])
def test_wanda_of_a_product_in_any_spelling(spelling: str) -> None:
    model, x = Spelled(spelling).double(), torch.randn(3, 5, 3, dtype=torch.float64)
    norms = model.first(x).relu().flatten(0, 1).norm(dim=0)
    expected = (model.weight.abs() * norms[:, None]).sum(1).detach()
    np.testing.assert_allclose(scored(Wanda([(x,)]), model, x), expected, rtol=1e-9)


def test_wanda_of_units_that_no_weight_reads() -> None:
    """Queries and keys multiply each other: the weights that make them count."""

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) @ self.k(x).transpose(1, 2)

    model, x = Scores().double(), torch.randn(2, 5, 3, dtype=torch.float64)
    norms = x.flatten(0, 1).norm(dim=0)
    expected = ((model.q.weight.abs() + model.k.weight.abs()) * norms).sum(1).detach()
    np.testing.assert_allclose(scored(Wanda([(x,)]), model, x), expected, rtol=1e-9)


@pytest.mark.parametrize("make", [Wanda, ActivationVariance, lambda loader: FlowCPMC()])
def test_a_recurrent_layer_that_starts_from_a_parameter(make: Any) -> None:
    """Its state is a parameter of two dimensions, but no weight that it multiplies."""
    case = BY_NAME["recurrent_from_a_parameter"]
    model, x = case.build(8).eval(), case.inputs(2)
    pruned = fxprune.prune(model, x, channels=0.5, criterion=make([(x,)]), verify=True)
    assert pruned.report.params_after < pruned.report.params_before


def test_wanda_refuses_a_group_whose_weights_it_does_not_see() -> None:
    case = BY_NAME["lstm_projected"]
    model, x = case.build(8).eval(), case.inputs(2)
    with pytest.raises(ArgumentError, match=r"Wanda: no weight of group 'rnn\..*keep="):
        fxprune.prune(model, x, channels=0.5, criterion=Wanda([(x,)]))


def test_wanda_compares_within_groups() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(6, 3)
    coupling = fxprune.analyze(model, x)
    value = rank(Wanda([(x,)]), coupling, model).value
    assert np.mean(of_group(value, coupling)) == pytest.approx(1)


# -- both


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["residual", "grouped", "depthwise", "encoder_layer", "vit_einsum", "shared_modules"]
)
def test_networks_are_pruned(name: str, kind: Any) -> None:
    case = BY_NAME[name]
    model, x = randomise(case.build(case.width)).eval(), as_dtype(case.inputs(2), torch.float64)
    coupling = fxprune.analyze(model, x)
    scores = kind([(x,)]).scores(coupling, model)
    for number, group in enumerate(coupling.groups):
        assert max(of_group(scores, coupling, number)) > 0, group.name
    pruned = fxprune.prune(model, x, channels=0.5, criterion=kind([(x,)]), verify=True)
    assert pruned.report.params_after < pruned.report.params_before


def test_half_precision_sums_in_single() -> None:
    """Squares of 300 overflow float16."""
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 2, bias=False)).half()
    x = torch.tensor([[300.0, 200.0], [400.0, -300.0]], dtype=torch.float16)
    coupling = fxprune.analyze(model, x)
    wide = nn.Sequential(*model).double()
    for kind in KINDS:
        exact = kind([(x.double(),)]).scores(coupling, wide)
        narrow = kind([(x,)]).scores(coupling, model.half())
        model.double()
        np.testing.assert_allclose(
            of_group(narrow, coupling), of_group(exact, coupling), rtol=0.02
        )
