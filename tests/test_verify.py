"""The proof finds what is wrong, also when a rule is."""

import dataclasses
import math
import operator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import RewriteError, VerificationError
from fxprune.rules import REGISTRY, Context


class Flipped(nn.Module):
    """A sum of two branches, one of them in reverse order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) + self.b(x).flip(-1))


X = torch.randn(2, 4)


def as_identity(context: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """A rule that is wrong for flip."""
    context.put(out, context.fields(a["self"]))


def pruned(model: nn.Module | None = None) -> tuple[nn.Module, Any]:
    model = Flipped() if model is None else model
    return model, fxprune.prune(model, X, channels=0.5)


def test_the_right_rule_is_proved() -> None:
    assert fxprune.verify(*pruned()).error < 1e-9


def test_a_wrong_rule_is_caught() -> None:
    wrong = dataclasses.replace(REGISTRY["flip"], handler=as_identity)
    with mock.patch.dict(REGISTRY, flip=wrong):
        fxprune.rules.find.cache_clear()
        try:
            error = fxprune.verify(*pruned()).error
        except (RewriteError, VerificationError):
            error = math.inf
        finally:
            fxprune.rules.find.cache_clear()
    assert error > 1e-3


@pytest.mark.parametrize("how", ["target", "order"])
def test_a_changed_graph_is_caught(how: str) -> None:
    model, result = pruned()
    (node,) = (n for n in result.model.graph.nodes if n.target is operator.add)
    if how == "target":
        node.target = operator.sub
    else:
        node.args = node.args[::-1]
    result.model.recompile()
    with pytest.raises(VerificationError, match="changed after pruning"):
        fxprune.verify(model, result)


def test_a_changed_shape_is_caught() -> None:
    model, result = pruned()
    result.model.c.bias = nn.Parameter(torch.zeros(1))
    with pytest.raises(VerificationError, match=r"c\.bias.*\(1,\).*\(3,\)"):
        fxprune.verify(model, result)


def test_structure_alone() -> None:
    with mock.patch("fxprune.verification.check.Bench", side_effect=AssertionError):
        check = fxprune.verify(*pruned(), numeric=False)
    assert math.isnan(check.error)
    assert check.outputs == 0


def test_weights_as_they_are() -> None:
    """A changed weight shows only where weights are not drawn anew."""
    model, result = pruned()
    assert fxprune.verify(model, result, X, randomize=False).error < 1e-9
    with torch.no_grad():
        result.model.c.bias.add_(1.0)
    assert fxprune.verify(model, result, X, randomize=False).error > 1e-3
    assert fxprune.verify(model, result, X).error < 1e-9


def test_what_is_not_finite() -> None:
    model, result = pruned()
    with pytest.raises(VerificationError, match="not finite"):
        fxprune.verify(model, result, torch.full((2, 4), math.inf), randomize=False)


def test_seeds_and_dtypes() -> None:
    model, result = pruned()
    errors = {fxprune.verify(model, result, dtype=torch.float32, seed=seed).error for seed in range(3)}
    assert len(errors) > 1
    assert max(errors) < 1e-5
    assert fxprune.verify(model, result, seed=1) == fxprune.verify(model, result, seed=1)


def test_printing() -> None:
    assert str(fxprune.verify(*pruned())).endswith("over 1 outputs in float64")
