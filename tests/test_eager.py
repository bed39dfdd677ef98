"""Tests of models that cannot be traced whole.

Their Python code stays, and the modules that it calls are pruned as graphs.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import math
import pickle
import re
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.ops import nms, roi_align

import fxprune
from fxprune.coupling.parts.python import RealMode
from fxprune.ops import Context
from fxprune.rewrite.module import PrunedModule
from tests.support.checking import masked, randomise

IMAGE = (2, 3, 16, 16)


def block(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.Conv2d(b, b, 3, padding=1)
    )


class Between(nn.Module):
    """Two parts with Python code between them."""

    def __init__(self, code: Callable[[Any, Tensor], Tensor], width: int = 16) -> None:
        super().__init__()
        self.first, self.second = block(3, width), block(width, width)
        self.head = nn.Conv2d(width, 4, 1)
        self.scale = nn.Parameter(torch.rand(width, 1, 1) + 0.5)
        self.norm = nn.BatchNorm2d(width)
        self.code, self.width = code, width

    def forward(self, x: Tensor) -> Tensor:
        torch.nonzero(x.flatten() > 1e9)
        y = self.code(self, self.first(x))
        return self.head(F.relu(self.second(y)))


def split_at_a_literal(model: Any, y: Tensor) -> Tensor:
    a, b = torch.split(y, [model.width // 2, model.width // 2], dim=1)
    return torch.cat([b, a], dim=1)


def scaled_by_the_width(model: Any, y: Tensor) -> Tensor:
    return y / math.sqrt(y.shape[1])


def scaled_by_the_width_as_a_tensor(model: Any, y: Tensor) -> Tensor:
    _batch, width, *_ = y.shape
    return y / torch.sqrt(torch.tensor(width))


def laid_out_anew(model: Any, y: Tensor) -> Tensor:
    batch, width, high, wide = y.shape
    return y.view(batch, width, high * wide).view(batch, width, high, wide)


def laid_out_by_a_literal(model: Any, y: Tensor) -> Tensor:
    return y.reshape(y.shape[0], model.width, -1).reshape(y.shape)


def laid_out_by_the_width_of_another(model: Any, y: Tensor) -> Tensor:
    other = model.second(torch.relu(y))
    return y.reshape(y.shape[0], other.shape[1], *y.shape[2:]) * 2


def collected(model: Any, y: Tensor) -> Tensor:
    out = torch.zeros(y.shape, dtype=y.dtype)
    for i in range(y.shape[0]):
        out[torch.tensor([i])] = y[torch.tensor([i])]
    return out


def collected_by_a_literal(model: Any, y: Tensor) -> Tensor:
    out = torch.zeros(y.shape[0], model.width, *y.shape[2:], dtype=y.dtype)
    out[torch.arange(y.shape[0])] = y
    return out


def normalised(model: Any, y: Tensor) -> Tensor:
    return (y - y.mean(dim=1, keepdim=True)) * 2


def chosen(model: Any, y: Tensor) -> Tensor:
    return y * (torch.sigmoid(y.mean(dim=(2, 3), keepdim=True)) > 0.25)


PYTHON: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "nothing": lambda model, y: y,
    "relu": lambda model, y: F.relu(y),
    "batch_norm": lambda model, y: model.norm(y),
    "own_parameter": lambda model, y: y * model.scale,
    "pooled": lambda model, y: F.interpolate(F.max_pool2d(y, 2), scale_factor=2.0),
    "one_channel": lambda model, y: y + y[:, 3:4],
    "split_at_a_literal": split_at_a_literal,
    "scaled_by_the_width": scaled_by_the_width,
    "scaled_by_the_width_as_a_tensor": scaled_by_the_width_as_a_tensor,
    "laid_out_anew": laid_out_anew,
    "laid_out_by_a_literal": laid_out_by_a_literal,
    "laid_out_by_the_width_of_another": laid_out_by_the_width_of_another,
    "collected": collected,
    "collected_by_a_literal": collected_by_a_literal,
    "made_by_a_literal": lambda model, y: (
        y * torch.full((1, model.width, 1, 1), 0.5, dtype=y.dtype)
    ),
    "made_by_the_width": lambda model, y: (
        y * torch.full((1, y.shape[1], 1, 1), 0.5, dtype=y.dtype)
    ),
    "mean_over_channels": normalised,
    "layer_norm": lambda model, y: F.layer_norm(y.movedim(1, -1), (model.width,)).movedim(-1, 1),
    "group_norm": lambda model, y: F.group_norm(y, 4),
    "grouped_convolution": lambda model, y: F.conv2d(y, model.scale[:, None], groups=model.width),
    "concatenated": lambda model, y: (
        torch.cat([y, -y], dim=1)[:, : model.width] + torch.stack([y, y]).sum(0)
    ),
    "variance": lambda model, y: y / (y.var(1, keepdim=True) + 1).sqrt(),
    "standard_deviation": lambda model, y: (
        y / (torch.std_mean(y, dim=(1, 2), keepdim=True)[0] + 1)
    ),
    "norm": lambda model, y: y / (y.norm(dim=1, keepdim=True) + 1),
    "normalised_rows": lambda model, y: F.normalize(y, dim=1),
    "instance_norm": lambda model, y: F.instance_norm(y),
    "softmax": lambda model, y: y.softmax(dim=1),
    "counted": lambda model, y: y / len(y[0]) + y.numel() / 1e5 + y.shape.numel() / 1e5,
    "flipped": lambda model, y: y.flip(1),
    "chosen": chosen,
    "sigmoid": lambda model, y: torch.sigmoid(y),
    "in_place": lambda model, y: y.mul_(2),
    "padded": lambda model, y: F.pad(y, (1, 1, 0, 2)),
    "padded_in_channels": lambda model, y: F.pad(y, (0, 0, 0, 0, 2, 2))[:, 2:-2],
    "padded_and_cut": lambda model, y: F.pad(F.pad(y, (0, 0, 0, 0, 0, 3)), (0, 0, 0, 0, 0, -3)),
    "padded_at_the_front": lambda model, y: torch.constant_pad_nd(y, (0, 0, 0, 0, 3, -3), 0),
    "padded_by_a_module": lambda model, y: nn.ConstantPad3d((0, 0, 0, 0, -2, 2), 0.0)(y),
    "padded_by_reflection": lambda model, y: F.pad(y, (1, 1, 1, 1), mode="reflect"),
    "flattened": lambda model, y: y.flatten(1).view(y.shape[0], -1).view(y.shape),
    "narrowed": lambda model, y: torch.narrow(y, 1, 0, model.width),
    "split_into_one": lambda model, y: torch.split(y, [model.width], dim=1)[0],
    "selected": lambda model, y: y.index_select(-3, torch.arange(model.width)),
    "rolled": lambda model, y: y.roll(model.width, 1).roll(3 * model.width, 1),
    "unfolded": lambda model, y: y.unfold(1, model.width, 1).movedim(-1, 1)[:, :, 0],
    "repeated": lambda model, y: y.repeat(1, 2, 1, 1)[:, : model.width],
    "squeezed": lambda model, y: y[None].squeeze(0).squeeze(1),
    "unbound": lambda model, y: torch.stack(y.unbind(0)),
    "stacked_channels": lambda model, y: torch.stack(y.unbind(1), 1),
    "made_by_the_weights": lambda model, y: (
        y * torch.ones(model.norm.num_features, 1, 1, dtype=y.dtype)
    ),
    "scaled_by_the_weights": lambda model, y: y / model.first[3].out_channels ** 0.5,
    "no_rule": lambda model, y: torch.renorm(y, 2, 0, 5.0),
    "gathered": lambda model, y: y[torch.arange(y.shape[0]).flip(0)],
}


def share_left(pruned: fxprune.Pruned) -> float:
    return pruned.report.params_after / pruned.report.params_before


@pytest.mark.parametrize("name", PYTHON)
def test_python_between_parts_does_the_same_on_what_is_left(name: str) -> None:
    model, x = Between(PYTHON[name]).eval(), torch.randn(IMAGE)
    before = copy.deepcopy(model.state_dict())
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert pruned.report.error is not None
    assert pruned.report.error < 1e-9
    assert share_left(pruned) < 0.45
    assert type(pruned.model) is Between
    assert isinstance(pruned.model.first, fx.GraphModule)
    assert isinstance(pruned.model.second, fx.GraphModule)
    assert set(pruned.model.state_dict()) == set(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    pruned.model.train()
    pruned.model(torch.randn(3, 3, 20, 12)).sum().backward()
    assert all(
        p.grad is not None
        for n, p in pruned.model.named_parameters()
        if n.split(".")[0] in ("first", "second", "head")
    )


@pytest.mark.parametrize("name", PYTHON)
def test_keeping_everything_changes_nothing(name: str) -> None:
    model, x = Between(PYTHON[name]).eval(), torch.randn(IMAGE)
    pruned = fxprune.prune(model, x, channels=1.0)
    for mode in (True, False):
        model.train(mode), pruned.model.train(mode)
        assert torch.equal(model(x), pruned.model(x))


class Refines(nn.Module):
    """A loop over a state that a part updates; the caller chooses the number of steps."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.encoder, self.update, self.head = (
            block(3, 2 * width),
            block(2 * width, width),
            nn.Conv2d(width, 2, 1),
        )
        self.width = width

    def forward(self, x: Tensor, steps: int = 3) -> list[Tensor]:
        hidden, context = torch.split(self.encoder(x), [self.width, self.width], dim=1)
        out = []
        for _ in range(steps):
            hidden = torch.tanh(self.update(torch.cat([hidden, F.relu(context)], dim=1)))
            out.append(self.head(hidden))
        return out


