"""Reductions over a channel axis that is pruned.

Each reduction either gives what the original gives with removed channels set to zero, or pins the
channels. A row of the table is one spelling of one operation, applied to features of shape (batch,
12 channels, 3, 4). ``pruned`` says whether channels can be removed. They cannot if a zero affects
the result and no correction is possible (a minimum, an ordering, a softmax).
"""

import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from tests.support.checking import TOLERANCE, masked, randomise, relative_error

CHANNELS = 12
aten = torch.ops.aten


@dataclass(frozen=True)
class Case:
    name: str
    function: Callable[[Tensor], Any]
    pruned: bool = True
    norm: bool = False  # returns features of the same shape, which the next layer reads


def norm(name: str, function: Callable[[Tensor], Any]) -> Case:
    return Case(name, function, norm=True)


def exact(name: str, function: Callable[[Tensor], Any]) -> Case:
    return Case(name, function)


def held(name: str, function: Callable[[Tensor], Any]) -> Case:
    return Case(name, function, pruned=False)


def groups(x: Tensor, count: int = 3) -> Tensor:
    return x.reshape(x.shape[0], count, x.shape[1] // count, *x.shape[2:])


def evo_norm(x: Tensor) -> Tensor:
    """Normalise as EvoNorm-S0 does, by the standard deviation of each group."""
    std = (groups(x).var(dim=(2, 3, 4), unbiased=False, keepdim=True) + 1e-5).sqrt()
    return (groups(x * torch.sigmoid(2 * x)) / std).reshape(x.shape)


def by_hand(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


CASES = [
    # the variance, in every spelling
    exact("x.var(1)", lambda x: x.var(1)),
    exact("x.var(-3)", lambda x: x.var(-3)),
    exact("x.var(dim=1)", lambda x: x.var(dim=1)),
    exact("x.var((1,))", lambda x: x.var((1,))),
    exact("x.var(1, False)", lambda x: x.var(1, False)),
    exact("x.var(1, True, True)", lambda x: x.var(1, True, True)),
    exact("x.var(1, keepdim=True)", lambda x: x.var(1, keepdim=True)),
    exact("x.var(1, unbiased=False)", lambda x: x.var(1, unbiased=False)),
    exact("x.var(1, correction=0)", lambda x: x.var(1, correction=0)),
    exact("x.var(1, correction=None)", lambda x: x.var(1, correction=None)),
    exact("x.var()", lambda x: x.var()),
    exact("x.var(False)", lambda x: x.var(False)),
    exact("x.var(unbiased=False)", lambda x: x.var(unbiased=False)),
    exact("x.var(dim=None)", lambda x: x.var(dim=None)),
    exact("x.var((1, 2, 3))", lambda x: x.var((1, 2, 3))),
    exact("x.var([-3, -1])", lambda x: x.var([-3, -1])),
    exact("x.flatten(1).var(1)", lambda x: x.flatten(1).var(1)),
    exact("torch.var(x, 1)", lambda x: torch.var(x, 1)),
    exact("torch.var(input=x, dim=1)", lambda x: torch.var(input=x, dim=1)),
    exact("torch.var(x, axis=1)", lambda x: torch.var(x, axis=1)),
    exact(
        "torch.var(x, dim=(1, 2), correction=0, keepdim=True)",
        lambda x: torch.var(x, dim=(1, 2), correction=0, keepdim=True),
    ),
    exact("torch.var(x, dim=1, correction=0.5)", lambda x: torch.var(x, dim=1, correction=0.5)),
    exact("torch.Tensor.var(x, 1)", lambda x: torch.Tensor.var(x, 1)),
    exact("aten.var.correction(x, [1])", lambda x: aten.var.correction(x, [1], correction=0)),
    exact("aten.var.dim(x, [1])", lambda x: aten.var.dim(x, [1], False)),
    held("x.var(1, correction=2)", lambda x: x.var(1, correction=2)),
    # reductions of values that are not zero for removed channels
    held("(x + 1).var(1)", lambda x: (x + 1).var(1)),
    held("x.exp().std(1)", lambda x: x.exp().std(1)),
    held("x.sigmoid().mean(1)", lambda x: x.sigmoid().mean(1)),
    # standard deviations, and deviations or variances together with means
    exact("x.std(1)", lambda x: x.std(1)),
    exact("x.std()", lambda x: x.std()),
    exact("x.std(1, False, True)", lambda x: x.std(1, False, True)),
    exact("torch.std(x, (1, 3), keepdim=True)", lambda x: torch.std(x, (1, 3), keepdim=True)),
    exact("aten.std.correction(x, [1])", lambda x: aten.std.correction(x, [1])),
    exact("torch.var_mean(x, 1)", lambda x: torch.var_mean(x, 1)),
    exact("torch.var_mean(x)", lambda x: torch.var_mean(x)),
    exact(
        "torch.var_mean(x, dim=(-3, -2))",
        lambda x: torch.var_mean(x, dim=(-3, -2), correction=0, keepdim=True),
    ),
    exact("torch.std_mean(x, 1, False)", lambda x: torch.std_mean(x, 1, False)),
    exact("torch.std_mean(x, unbiased=False)", lambda x: torch.std_mean(x, unbiased=False)),
    # means
    exact("x.mean(1)", lambda x: x.mean(1)),
    exact("x.mean()", lambda x: x.mean()),
    exact("x.mean(dim=(-3, -1), keepdim=True)", lambda x: x.mean(dim=(-3, -1), keepdim=True)),
    exact("torch.mean(x, 1, dtype=float64)", lambda x: torch.mean(x, 1, dtype=torch.float64)),
    exact("aten.mean.dim(x, [1])", lambda x: aten.mean.dim(x, [1])),
    exact("x.square().mean(1)", lambda x: x.square().mean(1)),
    held("torch.nanmean(x, 1)", lambda x: torch.nanmean(x, 1)),
    # complete normalisations
    norm("normalised by var_mean", by_hand),
    norm("normalised by std", lambda x: x / (x.std(1, keepdim=True) + 1e-5)),
    norm("root mean square", lambda x: x * (x.pow(2).mean(1, keepdim=True) + 1e-6).rsqrt()),
    norm("evo_norm", evo_norm),
    norm(
        "evo_norm, expanded",
        lambda x: (
            x * groups(x).std((2, 3, 4), keepdim=True).expand(groups(x).shape).reshape(x.shape)
        ),
    ),
    exact("std over groups", lambda x: groups(x).std((2, 3, 4))),
    exact("var over the groups", lambda x: groups(x).var(1).sum(1)),
    # sums and norms
    exact("x.sum(1)", lambda x: x.sum(1)),
    exact("x.nansum(1)", lambda x: x.nansum(1)),
    exact("x.norm()", lambda x: x.norm()),
    exact("x.norm(dim=1)", lambda x: x.norm(dim=1)),
    exact("x.norm(1, 1)", lambda x: x.norm(1, 1)),
    exact("x.norm('fro', (1, 2))", lambda x: x.norm("fro", (1, 2))),
    exact("torch.norm(x, p=inf, dim=1)", lambda x: torch.norm(x, p=float("inf"), dim=1)),
    held("torch.norm(x, p=-inf, dim=1)", lambda x: torch.norm(x, p=-float("inf"), dim=1)),
    held("torch.norm(x, p=0, dim=1)", lambda x: torch.norm(x, p=0, dim=1)),
    exact("linalg.norm(x, dim=1)", lambda x: torch.linalg.norm(x, dim=1)),
    exact("linalg.vector_norm(x, 3, 1)", lambda x: torch.linalg.vector_norm(x, 3, 1)),
    exact("linalg.matrix_norm(x, dim=(1, 2))", lambda x: torch.linalg.matrix_norm(x, dim=(1, 2))),
    held("linalg.matrix_norm(x, 2, (1, 2))", lambda x: torch.linalg.matrix_norm(x, 2, (1, 2))),
    norm("F.normalize(x)", lambda x: F.normalize(x)),
    norm("F.normalize(x, 1, 1)", lambda x: F.normalize(x, 1, 1)),
    exact("x.count_nonzero(1)", lambda x: x.count_nonzero(1)),
    held("x.renorm(2, 0, 1.0)", lambda x: x.renorm(2, 0, 1.0)),
    # operations whose result a zero changes
    held("x.amax(1)", lambda x: x.amax(1)),
    held("x.amin((1, 2))", lambda x: x.amin((1, 2))),
    held("x.max()", lambda x: x.max()),
    held("x.max(1)", lambda x: tuple(x.max(1))),
    held("x.min(dim=-3, keepdim=True)", lambda x: tuple(x.min(dim=-3, keepdim=True))),
    held("x.aminmax(dim=1)", lambda x: tuple(x.aminmax(dim=1))),
    held("x.argmax(1)", lambda x: x.argmax(1)),
    held("x.argmin()", lambda x: x.argmin()),
    held("x.prod(1)", lambda x: x.prod(1)),
    held("x.median(1)", lambda x: tuple(x.median(1))),
    held("x.median()", lambda x: x.median()),
    held("x.nanmedian(1)", lambda x: tuple(x.nanmedian(1))),
    held("x.mode(1)", lambda x: tuple(x.mode(1))),
    held("x.kthvalue(2, 1)", lambda x: tuple(x.kthvalue(2, 1))),
    held("x.quantile(0.5, 1)", lambda x: x.quantile(0.5, 1)),
    held("x.nanquantile(0.25, 1)", lambda x: x.nanquantile(0.25, 1)),
    held("x.logsumexp(1)", lambda x: x.logsumexp(1)),
    held("x.logsumexp((1, 2))", lambda x: x.logsumexp((1, 2))),
    held("x.softmax(1)", lambda x: x.softmax(1)),
    held("F.log_softmax(x, -3)", lambda x: F.log_softmax(x, -3)),
    held("F.softmin(x, 1)", lambda x: F.softmin(x, 1)),
    held("x.cumsum(1)", lambda x: x.cumsum(1)),
    held("x.cumprod(1)", lambda x: x.cumprod(1)),
    held("x.logcumsumexp(1)", lambda x: x.logcumsumexp(1)),
    held("x.cummax(1)", lambda x: tuple(x.cummax(1))),
    held("x.sort(1)", lambda x: tuple(x.sort(1))),
    held("x.argsort(dim=1, descending=True)", lambda x: x.argsort(dim=1, descending=True)),
    held("x.msort()", lambda x: x.movedim(1, 0).msort()),
    held("x.topk(3, 1)", lambda x: tuple(x.topk(3, 1))),
    held("(x > 0).all(1)", lambda x: (x > 0).all(1)),
    held("(x > 0).any(1)", lambda x: (x > 0).any(1)),
    held("x.diff(dim=1)", lambda x: x.diff(dim=1)),
    held("x.flatten(2).cdist", lambda x: torch.cdist(x.flatten(2).mT, x.flatten(2).mT)),
    held("F.pairwise_distance", lambda x: F.pairwise_distance(x.flatten(1), x.flatten(1).flip(0))),
    exact("F.cosine_similarity", lambda x: F.cosine_similarity(x, x.flip(0), dim=1)),
    held("F.local_response_norm", lambda x: F.local_response_norm(x, 3)),
    held("torch.cov", lambda x: torch.cov(x[0].flatten(1))),
    held("torch.corrcoef", lambda x: torch.corrcoef(x[0].flatten(1).mT)),
    # along an axis that stays, next to the pruned one
    exact("x.amax(2)", lambda x: x.amax(2).sum(1)),
    exact("x.softmax(-1)", lambda x: (x.softmax(-1) * x).sum(1)),
    exact("x.var((2, 3))", lambda x: x.var((2, 3)).sum(1)),
    exact("x.sort(2)", lambda x: (x.sort(2).values * x).sum(1)),
]


class Reduced(nn.Module):
    """A layer and a function that read the same features, or the layer after the function."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.a, self.b, self.case = (
            nn.Conv2d(3, CHANNELS, 3, padding=1),
            nn.Conv2d(CHANNELS, 2, 1),
            case,
        )

    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        return (
            self.b(self.case.function(h)) if self.case.norm else (self.b(h), self.case.function(h))
        )


@pytest.mark.filterwarnings("ignore::fxprune.FxpruneWarning")  # some cases can remove nothing
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_zeros_count(case: Case) -> None:
    torch.manual_seed(0)
    model = randomise(Reduced(case)).eval()
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    pruned = fxprune.prune(model, x, channels=0.5)
    assert (pruned.model.get_parameter("a.bias").numel() < CHANNELS) == case.pruned, pruned.report
    reference = masked(model, pruned.model)
    for example in (x, torch.randn(3, 3, 6, 5, dtype=torch.float64)):
        with torch.no_grad():
            assert relative_error(pruned.model(example), reference(example)) <= TOLERANCE
    assert fxprune.verify(model, pruned, x).error <= TOLERANCE


class Standardised(nn.Module):
    """A convolution whose kernels are standardised in each call, with ``count`` groups."""

    def __init__(self, count: int, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3, groups=count, bias=False),
            nn.Conv2d(8, 2, 1),
        )
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.c(
            F.conv2d(self.a(x).relu(), self.how(self.b.weight), groups=self.b.groups).relu()
        )


STANDARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean and std": lambda w: (
        (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
    ),
    "flat": lambda w: w / (w.view(len(w), -1).std(1).view(-1, 1, 1, 1) + 1e-5),
    "var_mean": lambda w: (
        (w - torch.var_mean(w, (1, 2, 3), keepdim=True)[1]) / torch.var(w, (1, 2, 3), keepdim=True)
    ),
    "per kernel": lambda w: w / (w.std((2, 3), keepdim=True) + 1e-5),
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("how", STANDARDS)
def test_removed_inputs_count_in_a_standardised_weight(how: str, count: int) -> None:
    model = randomise(Standardised(count, STANDARDS[how])).eval()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    pruned = fxprune.prune(model, x, channels=0.5)
    assert pruned.model.get_submodule("b").weight.shape[:2] == (4, 4 // count)
    reference = masked(model, pruned.model)
    weight = reference.get_parameter("b.weight")
    gone = weight.flatten(1).eq(0).all(1).nonzero().flatten()
    # a zero filter divided by its own deviation can be NaN, and no layer reads it
    with torch.no_grad():
        weight[gone] = torch.randn_like(weight[gone])
        reference.get_parameter("c.weight")[:, gone] = 0
        assert relative_error(pruned.model(x), reference(x)) <= TOLERANCE
    assert fxprune.verify(model, pruned, x).error <= TOLERANCE


@pytest.fixture
def normed() -> tuple[nn.Module, Any, Tensor]:
    model = randomise(
        Reduced(
            norm(
                "",
                lambda x: (
                    by_hand(x) / (x.std((1, 2), keepdim=True) + x.var(keepdim=True, dim=(1, 3)))
                ),
            )
        )
    )
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    return model.eval(), fxprune.prune(model, x, channels=0.5), x


def test_gradients_are_those_of_the_masked_original(normed: Any) -> None:
    model, pruned, x = normed
    reference = masked(model, pruned.model)
    for own in (reference, pruned.model):
        own.train()(x).square().sum().backward()
    alive = torch.isin(model.get_parameter("a.bias"), pruned.model.get_parameter("a.bias"))
    for name in ("a.weight", "a.bias"):
        grad = reference.get_parameter(name).grad[alive]
        assert relative_error(pruned.model.get_parameter(name).grad, grad) <= TOLERANCE


def test_a_pruned_norm_is_pruned_again(normed: Any) -> None:
    model, once, x = normed
    again = fxprune.prune(once.model, x, channels=0.5)
    assert again.model.get_parameter("a.bias").numel() == 3
    y = torch.randn(3, 3, 6, 7, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(again.model(y), masked(model, again.model)(y)) <= TOLERANCE


def test_a_pruned_norm_is_saved_compiled_scripted_and_exported(normed: Any) -> None:
    _, pruned, x = normed
    with torch.no_grad():
        wanted = pruned.model(x)
        again = pickle.loads(pickle.dumps(pruned.model))
        assert torch.equal(again(x), wanted)
        assert (
            relative_error(torch.export.export(pruned.model, (x,)).module()(x), wanted)
            <= TOLERANCE
        )
        assert (
            relative_error(torch.compile(pruned.model, fullgraph=True, backend="eager")(x), wanted)
            <= TOLERANCE
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            assert relative_error(torch.jit.script(pruned.model)(x), wanted) <= TOLERANCE


def test_the_deviation_of_zeros_has_a_gradient() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    fxprune.moments.std(x, [1], 1, False, 1, 2).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros(2, 4))


class Scaled(torch.autograd.Function):
    """Two fused norms in one node, the first over features, the second over a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Any:
        return F.layer_norm(x, x.shape[-1:]) * F.rms_norm(table, (4,)).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def test_fused_norms_in_one_node_are_told_apart() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 12), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(Scaled.apply(self.a(x), torch.arange(4.0, dtype=x.dtype)))

    pruned = fxprune.prune(Net(), torch.randn(3, 5), channels=0.5, verify=True)
    assert pruned.model.get_parameter("a.bias").numel() == 6
