"""Gates: closed ones equal the pruned model, and removing them leaves nothing behind."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import ArgumentError, CallbackError, ModelError
from fxprune.training import Constant, Gates, HardConcreteGates, Linear
from tests.support.checking import (
    as_dtype,
    assert_unharmed,
    call,
    masked,
    randomise,
    snapshot,
    tensors,
)
from tests.support.gating import REFUSED, close
from tests.zoo import CASES
from tests.zoo.case import Case

GATED = [
    pytest.param(case, id=case.name, marks=() if number % 4 == 0 else pytest.mark.slow)
    for number, case in enumerate(CASES)
    if not case.name.startswith(REFUSED)
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))


@pytest.mark.parametrize("case", GATED)
def test_closed_gates_equal_the_pruned_model(case: Case) -> None:
    torch.manual_seed(0)
    model = randomise(case.build(8)).eval()
    x: Any = as_dtype(case.inputs(3), torch.float64)
    coupling = fxprune.analyze(model, x)
    pruned = fxprune.prune(model, x, channels=0.5, criterion="random")
    # statistics over channels count a closed unit as a zero, until it is removed
    normalised = any(group.normalised for group in coupling.groups)
    reference = masked(model, pruned.model) if normalised else pruned.model
    with Gates(model, coupling) as gates, torch.no_grad():
        close(gates, coupling, pruned.plan)
        for training in (True, False):
            given, expected = [], []
            for module, outputs in ((model, given), (reference, expected)):
                torch.manual_seed(1)
                # dropout draws for as many channels as there are
                module.train(training and case.name != "containers")
                outputs += tensors(call(module, x))
            torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-9)
        closed = tensors(call(model, x))
    torch.testing.assert_close(tensors(call(model, x)), closed, rtol=1e-12, atol=1e-12)


def test_a_gate_multiplies_what_makes_the_unit() -> None:
    model, x = network(), torch.randn(4, 2)
    with Gates(model, fxprune.analyze(model, x)) as gates:
        with torch.no_grad():
            gates.values.copy_(torch.tensor([1.0, 0.5, 2.0]))
        own = model[0].parametrizations["weight"].original
        torch.testing.assert_close(model[0].weight, own * torch.tensor([[1.0], [0.5], [2.0]]))
        torch.testing.assert_close(model[1].weight, torch.tensor([1.0, 0.5, 2.0]))
        assert torch.equal(model[1].running_var, torch.ones(3))
        # a gate that is not closed leaves the weights that read the unit as they are
        assert torch.equal(model[3].weight, model[3].parametrizations["weight"].original)


def test_the_gradient_of_a_gate() -> None:
    """With y = g w x, the derivative by g is w x."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0], [3.0]]))
        model[1].weight.copy_(torch.tensor([[5.0, 7.0]]))
    with Gates(model, fxprune.analyze(model, torch.zeros(1, 1)), strength=0.5) as gates:
        (model(torch.tensor([[1.0]])).sum() + gates()).backward()
        assert gates.values.grad is not None
        assert gates.values.grad.tolist() == [10.5, 21.5]


