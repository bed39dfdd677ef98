"""Models in parts on routes that the example does not take.

Such routes are those of training, those chosen by chance, and those for many or no detections.
"""

from __future__ import annotations

import concurrent.futures
import copy
import itertools
import os
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms, roi_align

import fxprune
from tests.test_eager import Repeated, opaque, share_left

ONE = torch.float64


class Trained(nn.Module):
    """A model that does more in training: another head, another order of parts, more queries."""

    def __init__(self, more: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.a, self.b, self.last = (
            nn.Linear(6, 16),
            Repeated(16, 16),
            Repeated(16, 16),
            nn.Linear(16, 3),
        )
        self.auxiliary, self.queries, self.more = (
            nn.Linear(16, 3),
            nn.Parameter(torch.randn(4, 16)),
            more,
        )

    def forward(self, x: Tensor) -> Any:
        h = self.a(self.first(opaque(x)))
        if self.training:
            return self.last(self.b(h)), self.more(self, h)
        return self.last(self.b(h + self.queries[: h.shape[0]]))


MORE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a head": lambda model, h: model.auxiliary(h),
    "another order": lambda model, h: model.last(model.a(model.b(h))),
    "at full width": lambda model, h: model.last(h.flip(1)) + model.last(h.reshape(-1, 16)),
    "all queries": lambda model, h: model.last(model.b(model.queries)) + h.mean(),
    "a sum over pairs": lambda model, h: (
        (h.unsqueeze(0) - model.first.weight.T.unsqueeze(1)).square().sum(-1)
    ),
}


def masked_like(model: nn.Module, small: nn.Module) -> nn.Module:
    """Return a copy of the original with every element at zero that the pruned model lacks.

    All elements must be different.
    """
    left = torch.cat([p.detach().flatten() for p in small.parameters()])
    masked = copy.deepcopy(model)
    for parameter in masked.parameters():
        parameter.data[~torch.isin(parameter, left)] = 0
    return masked


