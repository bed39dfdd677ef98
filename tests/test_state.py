"""State that forward keeps for the next call.

A graph describes one call, so such state is found, and the code that keeps it stays Python.
"""

import contextvars
import copy
import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import TraceError
from fxprune.trace import example_of, meta_copy_of, trace
from fxprune.trace.module_state import Attributes, same_graph
from tests.support.checking import relative_error


class Keeps(nn.Module):
    """Two convolutions, and between them a function that may set attributes."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **members: Any) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), function
        for name, value in members.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self, self.first(x)))


def adds_the_last(m: Any, x: Tensor) -> Tensor:
    m.last_one = x if m.last_one is None else x + m.last_one
    return m.last_one


def counts(m: Any, x: Tensor) -> Tensor:
    m.step += 1
    return x * m.step


def begins_otherwise(m: Any, x: Tensor) -> Tensor:
    if not m.begun:
        m.begun = True
        return x * 2
    return x


def remembers_all(m: Any, x: Tensor) -> Tensor:
    m.seen.append(x.mean())
    return x + sum(m.seen)


def remembers_by_name(m: Any, x: Tensor) -> Tensor:
    y = x + m.table["last"] if "last" in m.table else x
    m.table["last"] = x
    return y


def remembers_sizes(m: Any, x: Tensor) -> Tensor:
    size = int(x.shape[-1])
    y = x * len(m.sizes)
    m.sizes.add(size + len(m.sizes))
    return y


def moves_a_constant(m: Any, x: Tensor) -> Tensor:
    m.shift = m.shift + 1
    return x + m.shift


class Same(torch.autograd.Function):
    """A copy of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


def counts_beside_a_function(m: Any, x: Tensor) -> Tensor:
    m.step += 1
    return m.same(x) * m.step


STATEFUL = [
    (counts_beside_a_function, {"same": Same.apply, "step": 0}, "step"),
    (adds_the_last, {"last_one": None}, "last_one"),
    (counts, {"step": 0}, "step"),
    (begins_otherwise, {"begun": False}, "begun"),
    (remembers_all, {"seen": []}, "seen"),
    (remembers_by_name, {"table": {}}, "table"),
    (remembers_sizes, {"sizes": set()}, "sizes"),
    (moves_a_constant, {"shift": torch.zeros(())}, "shift"),
]


@pytest.mark.parametrize(
    ("function", "members", "name"), STATEFUL, ids=[case[0].__name__ for case in STATEFUL]
)
def test_what_changes_the_next_call_is_in_no_graph(
    function: Any, members: dict[str, Any], name: str
) -> None:
    torch.manual_seed(0)
    model, x = Keeps(function, **copy.deepcopy(members)).eval(), torch.randn(2, 3, 8, 8)
    with pytest.raises(TraceError, match=rf"because it sets '{name}'"):
        trace(meta_copy_of(model), *example_of(x))
    pruned = fxprune.prune(model, x, channels=1.0)
    assert pruned.report.parts
    assert getattr(model, name) == members[name]  # the user's model was not called
    with torch.no_grad():
        for _ in range(3):
            assert relative_error(pruned.model(x), model(x)) <= 1e-6


