"""Tests of loops over the parts of a tensor.

A graph unrolls such a loop. If inputs decide the number of parts, and only then, the graph accepts
no other number.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune


class Cut(nn.Module):
    """A layer of 12 channels, a function that cuts its output, and a layer on 4 channels."""

    def __init__(self, cut: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.up, self.down, self.cut = nn.Linear(6, 12), nn.Linear(4, 3), cut

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.cut(self.up(x))[..., :4])


def _last(parts: Sequence[Tensor]) -> Tensor:
    """Return the last state of a recurrence over the parts."""
    state = torch.zeros_like(parts[0])
    for part in parts:
        state = 0.5 * state + part
    return state


COUNTED: dict[str, Callable[[Tensor], Any]] = {
    "unbind": lambda x: _last(x.unbind(1)),
    "unbind by name": lambda x: _last(torch.unbind(input=x, dim=-2)),
    "iteration": lambda x: _last(list(x.transpose(0, 1))),
    "split": lambda x: _last([part.squeeze(1) for part in x.split(1, 1)]),
    "chunk": lambda x: _last(torch.chunk(x, x.shape[1], dim=1)),
    "tensor_split": lambda x: _last([*torch.tensor_split(x, x.size(1), dim=1)]),
    "length": lambda x: x / len(x.unbind(1)),
    "the last": lambda x: x.split(1, 1)[-1],
    "reversed": lambda x: torch.stack(x.unbind(1)[::-1], 1),
    "joined": lambda x: torch.stack(x.unbind(1) + x.unbind(1), 1),
    "stacked": lambda x: torch.stack(x.unbind(1), 1),
}


@pytest.mark.parametrize("cut", COUNTED.values(), ids=COUNTED)
@pytest.mark.parametrize("length", [3, 8])
def test_another_number_of_parts_is_refused(cut: Callable[[Tensor], Any], length: int) -> None:
    """An input with another number of parts is refused, but another batch is accepted."""
    model = Cut(cut).eval()
    pruned = fxprune.prune(model, torch.randn(2, 5, 6), channels=0.5, verify=True)
    assert pruned.model(torch.randn(7, 5, 6)).shape == model(torch.randn(7, 5, 6)).shape
    with pytest.raises(AssertionError, match="this graph was traced for inputs with"):
        pruned.model(torch.randn(2, length, 6))


@pytest.mark.parametrize("length", [5, 2, 8])
def test_one_part_asks_for_no_more_than_itself(length: int) -> None:
    """The first part of ``x.split(2, 1)`` exists for every length, so every length is accepted."""
    model = Cut(lambda x: x.split(2, 1)[0]).eval()
    pruned = fxprune.prune(model, torch.randn(2, 5, 6), channels=1.0)
    x = torch.randn(2, length, 6)
    assert torch.allclose(pruned.model(x), model(x), atol=1e-6)


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: sum(x.chunk(3, -1)),
        lambda x: (lambda a, b, c: a * b + c)(*x.split(4, 2)),
        lambda x: torch.cat(torch.split(x, [4, 8], dim=-1)[::-1], -1),
        lambda x: sum(torch.tensor_split(x, 3, dim=-1)),
    ],
)
def test_widths_are_cut_without_a_word(cut: Callable[[Tensor], Any]) -> None:
    """A layer has the same number of channels for every input, so the graph asserts nothing."""
    pruned = fxprune.prune(Cut(cut).eval(), torch.randn(2, 5, 6), channels=0.5, verify=True)
    assert "assert" not in pruned.model.code
    assert "len(" not in pruned.model.code
    assert pruned.model(torch.randn(3, 9, 6)).shape == (3, 9, 3)


class Positions(nn.Module):
    """Two layers, and a table of 12 positions that is cut to the length of the input."""

    def __init__(self, cut: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.cut = nn.Linear(6, 8), nn.Linear(8, 3), cut
        self.table, self.places = nn.Parameter(torch.randn(1, 12, 8)), nn.Embedding(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) + self.cut(self, x)).mean(1)


@pytest.mark.parametrize(
    "cut",
    [
        lambda m, x: m.table[:, : x.size(1)],
        lambda m, x: m.table[:, : x.shape[1], :],
        lambda m, x: m.table.narrow(1, 0, x.size(1)),
        lambda m, x: torch.narrow(dim=1, start=1, length=x.size(1), input=m.table),
        lambda m, x: m.table[:, 12 - x.size(1) :],
        lambda m, x: m.places.weight[: x.size(1)],
        lambda m, x: m.places(torch.arange(x.size(1))),
    ],
)
@pytest.mark.parametrize("length", [2, 9])
def test_a_table_is_there_for_every_length(
    cut: Callable[[nn.Module, Tensor], Tensor], length: int
) -> None:
    """Rows of the table that the example does not reach are kept; only channels are removed."""
    model = Positions(cut).eval()
    pruned = fxprune.prune(model, torch.randn(2, 5, 6), params=0.6, verify=True)
    assert pruned.model.get_submodule("down").in_features < 8
    x = torch.randn(3, length, 6)
    assert fxprune.verify(model, pruned, x).error < 1e-9
    assert pruned.model(x).shape == (3, 3)
