"""Criteria of the second order against Hessians that are computed by hand or in full."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.coupling import Coupling
from fxprune.criteria import OBDC, Fisher, HessianDiagonal
from fxprune.errors import ArgumentError, CallbackError
from tests.support.checking import as_dtype, randomise
from tests.zoo import CASES

BY_NAME = {case.name: case for case in CASES}
KINDS = [HessianDiagonal, OBDC]


def mean_square(output: Tensor, *targets: Tensor) -> Tensor:
    """Return half of the squared error, summed over outputs: a mean over samples."""
    target = targets[0] if targets else torch.zeros_like(output)
    return (output - target).square().flatten(1).sum(1).mean() / 2


def elementwise(coupling: Coupling, model: nn.Module) -> list[list[tuple[str, Tensor]]]:
    """Return for each group and unit the parameters on which it lies, each with its mask."""
    units = []
    for group in coupling.groups:
        of_group: list[list[tuple[str, Tensor]]] = [[] for _ in range(group.size)]
        for name, fields in coupling.elements(group).items():
            if name in dict(model.named_parameters()):
                shape = model.get_parameter(name).shape
                for one in fields:
                    for unit in range(group.size):
                        of_group[unit].append((name, (one == unit).expand(shape)))
        units.append(of_group)
    return units


def full_hessian(model: nn.Module, x: Tensor, loss: Callable[..., Tensor]) -> dict[Any, Tensor]:
    """Return the Hessian of the loss, block by block of the parameters."""
    names = [name for name, _ in model.named_parameters()]

    def of(*values: Tensor) -> Tensor:
        parameters = dict(zip(names, values, strict=True))
        return loss(torch.func.functional_call(model, parameters, x))

    values = tuple(parameter.detach() for parameter in model.parameters())
    blocks = torch.autograd.functional.hessian(of, values)
    found = {}
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            found[one, other] = blocks[i][j].reshape(values[i].numel(), values[j].numel())
    return found


def by_hessian(
    model: nn.Module, coupling: Coupling, hessian: dict[Any, Tensor], *, whole: bool
) -> list[float]:
    """Return the scores of all units by a full Hessian: of whole units, or of its diagonal."""
    scores = []
    for of_group in elementwise(coupling, model):
        for parts in of_group:
            total = 0.0
            for name, mask in parts:
                weight = (model.get_parameter(name).detach() * mask).flatten()
                if not whole:
                    total += float((hessian[name, name].diagonal() * weight.square()).sum())
                    continue
                for other, its_mask in parts:
                    its = (model.get_parameter(other).detach() * its_mask).flatten()
                    total += float(weight @ hessian[name, other] @ its)
            scores.append(total / 2)
    return scores


def scores_of(criterion: Any, coupling: Coupling, model: nn.Module) -> list[float]:
    found = criterion.scores(coupling, model)
    return [float(found[unit]) for group in coupling.groups for unit in group.units]


def two_layers() -> tuple[nn.Sequential, Coupling]:
    """Return units whose outputs are apart: y is (2 x, 3 x, 4 x)."""
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    model[0].load_state_dict({"weight": torch.tensor([[1.0], [3.0], [2.0]])})
    model[1].load_state_dict({"weight": torch.diag(torch.tensor([2.0, 1.0, 2.0]))})
    return model, fxprune.analyze(model, torch.zeros(1, 1, dtype=torch.float64))


# -- with a loss


def test_whole_units_of_a_two_layer_network_by_hand() -> None:
    """Half the squared output of a unit whose weights have the factor m is m⁴ y² / 2.

    Its second derivative at m = 1 is 6 y², and half of it 3 y². Mean squares of x are 5. Units do
    not meet, so a single probe is exact.
    """
    model, coupling = two_layers()
    x = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    found = scores_of(OBDC([(x,)], mean_square, probes=1), coupling, model)
    np.testing.assert_allclose(found, [3 * 4 * 5, 3 * 9 * 5, 3 * 16 * 5], rtol=1e-12)


def test_elements_of_a_two_layer_network_by_hand() -> None:
    """The loss is y² / 2 for each output y = c a x, where only a is a parameter.

    Its second derivative is (c x)², so half of that times a² is y² / 2. Elements do not meet, so a
    single probe is exact.
    """

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(1, 3, bias=False)
            self.first.load_state_dict({"weight": torch.tensor([[1.0], [3.0], [2.0]])})
            self.register_buffer("second", torch.diag(torch.tensor([2.0, 1.0, 2.0])))

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) @ self.second

    model, x = Fixed().double(), torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    coupling = fxprune.analyze(model, x)
    found = scores_of(HessianDiagonal([(x,)], mean_square, probes=1), coupling, model)
    np.testing.assert_allclose(found, [4 * 5 / 2, 9 * 5 / 2, 16 * 5 / 2], rtol=1e-12)


def convolutions() -> tuple[nn.Sequential, Tensor, Coupling]:
    torch.manual_seed(2)
    layers = [nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 2, bias=False)]
    model, x = nn.Sequential(*layers).double(), torch.randn(4, 2, 4, 4, dtype=torch.float64)
    return model, x, fxprune.analyze(model, x)


@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_against_the_full_hessian(kind: Any) -> None:
    model, x, coupling = convolutions()
    hessian = full_hessian(model, x, mean_square)
    expected = by_hessian(model, coupling, hessian, whole=kind is OBDC)
    found = scores_of(kind([(x,)], mean_square, probes=1500), coupling, model)
    np.testing.assert_allclose(found, expected, rtol=0.08)
    few = scores_of(kind([(x,)], mean_square, probes=2), coupling, model)
    assert not np.allclose(few, expected, rtol=0.01)


def test_a_loss_that_curves_downwards_scores_negative() -> None:
    model, coupling = two_layers()
    x = torch.ones(2, 1, dtype=torch.float64)
    criterion = OBDC([(x,)], lambda output: -mean_square(output), probes=1)
    np.testing.assert_allclose(
        scores_of(criterion, coupling, model), [-12.0, -27.0, -48.0], rtol=1e-12
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_without_curvature_scores_nothing(kind: Any) -> None:
    """The output is linear in the weights of a layer that is read by a sum alone."""

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).sum(1)

    model, x = Summed(), torch.randn(4, 3)
    coupling = fxprune.analyze(model, x)
    assert scores_of(kind([(x,)], torch.mean), coupling, model) == [0.0] * 6


@pytest.mark.parametrize("kind", KINDS)
def test_the_split_into_batches_makes_no_difference(kind: Any) -> None:
    model, x, coupling = convolutions()
    y = torch.randn(4, 2, 2, 2, dtype=torch.float64)
    whole = kind([(x, y)], mean_square).scores(coupling, model)
    parts = [(x[:1], y[:1]), (x[1:], y[1:])]
    np.testing.assert_allclose(kind(parts, mean_square).scores(coupling, model), whole, rtol=1e-9)
    assert np.count_nonzero(whole) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_differentiated_twice(kind: Any) -> None:
    case = BY_NAME["encoder_layer"]
    model = randomise(case.build(8)).eval()
    x = as_dtype(case.inputs(2), torch.float64)
    coupling = fxprune.analyze(model, x)
    found = kind([(x,)], lambda output: output.square().mean(), probes=2).scores(coupling, model)
    assert all(found[group.units].any() for group in coupling.groups)


def test_an_operation_without_a_second_derivative_is_named() -> None:
    """A sum over segments is such an operation in PyTorch."""
    model, coupling = two_layers()
    x = torch.ones(2, 1, dtype=torch.float64)

    def of_segments(output: Tensor) -> Tensor:
        sums = torch.segment_reduce(output.flatten(), "sum", lengths=torch.tensor([4, 2]))
        return sums.square().mean()

    criterion = OBDC([(x,)], of_segments)
    with pytest.raises(CallbackError, match="the second derivative of the loss"):
        criterion.scores(coupling, model)


# -- without labels


def test_the_fisher_information_of_the_output_by_hand() -> None:
    """With a single output the probe's sign does not matter.

    The two samples are batches of their own; their outputs are x times 2 + 15 + 4. The gradient by
    either factor, times the factor, is what the unit gives. The mean of squares of x is 5. Two
    elements make 2 / 2 of the square, and together they make 2² / 2 of it.
    """
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False)).double()
    model[0].load_state_dict({"weight": torch.tensor([[1.0], [3.0], [2.0]])})
    model[1].load_state_dict({"weight": torch.tensor([[2.0, 5.0, 2.0]])})
    loader = [(torch.tensor([[x]], dtype=torch.float64), "unread") for x in (1.0, 3.0)]
    coupling = fxprune.analyze(model, loader[0][0])
    found = scores_of(HessianDiagonal(loader, probes=3), coupling, model)
    np.testing.assert_allclose(found, [4 * 5, 225 * 5, 16 * 5], rtol=1e-12)
    found = scores_of(OBDC(loader, probes=3), coupling, model)
    np.testing.assert_allclose(found, [2 * 4 * 5, 2 * 225 * 5, 2 * 16 * 5], rtol=1e-12)


def test_convolutions_by_hand() -> None:
    """A channel is 2 x with x summed over its map, read by weights of 3: 4 positions of 6 x.

    All are added up to one output. The gradient by each of the two weights, times the weight, is
    the sum of 6 x.
    """
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False), nn.Flatten(), Total()
    )
    model[0].load_state_dict({"weight": torch.tensor([2.0, 1.0]).reshape(2, 1, 1, 1)})
    model[1].load_state_dict({"weight": torch.tensor([3.0, -1.0]).reshape(1, 2, 1, 1)})
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]]).reshape(1, 1, 2, 2)  # it sums to 5
    coupling = fxprune.analyze(model, x)
    assert scores_of(HessianDiagonal([(x,)]), coupling, model) == [30.0**2, 5.0**2]
    assert scores_of(OBDC([(x,)]), coupling, model) == [60.0**2 / 2, 10.0**2 / 2]


class Total(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1)


def test_without_labels_it_is_the_gauss_newton_matrix() -> None:
    """For a network that is linear in a unit's mask, it is the Hessian of half the squared error.

    Here it is compared with the Jacobian in full.
    """
    model, x, coupling = convolutions()
    names = [name for name, _ in model.named_parameters()]

    def outputs(*values: Tensor) -> Tensor:
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(model, parameters, x).flatten()

    values = tuple(parameter.detach() for parameter in model.parameters())
    jacobian = torch.autograd.functional.jacobian(outputs, values)
    rows = [each.reshape(each.shape[0], -1) for each in jacobian]
    blocks = {}
    for one, left in zip(names, rows, strict=True):
        for other, right in zip(names, rows, strict=True):
            blocks[one, other] = left.T @ right / len(x)
    for kind in KINDS:
        expected = by_hessian(model, coupling, blocks, whole=kind is OBDC)
        found = scores_of(kind([(x,)], probes=1500), coupling, model)
        np.testing.assert_allclose(found, expected, rtol=0.1)


def test_whole_units_are_half_of_fisher() -> None:
    """With one output, the sign of the probe is squared away."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    loader = [(x[None],) for x in torch.randn(5, 3, dtype=torch.float64)]
    coupling = fxprune.analyze(model, loader[0][0])
    fisher = Fisher(loader, lambda output: output.mean()).scores(coupling, model)
    np.testing.assert_allclose(OBDC(loader).scores(coupling, model), fisher / 2, rtol=1e-12)