def test_a_number_of_steps_stays_the_callers() -> None:
    model, x = Refines().eval(), torch.randn(IMAGE)
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert pruned.report.error < 1e-9
    assert share_left(pruned) < 0.35
    assert [len(pruned.model(x, steps)) for steps in (1, 5)] == [1, 5]
    assert torch.equal(pruned.model(x, 5)[2], pruned.model(x)[2])


class Scales(nn.Module):
    """A module whose path depends on arguments that are not tensors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(
        self, x: Tensor, scale: float, mask: Tensor | None = None, twice: bool = False
    ) -> Tensor:
        y = F.relu(self.up(x if mask is None else x * mask))
        return self.down(y * scale if twice else y)


class HandsOn(nn.Module):
    """A model that calls a part several times, with a number, a flag and None as arguments."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.scales, self.head = nn.Linear(3, width), Scales(width), nn.Linear(width, 2)

    def forward(self, x: Tensor, steps: int = 2, scale: float = 0.5) -> Tensor:
        x = self.stem(x)
        for _ in range(steps):
            x = x + self.scales(x, scale, None, twice=True)
        return self.head(x)


def test_a_part_is_called_with_more_than_tensors_and_says_so_where_that_changes() -> None:
    """A part accepts other arguments than tensors, and refuses other values than the example's."""
    model, x = HandsOn(8), torch.randn(2, 3)
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert pruned.report.parts == ("stem", "scales", "head")
    assert pruned.report.params_after < 0.35 * pruned.report.params_before
    kept = fxprune.prune(model, x, channels=1.0).model
    assert torch.allclose(kept(x, steps=5), model(x, steps=5), rtol=1e-6)
    with pytest.raises(AssertionError, match=r"its argument 'scale' == 0\.5"):
        pruned.model(x, scale=0.25)
    with pytest.raises(AssertionError, match="its argument 'mask' == None"):
        pruned.model.scales(torch.zeros(2, 4), 0.5, torch.zeros(2, 4), twice=True)


