"""Tests of Python code between parts that branches on sizes of its inputs.

On every branch the pruned model equals the masked original.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.coupling.parts.questions import Questions
from fxprune.errors import FxpruneWarning
from fxprune.inputs import Call
from fxprune.resized import other_batch, other_sizes, single_axis_sizes
from tests.support.checking import masked, randomise, relative_error


class Sized(nn.Module):
    """Layers on tokens, with code between them that depends on sizes.

    The call of ``torch.nonzero`` on the input keeps the model from being one graph.
    """

    def __init__(self, code: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = (
            nn.Linear(6, 12),
            nn.Linear(12, 12),
            nn.Linear(12, 12),
            nn.Linear(12, 3),
        )
        self.weight, self.layers = (
            nn.Parameter(torch.randn(12, 12)),
            nn.ModuleList(nn.Linear(12, 12) for _ in range(3)),
        )
        self.code = code

    def forward(self, x: Tensor) -> Tensor:
        torch.nonzero(x.flatten() > 1e9)
        return self.head(F.relu(self.code(self, self.a(x))))


def returns_early(model: Any, y: Tensor) -> Tensor:
    if y.shape[1] <= 5:
        return model.b(F.relu(y))
    return model.c(F.relu(y.flip(-1)))


def of_one_row(model: Any, y: Tensor) -> Tensor:
    if len(y) == 1:
        return y @ model.weight
    return model.c(y)


def another_order(model: Any, y: Tensor) -> Tensor:
    if y.numel() > 400:
        return model.b(model.c(F.relu(y)))
    return model.c(model.b(F.relu(y)))


def odd(model: Any, y: Tensor) -> Tensor:
    return y.flip(-1) if y.shape[1] % 2 else model.b(y)


def half_of_it(model: Any, y: Tensor) -> Tensor:
    return y.roll(1, -1) if y.shape[1] / 2 > 4.1 else model.b(y)


def one_in_the_other(model: Any, y: Tensor) -> Tensor:
    n = y.size(1)
    if n > 4 and not n < 6:
        y = y.flip(-1)
        if n > 9:
            y = model.b(y)
    return model.c(F.relu(y))


def a_layer_for_each(model: Any, y: Tensor) -> Tensor:
    for i in range(y.shape[1]):
        y = model.layers[i % 3](F.relu(y))
    return y


def by_a_table(model: Any, y: Tensor) -> Tensor:
    return {4: model.b, 5: model.c}.get(y.shape[1], model.layers[0])(F.relu(y))


def far_away(model: Any, y: Tensor) -> Tensor:
    return y.flip(-1) if y.shape[1] > 100 else model.b(y)


def by_sizes_and_values(model: Any, y: Tensor) -> Tensor:
    return y.flip(-1) if y.shape[1] > 5 and y.sum() > 0 else model.b(y)


CODE = [
    returns_early,
    of_one_row,
    another_order,
    odd,
    half_of_it,
    one_in_the_other,
    a_layer_for_each,
    by_a_table,
    far_away,
    by_sizes_and_values,
]
SIZES = [(2, 4), (1, 4), (3, 4), (2, 1), (2, 3), (2, 5), (2, 6), (2, 7), (2, 10), (2, 101), (7, 7)]


def is_the_masked_original(model: nn.Module, pruned: nn.Module) -> None:
    reference = masked(model, pruned)
    for sizes in SIZES:
        x = torch.randn(*sizes, 6, dtype=torch.float64)
        assert relative_error(pruned(x), reference(x)) < 1e-12


@pytest.mark.parametrize("code", CODE)
def test_whichever_way_sizes_lead(code: Any) -> None:
    model = randomise(Sized(code)).eval()
    pruned = fxprune.prune(model, torch.randn(2, 4, 6, dtype=torch.float64), channels=0.5)
    assert pruned.report.params_after < 0.95 * pruned.report.params_before
    is_the_masked_original(model, pruned.model)
    assert fxprune.apply(fxprune.Plan.from_json(pruned.plan.to_json()), model).plan == pruned.plan


def steps(model: Any, y: Tensor) -> Tensor:
    state = torch.zeros_like(y[:, 0])
    for t in range(y.shape[1]):
        state = torch.tanh(model.b(state) + y[:, t])
    return model.c(state)


def laid_flat(model: Any, y: Tensor) -> Tensor:
    rows, length, _ = y.shape
    y = model.b(F.relu(y)) + torch.arange(length, dtype=y.dtype)[:, None] / max(length, 3)
    return model.c(F.relu(y.reshape(rows * length, -1))).reshape(rows, length, -1).mean(1)


def refused(model: Any, y: Tensor) -> Tensor:
    if y.shape[1] > 200:
        raise ValueError("too long")
    assert y.numel() > 0
    return model.c(F.relu(model.b(y)))


def checked_against_another(model: Any, y: Tensor) -> Tensor:
    z = model.b(F.relu(y))
    if z.shape != y.shape:
        z = z.reshape(y.shape[0], 0)
    return model.c(z)


@pytest.mark.parametrize("code", [steps, laid_flat, refused, checked_against_another])
def test_sizes_that_decide_nothing_cost_nothing(code: Any) -> None:
    """Sizes that choose between no layers do not limit what can be pruned."""
    model = randomise(Sized(code)).eval()
    del model.weight, model.layers
    pruned = fxprune.prune(model, torch.randn(2, 4, 6, dtype=torch.float64), channels=0.5)
    assert pruned.report.params_after < 0.6 * pruned.report.params_before
    is_the_masked_original(model, pruned.model)


def test_where_the_other_way_cannot_be_followed_parts_are_whole_to_each_other() -> None:
    """A branch that cannot be followed leaves the parts at full width between each other.

    No input near the example's sizes takes this branch, and the example itself fails on it.
    """

    def code(model: Any, y: Tensor) -> Tensor:
        if y.shape[1] > 300:
            return y.flip(-1).unfold(1, 300, 1).mean(-1)
        return model.b(y)

    model = randomise(Sized(code)).eval()
    with pytest.warns(FxpruneWarning, match="decides by sizes"):
        pruned = fxprune.prune(model, torch.randn(2, 4, 6, dtype=torch.float64), channels=0.5)
    for length in (4, 301):
        x = torch.randn(2, length, 6, dtype=torch.float64)
        assert torch.equal(pruned.model(x), model(x))


def test_training_goes_by_sizes_too() -> None:
    def code(model: Any, y: Tensor) -> Tensor:
        if model.training and y.shape[1] > 5:
            y = y.flip(-1)
        return model.b(y)

    model = randomise(Sized(code))
    pruned = fxprune.prune(model, torch.randn(2, 4, 6, dtype=torch.float64), channels=0.5)
    reference = masked(model, pruned.model)
    for length in (4, 6):
        x = torch.randn(2, length, 6, dtype=torch.float64)
        assert relative_error(pruned.model.train()(x), reference.train()(x)) < 1e-12


def test_questions_about_sizes() -> None:
    """Questions about sizes are recorded with their margins, and can be given the other answer."""

    def asks(x: Tensor) -> list[bool]:
        n = x.shape[1]
        return [n > 3 and True, -(-n // 2) * 2.0 < 9, bool(n % 2), n == max(n, 1) and len(x) != 2]

    x, count = torch.zeros(2, 4), builtins.len
    questions = Questions([])
    with questions, questions.counting():
        true = asks(x)
    assert true == asks(x) == [True, True, False, False]
    assert builtins.len is count
    assert [sorted(asked.margins) for asked in questions.asked.values()] == [
        [1],
        [-5.0],
        [0],
        [0],
        [0],
    ]
    for place in questions.asked:
        turned = Questions([], {place: next(iter({True, False} - questions.asked[place].answers))})
        with turned, turned.counting():
            assert asks(x) != true or place == [*questions.asked][3]


def test_the_same_question_has_one_answer() -> None:
    """The other answer to a question holds for its other forms too, but for no other question."""

    def asks(x: Tensor) -> tuple[bool, ...]:
        n = x.shape[0]
        return (n > 3, not n <= 3, n > 3, n > 2)

    x, questions = torch.zeros(5), Questions([])
    with questions:
        asks(x)
    turned = Questions([], {next(iter(questions.asked)): False})
    with turned:
        assert asks(x) == (False, False, False, True)


def test_other_sizes() -> None:
    call = Call((torch.zeros(3, 4, 4),), {"mask": torch.zeros(3, 4)})

    def shapes(found: Any) -> list[tuple[int, ...]]:
        return [tuple(tensor.shape) for tensor in (*found[0], *found[1].values())]

    assert shapes(other_batch(call)) == [(1, 4, 4), (1, 4)]
    assert shapes(other_batch(call, 4)) == [(4, 4, 4), (4, 4)]
    assert [shapes(found) for _, found in other_sizes(call)] == [
        [(3, n, n), (3, n)] for n in (2, 5, 8)
    ]
    assert [shapes(found) for _, found in single_axis_sizes(call)] == [
        [(3, 5, 4), (3, 5)],
        [(3, 4, 5), (3, 4)],
    ]