# -- both


@pytest.mark.parametrize("loss", [None, mean_square])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_give_equal_scores(kind: Any, loss: Any) -> None:
    model, x, coupling = convolutions()
    state = torch.get_rng_state()
    criteria = [kind([(x,)], loss, seed=seed) for seed in (1, 1, 2)]
    one, again, other = (criterion.scores(coupling, model) for criterion in criteria)
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("loss", [None, lambda output: output.square().mean()])
@pytest.mark.parametrize("name", ["residual", "grouped"])
def test_networks_are_pruned(name: str, loss: Any) -> None:
    case = BY_NAME[name]
    model, x = case.build(case.width).eval(), case.inputs(2)
    for kind in KINDS:
        criterion = kind([(x,)], loss, probes=2)
        pruned = fxprune.prune(model, x, macs=0.6, criterion=criterion, verify=True)
        assert pruned.report.macs_after <= 0.6 * pruned.report.macs_before


def test_options_that_are_refused() -> None:
    loader = [(torch.ones(1, 1),)]
    for kind in KINDS:
        with pytest.raises(ArgumentError, match="probes=0"):
            kind(loader, probes=0)
        with pytest.raises(ArgumentError, match="seed=-1"):
            kind(loader, seed=-1)
        with pytest.raises(ArgumentError, match="the loss is the class CrossEntropyLoss"):
            kind(loader, nn.CrossEntropyLoss)
        with pytest.raises(ArgumentError, match="only once"):
            kind(iter(loader), F.mse_loss)


def test_outputs_without_gradients_are_refused() -> None:
    class Labels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).argmax(1)

    model, x = Labels(), torch.randn(4, 3)
    coupling = fxprune.analyze(model, x)
    for kind in KINDS:
        with pytest.raises(ArgumentError, match=r"gives no real output .* give a loss"):
            kind([(x,)]).scores(coupling, model)