class Queue(nn.Module):
    """A ring buffer of features from past calls.

    Its position is read and then written in the same call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("ring", torch.randn(6, 8))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        start = int(self.place)
        self.ring[start : start + len(h)] = h.detach()
        self.place[0] = (start + len(h)) % 6
        return self.b(h * self.ring.mean(0))


@pytest.mark.filterwarnings("ignore::fxprune.errors.FxpruneWarning")
def test_a_value_is_another_one_after_it_was_read() -> None:
    model, x = Queue().eval(), torch.randn(2, 6)
    pruned = fxprune.prune(model, x, channels=1.0).model
    with torch.no_grad():
        for _ in range(4):
            assert relative_error(pruned(x), model(x)) <= 1e-6


def shows(m: Any, x: Tensor) -> Tensor:
    m.seen_last, m.width = x, x.shape[-1]
    m.all_seen = []
    m.all_seen.append(x)
    return x


def caches(m: Any, x: Tensor) -> Tensor:
    if m.table is None or m.table.shape[0] != x.shape[-1]:
        m.table = torch.arange(x.shape[-1]).float()
    return x + m.table


def caches_by_number(m: Any, x: Tensor) -> Tensor:
    if m.width != x.shape[-1]:
        m.width, m.table = x.shape[-1], torch.arange(x.shape[-1]).float()
    return x + m.table


def caches_a_constant(m: Any, x: Tensor) -> Tensor:
    if m.table is None:
        m.table = torch.arange(6).float()
    return x + m.table


def caches_in_a_dict(m: Any, x: Tensor) -> Tensor:
    if x.shape[-1] not in m.tables:
        m.tables[int(x.shape[-1])] = torch.ones(int(x.shape[-1]))
    return x + m.tables[int(x.shape[-1])]


STATELESS = [
    (shows, {"seen_last": None, "width": 0, "all_seen": []}),
    (caches, {"table": None}),
    (caches_by_number, {"width": 0, "table": None}),
    (caches_a_constant, {"table": None}),
    (caches_in_a_dict, {"tables": {}}),
]


@pytest.mark.parametrize(
    ("function", "members"), STATELESS, ids=[case[0].__name__ for case in STATELESS]
)
def test_what_does_not_is_traced_whole(function: Any, members: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = Keeps(function, **copy.deepcopy(members)).eval(), torch.randn(2, 3, 8, 8)
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert not pruned.report.parts
    assert pruned.report.error is not None
    assert pruned.report.error < 1e-12
    whole = fxprune.prune(model, x, channels=1.0).model
    with torch.no_grad():
        for _ in range(2):
            assert relative_error(whole(x), model(x)) <= 1e-6


def test_tracing_leaves_the_twin_as_it_was() -> None:
    for function, members, _ in STATEFUL:
        meta_copy = meta_copy_of(Keeps(function, **copy.deepcopy(members)).eval())
        before = Attributes(meta_copy.model)
        with pytest.raises(TraceError):
            trace(meta_copy, *example_of(torch.randn(2, 3, 8, 8)))
        assert not [*before.changes()]
    for function, members in STATELESS:
        meta_copy = meta_copy_of(Keeps(function, **copy.deepcopy(members)).eval())
        before = Attributes(meta_copy.model)
        trace(meta_copy, *example_of(torch.randn(2, 3, 8, 8)))
        assert not [
            change for change in before.changes() if not change.path.startswith("_constant")
        ]


def test_attributes_are_compared_and_restored() -> None:
    inner = nn.Identity()
    inner.names, inner.nested, inner.gone, inner.number = ["a"], {"b": [1]}, "here", 1
    root = nn.Sequential(inner)
    root.register_buffer("table", torch.zeros(2))
    names, nested, table, before = inner.names, inner.nested, root.table, Attributes(root)
    assert not [*before.changes()]
    inner.names.append("c")
    inner.nested["b"].append(2)
    inner.number += 1
    inner.new = 5
    root.table = torch.ones(2)
    del inner.gone
    paths = {change.path for change in before.changes()}
    assert paths == {"0.names", "0.nested", "0.number", "0.new", "0.gone", "table"}
    assert {change.path for change in before.changes(["table"])} == paths - {"table"}
    before.restore()
    assert not [*before.changes()]
    assert inner.names is names and names == ["a"]  # noqa: PT018
    assert inner.nested is nested and nested == {"b": [1]}  # noqa: PT018
    assert (inner.number, inner.gone, root.table is table, hasattr(inner, "new")) == (
        1,
        "here",
        True,
        False,
    )


def graph_of(value: Tensor, name: str, function: Any) -> tuple[fx.Graph, dict[str, Tensor]]:
    graph = fx.Graph()
    x, constant = graph.placeholder("x"), graph.get_attr(name)
    graph.output(graph.call_function(function, (x, constant)))
    return graph, {name: value}


def test_constants_count_by_value() -> None:
    """Constants are compared by value, because their names only number them."""
    one, held = graph_of(torch.ones(2), "_constant0", torch.add)
    for value, function, answer in (
        (torch.ones(2), torch.add, True),
        (torch.zeros(2), torch.add, False),
        (torch.ones(2), torch.mul, False),
        (torch.ones(3), torch.add, False),
        (torch.ones(2, dtype=torch.float64), torch.add, False),
        (torch.ones(2, device="meta"), torch.add, False),
    ):
        other, others = graph_of(value, "_constant1", function)
        assert same_graph(one, other, held, others) is answer
    longer, others = graph_of(torch.ones(2), "_constant1", torch.add)
    longer.call_function(torch.abs, (next(iter(longer.nodes)),))
    assert not same_graph(one, longer, held, others)


# -- what a call before pruning left in the model


class Cached(nn.Module):
    """Two convolutions, and between them a table that is kept between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.seen: Any = None
        self.table: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x).relu()))

    def between(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class GridBySize(Cached):
    def between(self, x: Tensor) -> Tensor:
        if self.seen != x.shape[2:]:
            self.seen, self.table = x.shape[2:], torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)
        return x + self.table


