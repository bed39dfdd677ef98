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
    """Every case with every variant; the tests of every change take one variant of a case, in
    turn, the slow ones the others.
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