@pytest.mark.parametrize("name", MORE)
def test_what_only_training_does_is_followed(name: str) -> None:
    model, x = Trained(MORE[name]).double().eval(), torch.randn(2, 6, dtype=ONE)
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert pruned.report.error < 1e-9
    assert share_left(pruned) < 0.8
    assert not any("training" in decision for decision in pruned.report.decisions)
    masked = masked_like(model, pruned.model)
    for training in (False, True):
        got, want = pruned.model.train(training)(x), masked.train(training)(x)
        for a, b in zip(got if training else [got], want if training else [want], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class Targets(Trained):
    """A model that cannot be called in training without targets."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        h = self.a(self.first(opaque(x)))
        if self.training:
            if targets is None:
                raise ValueError("targets should not be none")
            return F.mse_loss(self.more(self, h), targets)
        return self.last(self.b(h))


def test_where_training_needs_more_than_the_example_its_modules_find_everything_whole() -> None:
    model, x = Targets(MORE["a head"]).eval(), torch.randn(2, 6)
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert pruned.report.error < 1e-9
    assert any("targets should not be none" in decision for decision in pruned.report.decisions)
    # only the hidden axis inside the part is pruned: half of 32
    assert pruned.model.a.up.weight.shape == (16, 16)
    pruned.model.train()(x, torch.randn(2, 3)).backward()
    assert pruned.model.auxiliary.weight.grad is not None


def test_targets_cost_nothing_where_training_calls_what_evaluation_calls() -> None:
    model, x = Targets(MORE["another order"]).eval(), torch.randn(2, 6)
    del model.auxiliary, model.queries
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert share_left(pruned) < 0.5


class Drops(nn.Module):
    """A model that skips a layer at random in training."""

    def __init__(self, chance: Callable[[], Any]) -> None:
        super().__init__()
        self.first, self.a, self.b, self.last = (
            nn.Linear(6, 16),
            Repeated(16, 16),
            Repeated(16, 16),
            nn.Linear(16, 3),
        )
        self.chance = chance

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(self.first(opaque(x)))
        if not self.training or self.chance() < 0.5:
            h = self.b(h)
        return self.last(h)


OWN = random.Random(0)
CHANCE: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand([]),
    "in place": lambda: torch.empty(1).uniform_(),
    "python": random.random,
    "own": lambda: OWN.random(),
}


@pytest.mark.parametrize("name", CHANCE)
def test_what_python_decides_by_chance_fits_either_way(name: str) -> None:
    model, x = Drops(CHANCE[name]).double().eval(), torch.randn(2, 6, dtype=ONE)
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert share_left(pruned) < 0.8
    masked = masked_like(model, pruned.model).train()
    pruned.model.train()
    for seed in range(8):
        results = []
        for own in (pruned.model, masked):
            torch.manual_seed(seed), random.seed(seed), OWN.seed(seed)
            results.append(own(x))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


class Alternates(Drops):
    """A model that skips a layer in every other call."""

    def __init__(self) -> None:
        super().__init__(lambda: None)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.a(self.first(opaque(x)))
        return self.last(self.b(h) if self.calls % 2 else h)


def test_what_a_count_of_calls_chooses_fits_either_way() -> None:
    model, x = Alternates().double().eval(), torch.randn(2, 6, dtype=ONE)
    pruned = fxprune.prune(model, x, channels=0.5)
    assert share_left(pruned) < 0.8
    masked = masked_like(model, pruned.model)
    for _ in range(2):
        torch.testing.assert_close(pruned.model(x), masked(x), rtol=1e-9, atol=1e-12)


def test_a_count_of_calls_is_in_no_graph() -> None:
    model, x = Alternates().eval(), torch.randn(2, 6)
    assert fxprune.analyze(model, x).parts


@pytest.mark.parametrize("name", ["by a clock", "by a count"])
def test_what_cannot_be_compared_from_call_to_call_is_left_out_of_the_proof(name: str) -> None:
    chance = (
        itertools.cycle([0, 1]).__next__
        if name == "by a count"
        else lambda: os.urandom(1)[0] / 256
    )
    model, x = Drops(chance).double().eval(), torch.randn(2, 6, dtype=ONE)
    model.chance = chance
    found = fxprune.verify(model, fxprune.prune(model, x, channels=0.5), x)
    assert found.error < 1e-9


class Finds(nn.Module):
    """A small detector: boxes at high scores, pooled features, a class and a finer box each."""

    def __init__(self, threshold: float, skips: bool, width: int = 16) -> None:
        super().__init__()
        self.body, self.scores = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 5, 1)
        self.box = nn.Sequential(nn.Flatten(), nn.Linear(width * 9, 32), nn.ReLU())
        self.classes, self.finer = nn.Linear(32, 4), nn.Linear(32, 4 * 4)
        self.threshold, self.skips = threshold, skips

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        features = F.relu(self.body(images))
        out = self.scores(features)
        found = []
        for i in range(len(images)):
            score = out[i, 0].flatten().sigmoid()
            kept = torch.where(score > self.threshold)[0]
            corner = torch.stack([kept % out.shape[-1], kept // out.shape[-1]], dim=1).to(
                images.dtype
            )
            boxes = torch.cat(
                [corner, corner + 2 + out[i, 1:3].flatten(1)[:, kept].T.sigmoid() * 4], dim=1
            )
            boxes = boxes[nms(boxes, score[kept], 0.3)]
            if self.skips and not len(boxes):
                found.append({"boxes": boxes, "classes": images.new_zeros(0, 4)})
                continue
            pooled = self.box(roi_align(features[i : i + 1], [boxes], 3))
            finer = self.finer(pooled).reshape(boxes.shape[0], 4, 4)[:, 1:].reshape(-1, 4)
            found.append({"boxes": finer, "classes": self.classes(pooled).softmax(-1)})
        return found


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("threshold", [0.5, 2.0])
def test_an_image_in_which_nothing_is_found(threshold: float, skips: bool) -> None:
    """The example's images have boxes or none; the pruned model works on both kinds of images."""
    model, images = Finds(threshold, skips).double().eval(), torch.rand(2, 3, 8, 8, dtype=ONE)
    pruned = fxprune.prune(model, images, channels=0.5, verify=True)
    assert share_left(pruned) < 0.5
    masked = masked_like(model, pruned.model)
    for least in (0.45, 2.0):
        pruned.model.threshold = masked.threshold = least
        for got, want in zip(pruned.model(images), masked(images), strict=True):
            assert got["boxes"].shape[1] == 4
            assert bool(len(got["classes"])) is (least < 1)
            for name in want:
                torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-12)


@pytest.mark.long
def test_models_in_parts_are_pruned_by_several_threads_at_once() -> None:
    """A further thread calls a model of its own at the same time."""
    models = [Trained(MORE["all queries"]).double().eval() for _ in range(3)]
    x = torch.randn(2, 6, dtype=ONE)
    wanted = [fxprune.prune(model, x, channels=0.5).plan.to_json() for model in models]
    served, stop, errors = (
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).double(),
        threading.Event(),
        [],
    )
    right = served(x)

    def serve() -> None:
        while not stop.is_set():
            try:
                assert torch.equal(served(x), right)
            except Exception as error:
                errors.append(error)

    beside = threading.Thread(target=serve)
    beside.start()
    try:
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            for _ in range(2):
                plans = list(
                    pool.map(
                        lambda model: fxprune.prune(model, x, channels=0.5).plan.to_json(), models
                    )
                )
                assert plans == wanted
    finally:
        stop.set()
        beside.join()
    assert not errors
