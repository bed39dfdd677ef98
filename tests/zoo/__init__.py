"""Small networks, each around one construct that a pruner must understand."""

import pytest

from tests.zoo import attention, blocks, convolutional, flow, shapes, tokens
from tests.zoo.case import Case

CASES: tuple[Case, ...] = (
    *convolutional.CASES,
    *blocks.CASES,
    *attention.CASES,
    *tokens.CASES,
    *shapes.CASES,
    *flow.CASES,
)


def in_turn(names: str, *variants: object) -> pytest.MarkDecorator:
    """Return a mark that runs a test on every case with every variant.

    One variant of each case, in turn, belongs to the tests of every change. The others are slow.
    """
    return pytest.mark.parametrize(
        ("case", names),
        [
            pytest.param(
                case,
                own,
                id=f"{case.name}-{own}",
                marks=() if n % len(variants) == place else pytest.mark.slow,
            )
            for n, case in enumerate(CASES)
            for place, own in enumerate(variants)
        ],
    )
