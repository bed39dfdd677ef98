"""Python between parts that asks for values: of its caller's inputs freely, each way that it can go followed; of weights not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import rnn

import fxprune
from fxprune.eager.decisions import Decisions, followed, ways_of
from fxprune.errors import FxpruneWarning
from tests.support.checking import masked, randomise, relative_error


class Asks(nn.Module):
    """Two layers, and code of the caller's values between them."""

    def __init__(self, code: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)
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
        assert relative_error(pruned.model(x, other.double()), reference(x, other.double())) < 1e-12
    replayed = fxprune.apply(fxprune.Plan.from_json(pruned.plan.to_json()), model)
    assert replayed.plan == pruned.plan


def test_values_of_weights_keep_parts_whole_to_each_other() -> None:
    model, x = randomise(Asks(lambda m, y, mask: m.b(y) if y.sum() > 0 else m.c(y))).eval(), torch.randn(3, 6, dtype=torch.float64)
    with pytest.warns(FxpruneWarning, match="decides by values"):
        pruned = fxprune.prune(model, (x, MASKS[0].double()), channels=0.5)
    assert pruned.report.params_after == pruned.report.params_before
    assert any("decides by values" in row.reason for row in pruned.report.pinned)


def decided(forward: Callable[[Any, Tensor], Any], x: Tensor) -> list[tuple[bool, ...]] | str:
    """The ways of a function, or the line that decides by weights."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Any:
            return forward(self, x)

    def run(answers: tuple[bool, ...]) -> Decisions:
        return followed(Net(), (x,), {}, answers)[1]

    ways = ways_of(run)
    return ways.decided or ways.answers


def test_ways() -> None:
    x = torch.ones(2)
    assert decided(lambda m, x: x * 2, x) == [()]
    assert decided(lambda m, x: 1 if x.sum() > 0 else 2, x) == [(), (False,)]
    assert decided(lambda m, x: [1 for v in x if v > 0], x) == [(), (False,)]  # one line, asked twice
    assert decided(lambda m, x: int(x.sum()) and x.tolist(), x) == [()]
    assert decided(lambda m, x: bool(torch.zeros(x.shape).any()), x) == [()]  # of sizes alone
    for reads in (bool, float, lambda v: v.item(), lambda v: v.tolist(), lambda v: torch.equal(v, v), lambda v: v.numpy()):
        assert "test_ways.py" in decided(lambda m, x, reads=reads: reads((m.w.detach() * x).sum()), x)


def test_a_way_that_fails_is_not_known() -> None:
    """Unlike one that the model refuses itself: for another example it may be fine."""

    def fails(model: Any, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else x.view(3)

    def refuses(model: Any, x: Tensor) -> Tensor:
        assert x.sum() > 0
        return x

    assert "test_ways.py" in decided(fails, torch.ones(2))
    assert decided(refuses, torch.ones(2)) == [()]


def test_many_ways_are_not_followed() -> None:
    code = "\n".join(f"    x = x + {i} if x[{i}] > 0 else x" for i in range(12))
    space: dict[str, Any] = {}
    exec(compile(f"def many(model, x):\n{code}\n    return x", "many.py", "exec"), space)
    assert "many.py" in decided(space["many"], torch.ones(12))


class Counts(nn.Module):
    """What the caller gives says how long things are, and how often they come."""

    def __init__(self, code: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head, self.code = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 3), code

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        return self.head(self.code(self.b(F.relu(self.a(x))), n))


COUNTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a mask by lengths": lambda y, n: y * (torch.arange(int(n.max()))[None] < n[:, None])[..., None],
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
        packed = rnn.pack_padded_sequence(F.relu(self.a(x)), n, batch_first=True, enforce_sorted=False)
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
