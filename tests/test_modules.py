"""Every network of the zoo is pruned exactly, and to the size that it has at half its width."""

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.support.checking import call, check_exact, tensors
from tests.zoo import CASES, in_turn
from tests.zoo.case import Case

parametrised = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@parametrised
def test_half_the_channels(case: Case) -> None:
    torch.manual_seed(0)
    check_exact(
        case.build(case.width),
        case.inputs(2),
        at_most=case.bound(),
        zeroable=case.zeroable,
        batches=case.inputs,
    )


@in_turn("channels", 0.3, 0.8)
def test_other_shares(case: Case, channels: float) -> None:
    """Shares that give odd widths are exact, too.

    A share below one half must remove about as much as one half does, a larger one must remove
    something.
    """
    torch.manual_seed(1)
    at_most = case.bound() + 0.01 if channels < 0.5 else 0.97
    check_exact(
        case.build(case.width),
        case.inputs(2),
        channels=channels,
        at_most=at_most,
        zeroable=case.zeroable,
    )


@parametrised
def test_the_zoo_itself(case: Case) -> None:
    """The networks run at any batch size, and their bounds are neither too low nor too high."""
    model = case.build(case.width).eval()
    for batch in (1, 2, 5):
        outputs = tensors(call(model, case.inputs(batch)))
        assert outputs
        assert all(output.shape[0] == batch for output in outputs)
    assert all(leaf.shape[0] == 2 for leaf in pytree.tree_leaves(case.inputs(2)))
    assert 0.2 < case.bound() < 0.7


def test_names_are_unique() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