class BatchDecides(nn.Module):
    """A model that expands its one row of positions only for several sequences, as decoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.positions = (
            nn.Linear(3, 8),
            nn.Linear(8, 2),
            nn.Parameter(torch.randn(1, 8)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y, positions = self.up(x), self.positions
        if y.shape[0] != positions.shape[0]:
            positions = positions.expand(y.shape[0], -1)
        return self.down(F.relu(y + positions))


@pytest.mark.parametrize("batch", [1, 3])
def test_what_is_decided_is_decided_for_the_example(batch: int) -> None:
    """What the batch size decides is decided for the example.

    The analysis widens a batch of one to two, but not where the model would then do something
    else.
    """
    model, x = BatchDecides(), torch.randn(batch, 3)
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert pruned.model(x).shape == (batch, 2)
    assert pruned.report.params_after < 0.6 * pruned.report.params_before
    with pytest.raises(AssertionError, match="this graph was traced for"):
        pruned.model(torch.randn(4 - batch, 3))


class Detects(nn.Module):
    """A detector: a head shared by two levels finds boxes; pooled features are classified."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body, self.down = block(3, width), nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.rpn = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 5, 1)
        )
        self.box = nn.Sequential(nn.Flatten(), nn.Linear(width * 9, 32), nn.ReLU())
        self.classes = nn.Linear(32, 6)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        x = torch.stack([F.interpolate(image[None], (16, 16))[0] for image in images])
        features = [self.body(x)]
        features.append(self.down(features[0]))
        found: list[dict[str, Tensor]] = []
        heads = [self.rpn(level) for level in features]
        for i in range(len(images)):
            boxes, scores = [], []
            for level, out in enumerate(heads):
                score = out[i, 0].flatten()
                top = score.topk(min(6, score.numel())).indices
                corner = (
                    torch.stack([top % out.shape[-1], top // out.shape[-1]], dim=1) * 2.0**level
                )
                size = out[i, 1:3].flatten(1)[:, top].T.sigmoid() * 6 + 1
                boxes.append(torch.cat([corner, corner + size], dim=1).to(x.dtype))
                scores.append(score[top])
            box, score = torch.cat(boxes), torch.cat(scores)
            kept = nms(box, score, 0.5)
            pooled = roi_align(
                features[0], [box[kept] if j == i else box[:0] for j in range(len(images))], 3
            )
            found.append({"boxes": box[kept], "logits": self.classes(self.box(pooled))})
        return found


def test_a_detector_prunes_through_its_boxes() -> None:
    model, images = Detects().eval(), [torch.rand(3, 20, 30), torch.rand(3, 30, 20)]
    pruned = fxprune.prune(model, (images,), channels=0.5, verify=True)
    assert pruned.report.error < 1e-9
    assert share_left(pruned) < 0.35
    # half of the features' channels go through the pooling of boxes
    assert pruned.model.box[1].in_features == 8 * 9
    for count in (1, 3):
        assert len(pruned.model([torch.rand(3, 25, 25)] * count)) == count
    sum(out["logits"].sum() for out in pruned.model.train()(images)).backward()


class Branches(nn.Module):
    """A model that branches on values; both branches call every module."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.a, self.b, self.head = (
            block(3, width),
            block(width, width),
            block(width, width),
            nn.Conv2d(width, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if y.sum() > 0:
            return self.head(self.b(F.relu(self.a(y))))
        return self.head(self.a(self.b(y)))


def test_where_values_decide_both_ways_are_tied() -> None:
    """If values decide on a branch, the channels of both branches are coupled."""
    model, x = randomise(Branches()).eval(), torch.randn(IMAGE, dtype=torch.float64)
    pruned = fxprune.prune(model, x, channels=0.5, criterion="cpmc", verify=True)
    assert share_left(pruned) < 0.5
    same_on_both_paths(model, pruned, x)


def same_on_both_paths(model: Any, pruned: fxprune.Pruned, x: Tensor) -> None:
    """Assert that the pruned model equals the masked original on both branches."""
    reference, paths = masked(model, pruned.model), set()
    for factor in (-50.0, -1.0):
        for m in (reference, pruned.model):
            m.first[3].bias.data *= factor
        paths.add(bool(reference.first(x).sum() > 0))
        torch.testing.assert_close(pruned.model(x), reference(x), rtol=1e-9, atol=1e-9)
    assert paths == {True, False}


class Hides(Branches):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.head(self.a(y)) if y.sum() > 0 else self.head(self.b(y))


class HidesWhatItShares(Hides):
    """The module on the hidden branch shares a filter with the one on the visible branch."""

    def __init__(self) -> None:
        super().__init__()
        self.b[0].weight = self.a[0].weight


@pytest.mark.parametrize("kind", [Hides, HidesWhatItShares])
def test_a_module_that_a_branch_on_values_hides_is_pruned(kind: Callable[[], nn.Module]) -> None:
    model, x = randomise(kind()).eval(), torch.randn(IMAGE, dtype=torch.float64)
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert re.search(
        r"branches on the values of a tensor \(at test_eager.py:\d+\)", pruned.report.not_one_graph
    )
    assert pruned.report.not_one_graph in str(pruned.report)
    assert share_left(pruned) < 0.5
    same_on_both_paths(model, pruned, x)


def test_plans_of_parts_replay_and_are_saved(tmp_path: Any) -> None:
    model, x = Between(split_at_a_literal).eval(), torch.randn(IMAGE)
    pruned = fxprune.prune(model, x, channels=0.5)
    again = fxprune.apply(fxprune.Plan.from_json(pruned.plan.to_json()), model)
    assert torch.equal(again.model(x), pruned.model(x))
    pruned.save(tmp_path / "out")
    loaded = fxprune.load(tmp_path / "out", lambda: copy.deepcopy(model))
    assert torch.equal(loaded.model(x), pruned.model(x))
    twice = fxprune.prune(pruned.model, x, channels=0.5, verify=True)
    assert twice.report.error < 1e-9
    assert share_left(twice) < 0.5


def test_a_pruned_model_with_parts_can_be_copied_and_moved_to_another_dtype() -> None:
    pruned = fxprune.prune(Between(split_at_a_literal).eval(), torch.randn(IMAGE), channels=0.5)
    copied = copy.deepcopy(pruned.model).double()
    x = torch.randn(IMAGE)
    torch.testing.assert_close(copied(x.double()), pruned.model(x).double(), rtol=1e-4, atol=1e-5)
    assert isinstance(copied.first, nn.Sequential)
    assert isinstance(copied.first, fx.GraphModule)


def test_activations_are_read_in_every_part() -> None:
    """A unit's activation is the mean over all calls of all layers that read it."""
    model, data = Refines(8).eval(), [(torch.randn(4, 3, 8, 8),), (torch.randn(2, 3, 8, 8),)]
    coupling = fxprune.analyze(model, data[0][0])
    scores = fxprune.criteria.Activation(data).scores(coupling, model)
    read: dict[str, list[Tensor]] = {}
    # one is inside a part; Python cuts and joins the output of the other for the next part
    for name in ("update.3", "encoder.3"):
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, out, name=name: read.setdefault(name, []).append(inputs[0])
        )
    for (x,) in data:
        model(x)
    (inner,) = [group for group in coupling.groups if group.name == "update.0.weight:0"]
    expected = sum(x.abs().mean((2, 3)).sum(0) for x in read["update.3"]) / sum(
        len(x) for x in read["update.3"]
    )
    assert torch.allclose(torch.from_numpy(scores[inner.units]).float(), expected, rtol=1e-5)
    assert (scores[coupling.units] > 0).mean() > 0.9
    pruned = fxprune.prune(
        model, data[0][0], channels=0.5, criterion=fxprune.criteria.Activation(data), verify=True
    )
    assert share_left(pruned) < 0.4


def test_constants_go_into_the_biases_of_parts() -> None:
    """Constant channels can be removed exactly, in every part and at every step."""
    model, x = Refines(8).double().eval(), torch.randn(8, 3, 8, 8, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight[::2], 0.0)
            nn.init.constant_(module.bias, 2.0)
        elif isinstance(module, nn.Conv2d):
            # a border of zeros would differ from the constant
            module.padding_mode = "replicate"
    inner = {"encoder.0": 0.5, "update.0": 0.5}

    def scale(view: Any) -> Tensor:
        return (
            fxprune.criteria.bn_scale(view)
            if view.group.name in ("encoder.0.weight:0", "update.0.weight:0")
            else torch.ones(view.group.size)
        )

    pruned = fxprune.prune(model, x, layers=inner, criterion=scale)

    @torch.no_grad()
    def error() -> float:
        return max(
            float((a - b).abs().max())
            for a, b in zip(pruned.model(x, 4), model(x, 4), strict=True)
        )

    assert error() > 0.01
    assert fxprune.compensate(model, pruned, [(x,)]).changed == ("encoder.3", "update.3")
    assert error() < 1e-12
    refitted = fxprune.prune(model, x, layers=inner, criterion=scale)
    done = fxprune.compensate(model, refitted, [(x,)], method="least_squares", ridge=1e-9)
    assert done == fxprune.Compensation(("encoder.3", "update.3"), ())
    torch.testing.assert_close(refitted.model(x), model(x), rtol=1e-5, atol=1e-5)


ON_CPU = torch.device("cpu")
ASKS: dict[str, Callable[[Any, Tensor], bool]] = {
    "type": lambda model, x: x.device.type == "cpu",
    "type among several": lambda model, x: x.device.type in ("cpu", "cuda"),
    "type of a result": lambda model, x: (x * 2).device.type != "cuda",
    "type of a weight": lambda model, x: model.first.weight.device.type == "cpu",
    "type of the first parameter": lambda model, x: next(model.parameters()).device.type == "cpu",
    "device": lambda model, x: x.device == ON_CPU,
    "device the other way round": lambda model, x: ON_CPU == x.device,  # noqa: SIM300 - torch.device answers first
    "device of the first parameter": lambda model, x: (
        next(model.parameters()).device in (ON_CPU, "cpu")
    ),
    "text": lambda model, x: str(x.device) == "cpu",
    "formatted text": lambda model, x: f"on {x.device}" == "on cpu",
    "is_cpu": lambda model, x: x.is_cpu,
    "is_cuda": lambda model, x: not x.is_cuda,
    "is_meta": lambda model, x: not x.is_meta,
    "is_meta of the first parameter": lambda model, x: not next(model.parameters()).is_meta,
    "get_device": lambda model, x: x.get_device() < 0,
    "kind of tensor": lambda model, x: x.type() == "torch.FloatTensor",
    "device as a key": lambda model, x: {ON_CPU: True}.get(x.device, False),
    "dtype as a key": lambda model, x: {torch.float32: True}.get(x.dtype, False),
    "gradient of a weight": lambda model, x: model.first.weight.requires_grad,
    "gradient of the first parameter": lambda model, x: next(model.parameters()).requires_grad,
    "gradient of the input": lambda model, x: not x.requires_grad,
    "get_device of the first parameter": lambda model, x: (
        next(model.parameters()).get_device() < 0
    ),
}


class Asks(nn.Module):
    """A model that computes something else if the answer to a question is another one."""

    def __init__(self, question: Callable[[Any, Tensor], bool]) -> None:
        super().__init__()
        self.first, self.last, self.question = nn.Linear(8, 16), nn.Linear(16, 4), question

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x * 2 if self.question(self, x) else x)))


