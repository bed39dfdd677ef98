"""Checks of models on a device other than the CPU.

They are pruned there to the same plan, and all of the result is there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

import fxprune
from fxprune import criteria
from tests import test_eager
from tests.support.checking import call, randomise, relative_error, tensors
from tests.support.elsewhere import NAME, register
from tests.support.families import FAMILIES, Family
from tests.zoo import CASES as ZOO
from tests.zoo.case import Case

pytestmark = pytest.mark.filterwarnings("ignore")
BATCHES = [(torch.randn(4, 3, 8, 8), torch.randint(10, (4,))) for _ in range(3)]
IMAGE = torch.zeros(1, 3, 8, 8)


@pytest.fixture(autouse=True, scope="session")
def device() -> None:
    register()  # not if this file is only imported


def moved(value: Any) -> Any:
    """Return tensors, or a module, on the device; shared parameters stay shared."""
    if not isinstance(value, nn.Module):
        return tree_map_only(Tensor, lambda tensor: tensor.to(NAME), value)
    names: dict[int, list[str]] = {}
    for name, parameter in value.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    # `to` makes new parameters, because tensors of this device have another class. So parameters
    # that were shared are separate afterwards.
    value.to(NAME)
    for first, *others in names.values():
        for path, _, name in (other.rpartition(".") for other in others):
            setattr(value.get_submodule(path), name, value.get_parameter(first))
    return value


def here(model: nn.Module) -> bool:
    """Tell whether parameters, buffers and constants are all on the device."""
    constants = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor)
    ]
    return all(
        tensor.device.type == NAME
        for tensor in (*model.parameters(), *model.buffers(), *constants)
    )


def prunes_alike(model: nn.Module, inputs: Any, **options: Any) -> fxprune.Pruned:
    """Prune on the CPU and on the device, compare, and return the result of the device.

    Afterwards the model is on the device.
    """
    wanted = fxprune.prune(model, inputs, **options)
    reference = tensors(call(wanted.model, inputs))
    given = moved(inputs)
    found = fxprune.prune(moved(model), given, **options)
    assert found.plan.to_json() == wanted.plan.to_json()
    for made in (found.model, fxprune.deploy(found.model)):
        assert here(made)
        for out, ref in zip(tensors(call(made, given)), reference, strict=True):
            assert out.device.type == NAME
            assert relative_error(out.cpu(), ref) < 1e-3
    return found


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_family(family: Family) -> None:
    check_family(family)


@pytest.mark.parametrize("family", FAMILIES[2::6], ids=lambda family: family.name)
def test_few(family: Family) -> None:
    """A few families suffice, because the layers of a family matter little for devices."""
    check_family(family)


def check_family(family: Family) -> None:
    torch.manual_seed(0)
    model, x = randomise(family.build(), torch.float32).eval(), torch.randn(2, *family.shape)
    found = prunes_alike(model, x, channels=0.5)
    fxprune.verify(model, found, moved(x))
    sum(out.square().mean() for out in tensors(found.model.train()(moved(x)))).backward()  # type: ignore[union-attr]
    assert all(p.grad is None or p.grad.device.type == NAME for p in found.model.parameters())


def recurrent(case: Case) -> bool:
    return any(
        isinstance(module, (nn.RNNBase, nn.RNNCellBase))
        for module in case.build(case.width).modules()
    )


# No recurrent layers: on devices other than the CPU, torch calls kernels for them that only GPUs
# have.
@pytest.mark.parametrize(
    "case", [case for case in ZOO if not recurrent(case)], ids=lambda case: case.name
)
def test_zoo(case: Case) -> None:
    torch.manual_seed(0)
    prunes_alike(
        randomise(case.build(case.width), torch.float32).eval(), case.inputs(2), channels=0.5
    )


@pytest.mark.parametrize(
    "code",
    [
        test_eager.split_at_a_literal,
        test_eager.scaled_by_the_width,
        test_eager.laid_out_anew,
        test_eager.laid_out_by_the_width_of_another,
    ],
)
def test_python_between(code: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    prunes_alike(test_eager.Between(code).eval(), torch.randn(2, 3, 16, 16), channels=0.5)


def test_python_detector() -> None:
    torch.manual_seed(0)
    prunes_alike(
        test_eager.Detects().eval(),
        ([torch.rand(3, 20, 30), torch.rand(3, 30, 20)],),
        channels=0.5,
    )


class Constants(nn.Module):
    """A model with tensors that are no buffers.

    Its forward computes with them and with the device of parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.places = (
            nn.Linear(16, 32),
            nn.Linear(32, 4),
            nn.Embedding(8, 32),
        )
        self.scale, self.order = torch.rand(32), torch.tensor([3, 2, 1, 0])

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Constants:
        self.scale, self.order = function(self.scale), function(self.order)
        super()._apply(function, recurse)
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = torch.where((self.order > 1)[None, :, None], self.first(x) * self.scale, 0.5)
        return self.last(
            y + self.places(torch.arange(x.shape[1], device=next(self.parameters()).device))
        )


def test_constants() -> None:
    torch.manual_seed(0)
    found = prunes_alike(Constants().eval(), torch.randn(2, 4, 16), channels=0.5)
    assert isinstance(found.model, torch.fx.GraphModule)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 10),
    ]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("criterion", ["cpmc", "l1", "l2", "bn_scale", "lamp", "fpgm", "random"])
def test_criterion(criterion: str) -> None:
    prunes_alike(network(), IMAGE, macs=0.5, criterion=criterion)


OF_LOSS = [criteria.Taylor, criteria.Fisher, criteria.HessianDiagonal, criteria.OBDC]
OF_ACTIVATIONS = [criteria.Activation, criteria.ActivationVariance, criteria.Wanda]


@pytest.mark.parametrize("kind", [*OF_LOSS, *OF_ACTIVATIONS])
def test_criterion_with_data(kind: type) -> None:
    loss = (F.cross_entropy,) if kind in OF_LOSS else ()
    plans = [
        fxprune.prune(model, x, macs=0.5, criterion=kind(BATCHES, *loss)).plan.groups
        for model, x in ((network(), IMAGE), (moved(network()), moved(IMAGE)))
    ]
    assert plans[0] == plans[1]


def test_criterion_of_training() -> None:
    plans = []
    for model, x in ((network(), IMAGE), (moved(network()), moved(IMAGE))):
        movement = criteria.Movement(model)
        model(x).square().mean().backward()
        movement.update()
        plans.append(fxprune.prune(model, x, macs=0.5, criterion=movement).plan.groups)
    assert plans[0] == plans[1]


@pytest.mark.parametrize("method", ["constants", "least_squares"])
def test_criterion_compensated(method: str) -> None:
    model = moved(network())
    pruned = fxprune.prune(model, moved(IMAGE), macs=0.5)
    assert fxprune.compensate(model, pruned, BATCHES, method=method).changed
    assert here(pruned.model)


def test_criterion_in_steps_and_with_a_penalty(tmp_path: Path) -> None:
    model = moved(network())
    penalty = fxprune.GroupSparsity(model, fxprune.analyze(model, moved(IMAGE)))()
    penalty.backward()
    assert penalty.device.type == NAME
    *_, last = fxprune.Steps(model, moved(IMAGE), count=2, macs=0.4)
    assert here(last.model)
    last.save(tmp_path / "saved")
    again = fxprune.load(tmp_path / "saved", network, device=NAME)
    assert here(again.model)
    assert torch.equal(again.model(moved(IMAGE)).cpu(), last.model(moved(IMAGE)).cpu())
