"""The example of training before and after pruning, run on a few digits."""

import pytest
from torch import Tensor

pytest.importorskip("sklearn")
from examples import digits, sparse_training

Data = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.mark.long
def test_it_trains_prunes_and_distils(monkeypatch: pytest.MonkeyPatch) -> None:
    train_images, test_images, train_labels, test_labels = digits.load_data()

    def some() -> Data:
        return train_images[:640], test_images[:100], train_labels[:640], test_labels[:100]

    monkeypatch.setattr(sparse_training, "load_data", some)
    found = sparse_training.main(["--epochs", "3", "--macs", "0.4"])
    assert list(found) == ["dense", "pruned", "distilled"]
    assert found["dense"] > 80
    assert found["distilled"] > max(80, found["pruned"])
