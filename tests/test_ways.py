"""Python code between parts that reads values.

Branches on values are followed both ways. Numbers taken from inputs or weights are allowed only in
code that cannot branch on them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import rnn

import fxprune
from fxprune.coupling.parts.decisions import Decisions, followed, ways_of
from fxprune.errors import FxpruneWarning
from tests.support.checking import masked, randomise, relative_error


class Asks(nn.Module):
    """Layers with code between them that may read the caller's values."""

    def __init__(self, code: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = (
            nn.Linear(6, 12),
            nn.Linear(12, 12),
            nn.Linear(12, 12),
            nn.Linear(12, 3),
        )
        self.code = code

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(F.relu(self.code(self, self.a(x), mask)))


def masked_where_needed(model: Any, y: Tensor, mask: Tensor) -> Tensor:
    if not bool(mask.all()):
        y = y * mask[:, None]
    return model.c(F.relu(model.b(F.relu(y))))


def another_order(model: Any, y: Tensor, mask: Tensor) -> Tensor:
    if mask.sum() > 2:
        return model.c(F.relu(model.b(F.relu(y))))
    return model.b(F.relu(model.c(F.relu(y))))


def one_or_the_other(model: Any, y: Tensor, mask: Tensor) -> Tensor:
    return model.b(F.relu(y)) if torch.equal(mask, torch.ones_like(mask)) else model.c(F.relu(y))


def asked_in_turns(model: Any, y: Tensor, mask: Tensor) -> Tensor:
    if mask[0] > 0:
        y = model.b(F.relu(y))
        if mask[1] > 0:
            y = y + 1
    elif mask[1] > 0:
        y = model.c(F.relu(y))
    return y


def refused(model: Any, y: Tensor, mask: Tensor) -> Tensor:
    if not bool((mask >= 0).all()):
        raise ValueError("masks are positive")
    return model.c(F.relu(model.b(F.relu(y))))


MASKS = [torch.tensor([float(i), float(j), 1.0]) for i in (0, 1) for j in (0, 1)]
CODE = [masked_where_needed, another_order, one_or_the_other, asked_in_turns, refused]


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("mask", [MASKS[0], MASKS[-1]])
def test_whichever_way_the_callers_values_lead(code: Any, mask: Tensor) -> None:
    model, x = randomise(Asks(code)).eval(), torch.randn(3, 6, dtype=torch.float64)
    pruned = fxprune.prune(model, (x, mask.double()), channels=0.5)
    assert pruned.report.params_after < 0.75 * pruned.report.params_before
    assert "test_ways.py" in pruned.report.not_one_graph
    reference = masked(model, pruned.model)
    for other in MASKS:
        assert (
            relative_error(pruned.model(x, other.double()), reference(x, other.double())) < 1e-12
        )
    replayed = fxprune.apply(fxprune.Plan.from_json(pruned.plan.to_json()), model)
    assert replayed.plan == pruned.plan


def test_numbers_that_depend_on_weights_keep_parts_whole_to_each_other() -> None:
    def code(model: Any, y: Tensor, mask: Tensor) -> Tensor:
        return model.b(y) if y.sum().item() > 0 else model.c(y)

    model, x = randomise(Asks(code)).eval(), torch.randn(3, 6, dtype=torch.float64)
    with pytest.warns(FxpruneWarning, match="decides by values"):
        pruned = fxprune.prune(model, (x, MASKS[0].double()), channels=0.5)
    assert pruned.report.params_after == pruned.report.params_before
    assert any("decides by values" in row.reason for row in pruned.report.pinned)


@pytest.mark.parametrize(
    "read",
    [lambda n: n.item() > 3, lambda n: int(n) > 3, lambda n: n.tolist() > 3],
    ids=["item", "int", "list"],
)
def test_numbers_of_the_caller_that_code_may_turn_by_keep_parts_whole_to_each_other(
    read: Callable[[Tensor], bool],
) -> None:
    """For another number, the code may call other parts, on tensors of any kind."""

    def code(model: Any, y: Tensor, n: Tensor) -> Tensor:
        return model.b(y) if read(n) else model.c(y)

    model, x = randomise(Asks(code)).eval(), torch.randn(3, 6, dtype=torch.float64)
    with pytest.warns(FxpruneWarning, match="decides by values"):
        pruned = fxprune.prune(model, (x, torch.tensor(2)), channels=0.5)
    for n in (2, 5):
        assert torch.equal(pruned.model(x, torch.tensor(n)), model(x, torch.tensor(n)))


def decided(forward: Callable[[Any, Tensor], Any], x: Tensor) -> list[tuple[bool, ...]] | str:
    """Return the followed answers of a function, or the line because of which they are unknown."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Any:
            return forward(self, x)

    def run(answers: tuple[bool, ...]) -> Decisions:
        return followed(Net(), (x,), {}, answers)[1]

    ways = ways_of(run)
    return ways.decided or ways.taken_out or ways.answers


def test_ways() -> None:
    x = torch.ones(2)
    assert decided(lambda m, x: x * 2, x) == [()]
    assert decided(lambda m, x: 1 if x.sum() > 0 else 2, x) == [(True,), (False,)]
    # one line that asks twice
    assert decided(lambda m, x: [1 for v in x if v > 0], x) == [
        (True, True),
        (False, True),
        (True, False),
    ]
    assert "test_ways.py" in decided(lambda m, x: int(x.sum()) and x.tolist(), x)
    # depends only on sizes
    assert decided(lambda m, x: bool(torch.zeros(x.shape).any()), x) == [()]
    for asks in (bool, lambda v: torch.equal(v, v), lambda v: (v > 0).item()):
        assert decided(lambda m, x, asks=asks: asks((m.w.detach() * x).sum()), x) == [
            (True,),
            (False,),
        ]
    for reads in (float, lambda v: v.item(), lambda v: v.tolist(), lambda v: v.numpy()):
        assert "test_ways.py" in decided(
            lambda m, x, reads=reads: reads((m.w.detach() * x).sum()), x
        )


def test_a_way_that_fails_is_not_known() -> None:
    """A branch that fails may work for another example, unlike one that the model refuses."""

    def fails(model: Any, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else x.view(3)

    def refuses(model: Any, x: Tensor) -> Tensor:
        assert x.sum() > 0
        return x

    def checked(model: Any, x: Tensor) -> Tensor:
        torch._assert(x.sum() > 0, "positive")
        return torch.distributions.Normal(x, x.abs() + 1, validate_args=True).mean

    def meets_a_check_later(model: Any, x: Tensor) -> Tensor:
        y = x if x.sum() > 0 else x[:1]
        return nn.BatchNorm1d(1).train()(y[:, None])  # training mode needs more than one value

    assert decided(checked, torch.ones(2)) == [(True, True, True)]
    assert "test_ways.py" in decided(meets_a_check_later, torch.ones(2))
    assert "test_ways.py" in decided(fails, torch.ones(2))
    assert decided(refuses, torch.ones(2)) == [(True,)]


def test_ways_that_chance_has_chosen_can_be_gone_again() -> None:
    draws = iter([True, False, True, False])

    def run(answers: tuple[bool, ...]) -> Decisions:
        way = Decisions([], [])
        way.asked = [("line", answers[0] if answers else next(draws))]
        return way

    assert ways_of(run).answers == [(True,), (False,)]


def test_many_ways_are_not_followed() -> None:
    code = "\n".join(f"    x = x + {i} if x[{i}] > 0 else x" for i in range(20))
    space: dict[str, Any] = {}
    exec(compile(f"def many(model, x):\n{code}\n    return x", "many.py", "exec"), space)
    assert "many.py" in decided(space["many"], torch.ones(20))


class Counts(nn.Module):
    """The caller's numbers give lengths and repetitions."""

    def __init__(self, code: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head, self.code = (
            nn.Linear(6, 12),
            nn.Linear(12, 8),
            nn.Linear(8, 3),
            code,
        )

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        return self.head(self.code(self.b(F.relu(self.a(x))), n))


COUNTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a mask by lengths": lambda y, n: (
        y * (torch.arange(int(n.max()))[None] < n[:, None])[..., None]
    ),
    "cut to a length": lambda y, n: y[:, : n.max().item()],
    "as often as told": lambda y, n: torch.repeat_interleave(y, n, dim=0),
    "one by one": lambda y, n: torch.stack([y[i, :k].sum(0) for i, k in enumerate(n.tolist())]),
    "by ids": lambda y, n: y[torch.unique(n) % 2],
}