class GridByWidth(Cached):
    def between(self, x: Tensor) -> Tensor:
        self.prepare(x)
        return x + self.table

    def prepare(self, x: Tensor) -> None:
        if self.seen is None or self.seen != x.shape[-1]:
            self.seen, self.table = x.shape[-1], torch.arange(x.shape[-1]).to(x)


class TwoTables(Cached):
    def between(self, x: Tensor) -> Tensor:
        if self.seen != x.shape:
            self.seen = x.shape
            self.table = [torch.arange(n, dtype=x.dtype, device=x.device) for n in x.shape[2:]]
        return x + self.table[0][:, None] * self.table[1]


class TableThatGrows(Cached):
    def between(self, x: Tensor) -> Tensor:
        if self.table is None or self.table.size(0) < x.size(-1):
            self.table = torch.arange(x.size(-1)).to(x).sin()
        return x + self.table[: x.size(-1)]


class BufferThatGrows(Cached):
    def __init__(self) -> None:
        super().__init__()
        del self.table
        self.register_buffer("table", torch.zeros(0, dtype=torch.float64), persistent=False)

    def between(self, x: Tensor) -> Tensor:
        if x.size(-1) > self.table.size(0):
            self.table = torch.arange(x.size(-1)).to(x).cos()
        return x + self.table[: x.size(-1)]


class ShareOfLongest(Cached):
    """A table in which a shorter input reads other values than it would compute."""

    def between(self, x: Tensor) -> Tensor:
        if self.table is None or self.table.size(0) < x.size(-1):
            self.table = torch.arange(x.size(-1)).to(x) / x.size(-1)
        return x + self.table[: x.size(-1)]


class OfWeights(Cached):
    def between(self, x: Tensor) -> Tensor:
        if self.table is None or self.table.size(0) != x.size(-1):
            self.table = torch.ones(x.size(-1)).to(x) * self.last.weight.sum()
        return x + self.table.detach()


SIZES = [(2, 3, 6, 8), (2, 3, 6, 5), (3, 3, 9, 8), (1, 3, 6, 8), (2, 3, 6, 12), (4, 3, 4, 4)]


def called_before(kind: type[Cached], *size: int) -> Cached:
    torch.manual_seed(0)
    model = kind().double().eval()
    with torch.no_grad():
        model(torch.randn(size, dtype=torch.float64))
    return model


def sizes_taken(model: Cached) -> list[bool]:
    """Return, for each size, whether the pruned model accepts it.

    If it does, its output equals that of the original.
    """
    pruned = fxprune.prune(model, torch.randn(SIZES[0], dtype=torch.float64), channels=1.0).model
    assert isinstance(pruned, fx.GraphModule)
    taken = []
    for size in SIZES:
        x = torch.randn(size, dtype=torch.float64)
        with torch.no_grad():
            try:
                got = pruned(x)
            except AssertionError:
                taken.append(False)
                continue
            assert relative_error(got, copy.deepcopy(model)(x)) <= 1e-9, size
        taken.append(True)
    assert taken[0]
    return taken


@pytest.mark.parametrize("kind", [GridBySize, GridByWidth, TwoTables, TableThatGrows])
def test_a_table_of_an_earlier_call_is_computed_for_every_size(kind: type[Cached]) -> None:
    model = called_before(kind, *SIZES[0])
    kept = model.table
    assert all(sizes_taken(model))
    assert model.table is kept
    assert (
        fxprune.prune(
            model, torch.randn(SIZES[0], dtype=torch.float64), channels=0.5, verify=True
        ).report.error
        <= 1e-9
    )  # type: ignore


@pytest.mark.parametrize("kind", [GridByWidth, TwoTables])
def test_a_table_of_an_earlier_call_of_another_size(kind: type[Cached]) -> None:
    assert all(sizes_taken(called_before(kind, *SIZES[-2])))


@pytest.mark.parametrize("kind", [GridBySize, GridByWidth, TableThatGrows])
def test_a_table_that_somebody_changed_is_kept(kind: type[Cached]) -> None:
    model = called_before(kind, *SIZES[0])
    model.table = model.table + 1.0
    assert not all(sizes_taken(model))


@pytest.mark.parametrize("kind", [ShareOfLongest, OfWeights, BufferThatGrows])
def test_a_table_that_the_original_would_not_compute_again_is_kept(kind: type[Cached]) -> None:
    assert not all(sizes_taken(called_before(kind, *SIZES[0])))


