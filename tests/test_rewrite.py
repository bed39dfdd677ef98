"""The smaller graph: corrected literals, models with two modes, copies, and names of modules."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from tests.support.checking import check_exact


class Between(nn.Module):
    """Two linear layers over 12 units, and a function between them."""

    def __init__(self, function: Callable[[Tensor], Tensor], out: int = 12) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(5, 12), nn.Linear(out, 5), function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)))


def attend(x: Tensor) -> Tensor:
    q = x.view(x.shape[0], 6, 3, 4).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(x.shape[0], 6, 12)


LITERALS = {
    "view": (lambda x: x.view(-1, 6, 3, 4).relu().view(-1, 6, 12), 12, True),
    "reshape": (lambda x: x.reshape(x.shape[0] * 6, 12).relu().reshape(-1, 6, 12), 12, True),
    "unflatten": (lambda x: x.unflatten(-1, (3, 4)).relu().flatten(2), 12, True),
    "split": (lambda x: torch.cat([p.relu() for p in x.split([5, 7], -1)], -1), 12, True),
    "chunk": (lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1], 6, True),
    "slice": (lambda x: x[..., 2:9], 7, True),
    "narrow": (lambda x: x.narrow(-1, 3, 6), 6, True),
    "roll": (lambda x: x.roll(4, -1), 12, True),
    "pad": (lambda x: F.pad(x, (2, 3)), 17, True),
    "sdpa": (attend, 12, True),
    "mean": (lambda x: x.mean(-1, keepdim=True) * x, 12, True),
    "divisor": (lambda x: x / x.shape[-1], 12, True),
    "scale": (lambda x: x * x.size(-1) ** -0.5, 12, True),
    "layer_norm": (lambda x: F.layer_norm(x, (12,)), 12, False),
    "rms_norm": (lambda x: F.rms_norm(x, (x.shape[-1],)), 12, False),
}


@pytest.mark.parametrize("name", LITERALS)
@pytest.mark.parametrize("channels", [0.5, 0.75])
def test_literals(name: str, channels: float) -> None:
    function, out, zeroable = LITERALS[name]
    check_exact(
        Between(function, out),
        torch.randn(2, 6, 5),
        channels=channels,
        at_most=0.9,
        zeroable=zeroable,
        batches=lambda n: torch.randn(n, 6, 5),
    )


class TwoModes(nn.Module):
    """A model like GoogLeNet: in training, another head and another nesting of the output.

    One layer is never called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.aux, self.head = nn.Linear(5, 12), nn.Linear(12, 3), nn.Linear(12, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).relu()
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


@pytest.fixture
def both() -> Any:
    return fxprune.prune(TwoModes(), torch.randn(2, 5), channels=0.5).model


def test_the_auxiliary_head_trains(both: Any) -> None:
    main, aux = both.train()(torch.randn(4, 5))
    (main.sum() + aux.sum()).backward()
    assert both.get_parameter("aux.weight").grad.shape == (3, 6)
    assert both.eval()(torch.randn(4, 5)).shape == (4, 3)


class Frozen(nn.BatchNorm2d):
    """A batch norm that always stays in evaluation mode."""

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)


class FrozenBelow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3), Frozen(8), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        )

    def train(self, mode: bool = True) -> "FrozenBelow":
        super().train(mode)
        self.stem.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x))


def test_a_train_of_the_users_own_is_kept() -> None:
    model, x = nn.Sequential(FrozenBelow(), nn.ReLU()), torch.randn(2, 3, 8, 8)
    result = fxprune.prune(model, x, channels=0.5, verify=True)
    smaller = copy.deepcopy(result.model)
    for mode in (True, False):
        assert {name: own.training for name, own in smaller.train(mode).named_modules()} == {
            name: own.training for name, own in model.train(mode).named_modules()
        }
    before = smaller.get_buffer("0.body.1.running_mean").clone()
    smaller.train()(x)
    assert torch.equal(smaller.get_buffer("0.body.1.running_mean"), before)


def test_copies_keep_both_modes_and_all_parameters(both: Any) -> None:
    meta_copy, x = copy.deepcopy(both), torch.randn(4, 5)
    assert (
        meta_copy.state_dict().keys()
        == both.state_dict().keys()
        >= {"unused.weight", "unused.bias"}
    )
    assert not {id(p) for p in meta_copy.parameters()} & {id(p) for p in both.parameters()}
    assert torch.equal(meta_copy.eval()(x), both.eval()(x))
    for one, other in zip(meta_copy.train()(x), both.train()(x), strict=True):
        assert torch.equal(one, other)


