"""The report as text and as data."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import PlanError
from fxprune.result.report import GroupRow, PinnedRow, Report
from tests.support.families import FAMILIES


def full_report(**changes):
    values = {
        "params_before": 25_557_032,
        "params_after": 7_123_456,
        "macs_before": 4_089_184_256,
        "macs_after": 1_071_000_000,
        "groups": (("conv1", 32, 64), ("layer1.0.conv1", 16, 32)),
        "pinned": (
            ("fc.weight:0[0:1000]", "reaches the output", "output"),
            (("fc.bias:0",), "reaches the output", "output"),
        ),
        "untouched": ["aux.weight"],
        "decisions": ("if pad_r > 0 was False at forward:12",),
        "statistics": ("norm1: LayerNorm over 96 of 192 channels",),
        "seconds": {"trace": 0.25, "label": 0.5},
        "error": 1.25e-15,
        "params_pinned": 2_049_000,
        "macs_pinned": 0,
    }
    return Report(**{**values, **changes})


def test_text_for_people():
    assert (
        str(full_report())
        == """\
parameters  25,557,032 -> 7,123,456 (27.9 % left)
MACs        4,089,184,256 -> 1,071,000,000 (26.2 % left)
pinned      8.0 % of the parameters, 0.0 % of the MACs before: what no budget reaches
verified    equals the masked original, relative error 1.2e-15
seconds     0.75 (trace 0.25, label 0.50)

2 groups, 48 of 96 units kept
  conv1           32 of 64
  layer1.0.conv1  16 of 32

pinned, never pruned
  fc.weight:0[0:1000], fc.bias:0: reaches the output (at output)

not used by any operation, left as they are
  aux.weight

control flow fixed by the example inputs
  if pad_r > 0 was False at forward:12

normalised over the surviving channels
  norm1: LayerNorm over 96 of 192 channels"""
    )


def test_text_says_nothing_that_is_not_known():
    text = str(Report(params_before=10, params_after=10, macs_before=None, macs_after=None))
    assert "MACs        not counted" in text
    assert "verified" not in text
    assert "pinned" not in text
    assert "seconds" not in text
    assert "nothing in this model can be pruned" in text


def test_long_sections_are_cut_in_the_text_only():
    report = full_report(groups=tuple((f"layer{i}", 1, 2) for i in range(300)))
    assert "... and 260 more" in str(report)
    assert len(report.to_dict()["groups"]) == 300


def test_axes_pinned_for_one_reason_are_counted():
    row = (tuple(f"head{i}.weight:0" for i in range(5)), "reaches the output", "output")
    assert "head0.weight:0, head1.weight:0, head2.weight:0 and 2 more: reaches" in str(
        full_report(pinned=(row,))
    )


def test_dict_is_json_and_complete():
    report = full_report()
    data = json.loads(json.dumps(report.to_dict()))
    assert set(data) == {field.name for field in dataclasses.fields(Report)}
    assert data["groups"][0] == {"name": "conv1", "kept": 32, "total": 64}
    assert data["pinned"][0] == {
        "axes": ["fc.weight:0[0:1000]"],
        "reason": "reaches the output",
        "node": "output",
    }
    assert Report.from_dict(data) == report


@pytest.mark.parametrize(
    "data", [{}, [], 3, None, {"groups": [], "pinned": []}, {"groups": [3], "pinned": []}]
)
def test_what_is_no_report(data):
    with pytest.raises(PlanError, match="not a report"):
        Report.from_dict(data)


def narrow():
    """Return a model with two layers that cannot lose outputs, because they end in the output."""

    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.alone = (
                nn.Conv2d(3, 8, 3),
                nn.Conv2d(8, 4, 3),
                nn.Conv2d(3, 5, 3, bias=False),
            )

        def forward(self, x):
            return self.b(self.a(x)), self.alone(x)

    return Narrow()


def test_the_pinned_part_of_the_cost():
    report = fxprune.prune(narrow(), torch.zeros(1, 3, 8, 8), channels=0.5).report
    # b's bias and all of alone; b's weight shrinks with a
    assert report.params_pinned == 4 + 5 * 27
    assert report.macs_pinned == 5 * 27 * 6 * 6


def test_all_is_pinned_under_keep():
    report = fxprune.prune(narrow(), torch.zeros(1, 3, 8, 8), channels=0.5, keep=["a", "b"]).report
    assert (report.params_pinned, report.macs_pinned) == (report.params_before, report.macs_before)


@pytest.mark.parametrize("name", ["resnet", "densenet", "vit"])
def test_the_pinned_part_is_what_the_smallest_model_leaves_alone(name):
    (family,) = [family for family in FAMILIES if family.name == name]
    model, image = family.build(), torch.zeros(1, *family.shape)
    report = fxprune.prune(model, image, channels=1e-9).report
    smallest = fxprune.prune(model, image, channels=1e-9).model
    shapes = {name: tensor.shape for name, tensor in smallest.named_parameters()}
    same = sum(
        tensor.numel() for name, tensor in model.named_parameters() if shapes[name] == tensor.shape
    )
    assert 0 < report.params_pinned == same < report.params_before
    assert report.macs_pinned <= report.macs_after


def test_rows_are_named_and_the_report_is_frozen():
    report = full_report()
    assert report.groups[0] == GroupRow(name="conv1", kept=32, total=64)
    assert report.pinned[1] == PinnedRow(
        axes=("fc.bias:0",), reason="reaches the output", node="output"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.params_after = 0