@pytest.mark.parametrize("name", COUNTS)
def test_lengths_counts_and_ids_are_the_examples_own(name: str) -> None:
    model, x = randomise(Counts(COUNTS[name])).eval(), torch.randn(2, 5, 6, dtype=torch.float64)
    n = torch.tensor([5, 3])
    pruned = fxprune.prune(model, (x, n), channels=0.5, verify=True)
    assert pruned.report.params_after < 0.6 * pruned.report.params_before
    reference = masked(model, pruned.model)
    assert relative_error(pruned.model(x, n), reference(x, n)) < 1e-12
    again = fxprune.apply(fxprune.Plan.from_json(pruned.plan.to_json()), model)
    assert again.plan == pruned.plan
    assert torch.equal(again.model(x, n), pruned.model(x, n))


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        packed = rnn.pack_padded_sequence(
            F.relu(self.a(x)), n, batch_first=True, enforce_sorted=False
        )
        y, _ = rnn.pad_packed_sequence(packed, batch_first=True, padding_value=0.5)
        return self.head(self.b(y))


def test_packed_sequences_carry_channels() -> None:
    model, x = randomise(Packs()).eval(), torch.randn(2, 5, 6, dtype=torch.float64)
    pruned = fxprune.prune(model, (x, torch.tensor([3, 5])), channels=0.5, verify=True)
    assert pruned.report.params_after < 0.6 * pruned.report.params_before
    reference = masked(model, pruned.model)
    for lengths in ([5, 5], [1, 4]):
        n = torch.tensor(lengths)
        assert relative_error(pruned.model(x, n), reference(x, n)) < 1e-12