@pytest.mark.parametrize("question", ASKS.values(), ids=ASKS)
def test_what_is_done_for_some_callers_only_stays_python(
    question: Callable[[Any, Tensor], bool],
) -> None:
    """Code that depends on the device, dtype or gradients of a tensor stays Python.

    The meta copy is on the meta device and has no gradients, so its answer would differ. A graph
    would have one answer for all callers.
    """
    model, x = Asks(question).eval(), torch.randn(3, 8)
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert isinstance(pruned.model, Asks)
    assert pruned.model.first.weight.shape == (8, 8)
    assert torch.equal(fxprune.prune(model, x, channels=1.0).model(x), model(x))


@pytest.mark.parametrize(
    "device",
    [
        lambda model, x: x.device,
        lambda model, x: model.first.weight.device,
        lambda model, x: next(model.parameters()).device,
    ],
    ids=["of the input", "of a weight", "of the first parameter"],
)
def test_a_device_that_is_handed_on_stays_a_graph(
    device: Callable[[Any, Tensor], torch.device],
) -> None:
    """A device that is only passed on does not keep the model from being one graph."""

    class HandsOn(Asks):
        def forward(self, x: Tensor) -> Tensor:
            place = device(self, x)
            assert isinstance(place, torch.device)
            assert place == x.device
            return self.last(torch.relu(self.first(x.to(place) + torch.ones(8, device=place))))

    model, x = HandsOn(lambda *_: True).eval(), torch.randn(3, 8)
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert isinstance(pruned.model, fx.GraphModule)
    assert torch.equal(fxprune.prune(model, x, channels=1.0).model(x), model(x))
    assert pruned.model.to("meta")(x.to("meta")).device.type == "meta"


