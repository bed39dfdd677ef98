"""Labels, compared with the simplest programs that compute the same."""

import itertools
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fxprune.common.reshape import reshape_blocks
from fxprune.labels import Field, Units, alive_mask, compact, varied

COUNT = 12
some = st.lists(st.integers(0, COUNT), min_size=1, max_size=5)
pairs = st.lists(st.tuples(*[st.integers(0, COUNT)] * 2), min_size=1, max_size=5)
unites, pins = st.tuples(st.just("unite"), pairs), st.tuples(st.just("pin"), some)
steps = st.lists(st.one_of(unites, pins), max_size=12)


class Naive:
    """Units as a list of sets; the set with label 0 contains all pinned labels."""

    def __init__(self) -> None:
        self.sets = [{label} for label in range(COUNT + 1)]

    def of(self, label: int) -> set[int]:
        return next(s for s in self.sets if label in s)

    def unite(self, a: int, b: int) -> None:
        one, other = self.of(a), self.of(b)
        if one is not other:
            self.sets.remove(other)
            one |= other


def run(program: Any) -> tuple[Units, Naive]:
    units, naive = Units(), Naive()
    units.fresh(COUNT, 0)
    for kind, values in program:
        array = np.array(values, dtype=np.int64)
        if kind == "pin":
            units.pin(array, 3)
            for label in values:
                naive.unite(0, label)
        else:
            units.unite(array[:, 0], array[:, 1])
            for a, b in values:
                naive.unite(a, b)
    return units, naive


@given(program=steps)
def test_units_are_what_a_naive_union_find_gives(program: Any) -> None:
    units, naive = run(program)
    for a, b in itertools.combinations(range(1, COUNT + 1), 2):
        if not {a, b} & naive.of(0):
            one, other = units.find(np.array([a, b]))
            assert (one == other) == (naive.of(a) is naive.of(b))


@given(program=steps)
def test_live_is_zero_for_what_is_pinned_and_the_smallest_label_otherwise(program: Any) -> None:
    units, naive = run(program)
    labels = np.arange(COUNT + 1)
    assert units.live(labels).tolist() == [
        0 if label in naive.of(0) else min(naive.of(label)) for label in range(COUNT + 1)
    ]


@given(program=steps, more=some)
def test_an_answer_stays_while_the_version_does(program: Any, more: Any) -> None:
    units, _ = run(program)
    labels = np.arange(COUNT + 1)
    before, version = units.live(labels), units.version
    units.unite(np.array(more), np.array(more[::-1]))
    assert units.version > version or np.array_equal(units.live(labels), before)


@given(program=steps)
def test_reasons_are_there_where_something_is_pinned(program: Any) -> None:
    units, _ = run(program)
    labels = np.arange(1, COUNT + 1)
    assert ((units.reasons(labels) > 0) == (units.live(labels) == 0)).all()


def test_the_first_reason_stays() -> None:
    units = Units()
    a = units.fresh(2, 0)
    units.pin(a[:1], 5)
    units.pin(a, 6)
    assert units.reasons(a).tolist() == [5, 6]
    units.unite(a[:1], a[1:])
    assert units.reasons(a).tolist() == [5, 5]


def test_labels_that_do_not_pin() -> None:
    units = Units()
    units.pinning = False
    a = units.fresh(2, 0)
    units.pin(a, 5)
    assert units.live(a).tolist() == [1, 2]


@given(sizes=st.lists(st.integers(0, 700), max_size=6))
def test_fresh_labels_are_new_and_know_their_owner(sizes: list[int]) -> None:
    units = Units()
    made = [units.fresh(n, owner) for owner, n in enumerate(sizes)]
    assert np.concatenate([*made, []]).tolist() == list(range(1, sum(sizes) + 1))
    assert [units.owners(labels) for labels in made] == [
        [owner] if n else [] for owner, n in enumerate(sizes)
    ]
    assert units.owners(np.concatenate([*made, np.zeros(0)]).astype(np.int64)) == [
        o for o, n in enumerate(sizes) if n
    ]


# -- arrays


@st.composite
def labelled(draw: Any) -> Any:
    """Draw an array that may be constant, or have stride 0, along some dimensions."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    own = [draw(st.sampled_from([n, n, 1])) for n in shape]
    labels = np.array(
        draw(st.lists(st.integers(0, 3), min_size=int(np.prod(own)), max_size=int(np.prod(own))))
    ).reshape(own)
    full = np.broadcast_to(labels, shape)
    return full if draw(st.booleans()) else full.copy()


@given(labels=labelled())
def test_compact_drops_just_what_does_not_vary(labels: Any) -> None:
    small = compact(labels)
    assert np.array_equal(np.broadcast_to(small, labels.shape), labels)
    for d, size in enumerate(labels.shape):
        constant = all(
            np.array_equal(labels.take([i], d), labels.take([0], d)) for i in range(size)
        )
        assert small.shape[d] == (1 if constant else size)


@given(labels=labelled())
def test_fields_vary_along_their_dims(labels: Any) -> None:
    small = compact(labels)
    assert (
        Field(small, True).dims
        == set(varied(small))
        == {d for d, n in enumerate(small.shape) if n > 1}
    )


@st.composite
def reshapes(draw: Any) -> tuple[list[int], list[int]]:
    """Draw two shapes with the same number of elements."""
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3, 5]), max_size=6))

    def grouped() -> list[int]:
        cuts = sorted(draw(st.lists(st.integers(0, len(factors)), max_size=4)))
        return [
            int(np.prod(factors[a:b])) for a, b in itertools.pairwise([0, *cuts, len(factors)])
        ]

    return grouped(), grouped()


@given(shapes=reshapes())
def test_blocks_of_a_reshape_are_complete_and_smallest(shapes: Any) -> None:
    old, new = shapes
    blocks = reshape_blocks(old, new)
    assert [d for ins, _ in blocks for d in ins] == [d for d, n in enumerate(old) if n != 1]
    assert [d for _, outs in blocks for d in outs] == [d for d, n in enumerate(new) if n != 1]
    for ins, outs in blocks:
        left, right = np.cumprod([old[d] for d in ins]), np.cumprod([new[d] for d in outs])
        assert left[-1] == right[-1]
        assert not set(left[:-1].tolist()) & set(right[:-1].tolist())


@given(shapes=reshapes())
def test_blocks_of_a_reshape_are_reshaped_apart(shapes: Any) -> None:
    """An index that varies within one block of the old shape varies within that block of the new
    one, as np.reshape says.
    """
    old, new = shapes
    for ins, outs in reshape_blocks(old, new):
        own = [n if d in ins else 1 for d, n in enumerate(old)]
        index = np.arange(int(np.prod(own))).reshape(own)
        moved = np.broadcast_to(index, old).reshape(new)
        alone = index.reshape([n if d in outs else 1 for d, n in enumerate(new)])
        assert np.array_equal(moved, np.broadcast_to(alone, new))


def test_an_element_survives_when_all_its_labels_do() -> None:
    alive = np.array([True, True, False, True])
    rows, columns = np.array([[1], [2]]), np.array([[3, 2, 0]])
    assert alive_mask([rows, columns], alive).tolist() == [
        [True, False, True],
        [False, False, False],
    ]
    assert alive_mask([], alive).all()
