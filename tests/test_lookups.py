"""Lookups by a size in forward: in tables that exist, and in tables that forward fills."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxprune
from tests.support.checking import relative_error

FAST = {7, 10}
STRIDES = {10: 2}
TABLE: dict[object, Tensor] = {}
SEEN: set[int] = set()


class Looks(nn.Module):
    """Two convolutions with a function between them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), function
        self.own = {10: 3}
        self.table: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


@pytest.fixture(autouse=True)
def _empty() -> None:
    TABLE.clear()
    SEEN.clear()


def in_a_set(x: Tensor) -> Tensor:
    return x * 2 if x.shape[-1] in FAST else x


def in_a_dict(x: Tensor) -> Tensor:
    return x * STRIDES.get(x.shape[-1], 1)


def in_a_literal(x: Tensor) -> Tensor:
    return x * 2 if x.shape[-1] in {10: None} else x


def in_a_literal_of_pairs(x: Tensor) -> Tensor:
    return x * 2 if (x.shape[-2], x.shape[-1]) in {(9, 10)} else x


def by_what_fails(x: Tensor) -> Tensor:
    try:
        return x * STRIDES[x.shape[-1]]
    except KeyError:
        return x


def how_many_sizes(x: Tensor) -> Tensor:
    return x * len({x.shape[-1], x.shape[-2]})


def beside_a_table(x: Tensor) -> Tensor:
    """Look up the same size in a table that forward fills and in a set that exists."""
    size = x.shape[-1]
    if size not in TABLE:
        TABLE[size] = torch.arange(size) / size
    return x * TABLE[size] if size in FAST else x + TABLE[size]


def in_another_table(x: Tensor) -> Tensor:
    size = x.shape[-1]
    SEEN.add(size)
    return x * 2 if size in STRIDES else x


MISSES = [
    in_a_set,
    in_a_dict,
    in_a_literal,
    in_a_literal_of_pairs,
    by_what_fails,
    how_many_sizes,
    beside_a_table,
    in_another_table,
]


def taken(function: Callable[[Tensor], Tensor], training: bool = False) -> list[int]:
    """Return the sizes that the pruned model accepts; for these it must equal the original."""
    model = Looks(function).train(training)
    whole = fxprune.prune(model, torch.randn(2, 3, 9, 8), channels=1.0, verify=True).model
    assert isinstance(whole, torch.fx.GraphModule)
    found = []
    for size in (8, 9, 10, 7):
        x = torch.randn(3, 3, 9, size)
        try:
            got = whole(x)
        except AssertionError:
            continue
        assert relative_error(got, model(x)) < 1e-6
        found.append(size)
    return found


@pytest.mark.parametrize("function", MISSES, ids=lambda function: function.__name__)
def test_what_is_not_there_may_be_there_for_another_size(
    function: Callable[[Tensor], Tensor],
) -> None:
    """A lookup that finds nothing at the traced size holds for this size only."""
    assert taken(function) == [8]


def into_a_table(x: Tensor) -> Tensor:
    size = x.shape[-1]
    if size not in TABLE:
        TABLE[size] = torch.arange(size) / size
    return x * TABLE[size]


def into_a_table_of_pairs(x: Tensor) -> Tensor:
    key = "grid", x.shape[-2:]
    found = TABLE.get(key)
    if found is None:
        found = TABLE.setdefault(key, torch.ones(x.shape[-2:]).cumsum(-1))
    return x * found


@functools.lru_cache
def table(size: int) -> Tensor:
    return torch.arange(size) / size


def remembered(x: Tensor) -> Tensor:
    return x * table(x.shape[-1])


def in_one_set(x: Tensor) -> Tensor:
    """Put equal shapes into a set, which has one entry at every size."""
    shapes = {own.shape for own in (x, x * 2, x + 1)}
    assert len(shapes) == 1
    return x.relu()


def by_name(x: Tensor) -> Tensor:
    sizes = {"rows": x.shape[-2], "columns": x.shape[-1]}
    return x.reshape(x.shape[0], -1, sizes["rows"] * sizes["columns"]).reshape(x.shape)


FILLED = [into_a_table, into_a_table_of_pairs, remembered, in_one_set, by_name]


@pytest.mark.parametrize("function", FILLED, ids=lambda function: function.__name__)
def test_a_table_that_forward_fills_holds_for_every_size(
    function: Callable[[Tensor], Tensor],
) -> None:
    assert taken(function) == [8, 9, 10, 7]


KEPT = types.SimpleNamespace(size=0, table=torch.zeros(0))


