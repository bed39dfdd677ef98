"""Detectors and optical flow, the torchvision models that no graph holds whole, are pruned exactly and still do their work."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

import fxprune
from tests.torchvision_models import cheap_weights

LARGEST_ERROR = 1e-9
MOST_LEFT = 0.50


def _names(family: str) -> list[str]:
    return [n for n in models.list_models() if models.get_model_builder(n).__module__.split(".")[2] == family]


DETECTORS, FLOWS = _names("detection"), _names("optical_flow")
SLOW = {name for name in DETECTORS if "rcnn_resnet50" in name or name.endswith("_v2")}
"""Half a minute each; of every family a smaller one stays in the default set."""


def _marked(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


def images(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, 80 + 16 * i, 128 - 16 * i, generator=generator) for i in range(count)]


def detector(name: str) -> nn.Module:
    """Small images where the family takes them; all weights drawn, none downloaded."""
    sizes = (
        {} if models.get_model_builder(name).__module__.rpartition(".")[2].startswith("ssd") else {"min_size": 96, "max_size": 160}
    )
    with cheap_weights():
        return models.get_model(name, weights=None, weights_backbone=None, **sizes).eval()


@functools.lru_cache(maxsize=1)
def pruned_detector(name: str) -> tuple[nn.Module, fxprune.Pruned]:
    model = detector(name)
    return model, fxprune.prune(model, (images(2),), channels=0.5, verify=True)


def threshold(model: nn.Module, value: float) -> None:
    """From which score on a box counts."""
    owner: Any = model.roi_heads if hasattr(model, "roi_heads") else model
    owner.score_thresh = value


def test_with_these_every_torchvision_model_is_covered() -> None:
    from tests.torchvision_models import CASES

    assert sorted([*CASES, *DETECTORS, *FLOWS]) == sorted(models.list_models())


@pytest.mark.parametrize("name", _marked(DETECTORS))
def test_detectors(name: str) -> None:
    model, pruned = pruned_detector(name)
    assert pruned.report.error is not None
    assert pruned.report.error <= LARGEST_ERROR
    assert pruned.report.params_after / pruned.report.params_before <= MOST_LEFT
    assert type(pruned.model) is type(model)
    assert set(pruned.model.state_dict()) == set(model.state_dict())
    for least, some in ((0.0, True), (1.1, False)):
        threshold(pruned.model, least)
        for count in (1, 3):
            with torch.no_grad():
                found = pruned.model(images(count, seed=count))
            assert len(found) == count
            assert all(bool(len(one["boxes"])) is some for one in found)


@pytest.mark.parametrize("name", _marked(DETECTORS))
def test_detectors_train(name: str) -> None:
    _, pruned = pruned_detector(name)
    targets = [
        {
            "boxes": torch.tensor([[10.0, 10.0, 50.0, 60.0], [30.0, 20.0, 90.0, 70.0]]),
            "labels": torch.tensor([1, 1]),
            "masks": torch.ones(2, *image.shape[1:], dtype=torch.uint8),
            "keypoints": torch.tensor([[20.0, 30.0, 1.0]]).expand(2, 17, 3).clone(),
        }
        for image in images(2)
    ]
    pruned.model.train()
    optimizer = torch.optim.SGD(pruned.model.parameters(), lr=1e-4)
    losses = pruned.model(images(2), targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(p.grad is not None for p in pruned.model.parameters())
    optimizer.step()
    pruned.model.eval()


@pytest.mark.parametrize("name", FLOWS)
def test_flows(name: str) -> None:
    with cheap_weights():
        model = models.get_model(name, weights=None).eval()
    pair = tuple(torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    pruned = fxprune.prune(model, pair, channels=0.5, verify=True)
    assert pruned.report.error is not None
    assert pruned.report.error <= LARGEST_ERROR
    assert pruned.report.params_after / pruned.report.params_before <= MOST_LEFT
    for updates in (1, 4):
        flows = pruned.model(torch.rand(2, 3, 136, 144), torch.rand(2, 3, 136, 144), num_flow_updates=updates)
        assert [tuple(flow.shape) for flow in flows] == [(2, 2, 136, 144)] * updates
    pruned.model.train()
    sum(flow.square().mean() for flow in pruned.model(*pair, num_flow_updates=2)).backward()
    assert all(p.grad is not None for p in pruned.model.parameters())


def test_frozen_batch_norms_stay_frozen_and_get_smaller() -> None:
    """What torchvision builds when the backbone's weights are given: batch norms of buffers alone."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.misc import FrozenBatchNorm2d

    with cheap_weights():
        backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d)
        model = RetinaNet(backbone, 5, anchor_generator=None, min_size=96, max_size=160).eval()
    # Its default anchors are for five levels, as this backbone has.
    pruned = fxprune.prune(model, (images(2),), channels=0.5, verify=True)
    assert pruned.report.error is not None
    assert pruned.report.error <= LARGEST_ERROR
    norm = pruned.model.get_submodule("backbone.body.layer1.0.bn1")
    assert isinstance(norm, FrozenBatchNorm2d)
    assert tuple(norm.weight.shape) == (32,)
    assert not any(name.startswith("backbone.body.layer1.0.bn1") for name, _ in pruned.model.named_parameters())
