"""Tests of one operation in many spellings.

Numbers in a call that describe channels are corrected, or the channels are pinned. Each case calls
an operation along the channel axis of features of shape (batch, 12 channels, 3, 4), and names a
size or a position there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxprune
from fxprune.ops.calls import call_of
from tests.support.checking import TOLERANCE, masked, randomise, relative_error

aten = torch.ops.aten


@dataclass(frozen=True)
class Case:
    name: str
    function: Callable[[Tensor], Tensor]
    width: int = 12
    pruned: bool | None = True  # None: either is right


def held(name: str, function: Callable[[Tensor], Tensor], width: int = 12) -> Case:
    return Case(name, function, width, pruned=False)


def last(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the function, called with the channels on the last axis."""
    return lambda x: function(x.movedim(1, -1)).movedim(-1, 1)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def summed_padding(x: Tensor) -> Tensor:
    """Pad channels by a list that is computed from pairs, one pair for each dimension."""
    pad = [(0, 0)] * x.dim()
    pad[1] = (1, 3)
    return F.pad(x, sum(pad[::-1], ()))


CASES = [
    # padding
    Case("F.pad", lambda x: F.pad(x, (0, 0, 0, 0, 1, 3)), 16),
    Case("F.pad by keyword", lambda x: F.pad(input=x, pad=[0, 0, 0, 0, 1, 3], value=0.5), 16),
    Case("torch.constant_pad_nd", lambda x: torch.constant_pad_nd(x, (0, 0, 0, 0, 1, 3)), 16),
    Case(
        "aten.constant_pad_nd",
        lambda x: aten.constant_pad_nd.default(x, [0, 0, 0, 0, 1, 3], 2.0),
        16,
    ),
    Case("aten.pad", lambda x: aten.pad.default(x, [0, 0, 0, 0, 1, 3]), 16),
    Case("nn.ConstantPad3d", lambda x: nn.ConstantPad3d((0, 0, 0, 0, 1, 3), 0.5)(x), 16),
    Case("channels last", last(lambda x: F.pad(x, (2, 2))), 16),
    Case("of pixels", lambda x: F.pad(x, (1, 1, 2, 2))[:, :, 2:-2, 1:-1]),
    Case("computed list", summed_padding, 16),
    held("cropped", lambda x: F.pad(x, (0, 0, 0, 0, -2, -2)), 8),
    # ranges
    Case("x.narrow", lambda x: x.narrow(1, 2, 7), 7),
    Case("torch.narrow by keyword", lambda x: torch.narrow(input=x, dim=-3, start=2, length=7), 7),
    Case("torch.Tensor.narrow", lambda x: torch.Tensor.narrow(x, 1, 2, 7), 7),
    Case("aten.narrow", lambda x: aten.narrow.default(x, 1, 2, 7), 7),
    Case("torch.narrow_copy", lambda x: torch.narrow_copy(x, 1, 2, 7), 7),
    Case("x[:, 2:9]", lambda x: x[:, 2:9], 7),
    Case("aten.slice", lambda x: aten.slice.Tensor(x, 1, 2, 9), 7),
    Case("aten.slice, to the end", lambda x: aten.slice.Tensor(x, 1, -7), 7),
    Case("torch.slice_copy", lambda x: torch.slice_copy(x, 1, 2, 9), 7),
    # pieces
    Case("x.split", lambda x: torch.cat([p.relu() for p in x.split(5, 1)], 1)),
    Case(
        "x.split by keyword",
        lambda x: torch.cat([p.relu() for p in x.split(split_size=[5, 7], dim=1)], 1),
    ),
    Case(
        "torch.split",
        lambda x: torch.cat(
            [p.relu() for p in torch.split(x, split_size_or_sections=5, dim=1)], 1
        ),
    ),
    Case("torch.chunk", lambda x: torch.cat(torch.chunk(x, 5, dim=1)[::-1], 1)),
    Case("torch.tensor_split", lambda x: torch.cat(torch.tensor_split(x, (2, 7), dim=1)[::-1], 1)),
    Case("x.tensor_split", lambda x: torch.cat(x.tensor_split(5, 1)[::-1], 1)),
    Case("torch.hsplit", lambda x: torch.cat(torch.hsplit(x, [3, 4])[::-1], 1)),
    Case(
        "x.dsplit",
        last(lambda x: torch.cat(x[:, 0].dsplit([4])[::-1], -1)[:, None].expand(-1, 3, -1, -1)),
    ),
    Case("aten.split", lambda x: torch.cat(aten.split.Tensor(x, 5, 1)[::-1], 1)),
    Case(
        "aten.split_with_sizes",
        lambda x: torch.cat(aten.split_with_sizes.default(x, [5, 7], 1)[::-1], 1),
    ),
    Case("torch.unsafe_chunk", lambda x: torch.cat(torch.unsafe_chunk(x, 2, 1)[::-1], 1)),
    Case("torch.split_copy", lambda x: torch.cat(torch.split_copy(x, 5, 1)[::-1], 1)),
    Case("x.select", lambda x: x + x.select(1, 3)[:, None]),
    Case("torch.select within blocks", lambda x: torch.select(x.view(-1, 3, 4, 3, 4), 1, 2), 4),
    Case("aten.select within blocks", lambda x: aten.select.int(x.view(-1, 3, 4, 3, 4), 1, -1), 4),
    Case("torch.unbind of blocks", lambda x: sum(torch.unbind(x.view(-1, 3, 4, 3, 4), 1)), 4),
    # layouts
    Case("x.view", lambda x: x.view(x.shape[0], 12, 12).relu().view(-1, 12, 3, 4)),
    Case(
        "x.view by keyword",
        lambda x: x.contiguous().view(size=(-1, 4, 3, 3, 4)).relu().flatten(1, 2),
    ),
    Case("torch.reshape", lambda x: torch.reshape(x, (-1, 12, 12)).reshape(x.shape)),
    Case(
        "torch.Tensor.view", lambda x: torch.Tensor.view(x, -1, 12, 12).relu().view(-1, 12, 3, 4)
    ),
    Case("aten.view", lambda x: aten.view.default(x, [-1, 12, 12]).relu().view(-1, 12, 3, 4)),
    Case(
        "aten.reshape", lambda x: aten.reshape.default(x, [-1, 12, 12]).relu().view(-1, 12, 3, 4)
    ),
    Case(
        "aten._unsafe_view",
        lambda x: aten._unsafe_view.default(x, [-1, 12, 12]).relu().view(-1, 12, 3, 4),
    ),
    Case("torch.view_copy", lambda x: torch.view_copy(x, [-1, 12, 12]).relu().view(-1, 12, 3, 4)),
    Case(
        "torch.unflatten",
        lambda x: torch.unflatten(input=x, dim=1, sizes=(3, 4)).relu().flatten(1, 2),
    ),
    Case("x.unflatten", lambda x: x.unflatten(-3, [4, -1]).relu().flatten(1, 2)),
    Case("nn.Unflatten", lambda x: nn.Unflatten(1, (3, 4))(x).relu().flatten(1, 2)),
    # sizes
    Case("x.expand", lambda x: x * pooled(x).expand(-1, 12, 3, 4)),
    Case("torch.Tensor.expand", lambda x: x * torch.Tensor.expand(pooled(x), -1, 12, -1, 4)),
    Case("x.expand by keyword", lambda x: x * pooled(x).expand(size=(-1, 12, 3, 4))),
    Case("aten.expand", lambda x: x * aten.expand.default(pooled(x), [-1, 12, 3, 4])),
    Case("torch.broadcast_to", lambda x: x * torch.broadcast_to(pooled(x), (-1, 12, 3, 4))),
    Case("torch.expand_copy", lambda x: x * torch.expand_copy(pooled(x), (-1, 12, 3, 4))),
    Case("x.repeat", lambda x: x.repeat(1, 2, 1, 1), 24),
    Case("torch.tile", lambda x: torch.tile(x, dims=(2, 1, 1)), 24),
    Case("aten.repeat", lambda x: aten.repeat.default(x, [1, 2, 1, 1]), 24),
    Case("torch.repeat_interleave", lambda x: torch.repeat_interleave(x, repeats=2, dim=1), 24),
    Case("x.repeat_interleave", lambda x: x.repeat_interleave(2, 1), 24),
    Case("x.new_ones", lambda x: x + x.new_ones(12, 1, 1)),
    Case("torch.full", lambda x: x * torch.full(size=(12, 3, 4), fill_value=0.5, dtype=x.dtype)),
    Case("torch.zeros", lambda x: x + torch.zeros(12, 1, 1, dtype=x.dtype)),
    Case(
        "x.expand of what has no channels",
        lambda x: x * x.mean(1, keepdim=True).expand(-1, 12, -1, -1),
    ),
    Case(
        "aten.ones", lambda x: x * aten.ones.default([12, 3, 4], dtype=torch.float64), pruned=None
    ),
    # orders
    Case("x.roll", lambda x: x.roll(4, 1)),
    Case("torch.roll", lambda x: torch.roll(x, shifts=(4, 1), dims=(1, 3))),
    Case("aten.roll", lambda x: aten.roll.default(x, [-3], [1])),
    Case("torch.flip", lambda x: torch.flip(x, dims=(1,))),
    Case("F.channel_shuffle", lambda x: F.channel_shuffle(x, 3)),
    Case("aten.channel_shuffle", lambda x: aten.channel_shuffle.default(x, 3)),
    Case("torch.permute_copy", lambda x: torch.permute_copy(x, (0, 1, 3, 2)).mT),
    # axes with one remaining position
    Case("x.squeeze", lambda x: x[:, :2].contiguous().squeeze(), 2),
    Case("x.squeeze by dims", lambda x: x[:, :2].squeeze((1,)), 2),
    # convolutions by name
    Case(
        "aten.conv2d",
        lambda x: aten.conv2d.default(
            x, torch.ones(12, 1, 1, 1, dtype=x.dtype), None, [1, 1], [0, 0], [1, 1], 12
        ),
    ),
    Case(
        "aten.convolution",
        lambda x: aten.convolution.default(
            x, x.new_ones(12, 1, 1, 1), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 12
        ),
    ),
    Case(
        "F.conv2d by keyword",
        lambda x: F.conv2d(input=x, weight=x.new_ones(12, 1, 1, 1), groups=x.shape[1]),
    ),
]