def opaque(x: Tensor) -> Tensor:
    """Return ``x`` after a call that no graph can hold."""
    torch.nonzero(x.flatten() > 1e9)
    return x


class Cell(nn.Module):
    """A model that calls a cell several times, the first time without a state."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.last = kind, nn.Linear(6, 16), nn.Linear(16, 3)
        self.cell = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}.get(kind, Repeated)(16, 16)

    def forward(self, x: Tensor, steps: int = 3) -> Tensor:
        x = self.first(opaque(x))
        h = self.cell(x)
        for _ in range(steps - 1):
            h = self.cell(x, h)
        return self.last(h[0] if self.kind == "lstm" else h)


class Repeated(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(a, 2 * b), nn.Linear(2 * b, b)

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        return self.down(F.relu(self.up(x if h is None else x + h)))


@pytest.mark.parametrize("kind", ["gru", "lstm", "own"])
def test_a_module_that_is_called_in_two_ways_runs_in_both(kind: str) -> None:
    model, x = Cell(kind).eval(), torch.randn(2, 6)
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert pruned.report.error < 1e-9
    assert share_left(pruned) < 0.7
    for steps in (1, 2, 4):
        assert pruned.model(x, steps).shape == (2, 3)
    assert torch.equal(fxprune.prune(model, x, channels=1.0).model(x), model(x))


class CallsInside(nn.Module):
    """A model that calls a module, and afterwards calls a module inside it again.

    ``way`` decides whether they are called as modules or by ``forward``.
    """

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.outer, self.last, self.way = (
            nn.Linear(6, 16),
            Repeated(16, 16),
            nn.Linear(32, 3),
            way,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(opaque(x))
        y = self.outer.forward(x) if self.way == "forward" else self.outer(x)
        return self.last(
            self.outer.up(y)
            if self.way != "method"
            else self.outer.down.forward(self.outer.up(y)).repeat(1, 2)
        )


@pytest.mark.parametrize("way", ["path", "method", "forward"])
def test_a_part_lies_in_no_other(way: str) -> None:
    """Of two nested modules that are called, at most one is a part."""
    model, x = CallsInside(way).eval(), torch.randn(2, 6)
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert pruned.report.error < 1e-9
    assert share_left(pruned) < 0.7
    assert not any(
        a != b and b.startswith(f"{a}.") for a in pruned.report.parts for b in pruned.report.parts
    )


HELD: dict[str, Callable[[Any], Any]] = {
    "list": lambda model: [model.adapter],
    "dict": lambda model: {0: model.adapter},
    "tuple": lambda model: (model.adapter,),
    "nested": lambda model: [[model.adapter]],
    "method": lambda model: model.adapter.forward,
    "closure": lambda model: lambda x: model.adapter(x),
    "partial": lambda model: functools.partial(nn.Linear.__call__, model.adapter),
    "namespace": lambda model: types.SimpleNamespace(m=model.adapter),
    "weak reference": lambda model: weakref.ref(model.adapter),
    "weight": lambda model: [model.adapter.weight, model.adapter.bias],
}


class Holds(nn.Module):
    """A model that calls a module through another object that holds it."""

    def __init__(self, hold: Callable[[Any], Any]) -> None:
        super().__init__()
        self.first, self.adapter, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.held = hold(self)

    def forward(self, x: Tensor) -> Tensor:
        call = self.held
        if isinstance(call, list) and isinstance(call[0], Tensor):
            call = functools.partial(lambda weights, x: F.linear(x, *weights), call)
        if isinstance(call, (weakref.ref, types.SimpleNamespace)):
            call = call() if isinstance(call, weakref.ref) else call.m
        while not callable(call):
            call = call[0]
        return self.last(F.relu(call(self.first(opaque(x)))))


@pytest.mark.parametrize("hold", HELD.values(), ids=HELD)
@pytest.mark.parametrize("whole", [False, True])
def test_a_module_is_called_through_whatever_holds_it(
    hold: Callable[[Any], Any], whole: bool, monkeypatch: Any
) -> None:
    if whole:
        monkeypatch.setitem(globals(), "opaque", lambda x: x)
    model, x = Holds(hold).eval(), torch.randn(2, 6)
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert isinstance(pruned.model, fx.GraphModule) is whole
    assert pruned.report.error < 1e-9
    assert pruned.model.adapter.weight.shape == (8, 8)
    pruned.model(x).sum().backward()
    assert pruned.model.adapter.weight.grad is not None
    assert model.adapter.weight.grad is None
    assert torch.equal(fxprune.prune(model, x, channels=1.0).model(x), model(x))


class Fusible(Repeated):
    def forward_fused(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)) * 2)


def test_indices_that_stand_for_none_differ() -> None:
    """Indices that replace an empty index differ from each other.

    An image without boxes writes with an empty index. Two equal indices in its place would race,
    and the plan would change from run to run.
    """
    mode = RealMode(Context())
    assert mode._with_elements(torch.zeros(0, dtype=torch.int64)).tolist() == [0, 1]
    assert mode._with_elements(torch.zeros(2, 0, dtype=torch.int32)).tolist() == [[0, 1]] * 2
    assert mode._with_elements(torch.zeros(0, 3)).tolist() == [[0.0] * 3] * 2


def test_a_part_hides_no_method_of_the_users() -> None:
    """The emitted class defines no name that GraphModule does not define.

    It comes before the user's class, so it would hide methods that Python between parts calls.
    """
    assert [name for name in vars(PrunedModule) if not hasattr(fx.GraphModule, name)] == []


class Replaced(nn.Module):
    """A model with a module whose forward was replaced by a method, a function or a partial."""

    def __init__(self, way: str, whole: bool) -> None:
        super().__init__()
        self.first, self.block, self.last, self.whole = (
            nn.Linear(6, 16),
            Fusible(16, 16),
            nn.Linear(16, 3),
            whole,
        )
        own = self.block if way != "leaf" else self.first
        plain = type(own).forward
        own.forward = {  # type: ignore[method-assign]
            "method": self.block.forward_fused,
            "closure": lambda x: own.forward_fused(x) + 1,
            "partial": functools.partial(plain, own),
            "leaf": lambda x: plain(own, x) * 2,
        }[way]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.first(x if self.whole else opaque(x))))


@pytest.mark.parametrize("way", ["method", "closure", "partial", "leaf"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_replaced_forward_computes_with_the_pruned_weights(way: str, whole: bool) -> None:
    model, x = Replaced(way, whole).eval(), torch.randn(2, 6)
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert isinstance(pruned.model, fx.GraphModule) is whole
    assert pruned.report.error < 1e-9
    assert share_left(pruned) < 0.7
    assert torch.equal(fxprune.prune(model, x, channels=1.0).model(x), model(x))
    before = pruned.model(x)
    if way != "leaf":  # the replaced forward stays on the module
        given = torch.randn(2, pruned.model.block.up.weight.shape[1])
        assert pruned.model.block(given).shape == (2, pruned.model.block.down.weight.shape[0])
    pruned.model(x).sum().backward()
    assert all(p.grad is not None for p in pruned.model.parameters())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        pruned.model.block.up.weight.zero_()
    assert not torch.equal(pruned.model(x), before)


class Hooked(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(6, 16), Repeated(16, 16), nn.Linear(16, 3)
        self.where = where

    @property
    def owner(self) -> Any:
        return {"root": self, "block": self.block, "leaf": self.block.up}[self.where]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.block(F.relu(self.first(x)))))


@pytest.mark.parametrize("where", ["root", "block", "leaf"])
def test_hooks_change_what_they_change_and_go_on_seeing_what_they_see(where: str) -> None:
    """Hooks change the results of the pruned model, and see its modules and tensors."""
    model, x, seen = Hooked(where).double().eval(), torch.randn(2, 6).double(), []
    model.owner.register_forward_hook(lambda module, inputs, out: seen.append((module, out)))
    model.owner.register_forward_hook(
        lambda module, inputs, out: out * 2 / math.sqrt(out.shape[-1])
    )
    model.owner.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert pruned.report.error < 1e-9
    assert share_left(pruned) < 0.7
    assert torch.equal(fxprune.prune(model, x, channels=1.0).model(x), model(x))
    assert not any(out.shape[-1] == 8 for _, out in seen)  # the analysis left nothing in it
    seen.clear()
    out = pruned.model(x)
    ((module, kept),) = seen
    assert module is pruned.model.owner
    assert kept.shape[0] == 2
    if where == "root":
        assert torch.equal(kept * 2 / math.sqrt(3), out)


def test_modules_whose_calls_are_looked_at_are_a_copys_alone() -> None:
    """Calls of modules are watched on a copy; ``nn.Module`` is not changed, not even for a while.

    Therefore other threads and other models run as usual.
    """
    model, x = Refines().eval(), torch.randn(IMAGE)
    calls: list[tuple[bool, bool]] = []
    plain = nn.Module.__call__

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append((nn.Module.__call__ is plain, "forward" in vars(model.encoder)))
            return x

    model.encoder.add_module("looks", Looks())
    fxprune.prune(model, x, channels=0.5)
    assert (True, False) in calls


class Tied(nn.Module):
    """A model whose Python code reads a part's weight again, beside tensors at full width."""

    def __init__(self, read: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.inner, self.more = (
            nn.Linear(6, 16),
            nn.Linear(16, 12, bias=False),
            Repeated(16, 16),
        )
        self.last, self.read = nn.Linear(16, 3), read

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.inner(self.more(self.first(opaque(x)))))
        return self.last(self.read(self, y))