class Repeats(nn.Module):
    """A loop that continues depending on values; each pass takes the output of the one before."""

    def __init__(self, of_weights: bool) -> None:
        super().__init__()
        self.a, self.turn, self.head, self.of_weights = (
            nn.Linear(6, 12),
            nn.Linear(12, 12),
            nn.Linear(12, 3),
            of_weights,
        )

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        y = self.a(x)
        while y.square().sum() > 2 if self.of_weights else n > 0:
            y, n = self.turn(F.relu(y)) / 4, n - 1
        return self.head(F.relu(y))


@pytest.mark.parametrize("turns", [0, 1, 2])
@pytest.mark.parametrize("of_weights", [False, True])
def test_a_loop_ties_its_turns_however_often_the_example_turns(
    turns: int, of_weights: bool
) -> None:
    model, x = randomise(Repeats(of_weights)).eval(), torch.randn(3, 6, dtype=torch.float64)
    x = x * (0.01, 1.0, 4.0)[turns]
    pruned = fxprune.prune(model, (x, torch.tensor(turns)), channels=0.5)
    assert pruned.report.params_after < 0.6 * pruned.report.params_before
    reference = masked(model, pruned.model)
    for n in range(6):
        call = x * 4.0 ** (n - 3), torch.tensor(n)
        assert relative_error(pruned.model(*call), reference(*call)) < 1e-12


def test_ways_of_weights_are_the_same_for_other_weights(tmp_path: Path) -> None:
    """The factory of a loaded model may give other weights, which lead the code another way."""

    def build(shift: float) -> Asks:
        model = randomise(Asks(lambda m, y, mask: m.b(y) if y.sum() > 0 else m.c(y))).eval()
        nn.init.constant_(model.a.bias, shift)
        return model

    for shift in (-9.0, 9.0):
        model, x = build(shift), torch.randn(3, 6, dtype=torch.float64)
        pruned = fxprune.prune(model, (x, MASKS[0].double()), channels=0.5)
        assert pruned.report.params_after < 0.75 * pruned.report.params_before
        pruned.save(tmp_path)
        loaded = fxprune.load(tmp_path, lambda shift=shift: build(-shift))
        assert torch.equal(loaded.model(x, MASKS[0].double()), pruned.model(x, MASKS[0].double()))