class Between(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.a, self.b, self.case = (
            nn.Conv2d(3, 12, 3, padding=1),
            nn.Conv2d(case.width, 2, 1),
            case,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.case.function(self.a(x)))


@pytest.mark.filterwarnings("ignore::fxprune.FxpruneWarning")  # where nothing can be removed
@pytest.mark.parametrize("channels", [0.5, 0.1])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_spelling_is_exact_or_pinned(case: Case, channels: float) -> None:
    torch.manual_seed(0)
    model = randomise(Between(case)).eval()
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    pruned = fxprune.prune(model, x, channels=channels)
    if channels == 0.5 and case.pruned is not None:
        assert (pruned.model.get_parameter("a.bias").numel() < 12) == case.pruned, pruned.report
    reference = masked(model, pruned.model)
    for example in (x, torch.randn(3, 3, 3, 4, dtype=torch.float64)):
        with torch.no_grad():
            assert relative_error(pruned.model(example), reference(example)) <= TOLERANCE
    if channels == 0.5:
        assert fxprune.verify(model, pruned, x).error <= TOLERANCE


def test_literal_sizes_hold_what_they_are_laid_out_from() -> None:
    """A graph with literal sizes refuses images of another width.

    At twice the width the original silently mixes rows of two images. A graph with fewer channels
    would mix other rows.
    """
    model = randomise(
        Between(Case("", lambda x: x.view(-1, 12, 12).relu().view(-1, 12, 3, 4)))
    ).eval()
    pruned = fxprune.prune(model, torch.randn(2, 3, 3, 4, dtype=torch.float64), channels=0.5).model
    wide = torch.randn(2, 3, 3, 8, dtype=torch.float64)
    assert model(wide).shape == (4, 2, 3, 4)
    with pytest.raises(AssertionError, match="pruned for inputs with"):
        pruned(wide)


@pytest.mark.parametrize("kind", [lambda n: nn.ConstantPad3d(n, 0.5), nn.ZeroPad3d])
def test_modules_that_pad_channels(kind: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 12, 3), kind((0, 0, 1, 1, 2, 3)), nn.Conv2d(17, 2, 1))
    model = randomise(net).eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    pruned = fxprune.prune(model, x, channels=0.5)
    assert sum(pruned.model.get_submodule("1").padding) < 7
    assert pruned.model.get_parameter("0.bias").numel() == 6
    with torch.no_grad():
        assert relative_error(pruned.model(x), masked(model, pruned.model)(x)) <= TOLERANCE


