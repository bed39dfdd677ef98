"""Forward writes into weights and buffers, and the next call reads what was written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.coupling import Labelling
from fxprune.errors import VerificationError
from fxprune.trace.aliasing import UndoWrites
from tests.support.checking import call, relative_error


class Writes(nn.Module):
    """Three convolutions, and a function that writes before they run."""

    def __init__(self, write: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.first, self.inner, self.last = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3),
            nn.Conv2d(8, 4, 1),
        )
        self.register_buffer("level", torch.rand(8))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self, x)
        y = self.first(x) + self.level[:, None, None]
        return self.last(F.relu(self.inner(F.relu(y))))


def clamps(m: Any, x: Tensor) -> None:
    m.first.weight.data.clamp_(-0.1, 0.1)


def shrinks(m: Any, x: Tensor) -> None:
    with torch.no_grad():
        m.inner.weight.mul_(0.9)


def normalises(m: Any, x: Tensor) -> None:
    w = m.inner.weight.data
    w.div_(w.flatten(1).norm(dim=1)[:, None, None, None] + 1e-5)


def follows_sizes(m: Any, x: Tensor) -> None:
    m.level.fill_(x.shape[-1])


def averages(m: Any, x: Tensor) -> None:
    m.level.mul_(0.9).add_(m.first(x).mean((0, 2, 3)).detach(), alpha=0.1)


def lifts(m: Any, x: Tensor) -> None:
    m.first.bias.data.fill_(0.5)


X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
PRUNED = (clamps, shrinks, normalises, follows_sizes, averages, lifts)


@pytest.mark.parametrize("write", PRUNED, ids=lambda write: write.__name__)
def test_what_stays_zero_or_is_not_summed_is_pruned(write: Callable[[Any, Tensor], None]) -> None:
    """Several calls, with several sizes, equal those of the masked original."""
    model = Writes(write).double()
    pruned = fxprune.prune(model, X.double(), channels=0.5)
    assert [
        tuple(m.weight.shape[:2]) for m in pruned.model.modules() if isinstance(m, nn.Conv2d)
    ] == [(4, 3), (4, 4), (4, 4)]
    proof = fxprune.verify(model, pruned)
    assert "a second call" in proof.compared
    assert sum("another size" in name for name in proof.compared) == 2
    assert proof.error < 1e-9


def centres(m: Any, x: Tensor) -> None:
    w = m.inner.weight.data
    w.sub_(w.mean((1, 2, 3), keepdim=True))


def counts_use(m: Any, x: Tensor) -> None:
    m.level.div_(m.level.sum())
    m.level.add_(1)


@pytest.mark.parametrize("write", [centres, counts_use], ids=lambda write: write.__name__)
def test_what_is_summed_at_the_next_call_is_not(
    write: Callable[[Any, Tensor], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mean over all inputs makes removed weights nonzero, and the next mean would count them.

    Without the pin, ``verify`` reports it.
    """
    model = Writes(write)
    pruned = fxprune.prune(model, X, channels=0.5)
    assert pruned.model.get_submodule("first").out_channels == 8
    assert pruned.model.get_submodule("inner").out_channels == 4
    assert fxprune.verify(model, pruned).error < 1e-9
    monkeypatch.setattr(Labelling, "overwritten", lambda self: set())
    with pytest.raises(VerificationError, match="a second call: the pruned model differs"):
        fxprune.prune(model, X, channels=0.5, verify=True)


@pytest.mark.filterwarnings("ignore:channels=0.5 was asked for")
def test_a_bias_that_was_lifted_is_no_zero_in_a_mean() -> None:
    class Mean(Writes):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            lifts(self, x)
            return self.last(y) + self.first(x).mean(1, keepdim=True)

    model = Mean(lifts)
    assert (
        fxprune.prune(model, X, channels=0.5, verify=True)
        .model.get_submodule("first")
        .out_channels
        == 8
    )


@pytest.mark.filterwarnings("ignore:channels=0.5 was asked for")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_hidden_units_that_a_bias_lifts_stay(kind: Any) -> None:
    """A removed unit would not stay zero."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.last = kind(5, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.cell.bias_ih_l0.data.add_(1.0)
            return self.last(self.cell(x)[0])

    pruned = fxprune.prune(Recurrent(), torch.randn(2, 4, 5), channels=0.5, verify=True)
    assert pruned.model.get_submodule("cell").hidden_size == 8


@pytest.mark.parametrize("write", [clamps, averages, centres], ids=lambda write: write.__name__)
def test_the_user_keeps_weights_that_python_writes(write: Callable[[Any, Tensor], None]) -> None:
    """A model in parts runs on the user's own weights, and so do criteria and compensation."""

    class InPython(Writes):
        def forward(self, x: Tensor) -> Tensor:
            x.tolist()
            return super().forward(x)

    model = InPython(write).eval()
    before = copy.deepcopy(model.state_dict())
    pruned = fxprune.prune(
        model, X, channels=0.5, verify=True, criterion=fxprune.criteria.Activation([(X,)])
    )
    assert pruned.report.parts
    fxprune.compensate(model, pruned, [(X,)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    whole = fxprune.prune(model, X, channels=1.0).model
    for _ in range(2):
        assert relative_error(call(whole, X), call(model, X)) < 1e-6


def test_undone() -> None:
    """Writes are undone, also through views and lists; unwritten tensors are not copied."""
    held = {
        "a": torch.ones(4),
        "b": nn.Parameter(torch.ones(4)),
        "c": torch.ones(4),
        "d": torch.empty(4, device="meta"),
    }
    undone = UndoWrites(held)
    with undone.undoing(), torch.no_grad():
        held["a"][1:3].zero_()
        torch._foreach_mul_([held["b"].data], 2.0)
        held["c"].add(1)
        held["d"].zero_()
        assert held["a"].sum() == 2
        assert held["b"].sum() == 8
    assert undone.written == {"a", "b"}
    assert all(torch.equal(value, torch.ones(4)) for name, value in held.items() if name != "d")
    with pytest.raises(RuntimeError), undone.undoing():
        held["a"].mul_(2).view(3)
    assert torch.equal(held["a"], torch.ones(4))
