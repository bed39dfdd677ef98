"""What scripted functions and ``torch.func`` do below Python: followed for any batch, and held to the sizes that they read."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from tests.support.checking import TOLERANCE, masked, randomise, relative_error


def normed(x: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)


def spread(x: Tensor) -> Tensor:
    return x * torch.var(x, [1, 2], correction=0, keepdim=True)


def swapped(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.cat([b, a], 1)


def sliced(x: Tensor) -> Tensor:
    return torch.cat([x[:, 2:9], x[:, :5]], 1)


def padded(x: Tensor) -> Tensor:
    return F.pad(x, [0, 0, 0, 0, 1, 2])[:, :12]


def rolled(x: Tensor) -> Tensor:
    return x.roll([3], [1])


def grouped(x: Tensor) -> Tensor:
    return x.view(x.shape[0], 3, 4, x.shape[2], x.shape[3]).relu().flatten(1, 2)


def attended(x: Tensor) -> Tensor:
    q = x.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(x.shape)


def expanded(x: Tensor) -> Tensor:
    return x * x.mean([2, 3], keepdim=True).expand(-1, 12, 3, 4)


def scaled(x: Tensor) -> Tensor:
    return x * float(x.shape[1]) ** -0.5


FUNCTIONS = (normed, spread, swapped, sliced, padded, rolled, grouped, attended, expanded, scaled)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch.jit is deprecated
    SCRIPTED = {function.__name__: torch.jit.script(function) for function in FUNCTIONS}


def by_script(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: SCRIPTED[function.__name__](x)


def by_vmap(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return torch.vmap(lambda row: function(row[None]).squeeze(0))


class Between(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 2, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)))


@pytest.mark.parametrize("how", [by_script, by_vmap])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_channels_go_and_any_batch_runs(function: Callable[[Tensor], Tensor], how: Any) -> None:
    torch.manual_seed(0)
    model = randomise(Between(how(function))).eval()
    pruned = fxprune.prune(model, torch.randn(2, 3, 3, 4, dtype=torch.float64), channels=0.5).model
    assert pruned.get_parameter("a.bias").numel() < 12
    for batch in (2, 3, 5):
        x = torch.randn(batch, 3, 3, 4, dtype=torch.float64)
        with torch.no_grad():
            assert relative_error(pruned(x), masked(model, pruned)(x)) <= TOLERANCE


READS: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda row: row.shape[-1],
    "size": lambda row: row.size(1),
    "size()": lambda row: row.size()[2],
    "numel": lambda row: row.numel(),
    "len": lambda row: len(row[0]),
}


@pytest.mark.parametrize("name", READS)
def test_sizes_that_are_read_inside_of_vmap_are_held(name: str) -> None:
    read = READS[name]
    model = randomise(Between(torch.vmap(lambda row: row / read(row)))).eval()
    pruned = fxprune.prune(model, torch.randn(2, 3, 3, 4, dtype=torch.float64), channels=0.5).model
    x = torch.randn(5, 3, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(pruned(x), masked(model, pruned)(x)) <= TOLERANCE
        with pytest.raises(AssertionError, match="traced for inputs with"):
            pruned(torch.randn(2, 3, 6, 5, dtype=torch.float64))


def test_what_is_split_below_is_held() -> None:
    model = randomise(Between(by_vmap(attended))).eval()
    pruned = fxprune.prune(model, torch.randn(2, 3, 3, 4, dtype=torch.float64), channels=0.5).model
    with torch.no_grad(), pytest.raises(AssertionError, match="traced for inputs with"):
        pruned(torch.randn(2, 3, 6, 5, dtype=torch.float64))
