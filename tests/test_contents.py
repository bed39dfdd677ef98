"""Tests of outputs in objects of any kind: kind and shapes stay the same."""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.common.contents import leaves

pytestmark = pytest.mark.filterwarnings("ignore::fxprune.errors.FxpruneWarning")


class Row(tuple[Any, ...]):
    """A tuple of a user's class."""


class Rows(list[Any]):
    """A list with an attribute besides its entries."""

    note: Any = None


def noted(h: Tensor) -> Rows:
    rows = Rows([1])
    rows.note = h
    return rows


class Box(nn.Module):
    def __init__(self, held: Tensor) -> None:
        super().__init__()
        self.held = held
        self.register_buffer("twice", held * 2)


HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "values of a dict": lambda h: {"h": h}.values(),
    "key of a dict": lambda h: {h: 1},
    "exception": ValueError,
    "slice": lambda h: slice(h, None),
    "partial": lambda h: functools.partial(torch.add, h),
    "method": lambda h: h.sum,
    "module": Box,
    "class": lambda h: type("Held", (), {"h": h}),
    "array of objects": lambda h: np.array([h.detach(), None], dtype=object),
    "tuple of a kind": lambda h: Row([h]),
    "list with more": noted,
    "ordered dict in a namespace": lambda h: types.SimpleNamespace(
        inner=collections.OrderedDict(h=[h])
    ),
}


class Gives(nn.Module):
    """A model that returns its output and an object that holds its hidden features."""

    def __init__(
        self, hold: Callable[[Any], Any], what: Callable[[Tensor], Any] = lambda h: h
    ) -> None:
        super().__init__()
        self.a, self.b, self.hold, self.what = nn.Linear(6, 8), nn.Linear(8, 3), hold, what

    def forward(self, x: Tensor) -> Any:
        h = self.a(x).relu()
        return self.b(h), self.hold(self.what(h))


@pytest.mark.parametrize("name", HOLDERS)
def test_what_an_object_holds_is_an_output(name: str) -> None:
    model, x = Gives(HOLDERS[name]).eval(), torch.randn(2, 6)
    with torch.no_grad():
        pruned = fxprune.prune(model, x, channels=0.5, verify=True).model
        got, wanted = pruned(x), model(x)
    assert type(got[1]).__name__ == type(wanted[1]).__name__
    pairs = zip(leaves(got), leaves(wanted), strict=True)
    assert all(one.shape == other.shape for one, other in pairs if isinstance(one, Tensor))
    assert any(leaf.shape[-1] == 8 for leaf in leaves(got[1]) if isinstance(leaf, Tensor))


def test_a_width_in_an_object_is_the_originals() -> None:
    model = Gives(lambda n: types.SimpleNamespace(n=n), lambda h: h.shape[1])
    pruned = fxprune.prune(model, torch.randn(2, 6), channels=0.5).model
    assert pruned(torch.randn(2, 6))[1].n == 8