def beside_its_size(x: Tensor) -> Tensor:
    """Keep a table beside its size, a number that tracing could leave behind without the table."""
    size = int(x.shape[-1])
    if KEPT.size != size:
        KEPT.size, KEPT.table = size, torch.arange(size, dtype=x.dtype) / size
    return x * KEPT.table


def test_a_table_is_left_as_it_was_with_what_belongs_to_it() -> None:
    before, x = KEPT.table, torch.randn(2, 3, 9, 8)
    model = Looks(beside_its_size)
    whole = fxprune.prune(model, x, channels=1.0, verify=True).model
    assert KEPT.size == 0
    assert KEPT.table is before
    assert relative_error(whole(x), model(x)) < 1e-6


class Remembers:
    """An object outside the model that keeps a table and its size."""

    def __init__(self) -> None:
        self.size, self.table = 0, torch.zeros(0)
        self.tables: dict[str, Tensor] = {}


BESIDE = Remembers()
GRID: Tensor | None = None


def beside_the_model(x: Tensor) -> Tensor:
    if BESIDE.size != x.shape[-1]:
        BESIDE.size, BESIDE.table = x.shape[-1], torch.arange(x.shape[-1], dtype=x.dtype) / 7
    return x * BESIDE.table


def in_a_dict_of_an_object(x: Tensor) -> Tensor:
    size = x.shape[-1]
    if size not in BESIDE.tables:
        BESIDE.tables[size] = torch.linspace(0, 1, size, dtype=x.dtype)
    return x * BESIDE.tables[size]


def in_a_global_that_grows(x: Tensor) -> Tensor:
    global GRID
    if GRID is None or len(GRID) < x.shape[-1]:
        GRID = torch.arange(x.shape[-1] + 3, dtype=x.dtype)
    return x * GRID[: x.shape[-1]]


TABLES = [
    into_a_table,
    into_a_table_of_pairs,
    beside_the_model,
    in_a_dict_of_an_object,
    in_a_global_that_grows,
]


@pytest.fixture
def _anew() -> None:
    global GRID
    BESIDE.__init__()  # type: ignore[misc]
    GRID = None


@pytest.mark.usefixtures("_anew")
@pytest.mark.parametrize("function", TABLES, ids=lambda function: function.__name__)
def test_a_table_outside_is_computed_whenever_the_model_was_called(
    function: Callable[[Tensor], Tensor],
) -> None:
    """The graph is the same, and right at every size, whenever the model was called before.

    The model is called before pruning, between pruning and verification, or never.
    """
    model, x = Looks(function).double(), torch.randn(2, 3, 9, 8, dtype=torch.float64)
    before = fxprune.prune(model, x, channels=0.5)
    model(x)
    state = {**TABLE}, BESIDE.size, BESIDE.table, {**BESIDE.tables}, GRID
    assert fxprune.verify(model, before).error < 1e-9
    after = fxprune.prune(model, x, channels=0.5, verify=True)
    assert after.model.code == before.model.code
    now = TABLE, BESIDE.size, BESIDE.table, BESIDE.tables, GRID
    for old, new in zip(state, now, strict=True):
        assert old is new or old == new
    whole = fxprune.prune(model, x, channels=1.0).model
    for size in (8, 9, 5):
        y = torch.randn(1, 3, 9, size, dtype=torch.float64)
        assert relative_error(whole(y), model(y)) < 1e-12


def test_a_table_that_somebody_changed_is_a_constant() -> None:
    """A changed table is not what forward would compute, so it holds for its size only."""
    model, x = Looks(into_a_table), torch.randn(2, 3, 9, 8)
    model(x)
    TABLE[8] = TABLE[8] + 1
    pruned = fxprune.prune(model, x, channels=1.0, verify=True)
    assert relative_error(pruned.model(x), model(x)) < 1e-6
    assert fxprune.verify(model, pruned).error < 1e-6
    with pytest.raises(AssertionError, match="traced for inputs with"):
        pruned.model(torch.randn(2, 3, 9, 9))


@pytest.mark.filterwarnings("ignore:channels=0.5 was asked for")
def test_what_python_does_on_other_ways_is_taken_back() -> None:
    """What forward stores on a branch that is only explored is removed again.

    Pruning follows both answers to a question about values. The user's objects must not change on
    the branch that a real call does not take.
    """

    class Asks(Looks):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            if x.sum() > 1e9:
                TABLE["much"] = torch.full((), 7.0)
            return self.last(y * TABLE.get("much", 1.0))

    model, x = Asks(into_a_table), torch.randn(2, 3, 9, 8)
    pruned = fxprune.prune(model, x, channels=0.5)
    assert pruned.report.parts
    assert not TABLE
    assert relative_error(fxprune.prune(model, x, channels=1.0).model(x), model(x)) < 1e-6