def test_plain_tensors_are_copied_too() -> None:
    table = torch.arange(6.0)[:, None]
    model = fxprune.prune(Between(lambda x: x * table), torch.randn(2, 6, 5), channels=0.5).model
    x = torch.randn(3, 6, 5)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_groups_that_keep_one_input_each_still_sum(kind: Any) -> None:
    """The remaining weight looks depthwise, but each output still is a unit of its own."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.ReLU(),
        kind(4, 4, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    )
    pruned = fxprune.prune(net, torch.randn(2, 3, 6, 6), channels=0.5, verify=True)
    assert pruned.report.error is not None
    assert pruned.report.error <= 1e-9
    assert pruned.plan.pinned_nodes == ()
    assert pruned.model.get_submodule("2").weight.shape == (2, 1, 3, 3)


class Nested(nn.Module):
    """Two groups over all channels, and two over some of them that lie inside the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 1)
        self.all, self.some = nn.Conv2d(12, 4, 1, groups=2), nn.Conv2d(8, 6, 1, groups=2)
        self.head = nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        some = torch.cat([x[:, :4], x[:, 6:10]], dim=1)
        return self.head(torch.cat([self.all(x), self.some(some)], dim=1).relu())


@pytest.mark.parametrize(
    "budget", [{"channels": 0.4, "scope": "global"}, {"macs": 0.3}, {"params": 0.3}]
)
def test_groups_within_groups(budget: dict[str, Any]) -> None:
    pruned = fxprune.prune(Nested(), torch.randn(2, 3, 4, 4), verify=True, **budget)
    assert pruned.report.error is not None
    assert pruned.report.error <= 1e-9
    assert pruned.plan.pinned_nodes == ()


class InContainers(nn.Module):
    """Nested containers, and a layer that is named as generated code would name one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(3))
        )
        self.in_body = nn.Conv2d(4, 4, 1)
        self.scale = nn.Module()
        self.scale.factor = nn.Parameter(torch.rand(4, 1, 1))
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, in_body_: Tensor) -> Tensor:
        x = self.body(self.in_body(in_body_)) * self.scale.factor
        return self.head(x + self.body[1][0](x))


def test_each_container_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = fxprune.prune(InContainers().eval(), x := torch.randn(2, 4, 5, 5), channels=0.5).model
    asked: list[str] = []
    ask = nn.Module.__getattr__

    def noting(module: nn.Module, name: str) -> Any:
        found = ask(module, name)
        if isinstance(found, nn.Module) and (found._modules or name == "scale"):
            asked.append(name)
        return found

    for model in (pruned, copy.deepcopy(pruned), fxprune.deploy(pruned)):
        asked.clear()
        with monkeypatch.context() as during:
            during.setattr(nn.Module, "__getattr__", noting)
            model(x)
        assert sorted(asked) == ["0", "1", "2", "body", "scale"]
    check_exact(InContainers().eval(), x, channels=0.5, at_most=0.7)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_reads_it() -> None:
    pruned = fxprune.prune(InContainers().eval(), x := torch.randn(2, 4, 5, 5), channels=0.5).model
    for model in (pruned, fxprune.deploy(pruned)):
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))


class WritesIntoACopy(nn.Module):
    """A write into a reshaped tensor that is a copy, so that nothing else sees the write.

    The features have channels last in memory, so flattening them copies them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.LayerNorm(4),
            nn.Linear(4, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x).permute(0, 2, 3, 1)).movedim(-1, 1) + 0.1
        x.flatten(1).mul_(0.5)
        return self.head(x.mean((2, 3)))


def test_a_copy_stays_one_where_one_channel_is_left() -> None:
    """With one channel, both layouts are the same in memory.

    Without an explicit clone in the graph, the copy would become a view.
    """
    torch.manual_seed(0)
    model = WritesIntoACopy().eval()
    pruned = check_exact(
        model, torch.randn(2, 3, 6, 6), channels=0.25, at_most=0.4, zeroable=False
    ).model
    assert pruned.get_parameter("norm.weight").numel() == 1
    assert "clone" in pruned.code
    with pytest.raises(
        AssertionError, match=r"pruned for inputs with \(add.size\(3\) == 1\) == False"
    ):
        pruned(torch.randn(2, 3, 6, 1, dtype=torch.float64))


class Squeezes(nn.Module):
    """A squeeze of the spatial axes that also drops a batch axis of size one."""

    def __init__(self, gate: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.linear, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Conv2d(8, 4, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(x * self.gate(self.linear, x.mean((2, 3), True).squeeze()))


def test_axes_that_are_dropped_with_a_batch_of_one() -> None:
    """A batch of one is refused by a guard if the graph depends on the rank after squeezing.

    A graph that does not depend on it takes any batch.
    """
    x, one = torch.randn(2, 3, 6, 6), torch.randn(1, 3, 6, 6)
    by_rank, by_all = (
        (lambda m, y: (y := m(y)).view(*y.shape, 1, 1)),
        (lambda m, y: m(y)[..., None, None]),
    )
    for gate, taken in ((by_rank, False), (by_all, True)):
        model = Squeezes(gate).eval()
        pruned = fxprune.prune(model, x, channels=0.5, verify=True).model
        assert pruned(torch.randn(5, 3, 6, 6)).shape == (5, 4, 4, 4)
        if taken:
            assert pruned(one).shape == model(one).shape
        else:
            with pytest.raises(AssertionError, match=r"squeeze.dim\(\) == 2"):
                pruned(one)