class Shows(nn.Module):
    """A model whose last layer stores its input and a size in attributes that it does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), Keeps(shows_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)[:, :3])


def shows_features(m: Any, x: Tensor) -> Tensor:
    m.features = m.first.seen = x
    m.size = x.shape[2] * torch.ones(())
    return x


def test_attributes_that_a_graph_does_not_set_are_reported() -> None:
    """Some models keep an attention map that users may inspect."""
    pruned = fxprune.prune(Shows(), torch.randn(2, 3, 9, 9), channels=0.5)
    assert pruned.report.not_set == ("last.features", "last.first.seen")
    assert "set by forward, not by its graph\n  last.features\n  last.first.seen" in str(
        pruned.report
    )
    assert "last.features" in str(fxprune.analyze(Shows(), torch.randn(2, 3, 9, 9)))


TABLES: dict[int, Tensor] = {}
SEEN: list[Tensor] = []
NOTES = types.SimpleNamespace(last=None, shared={"last": None})
LAST = types.SimpleNamespace(last=None)


class Slots:
    __slots__ = ("last",)


SLOTS = Slots()


def scaled_by_a_table(m: Any, x: Tensor) -> Tensor:
    size = x.shape[2]
    if size not in TABLES:
        TABLES[size] = torch.arange(size) / size
    return x * TABLES[size]


@functools.lru_cache
def table(size: int) -> Tensor:
    return torch.arange(size) / size


def scaled_by_a_remembered_table(m: Any, x: Tensor) -> Tensor:
    return x * table(int(x.shape[2]))


def lists(m: Any, x: Tensor) -> Tensor:
    SEEN.append(x)
    return x.relu()


def notes(m: Any, x: Tensor) -> Tensor:
    NOTES.last = NOTES.shared["last"] = x
    return x.relu()


def notes_the_last(m: Any, x: Tensor) -> Tensor:
    LAST.last = x
    return x.relu()


def fills_a_slot(m: Any, x: Tensor) -> Tensor:
    SLOTS.last = x
    return x.relu()


def counter() -> tuple[Callable[[Any, Tensor], Tensor], Callable[[], Any]]:
    last = None

    def remember(m: Any, x: Tensor) -> Tensor:
        nonlocal last
        last = x
        return x.relu()

    return remember, lambda: last


in_a_variable, variable = counter()
BESIDE, OF_A_THREAD, OF_A_CONTEXT = (
    nn.Module(),
    threading.local(),
    contextvars.ContextVar[Any]("last", default=None),
)


def beside(m: Any, x: Tensor) -> Tensor:
    BESIDE.last = x
    return x.relu()


def of_itself(m: Any, x: Tensor) -> Tensor:
    of_itself.last = x  # type: ignore[attr-defined]
    return x.relu()


def of_a_thread(m: Any, x: Tensor) -> Tensor:
    OF_A_THREAD.last = x
    return x.relu()


def of_a_context(m: Any, x: Tensor) -> Tensor:
    OF_A_CONTEXT.set(x)
    return x.relu()


HELD: dict[Any, Callable[[], Any]] = {
    in_a_variable: variable,
    beside: lambda: BESIDE.last,
    of_itself: lambda: of_itself.last,  # type: ignore[attr-defined]
    of_a_thread: lambda: OF_A_THREAD.last,
    of_a_context: OF_A_CONTEXT.get,
}


@pytest.mark.parametrize("function", HELD, ids=lambda function: function.__name__)
def test_whatever_holds_an_activation_is_seen(function: Callable[[Any, Tensor], Tensor]) -> None:
    model, x = Keeps(function).eval(), torch.randn(2, 3, 9, 9)
    pruned = fxprune.prune(model, x, channels=0.5)
    assert pruned.report.parts == ("first", "last")
    pruned.model(torch.randn(5, 3, 9, 9))
    assert HELD[function]().shape[0] == 5


@pytest.mark.parametrize("function", [scaled_by_a_table, scaled_by_a_remembered_table])
def test_a_table_outside_of_the_model_is_as_it_was(
    function: Callable[[Any, Tensor], Tensor],
) -> None:
    """If tracing left its table there, the next call of the user's model would read it."""
    TABLES.clear()
    model, x = Keeps(function).eval(), torch.randn(2, 3, 9, 9)
    pruned = fxprune.prune(model, x, channels=0.5)
    assert not pruned.report.parts
    assert not TABLES
    assert model(x).shape == pruned.model(x).shape
    assert relative_error(fxprune.prune(model, x, channels=1.0).model(x), model(x)) < 1e-6


