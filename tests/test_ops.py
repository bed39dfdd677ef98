"""Every operation that models execute has a rule, or consists of such operations.

The only exceptions are operations that take no tensor.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.ops import OPS, Trait, find_row, name_of_op, takes_sizes
from tests import test_transformers, torchvision_models, zoo

WITHOUT_RULE = {
    "arange": "numbers in a row, of no tensor",
    "scalar_tensor": "one number",
}
"""Operations that models execute and that have no rule. None of them takes a tensor."""

SIZES = (1, 3, 64, 64)
TIMM = (
    "botnet26t_256",
    "cait_xxs24_224",
    "coat_lite_tiny",
    "convnextv2_atto",
    "dpn48b",
    "efficientformerv2_s0",
    "ghostnetv2_100",
    "levit_128s",
    "maxvit_nano_rw_256",
    "mobilevitv2_050",
    "poolformerv2_s12",
    "res2net50_14w_8s",
    "resnest14d",
    "swin_s3_tiny_224",
    "tinynet_e",
    "xcit_nano_12_p16_224",
)


def without_rule(model: nn.Module, example_inputs: Any) -> set[str]:
    """Return the names of the operations without a rule that a model executes."""
    ran = fxprune.analyze(model, example_inputs).context.found.ran
    funcs = {func for calls in ran.values() for func, _, _ in calls}
    assert funcs
    return {name_of_op(func) for func in funcs if find_row(func) is None}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=() if n % 8 == 0 else pytest.mark.slow)
        for n, case in enumerate(zoo.CASES)
    ],
)
def test_of_small_networks(case: Any) -> None:
    assert without_rule(case.build(case.width).eval(), case.inputs(2)) <= WITHOUT_RULE.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(torchvision_models.CASES))
def test_of_torchvision(name: str) -> None:
    case = torchvision_models.CASES[name]
    assert without_rule(case.build(), case.inputs()) <= WITHOUT_RULE.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm", reason="the timm library is not installed")
    model = timm.create_model(name).eval()
    size = model.default_cfg["input_size"]
    assert without_rule(model, torch.zeros(1, *size)) <= WITHOUT_RULE.keys()


@pytest.mark.parametrize("name", list(test_transformers.CASES))
def test_of_transformers(name: str) -> None:
    build, inputs, _ = test_transformers.CASES[name]
    model = build().eval()
    assert without_rule(model, inputs(test_transformers.TOKENS)) <= WITHOUT_RULE.keys()


def test_what_has_no_rule_takes_no_tensor() -> None:
    for name in WITHOUT_RULE:
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            schema = getattr(packet, overload)._schema
            given = [own for own in schema.arguments if not own.kwarg_only]
            assert all("Tensor" not in str(own.type) for own in given), overload


def test_no_operation_has_two_rows_and_traits_are_of_some() -> None:
    assert all(row.name == name for name, row in OPS.items())
    for trait in Trait:
        assert any(trait in row.traits for row in OPS.values()), trait


def test_sizes_are_told_by_the_schema() -> None:
    """Schemas tell which operations take the sizes of their result, and name no others.

    Among these sizes may be a width that Python has read from a tensor.
    """
    told = [name for name in OPS if takes_sizes(name)]
    assert {"view", "reshape", "expand", "repeat", "zeros", "new_zeros", "unflatten"} <= {*told}
    assert not {"split", "narrow", "as_strided", "pad", "roll", "permute", "slice"} & {*told}
