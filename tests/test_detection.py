"""Tests of torchvision's detectors and optical flow, which cannot be traced whole.

They are pruned exactly, and still do their work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

import fxprune
from tests.torchvision_models import CASES, COMPOSITE, Composite, small_detector

LARGEST_ERROR = 1e-9
MOST_LEFT = 0.50


DETECTORS, FLOWS = (
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else [])
        for case in COMPOSITE.values()
        if of in case.module
    ]
    for of in ("detection", "optical_flow")
)


@dataclass(frozen=True)
class Detector:
    case: Composite
    model: nn.Module
    pruned: fxprune.Pruned


@pytest.fixture(scope="module", params=DETECTORS)
def detector(request: pytest.FixtureRequest) -> Detector:
    """Return a detector and its pruned form.

    The tests of one detector run one after the other, so that it is pruned once.
    """
    case = request.param
    model = case.build()
    return Detector(
        case, model, fxprune.prune(model, case.inputs(batch=2), channels=0.5, verify=True)
    )


def threshold(model: nn.Module, value: float) -> None:
    """Set the score from which a box counts."""
    owner: Any = model.roi_heads if hasattr(model, "roi_heads") else model
    owner.score_thresh = value


def test_with_these_every_torchvision_model_is_covered() -> None:
    assert sorted([*CASES, *COMPOSITE]) == sorted(models.list_models())


@pytest.mark.long
def test_detectors(detector: Detector) -> None:
    """A pruned detector is exact and smaller, keeps its class and names, and finds boxes."""
    case, model, pruned = detector.case, detector.model, detector.pruned
    assert pruned.report.error is not None
    assert pruned.report.error <= LARGEST_ERROR
    assert pruned.report.params_after / pruned.report.params_before <= MOST_LEFT
    assert type(pruned.model) is type(model)
    assert set(pruned.model.state_dict()) == set(model.state_dict())
    for least, some in ((0.0, True), (1.1, False)):
        threshold(pruned.model, least)
        for count in (1, 3):
            with torch.no_grad():
                found = pruned.model(*case.inputs(batch=count, seed=count))
            assert len(found) == count
            assert all(bool(len(one["boxes"])) is some for one in found)


@pytest.mark.long
def test_detectors_train(detector: Detector) -> None:
    case, pruned = detector.case, detector.pruned
    (images,) = case.inputs(batch=2)
    targets = [
        {
            "boxes": torch.tensor([[10.0, 10.0, 50.0, 60.0], [30.0, 20.0, 90.0, 70.0]]),
            "labels": torch.tensor([1, 1]),
            "masks": torch.ones(2, *image.shape[1:], dtype=torch.uint8),
            "keypoints": torch.tensor([[20.0, 30.0, 1.0]]).expand(2, 17, 3).clone(),
        }
        for image in images
    ]
    pruned.model.train()
    optimizer = torch.optim.SGD(pruned.model.parameters(), lr=1e-4)
    losses = pruned.model(images, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(p.grad is not None for p in pruned.model.parameters())
    optimizer.step()
    pruned.model.eval()


@pytest.mark.long
@pytest.mark.parametrize("case", FLOWS)
def test_flows(case: Composite) -> None:
    pair = case.inputs()
    pruned = fxprune.prune(case.build(), pair, channels=0.5, verify=True)
    assert pruned.report.error is not None
    assert pruned.report.error <= LARGEST_ERROR
    assert pruned.report.params_after / pruned.report.params_before <= MOST_LEFT
    for updates in (1, 4):
        flows = pruned.model(
            torch.rand(2, 3, 136, 144), torch.rand(2, 3, 136, 144), num_flow_updates=updates
        )
        assert [tuple(flow.shape) for flow in flows] == [(2, 2, 136, 144)] * updates
    pruned.model.train()
    sum(flow.square().mean() for flow in pruned.model(*pair, num_flow_updates=2)).backward()
    assert all(p.grad is not None for p in pruned.model.parameters())


def test_frozen_batch_norms_stay_frozen_and_get_smaller() -> None:
    """Frozen batch norms, which consist of buffers alone, stay frozen and lose channels.

    torchvision builds them if weights of the backbone are given.
    """
    from torchvision.ops.misc import FrozenBatchNorm2d

    torch.manual_seed(0)
    images = ([torch.rand(3, 48, 64), torch.rand(3, 56, 48)],)
    pruned = fxprune.prune(small_detector(FrozenBatchNorm2d), images, channels=0.5, verify=True)
    assert pruned.report.error is not None
    assert pruned.report.error <= LARGEST_ERROR
    norm = pruned.model.get_submodule("backbone.1")
    assert isinstance(norm, FrozenBatchNorm2d)
    assert tuple(norm.weight.shape) == (4,)
    assert not any(name.startswith("backbone.1.") for name, _ in pruned.model.named_parameters())
