"""Pruning in steps: budgets, training between steps, and going on after an interruption."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune.cost import cost_of
from fxprune.errors import ArgumentError, PlanError
from fxprune.result.serialization import write_files

IMAGE = (1, 3, 8, 8)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3),
        nn.ReLU(),
        nn.Conv2d(48, 4, 1),
    ).eval()


def train(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)


def test_each_step_keeps_its_share() -> None:
    model, x = network(), torch.randn(IMAGE)
    whole = cost_of(model, x)
    shares = [
        (cost_of(step.model, x).macs / whole.macs)
        for step in fxprune.Steps(model, x, count=3, macs=0.2)
    ]
    for k, share in enumerate(shares, start=1):
        assert 0.2 ** (k / 3) * 0.8 < share <= 0.2 ** (k / 3) + 1e-12


def test_a_schedule_says_how_a_budget_is_reached() -> None:
    model, x = network(), torch.randn(IMAGE)
    whole = cost_of(model, x)
    # 0.2 + 0.8 (1 - k / 2)^3: 0.3, then 0.2; geometric steps would begin with 0.45
    shares = [
        cost_of(step.model, x).macs / whole.macs
        for step in fxprune.Steps(model, x, count=2, macs=0.2, schedule=fxprune.training.Cubic)
    ]
    for share, expected in zip(shares, (0.3, 0.2), strict=True):
        assert expected * 0.8 < share <= expected + 1e-12


def test_a_schedule_that_misses_the_budget_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"macs=0\.2.*end at the budget"):
        fxprune.Steps(
            network(), torch.randn(IMAGE), count=2, macs=0.2, schedule=lambda *_: lambda step: 0.5
        )


def test_several_budgets_hold_together() -> None:
    model, x = network(), torch.randn(IMAGE)
    *_, last = fxprune.Steps(model, x, count=2, macs=0.5, params=0.3)
    before, after = cost_of(model, x), cost_of(last.model, x)
    assert after.macs <= 0.5 * before.macs
    assert after.params <= 0.3 * before.params


def test_training_in_the_body_is_what_the_next_step_prunes() -> None:
    model, x = network(), torch.randn(IMAGE)
    trained = {}
    for k, step in enumerate(fxprune.Steps(model, x, count=2, macs=0.4)):
        if k == 0:
            train(step.model)
            trained = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    left = step.model.get_parameter("5.bias")
    assert torch.equal(left, trained["5.bias"])
    assert not torch.equal(left, model.get_parameter("5.bias"))


@pytest.mark.parametrize("killed_in", [1, 2, 3])
def test_goes_on_behind_the_last_finished_step(tmp_path: Path, killed_in: int) -> None:
    """After an exception in the body of a step, only that step is repeated."""
    model, x = network(), torch.randn(IMAGE)

    def run(folder: Path, stop: int | None = None) -> tuple[list[int], fxprune.Pruned | None]:
        seen, last = [], None
        steps = fxprune.Steps(model, x, count=3, macs=0.2, folder=folder)
        for last in steps:
            seen.append(steps.done + 1)
            train(last.model)
            if seen[-1] == stop:
                raise KeyboardInterrupt
        return seen, last

    whole, expected = run(tmp_path / "whole")
    assert whole == [1, 2, 3]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", killed_in)
    again, found = run(tmp_path / "killed")
    assert again == [1, 2, 3][killed_in - 1 :]
    assert expected is not None
    assert found is not None
    for name, value in expected.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], value)
    assert run(tmp_path / "killed")[0] == []  # nothing is left to do
    finished = fxprune.Steps(model, x, count=3, macs=0.2, folder=tmp_path / "killed").last()
    torch.testing.assert_close(finished.model(x), expected.model(x))


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    model, x = network(), torch.randn(IMAGE)
    fxprune.Steps(model, x, count=3, macs=0.2, folder=tmp_path)
    with pytest.raises(ArgumentError, match=r"other settings.*another folder"):
        fxprune.Steps(model, x, count=3, macs=0.3, folder=tmp_path)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "budget": ({"macs": 0.3}, "budget"),
    "count": ({"count": 4}, "count"),
    "schedule": ({"schedule": fxprune.training.Cubic}, "schedule"),
    "architecture": (
        {"model": nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 4, 1))},
        "model",
    ),
    "weights": (
        {
            "model": network()
            .requires_grad_(False)
            .apply(lambda m: [p.add_(1) for p in m.parameters()])
        },
        "model",
    ),
    "dtype": (
        {"model": network().double(), "example_inputs": torch.randn(IMAGE).double()},
        "model and another inputs",
    ),
    "resolution": ({"example_inputs": torch.randn(1, 3, 12, 12)}, "inputs"),
    "criterion": ({"criterion": "l2"}, "options"),
    "settings of a criterion": ({"criterion": fxprune.criteria.CPMC(beta=0.5)}, "options"),
    "option": ({"min_channels": 4}, "options"),
    "keep": ({"keep": "0"}, "options"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_does_not_go_on_with_what_another_left(name: str, tmp_path: Path) -> None:
    run = {
        "model": network(),
        "example_inputs": torch.randn(IMAGE),
        "count": 3,
        "macs": 0.2,
        "criterion": fxprune.criteria.CPMC(),
    }
    next(iter(fxprune.Steps(**run, folder=tmp_path)))
    fxprune.Steps(**run, folder=tmp_path)
    change, what = OTHERS[name]
    with pytest.raises(ArgumentError, match=rf"other settings: another {what}.*another folder"):
        fxprune.Steps(**{**run, **change}, folder=tmp_path)


def test_the_same_run_is_known_in_another_process(tmp_path: Path) -> None:
    """Modules, functions and loaders have other addresses in another process.

    Numbers may be NumPy's.
    """

    def steps() -> fxprune.Steps:
        model, x = network(), torch.randn(IMAGE)
        criterion = fxprune.criteria.Taylor(
            [(x, torch.zeros(1))], lambda output, target: output.mean()
        )
        return fxprune.Steps(
            model,
            x,
            count=2,
            macs=np.float32(0.6),
            criterion=criterion,
            keep=[model[5]],
            folder=tmp_path,
        )

    for _ in steps():
        pass
    assert steps().done == 2


def test_a_damaged_record_of_the_run(tmp_path: Path) -> None:
    model, x = network(), torch.randn(IMAGE)
    for text in ("[]", "{", "3"):
        write_files(tmp_path, {"steps.json": functools.partial(Path.write_text, data=text)})
        with pytest.raises(PlanError, match=r"steps.json is damaged"):
            fxprune.Steps(model, x, count=3, macs=0.2, folder=tmp_path)


def test_what_cannot_be() -> None:
    model, x = network(), torch.randn(IMAGE)
    with pytest.raises(ArgumentError, match="count=0"):
        fxprune.Steps(model, x, count=0, macs=0.5)
    with pytest.raises(ArgumentError, match="macs="):
        fxprune.Steps(model, x, count=2)
    with pytest.raises(ArgumentError, match="channels="):
        fxprune.Steps(model, x, count=2, macs=0.5, channels=0.5)
    with pytest.raises(ArgumentError, match="folder="):
        fxprune.Steps(model, x, count=2, macs=0.5).last()


class OfImages(nn.Module):
    """A model whose only argument is a list of images, as in a detector."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.net(image) for image in images]


def test_a_list_as_example_is_one_argument_at_every_door() -> None:
    model, images = OfImages().eval(), [torch.randn(IMAGE), torch.randn(IMAGE)]
    assert cost_of(model, images).macs == 2 * cost_of(model.net, images[0]).macs
    *_, last = fxprune.Steps(model, images, count=2, macs=0.5)
    assert cost_of(last.model, images).macs <= 0.5 * cost_of(model, images).macs
    assert fxprune.prune(model, images, channels=0.5, verify=True).report.error < 1e-9
    assert fxprune.verify(model, last, images).error < 1e-9
    assert fxprune.latency.measure({"it": model}, images, rounds=1, seconds=0.001)["it"].batch == 2