@pytest.mark.parametrize(("function", "holder"), [(notes_the_last, LAST), (fills_a_slot, SLOTS)])
def test_what_is_left_in_an_object_is_left_by_the_pruned_one(
    function: Callable[[Any, Tensor], Tensor], holder: Any
) -> None:
    model, x, holder.last = Keeps(function).eval(), torch.randn(2, 3, 9, 9), None
    pruned = fxprune.prune(model, x, channels=0.5)
    holder.last = None
    pruned.model(x)
    assert type(holder.last) is Tensor


@pytest.mark.parametrize("function", [lists, notes])
def test_what_is_left_outside_of_the_model_is_left_by_the_pruned_one(
    function: Callable[[Any, Tensor], Tensor],
) -> None:
    model, x = Keeps(function).eval(), torch.randn(2, 3, 9, 9)
    pruned = fxprune.prune(model, x, channels=0.5)
    assert pruned.report.parts == ("first", "last")
    SEEN.clear()
    NOTES.last = NOTES.shared["last"] = None
    pruned.model(x)
    left = SEEN[0] if function is lists else NOTES.last
    assert isinstance(left, Tensor)
    assert left.shape[0] == 2
    assert function is lists or NOTES.shared["last"] is left


def a_parameter(m: Any, weight: Tensor) -> None:
    m.conv.weight = nn.Parameter(weight)


def data(m: Any, weight: Tensor) -> None:
    m.conv.weight.data = weight


def an_attribute(m: Any, weight: Tensor) -> None:
    if "weight" in m.conv._parameters:
        del m.conv.weight
    m.conv.weight = weight


def a_buffer(m: Any, weight: Tensor) -> None:
    if "weight" in m.conv._parameters:
        del m.conv.weight
        m.conv.register_buffer("weight", torch.zeros_like(m.weight))
    m.conv.weight = weight


class SetsWeights(nn.Module):
    """The weight of its convolution is computed in each call.

    With ``reads``, Python has read a value of the input before.
    """

    def __init__(self, put: Callable[[Any, Tensor], None], reads: bool) -> None:
        super().__init__()
        self.stem, self.conv, self.head = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 4, 1),
        )
        self.weight, self.scale = (
            nn.Parameter(torch.randn(8, 8, 3, 3)),
            nn.Parameter(torch.tensor(1.5)),
        )
        self.put, self.reads = put, reads
        if put is not a_parameter and put is not data:
            put(self, torch.zeros(8, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        if self.reads and bool((x > 100).any()):
            x = x.clamp(-1, 1)
        x = self.stem(x)
        self.put(self, self.weight * self.scale)
        return self.head(self.conv(x).relu())


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("put", [a_parameter, data, an_attribute, a_buffer])
def test_a_layer_computes_with_the_weight_that_forward_gives_it(
    put: Callable[[Any, Tensor], None], reads: bool
) -> None:
    model, x = SetsWeights(put, reads).eval(), torch.randn(2, 3, 9, 9)
    pruned = fxprune.prune(model, x, channels=0.5)
    assert bool(pruned.report.parts) == (reads or put is data)
    assert dict(pruned.model.named_parameters())["weight"].shape == (4, 4, 3, 3)
    fxprune.verify(model, pruned, example_inputs=x)
    before = pruned.model(x)
    with torch.no_grad():
        pruned.model.get_parameter("scale").mul_(2)
    assert relative_error(pruned.model(x), before) > 1e-3


def test_parameters_of_the_model_are_its_own_again() -> None:
    model = SetsWeights(a_parameter, reads=False).eval()
    meta_copy = meta_copy_of(model)
    own = meta_copy.model.get_parameter("conv.weight")
    traced = trace(meta_copy, *example_of(torch.randn(2, 3, 9, 9)))
    assert meta_copy.model.get_parameter("conv.weight") is own
    assert "conv.weight" not in {node.target for node in traced.graph.nodes}


class Marks(nn.Module):
    """A model that sets an attribute on an inner tensor and on the one it returns.

    Only the second one can be seen by the caller.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        h.depth = 1
        y = self.last(self.second(h).relu())
        if self.marks_results:
            y.source = h
        return y

    marks_results = True


def test_what_forward_sets_on_a_result_is_set_by_the_pruned_model() -> None:
    model, x = Marks(), torch.randn(2, 4)
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert "sets 'source' on a tensor" in str(pruned.report)
    assert pruned.model(x).source.shape == (2, 8)  # it is handed out: its width is pinned
    model.marks_results = False
    small = fxprune.prune(model, x, channels=0.5, verify=True)
    assert not small.report.parts
    assert small.model.get_parameter("first.weight").shape == (4, 4)
