"""Small networks, each around one construct that a pruner must understand."""

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