X = torch.zeros(2, 12)
SPELLINGS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (torch.narrow, (X, 1, 2, 7), {}),
    ("narrow", (X, 1), {"start": 2, "length": 7}),
    (torch.narrow, (), {"input": X, "dim": 1, "start": 2, "length": 7}),
    (aten.narrow.default, (X, 1, 2, 7), {}),
]


@pytest.mark.parametrize(("target", "args", "kwargs"), SPELLINGS)
def test_a_call_keeps_its_spelling(target: Any, args: Any, kwargs: Any) -> None:
    """A corrected call keeps its target, and passes its arguments as before."""
    graph = fx.Graph()
    node = (
        graph.call_method(target, args, kwargs)
        if isinstance(target, str)
        else graph.call_function(target, args, kwargs)
    )
    call = call_of(node, [(aten.narrow.default, (X, 1, 2, 7), {})], lambda value: value)
    assert call is not None
    assert call.name == "narrow"
    new_target, new_args, new_kwargs = call.with_({"start": 3})
    assert new_target is node.target
    assert {
        **dict(zip(("input", "dim", "start", "length"), new_args, strict=False)),
        **new_kwargs,
    }["start"] == 3
    assert len(new_args) == len(args)
    assert new_kwargs.keys() == kwargs.keys()


@pytest.mark.parametrize(
    ("args", "changed", "wanted"),
    [
        ((X, 3, 8), [3, 4], (X, 3, 4)),
        ((X, (3, 8)), [3, 4], (X, (3, 4))),
        ((X, [3, 8]), [3, 4], (X, [3, 4])),
    ],
)
def test_sizes_stay_as_they_were_given(args: Any, changed: Any, wanted: Any) -> None:
    call = call_of(
        fx.Graph().call_method("view", args),
        [(aten.view.default, (X, [3, 8]), {})],
        lambda value: value,
    )
    assert call is not None
    assert call.with_({"size": changed})[1] == wanted


def test_a_node_whose_arguments_are_not_those_of_the_op_is_no_call() -> None:
    node = fx.Graph().call_function(torch.narrow, (X, 1, 2, 7))
    old = lambda value: value  # noqa: E731
    assert call_of(node, [(aten.narrow.default, (X, 1, 2, 5), {})], old) is None
    assert call_of(node, [(aten.narrow.default, (X.clone(), 1, 2, 7), {})], old) is None
    assert call_of(node, [(aten.relu.default, (X,), {})], old) is None
    assert call_of(node, [], old) is None
    assert call_of(node, [(aten.narrow.default, (X, 1, 2, 7), {})] * 2, old) is None