TIED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "narrow": lambda model, y: F.linear(y, model.inner.weight.t()),
    "wide": lambda model, y: F.linear(y, model.inner.weight.t()).reshape(2, 16),
    "wide before": lambda model, y: F.linear(y.reshape(-1, 12), model.inner.weight.t()),
    "by its size": lambda model, y: (
        F.linear(y, model.inner.weight.t()) / model.inner.weight.shape[1]
    ),
}


@pytest.mark.parametrize("read", TIED.values(), ids=TIED)
def test_a_weight_that_a_part_and_python_read_is_one_weight(
    read: Callable[[Any, Tensor], Tensor],
) -> None:
    model, x = Tied(read).eval(), torch.randn(2, 6)
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert pruned.report.error < 1e-9
    assert torch.equal(fxprune.prune(model, x, channels=1.0).model(x), model(x))


Named = collections.namedtuple("Named", "first second")


@dataclasses.dataclass
class Held:
    first: Tensor
    second: Tensor


class Ordered(collections.OrderedDict):  # type: ignore[type-arg]
    pass


OUTPUTS: dict[str, tuple[Callable[..., Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "named tuple": (Named, lambda out: (out.first, out.second)),
    "dataclass": (Held, lambda out: (out.first, out.second)),
    "tuple": (lambda a, b: (a, b), lambda out: (out[0], out[1])),
    "dict": (lambda a, b: {"a": a, "b": [b]}, lambda out: (out["a"], out["b"][0])),
    "ordered": (lambda a, b: collections.OrderedDict(a=a, b=b), lambda out: (out["a"], out["b"])),
    "split": (
        lambda a, b: torch.split(torch.cat([a, b], -1), [16, 16], -1),
        lambda out: (out[0], out[1]),
    ),
    "pooled": (
        lambda a, b: torch.max(torch.stack([a, a - 1], 1), 1),
        lambda out: (out.values, out[0]),
    ),
    "nested": (
        lambda a, b: Named(a, (b, Named(b, a))),
        lambda out: (out.first, out.second[1].second),
    ),
    "own class": (lambda a, b: types.SimpleNamespace(a=a, b=b), lambda out: (out.a, out.b)),
}


class Gives(nn.Module):
    def __init__(self, make: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.make = nn.Linear(16, 16), nn.Linear(16, 16), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.a(x), self.b(F.relu(self.a(x))))


class Takes(nn.Module):
    def __init__(
        self, make: Callable[..., Any], take: Callable[[Any], tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__()
        self.first, self.gives, self.last, self.take = (
            nn.Linear(6, 16),
            Gives(make),
            nn.Linear(16, 3),
            take,
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(opaque(x))
        a, b = self.take(self.gives(h))
        return self.last(a.reshape(-1, 16) + b.view(2, 16)) + h[:, 3:6]


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_a_part_gives_keeps_its_kind_where_python_sees_it_whole(name: str) -> None:
    model, x = Takes(*OUTPUTS[name]).eval(), torch.randn(2, 6)
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert pruned.report.error < 1e-9
    assert type(pruned.model.gives(torch.randn(2, 16))) is type(model.gives(torch.randn(2, 16)))
    assert name == "pooled" or pruned.model.gives.a.weight.shape[0] == 8
    assert torch.equal(fxprune.prune(model, x, channels=1.0).model(x), model(x))


class Layers(nn.Module):
    """Modules of torch.nn that are parts themselves, or that Python calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.deep, self.b = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(16, 32, 3, padding=1, groups=16),
            nn.Conv2d(32, 8, 1),
        )
        self.up, self.norm, self.last = (
            nn.ConvTranspose2d(8, 8, 2),
            nn.BatchNorm2d(8),
            nn.Linear(8, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.up(F.relu(self.b(F.relu(self.deep(F.relu(self.a(opaque(x)))))))))
        return self.last(x.mean((2, 3)))


def test_parts_know_their_sizes() -> None:
    """Modules of torch.nn have attributes with the pruned sizes."""
    model, x = Layers().eval(), torch.randn(IMAGE)
    small = fxprune.prune(model, x, channels=0.5, verify=True).model
    assert (
        small.a.out_channels,
        small.deep.in_channels,
        small.deep.out_channels,
        small.deep.groups,
    ) == (8, 8, 16, 8)
    assert (
        small.b.in_channels,
        small.b.out_channels,
        small.up.in_channels,
        small.up.out_channels,
    ) == (16, 4, 4, 4)
    assert (small.norm.num_features, small.last.in_features, small.last.out_features) == (4, 4, 4)


class Squeezes(nn.Module):
    """A model whose Python code drops a batch axis of one.

    It also gives a part channels at full width, from which the part has to pick.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)
        self.seen.register_forward_hook(lambda module, args, output: output.relu())

    def forward(self, x: Tensor) -> Tensor:
        y = self.seen(x)
        return self.head(torch.squeeze((y * y.std(1, keepdim=True)).mean((2, 3))))


def test_a_batch_of_one_that_python_drops() -> None:
    model = randomise(Squeezes().eval())
    pruned = fxprune.prune(model, torch.randn(3, 3, 4, 4, dtype=torch.float64), channels=0.5).model
    for batch in (3, 1):
        x = torch.randn(batch, 3, 4, 4, dtype=torch.float64)
        with torch.no_grad():
            assert torch.allclose(pruned(x), masked(model, pruned)(x))


class Attends(nn.Module):
    """Attention in Python, whose scale depends on the width."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(4, 4)
        self.v.register_forward_hook(lambda module, args, output: output * 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


def test_attention_in_python_keeps_its_scale() -> None:
    model, x = randomise(Attends().eval()), torch.randn(2, 5, 4, dtype=torch.float64)
    pruned = fxprune.prune(model, x, channels=0.5)
    assert pruned.report.params_after < pruned.report.params_before
    with torch.no_grad():
        assert torch.allclose(pruned.model(x), masked(model, pruned.model)(x))


class First(nn.Module):
    def forward(self, several: tuple[Tensor, ...]) -> Tensor:
        return several[0]


class Recurrent(nn.Module):
    """A part whose recurrent layer makes its first state as wide as its attribute says."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Linear(4, 8)
        self.seen.register_forward_hook(lambda module, args, output: output * 2)
        self.part = nn.Sequential(nn.GRU(8, 12, batch_first=True), First(), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.seen(x))


def test_a_recurrent_layer_in_a_part_knows_its_size() -> None:
    model = randomise(Recurrent().eval())
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    pruned = fxprune.prune(model, x, channels=0.5)
    assert set(pruned.report.parts) == {"seen", "part"}
    assert pruned.report.params_after < 0.6 * pruned.report.params_before
    with torch.no_grad():
        assert torch.allclose(pruned.model(x), masked(model, pruned.model)(x))


class Passes(nn.Module):
    """A part that passes on an argument, which is another tensor at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x), F.relu(y)


class Alternates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.passes, self.last = (
            *(nn.Linear(8, 8) for _ in range(3)),
            Passes(),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(opaque(x))
        one, a = self.passes(x, self.a(x))
        _, b = self.passes(x, self.b(x))
        return self.last(a.reshape(2, 8) * 2 + b.flip(1) + one)


def test_one_graph_serves_all_calls_of_a_part() -> None:
    model, x = Alternates().eval(), torch.randn(2, 8)
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert pruned.report.error < 1e-9
    assert share_left(pruned) < 0.8


class FromGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.generator = (
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)),
            torch.Generator(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + torch.rand(4, generator=self.generator.manual_seed(5))


def test_numbers_from_a_generator_stay_python() -> None:
    model, x = FromGenerator(), torch.randn(2, 8)
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert "a Generator" in pruned.report.not_one_graph
    assert share_left(pruned) < 0.8


class Tagged(Tensor):
    """A user's class of tensors."""


class ByNumpy(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
        return ByNumpy.apply(x), in_dims[0]


def given_memory(y: Tensor) -> Tensor:
    other = torch.empty(0)
    other.data = y
    return other


UNSEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "another class": lambda y: y.as_subclass(Tagged),
    "a parameter": lambda y: nn.Parameter(y.detach(), requires_grad=False),
    "data": lambda y: y.data,
    "data that is set": given_memory,
    "a deep copy": lambda y: copy.deepcopy(y.detach()),
    "written down": lambda y: pickle.loads(pickle.dumps(y.detach())),
    "NumPy under vmap": torch.vmap(ByNumpy.apply),
}


@pytest.mark.parametrize("made", UNSEEN.values(), ids=UNSEEN)
def test_tensors_that_no_operation_makes_between_parts(made: Callable[[Tensor], Tensor]) -> None:
    """Pruning is exact with tensors between parts that are made without an operation."""
    model, x = Between(lambda model, y: made(y)).eval(), torch.randn(IMAGE)
    fxprune.prune(model, x, channels=0.5, verify=True).model(x)


class Ensemble(nn.Module):
    """A model that calls one module with the parameters of all members."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 2)
        self.members = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h, base = self.first(x), self.members[0]
        stacked, buffers = torch.func.stack_module_state(list(self.members))
        outs = torch.vmap(
            lambda p, b, v: torch.func.functional_call(base, (p, b), (v,)), (0, 0, None)
        )(stacked, buffers, h)
        return self.last(outs.mean(0))


@pytest.mark.filterwarnings("ignore")
def test_a_module_that_is_called_with_the_parameters_of_others_is_no_part() -> None:
    model, x = Ensemble().eval(), torch.randn(2, 4)
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert set(pruned.report.parts) == {"first", "last"}
    assert torch.allclose(fxprune.prune(model, x, channels=1.0).model(x), model(x))


class Cubes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.pow(self.first(x), 3.0))


def test_a_part_is_as_large_as_where_nothing_looks_on() -> None:
    """The modes that watch a model's runs do not change which modules become parts.

    A mode that saw how parts are traced would make them smaller.
    """

    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cubes, self.last = Cubes(), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.cubes(x)
            return self.last(h if bool(x.sum() > 0) else h * 2)

    pruned = fxprune.prune(Decides().eval(), torch.randn(2, 3, 8, 8), channels=0.5, verify=True)
    assert pruned.report.parts == ("cubes", "last")
