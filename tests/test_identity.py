"""Dictionaries that compare their keys, here tensors, by identity."""

import gc
import weakref

import torch

from fxprune.common.identity import IdentityMap


def test_equal_tensors_are_two_keys() -> None:
    one, other = torch.zeros(2), torch.zeros(2)
    noted = IdentityMap([(one, "one")])
    assert one in noted
    assert other not in noted
    noted[other] = "other"
    assert [noted[one], noted[other], len(noted)] == ["one", "other", 2]
    assert list(noted.values()) == ["one", "other"]
    assert noted.get(3, "nothing") == "nothing"


def test_a_tensor_that_is_noted_stays_alive_so_that_no_other_gets_its_id() -> None:
    noted: IdentityMap[torch.Tensor, int] = IdentityMap()
    for number in range(100):
        noted[torch.zeros(1)] = number
    gc.collect()
    assert len(noted) == 100
    assert all(torch.zeros(1) not in noted for _ in range(100))


def test_what_is_discarded_is_let_go() -> None:
    noted: IdentityMap[torch.Tensor, int] = IdentityMap()
    tensor = torch.zeros(1)
    noted[tensor] = 1
    gone = weakref.ref(tensor)
    noted.discard(tensor)
    noted.discard(tensor)
    del tensor
    gc.collect()
    assert gone() is None
    assert len(noted) == 0