class Table(nn.Module):
    """A convolution plus a table that is not saved, and a tied pair of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(1, 4, 1, 1), persistent=False)
        self.conv = nn.Conv2d(3, 4, 3)
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.second.weight = self.first.weight
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x) + self.table)
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def test_open_gates_leave_everything_as_it_was() -> None:
    """Also the order of parameters, by which optimisers know them, and what is not saved."""
    model = Table()
    before, names = snapshot(model), [name for name, _ in model.named_parameters()]
    coupling = fxprune.analyze(model, torch.randn(2, 3, 5, 5))
    gates = Gates(model, coupling)
    assert any(parameter is gates.values for parameter in model.parameters())
    with pytest.raises(KeyboardInterrupt), gates:
        raise KeyboardInterrupt
    assert_unharmed(model, before)
    assert [name for name, _ in model.named_parameters()] == names
    assert "table" not in model.state_dict()


def test_removing_gates_writes_the_gated_weights() -> None:
    model, x = Table().double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with Gates(model, fxprune.analyze(model, x)) as gates:
        with torch.no_grad():
            gates.values.fill_(0.5)
        expected = model(x)
    assert torch.equal(model(x), expected)
    # two layers share this weight, and it is written once
    assert torch.equal(model.first.weight, 0.5 * before["first.weight"])
    assert model.second.weight is model.first.weight
    assert torch.equal(model.head.weight, before["head.weight"])
    gates.remove()  # a second time
    assert torch.equal(model(x), expected)


def test_a_copy_of_the_gated_model_stays_gated() -> None:
    """An average of the weights, for instance, is a copy that outlives the gates."""
    model, x = network().eval(), torch.randn(4, 2)
    with Gates(model, fxprune.analyze(model, x)) as gates:
        with torch.no_grad():
            gates.values.fill_(0.5)
        average = copy.deepcopy(model)
        expected = model(x)
    assert torch.equal(average(x), expected)


def test_a_copy_from_before_the_gates_stays_as_it_is() -> None:
    """Copies of a module with a parametrisation share its class, to which torch adds gates."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 4)), nn.ReLU(), nn.Linear(4, 1)
    )
    x, other = torch.randn(3, 2), copy.deepcopy(model)
    expected = model(x)
    with Gates(model, fxprune.analyze(model, x)) as gates:
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            gates.values[0] = 0
        assert not torch.equal(model(x), expected)
    assert torch.equal(other(x), expected)


def test_gates_are_a_criterion() -> None:
    model, x = network().eval(), torch.randn(4, 2)
    coupling = fxprune.analyze(model, x)
    gates = Gates(model, coupling)
    with torch.no_grad():
        gates.values.copy_(torch.tensor([0.0, -2.0, 1.0]))
    expected = model(x)
    gates.remove()
    assert gates.scores(coupling, model)[coupling.groups[0].units].tolist() == [0.0, 2.0, 1.0]
    pruned = fxprune.prune(model, x, channels=2 / 3, criterion=gates)
    assert pruned.plan.groups[0].kept == (1, 2)
    torch.testing.assert_close(pruned.model(x), expected)


def test_gates_of_another_analysis_are_no_criterion() -> None:
    model, x = network(), torch.randn(4, 2)
    gates = Gates(model, fxprune.analyze(model, x, keep="0"))
    gates.remove()
    with pytest.raises(ArgumentError, match=r"'0\.weight:0' of 3 units has no gates.*keep="):
        fxprune.prune(model, x, channels=0.5, criterion=gates)


