"""Tests of models that are compiled, on the meta device, or made or pruned in inference mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.common.compiled import uncompiled
from fxprune.cost import cost_of
from tests.support.checking import masked, randomise, relative_error
from tests.zoo import CASES
from tests.zoo.case import Case


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1))


IMAGE = torch.randn(2, 3, 8, 8)

# -- compiled modules


def test_a_compiled_model_is_the_model_that_was_compiled(tmp_path: Path) -> None:
    """A compiled model is treated as the original module, and nothing is compiled."""
    net, built = network().eval(), []

    def run(graph: Any, inputs: Any) -> Any:
        built.append(graph)
        return graph.forward

    compiled = torch.compile(net, backend=run)
    assert uncompiled(compiled) is net
    pruned = fxprune.prune(compiled, IMAGE, channels=0.5, verify=True)
    assert pruned.plan == fxprune.prune(net, IMAGE, channels=0.5).plan
    assert fxprune.verify(compiled, pruned, IMAGE).error < 1e-9
    assert torch.equal(fxprune.apply(pruned.plan, compiled).model(IMAGE), pruned.model(IMAGE))
    pruned.save(tmp_path)
    assert torch.equal(fxprune.load(tmp_path, compiled).model(IMAGE), pruned.model(IMAGE))
    assert cost_of(compiled, IMAGE).macs == cost_of(net, IMAGE).macs
    *_, last = fxprune.Steps(compiled, IMAGE, count=2, macs=0.5)
    assert last.report.macs_after <= 0.5 * cost_of(net, IMAGE).macs
    assert not built, "nothing is compiled for it"


class Attends(nn.Module):
    """A model that reads an attribute of a compiled module, and may branch on values."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        block.width = 8
        self.block, self.head, self.branches = (
            torch.compile(block, backend="eager"),
            nn.Linear(8, 3),
            branches,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.branches and x.sum() > 1e9:
            x = x / 2
        return self.head(F.relu(self.block(x)) / self.block.width)


@pytest.mark.parametrize("branches", [False, True])
def test_a_compiled_module_inside_is_pruned(branches: bool) -> None:
    model, x = randomise(Attends(branches)).eval(), torch.randn(2, 8, dtype=torch.float64)
    before = set(model.state_dict())
    pruned = fxprune.prune(model, x, channels=0.5)
    assert bool(pruned.report.parts) is branches
    assert pruned.report.params_after < 0.6 * pruned.report.params_before
    assert set(pruned.model.state_dict()) == before
    assert relative_error(pruned.model(x), masked(model, pruned.model)(x)) < 1e-12


def test_a_module_compiled_in_place_is_pruned() -> None:
    model = network().eval().double()
    model[3].compile(backend="eager")
    pruned = fxprune.prune(model, IMAGE.double(), channels=0.5, verify=True)
    assert pruned.report.params_after < 0.6 * pruned.report.params_before
    assert pruned.model.get_submodule("3").weight.shape[1] == 8
    assert pruned.model(IMAGE.double()).shape == (2, 4, 6, 6)
    assert model[3]._compiled_call_impl is not None


# -- the meta device


@pytest.mark.parametrize(
    "build", [network, torchvision.models.swin_t], ids=["batch norm", "tables of integers"]
)
def test_a_model_without_data_has_the_groups_of_one_with_data(
    build: Callable[[], nn.Module],
) -> None:
    with torch.device("meta"):
        model = build()
    x = torch.zeros(1, 3, 64, 64)
    found, wanted = fxprune.analyze(model, x), fxprune.analyze(build(), x)
    assert [(group.name, group.size) for group in found.groups] == [
        (group.name, group.size) for group in wanted.groups
    ]
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES if "group" in c.name])
def test_a_model_without_data_gets_the_shapes_of_one_with_data(case: Case) -> None:
    """Grouped layers lose other positions in each block, which a mask without data cannot say."""
    model, inputs = case.build(case.width).eval(), case.inputs(2)
    shapes = []
    for each in (model, copy.deepcopy(model).to("meta")):
        pruned = fxprune.prune(each, inputs, channels=0.5, criterion="random")
        shapes.append({name: tensor.shape for name, tensor in pruned.model.state_dict().items()})
    assert shapes[0] == shapes[1] != {name: t.shape for name, t in model.state_dict().items()}


# -- inference mode


@pytest.mark.parametrize("made_inside", [False, True])
def test_what_is_pruned_in_inference_mode_can_be_trained(
    made_inside: bool, tmp_path: Path
) -> None:
    with torch.inference_mode(made_inside):
        model = network()
    with torch.inference_mode():
        x = torch.randn(2, 3, 8, 8)
        pruned = fxprune.prune(model, x, channels=0.5, verify=True)
        pruned.save(tmp_path)
        others = [
            fxprune.apply(pruned.plan, model),
            fxprune.load(tmp_path, network),
            *fxprune.Steps(model, x, count=1, macs=0.5),
        ]
        assert torch.is_inference_mode_enabled()
    for own in (pruned, *others):
        own.model.train()(IMAGE).sum().backward()
        assert all(p.grad is not None for p in own.model.parameters())
