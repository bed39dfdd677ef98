"""The knapsack solver, compared with a search over all combinations."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from fxprune.select.knapsack import best_options

classes = st.lists(
    st.lists(st.tuples(st.integers(0, 50), st.integers(-20, 60)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


@settings(max_examples=200, deadline=None)
@given(classes, st.integers(-40, 200))
def test_no_combination_that_fits_is_worth_more(
    options: list[list[tuple[int, int]]], capacity: int
) -> None:
    worth, cost = ([[own[place] for own in one] for one in options] for place in (0, 1))
    chosen = best_options(worth, cost, capacity)
    fitting = [
        own for own in itertools.product(*options) if sum(price for _, price in own) <= capacity
    ]
    if chosen is None:
        assert not fitting
        return
    taken = [own[option] for own, option in zip(options, chosen, strict=True)]
    assert sum(price for _, price in taken) <= capacity
    # Costs are rounded up to 1/4000 of the spare capacity, so at most that much of it per class
    # stays unused.
    spare = capacity - sum(min(price for _, price in own) for own in options)
    surely = [
        own
        for own in fitting
        if sum(price for _, price in own) <= capacity - len(options) * spare / 4000
    ]
    assert sum(value for value, _ in taken) >= max(
        (sum(value for value, _ in own) for own in surely), default=0
    )


def test_what_the_cheapest_do_not_fit_into() -> None:
    assert best_options([[1.0], [1.0, 2.0]], [[3.0], [2.0, 9.0]], 4.9) is None
    assert best_options([[1.0], [1.0, 2.0]], [[3.0], [2.0, 9.0]], 5.0) == [0, 0]
    assert best_options([], [], 0.0) == []