def test_training_closes_the_gate_of_a_useless_unit() -> None:
    """The target reads the first of two inputs, so only the unit of this input is of use."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[1].weight.copy_(torch.tensor([[1.0, 0.1]]))
    x = torch.randn(64, 2)
    with Gates(model, fxprune.analyze(model, x), strength=Linear(0, 0.05, steps=50)) as gates:
        optimiser = torch.optim.SGD([gates.values], lr=0.1)
        for _ in range(300):
            optimiser.zero_grad()
            ((model(x) - x[:, :1]).square().mean() + gates()).backward()
            optimiser.step()
            gates.step()
    useful, useless = gates.values.abs().tolist()
    # with an L1 penalty, SGD stays within a step of lr * strength = 0.005 of zero
    assert useless < 0.01
    # the mean of (g - 1)^2 x^2 + 0.05 g is least at g = 1 - 0.025 / mean(x^2)
    assert useful == pytest.approx(1 - 0.025 / x[:, 0].square().mean().item(), abs=0.01)


# -- gates of the hard concrete distribution


def test_hard_concrete_gates_start_open() -> None:
    model, x = network().eval(), torch.randn(4, 2)
    expected, coupling, before = model(x), fxprune.analyze(model, x), snapshot(model)
    with HardConcreteGates(model, coupling, strength=0.5) as gates:
        assert torch.equal(model(x), expected)
        # P(g > 0) = sigmoid(3 - 2/3 log(0.1 / 1.1)), for three units
        open_share = 1 / (1 + math.exp(-3 + 2 / 3 * math.log(0.1 / 1.1)))
        assert gates().item() == pytest.approx(0.5 * 3 * open_share)
    assert_unharmed(model, before)


def test_the_draw_is_that_of_the_formula_and_shared_by_all_weights() -> None:
    model, x = network().train(), torch.randn(4, 2)
    with HardConcreteGates(model, fxprune.analyze(model, x)) as gates:
        with torch.no_grad():
            gates.values.copy_(torch.tensor([0.0, 1.0, -1.0]))
        torch.manual_seed(5)
        model(x)
        torch.manual_seed(5)
        u = torch.empty(3).uniform_(1e-6, 1 - 1e-6)
        s = (((u / (1 - u)).log() + gates.values) / (2 / 3)).sigmoid()
        expected = (s * 1.2 - 0.1).clamp(0, 1)
        torch.testing.assert_close(model[1].weight, expected)  # the scales are 1
        original = model[0].parametrizations["weight"].original
        torch.testing.assert_close(model[0].weight, original * expected[:, None])


def test_gates_open_as_often_as_the_penalty_says() -> None:
    units = 4000
    model = nn.Sequential(nn.Linear(1, units, bias=False), nn.Linear(units, 1)).train()
    nn.init.ones_(model[0].weight)
    with HardConcreteGates(model, fxprune.analyze(model, torch.zeros(1, 1))) as gates:
        with torch.no_grad():
            gates.values.zero_()
        torch.manual_seed(0)
        model(torch.zeros(1, 1))
        found, expected = (model[0].weight != 0).double().mean(), gates().item() / units
    # the standard deviation of the share is sqrt(0.83 * 0.17 / 4000) = 0.006
    assert found.item() == pytest.approx(expected, abs=0.025)


def test_training_closes_gates_for_good() -> None:
    """The units of the closed gates go, and the outputs stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 1, bias=False)).train()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0]]))
        model[1].weight.copy_(torch.tensor([[1.0, 0.01, -0.01, 0.01]]))
    x = torch.randn(64, 2)
    coupling = fxprune.analyze(model, x)
    with HardConcreteGates(model, coupling, strength=0.05) as gates:
        optimiser = torch.optim.Adam([gates.values], lr=0.1)
        for _ in range(150):
            optimiser.zero_grad()
            ((model(x) - x[:, :1]).square().mean() + gates()).backward()
            optimiser.step()
    expected = model.eval()(x)
    pruned = fxprune.prune(model, x, channels=0.25, criterion=gates)
    assert pruned.plan.groups[0].kept == (0,)
    torch.testing.assert_close(pruned.model(x), expected)


@pytest.mark.parametrize(
    ("model", "x", "error", "message"),
    [
        (
            nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1)),
            torch.randn(3, 2),
            ArgumentError,
            r"'1' normalises by running statistics without a scale.*keep='1'",
        ),
        (
            next(case for case in CASES if case.name == "lstm_in_the_middle").build(8),
            next(case for case in CASES if case.name == "lstm_in_the_middle").inputs(2),
            ModelError,
            r"'rnn' also keeps its parameters in a list.*keep=",
        ),
    ],
    ids=["batch norm without a scale", "recurrent"],
)
def test_refused_where_a_gate_would_not_mask(
    model: nn.Module, x: Any, error: type[Exception], message: str
) -> None:
    coupling, before = fxprune.analyze(model, x), snapshot(model)
    with pytest.raises(error, match=message):
        Gates(model, coupling)
    assert_unharmed(model, before)


@pytest.mark.parametrize(
    ("strength", "error", "message"),
    [
        (-1, ArgumentError, r"strength=-1 must be a finite number of at least 0"),
        ("0.1", ArgumentError, r"neither a number nor a schedule"),
        (Constant, ArgumentError, r"neither a number nor a schedule"),
        (lambda step: -1.0, ArgumentError, r"the schedule's value=-1\.0"),
        (lambda step: 1 / 0, CallbackError, r"the schedule, given a step, raised"),
    ],
)
def test_strengths_that_are_none(strength: Any, error: type[Exception], message: str) -> None:
    model, x = network(), torch.randn(4, 2)
    coupling = fxprune.analyze(model, x)
    with (
        pytest.raises(error, match=message),
        Gates(model, coupling, strength=strength) as gates,
    ):
        gates()
