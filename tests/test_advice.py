"""Tests of the warning that pruning removed hardly anything.

The warning names what keeps the model large. A call that removes what was asked for does not warn.
"""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from fxprune.errors import FxpruneWarning


class Sorted(nn.Module):
    """A network whose channels are sorted, so that only a small layer can be pruned."""

    def __init__(self, rest: int) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(32, 64), nn.Linear(64, 32)
        self.small, self.head = nn.Linear(32, rest), nn.Linear(rest, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.wide(x).relu().sort(dim=-1).values
        return self.head(self.small(self.narrow(hidden).cumsum(-1)).relu())


def convolutions(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3))


X, IMAGE = torch.randn(2, 32), torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("scope", ["group", "global"])
def test_what_is_nearly_all_pinned(scope: str) -> None:
    """The warning names the request, the parameters left, the main cause and the next step."""
    with pytest.warns(FxpruneWarning) as caught:
        report = fxprune.prune(Sorted(4), X, channels=0.5, scope=scope).report
    (warning,) = caught
    left = report.params_after / report.params_before
    assert left > 0.9
    text = str(warning.message)
    for part in (
        r"channels=0\.5 was asked for",
        f"{left:.0%} of the parameters are left",
        r"What pins most: .* \d+% of the mul",
        "analyze",
    ):
        assert re.search(part, text), text
    assert '"is mixed by ' in text
    assert warning.filename == __file__


def between(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """Build two linear layers with a function between them."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(function(self.a(x)))

    return Two()


class Computed(nn.Module):
    """A layer whose weight is computed from its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(64, 32)), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.linear(x, self.weight.sort(0).values))


def spectral() -> nn.Module:
    layers = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 3)
    return nn.Sequential(*map(nn.utils.parametrizations.spectral_norm, layers))


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (
            nn.Sequential(
                nn.utils.parametrizations.spectral_norm(nn.Linear(32, 64)), nn.Linear(64, 4)
            ),
            X,
            "aten::vdot has no rule",
        ),
        (spectral(), IMAGE, "aten::vdot has no rule"),
        (
            nn.Sequential(
                nn.utils.parametrizations.orthogonal(nn.Linear(32, 64)), nn.Linear(64, 4)
            ),
            X,
            "aten::tril has no rule",
        ),
        (Computed(), X, "is mixed by sort"),
        (between(lambda h: h.sort(-1).values), X, "is mixed by sort"),
        (between(lambda h: h.cumsum(-1).relu() + 1), X, "is mixed by cumsum"),
        (between(lambda h: h.softmax(-1)), X, "is mixed by softmax"),
        (between(lambda h: torch.linalg.qr(h.T)[0].T), X, "aten::linalg_qr has no rule"),
        (between(lambda h: h[:, torch.arange(32).flip(0)]), X, "is read by indices"),
        (between(lambda h: h * torch.linspace(0, 1, 32)), X, "meets a tensor of fixed size"),
        (between(lambda h: h), X, None),
        (nn.Sequential(nn.Linear(32, 64)), X, "is an output of the model"),
        (nn.Sequential(nn.Linear(32, 1), nn.Linear(1, 4)), X, "reads an input of the model"),
    ],
)
def test_the_reason_that_is_named_is_the_cause(
    model: nn.Module, x: Tensor, reason: str | None
) -> None:
    """The warning names a cause, not its consequences.

    A layer behind a pinned layer keeps its width only because of that layer.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fxprune.prune(model, x, channels=0.5)
    assert [f'What pins most: "{reason}"' in str(warning.message) for warning in caught] == [
        True
    ] * (reason is not None)


def test_the_input_that_a_branch_is_added_to_is_named() -> None:
    class Around(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x) + x)

    with pytest.warns(FxpruneWarning, match='What pins most: "meets an input of the model"'):
        fxprune.prune(Around(nn.Linear(32, 32), nn.Linear(32, 4)), X, channels=0.5)


@pytest.mark.parametrize("options", [{"channels": 0.5}, {"channels": 0.9, "scope": "global"}])
def test_what_cannot_be_pruned_at_all(options: dict[str, Any]) -> None:
    with pytest.warns(FxpruneWarning, match="nothing in this model can be pruned"):
        fxprune.prune(nn.Sequential(nn.Conv2d(3, 4, 3)), IMAGE, **options)


def test_groups_that_are_left_as_they_are_by_rounding() -> None:
    for options in ({"round_to": 16}, {"min_channels": 16}):
        with pytest.warns(FxpruneWarning, match=r"none of the 8 units went.*round_to=") as caught:
            fxprune.prune(convolutions(), IMAGE, channels=0.5, **options)
        assert "What pins most" not in str(caught[0].message)


@pytest.mark.parametrize(
    ("model", "x", "options"),
    [
        (convolutions(), IMAGE, {"channels": 0.5}),
        (convolutions(), IMAGE, {"channels": 0.95, "scope": "global"}),
        (convolutions(), IMAGE, {"channels": 1.0}),
        (convolutions(), IMAGE, {"layers": {"0": 0.9}}),
        (convolutions(), IMAGE, {"channels": 0.5, "keep": "0"}),
        (convolutions(), IMAGE, {"macs": 1.0}),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), IMAGE, {"channels": 1.0}),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), IMAGE, {"params": 1.0}),
        (Sorted(4), X, {"params": 0.99}),
        (Sorted(512), X, {"channels": 0.5}),
        (nn.Sequential(nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 512)), X, {"channels": 0.75}),
    ],
)
def test_no_false_alarm(model: nn.Module, x: Tensor, options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxprune.prune(model, x, **options)


class TrainsElsewhere(nn.Module):
    """A model whose training path branches on values, so that it cannot be traced.

    The weights are in no submodule that could be traced alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = (x @ self.a.T).relu()
        if self.training and h.sum() > 0:
            h = h * 2
        return h @ self.b.T


def test_a_graph_of_evaluation_alone() -> None:
    """If the training path cannot be traced, a warning says what is assumed."""
    with pytest.warns(
        FxpruneWarning,
        match=r"computes in training what it computes in evaluation.*test_advice\.py:\d+",
    ) as caught:
        pruned = fxprune.prune(TrainsElsewhere(), torch.randn(2, 3), channels=0.5)
    (warning,) = caught
    assert warning.filename == __file__
    assert pruned.report.params_after < pruned.report.params_before