def through_numpy(model: Any, y: Tensor, mask: Tensor) -> Tensor:
    level = torch.from_numpy(model.b(F.relu(y)).detach().numpy().mean(axis=1))
    return model.c(F.relu(y)) + level[:, None]


def through_a_list(model: Any, y: Tensor, mask: Tensor) -> Tensor:
    return y * torch.tensor(model.b(y).tolist(), dtype=y.dtype)


def scaled_by_a_number(model: Any, y: Tensor, mask: Tensor) -> Tensor:
    return model.b(y) / (1 + y.square().sum().item())


STRAIGHT = [through_numpy, through_a_list, scaled_by_a_number]


@pytest.mark.parametrize("code", STRAIGHT)
def test_numbers_of_weights_in_code_that_goes_one_way(code: Any) -> None:
    model, x = randomise(Asks(code)).eval(), torch.randn(3, 6, dtype=torch.float64)
    pruned = fxprune.prune(model, (x, MASKS[0].double()), channels=0.5)
    assert pruned.report.params_after < 0.9 * pruned.report.params_before
    reference = masked(model, pruned.model)
    assert relative_error(pruned.model(x, MASKS[0]), reference(x, MASKS[0])) < 1e-12


def picks(model: Any, y: Tensor, mask: Tensor) -> Tensor:
    chosen = nn.ModuleList([model.b, model.c])[int(y.sum()) % 2]
    return chosen(y) + model.b(y) + model.c(y)


def named(model: Any, y: Tensor, mask: Tensor) -> Tensor:
    return getattr(model, "abc"[1 + int(y.sum()) % 2])(y) + model.b(y) + model.c(y)


def in_a_loop(model: Any, y: Tensor, mask: Tensor) -> Tensor:
    for i in (1 + int(y.sum()) % 3) * [0]:
        y = model.b(y) + i
    return model.c(y)


def tried(model: Any, y: Tensor, mask: Tensor) -> Tensor:
    try:
        return model.b(y) / (1 / max(0, int(y.sum())))
    except ZeroDivisionError:
        return model.c(model.b(y))


def turns(model: Any, y: Tensor, mask: Tensor) -> Tensor:
    return model.b(model.c(y)) if y.sum().item() > 0 else model.c(model.b(y))


@pytest.mark.parametrize("code", [picks, named, in_a_loop, tried, turns])
def test_numbers_of_weights_in_code_that_can_turn(code: Any) -> None:
    model, x = randomise(Asks(code)).eval(), torch.randn(3, 6, dtype=torch.float64)
    with pytest.warns(FxpruneWarning, match="decides by values"):
        pruned = fxprune.prune(model, (x, MASKS[0].double()), channels=0.5)
    assert pruned.report.params_after == pruned.report.params_before


class Drops(nn.Module):
    """A model that skips a layer at random in training."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head, self.drop = (
            nn.Linear(6, 12),
            nn.Linear(12, 12),
            nn.Linear(12, 3),
            nn.Dropout(0.5),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        if not self.training or torch.rand(()) < 0.5:
            y = F.relu(self.b(self.drop(y)))
        if y.sum() > 1e9:
            y = y / 2
        return self.head(y)


def test_random_numbers_are_the_callers() -> None:
    model, x = randomise(Drops()), torch.randn(2, 6, dtype=torch.float64)
    plans = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before, own = torch.get_rng_state(), random.getstate()
        plans.append(fxprune.prune(model, x, channels=0.5, verify=seed == 1).plan)
        assert torch.equal(before, torch.get_rng_state())
        assert own == random.getstate()
    assert plans[0] == plans[1]
    pruned = fxprune.apply(plans[0], model).model
    assert {pruned.train()(x).shape for _ in range(20)} == {(2, 3)}
