"""Example inputs in all their forms."""

from typing import Any

import pytest
import torch

from fxprune.inputs import as_call, batch_size, drawn

IMAGES = [torch.zeros(3, 8, 8), torch.zeros(3, 6, 9)]


@pytest.mark.parametrize(
    ("example", "rows"),
    [
        (torch.zeros(5, 2), 5),
        ((torch.tensor(1.0), {"x": torch.zeros(4, 2)}), 4),
        ({"images": IMAGES, "sizes": torch.zeros(7)}, 2),
        ((IMAGES,), 2),
        ((1, None), 1),
    ],
)
def test_how_many_examples(example: Any, rows: int) -> None:
    assert batch_size(example) == rows
    assert batch_size(drawn(example)) == rows


def test_another_batch_of_a_tensor() -> None:
    x = torch.ones(2, 3, dtype=torch.float64)
    new = drawn(x, batch=5)
    assert new.shape == (5, 3)
    assert new.dtype == torch.float64
    assert new.unique().numel() == 15
    assert torch.equal(new, drawn(x, batch=5))
    assert not torch.equal(new, drawn(x, batch=5, seed=1))


def test_another_batch_of_images_of_several_sizes() -> None:
    (images,) = drawn((IMAGES,), batch=3)
    assert [tuple(image.shape) for image in images] == [(3, 8, 8), (3, 6, 9), (3, 8, 8)]


def test_a_list_at_the_top_is_one_argument() -> None:
    assert batch_size(IMAGES) == 2
    new = drawn(IMAGES, batch=3)
    assert isinstance(new, list)
    assert [tuple(image.shape) for image in new] == [(3, 8, 8), (3, 6, 9), (3, 8, 8)]


def test_only_what_has_a_row_per_example_changes() -> None:
    new = drawn({"x": torch.zeros(2, 3), "index": torch.tensor([1, 0]), "table": torch.zeros(3, 3), "scale": 2.0}, batch=4)
    assert {name: tuple(t.shape) for name, t in new.items() if isinstance(t, torch.Tensor)} == {
        "x": (4, 3),
        "index": (4,),
        "table": (3, 3),
    }
    assert new["index"].tolist() == [1, 0, 1, 0]
    assert new["scale"] == 2.0


def test_calls() -> None:
    x = torch.zeros(1)
    assert as_call(x) == ((x,), {})
    assert as_call((x, 2)) == ((x, 2), {})
    assert as_call([x, 2]) == (([x, 2],), {})  # a list is one argument that is a list
    assert as_call({"x": x}) == ((), {"x": x})
