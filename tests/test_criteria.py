"""Scores against the plainest loop, and what they must not depend on."""

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune.criteria import magnitude
from tests.support.checking import as_dtype
from tests.zoo import CASES
from tests.zoo.case import Case

SOME = [case for case in CASES if case.name in ("residual", "vit_packed", "concat", "shared", "two_inputs", "depthwise")]
some = pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)


def naive(coupling: fxprune.Coupling, group: object, tensors: dict[str, torch.Tensor]) -> list[float]:
    """Sum of squares, element by element."""
    out = [0.0] * group.size  # type: ignore[attr-defined]
    for name, fields in coupling.elements(group).items():  # type: ignore[arg-type]
        for field in fields if name in tensors else ():
            for unit, weight in zip(
                field.expand(tensors[name].shape).flatten().tolist(), tensors[name].flatten().tolist(), strict=True
            ):
                if unit >= 0:
                    out[unit] += weight**2
    return [value**0.5 for value in out]


@some
def test_magnitude_is_the_norm_of_what_vanishes(case: Case) -> None:
    model = case.build(8).double()
    coupling = fxprune.analyze(model, as_dtype(case.inputs(2), torch.float64))
    parameters = dict(model.named_parameters())
    scores = magnitude(coupling, parameters)
    for group in coupling.groups:
        np.testing.assert_allclose(scores[list(group.units)], naive(coupling, group, parameters), rtol=1e-9)


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).double()


def test_permuting_units_permutes_scores() -> None:
    model, order, x = chain(), torch.randperm(8), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    nn.init.normal_(model[1].weight)
    coupling = fxprune.analyze(model, x)
    (group,) = coupling.groups
    before = magnitude(coupling, dict(model.named_parameters()))[list(group.units)]
    with torch.no_grad():
        for parameter in (model[0].weight, model[0].bias, model[1].weight, model[1].bias):
            parameter.copy_(parameter[order].clone())
        model[3].weight.copy_(model[3].weight[:, order].clone())
    after = magnitude(coupling, dict(model.named_parameters()))[list(group.units)]
    np.testing.assert_allclose(after, before[order.numpy()], rtol=1e-12)
    assert len(set(before.tolist())) == 8


def test_what_is_no_unit_scores_nothing() -> None:
    model = chain()
    coupling = fxprune.analyze(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    scores = magnitude(coupling, dict(model.named_parameters()))
    units = [unit for group in coupling.groups for unit in group.units]
    assert scores[0] == 0
    assert np.count_nonzero(scores) == np.count_nonzero(scores[units]) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    """Squares are summed in a wider type: 300 squared is no number of float16."""
    model = chain()
    nn.init.constant_(model[0].weight, 300.0)
    coupling = fxprune.analyze(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    scores = magnitude(coupling, {"0.weight": model[0].weight.to(dtype)})
    np.testing.assert_allclose(scores[list(coupling.groups[0].units)], 300 * 27**0.5, rtol=1e-2)


def test_memory_formats() -> None:
    model, x = chain(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    coupling = fxprune.analyze(model, x)
    plain = magnitude(coupling, dict(model.named_parameters()))
    last = magnitude(coupling, dict(model.to(memory_format=torch.channels_last).named_parameters()))
    np.testing.assert_allclose(last, plain, rtol=1e-12)
