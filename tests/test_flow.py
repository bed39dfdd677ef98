"""Tests of the flow, and of the criterion that ranks by it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fxprune
from fxprune.calibration import batches_of
from fxprune.common.arrays import Floats
from fxprune.criteria import DividingCosts, FlowCPMC, rank
from fxprune.criteria.flow import FlowWatcher
from fxprune.criteria.meter import watch_batch, watching
from fxprune.criteria.noise import noise_like
from fxprune.errors import ArgumentError, BudgetError, FxpruneWarning
from fxprune.inputs import Call
from tests.specs import Conv, Network, build, example, networks
from tests.specs.profiles import networks_drawn
from tests.support.checking import assert_unharmed, randomise, snapshot
from tests.zoo import CASES

IMAGES = torch.randn(6, 3, 9, 9, dtype=torch.float64)


def flow_on(model: nn.Module, x: Any, *, own_statistics: bool = False) -> list[Floats]:
    """Return the flow of the units of each group on some data."""
    coupling = fxprune.analyze(model, x)
    watcher = FlowWatcher(coupling, own_statistics=own_statistics)
    with watching(coupling, model) as filled:
        for batch in batches_of([(x,)], model, coupling.example):
            watch_batch(watcher, coupling, filled, batch)
    return [watcher.total[group.units] / watcher.samples for group in coupling.groups]


# -- the value by hand


class Reads(nn.Module):
    """A layer whose units another layer reads."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def one_by_one(model: Any, x: Tensor) -> Floats:
    """Return the flow of each channel: the mean square of what it gives alone.

    It is divided by the variance of the output.
    """
    hidden, out = model.first(x).relu(), model(x)
    others = [d for d in range(out.dim()) if d != 1]
    variance = out.var(others, unbiased=False)
    model.second.bias, shares = None, []
    for u in range(hidden.shape[1]):
        alone = torch.zeros_like(hidden)
        alone[:, u] = hidden[:, u]
        shares.append(float((model.second(alone).square().mean(others) / variance).mean()))
    return np.array(shares)


@pytest.mark.parametrize(
    "second",
    [
        nn.Conv2d(4, 5, 3),
        nn.Conv2d(4, 5, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2),
        nn.Conv2d(4, 6, (1, 3), padding="same"),
        nn.Conv2d(4, 5, 1),
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Sequential(nn.Flatten(), nn.Linear(196, 5)),
    ],
    ids=["plain", "strided", "groups", "same", "pointwise", "transposed", "flattened"],
)
@torch.no_grad()
def test_the_share_of_a_channel_is_what_it_gives_alone(second: nn.Module) -> None:
    model = Reads(nn.Conv2d(3, 4, 3), second).double().eval()
    expected = flow_on(model, IMAGES)
    if isinstance(second, nn.Sequential):
        second[1].bias = None
    np.testing.assert_allclose(expected[0], one_by_one(model, IMAGES), rtol=1e-4)


@torch.no_grad()
def test_a_unit_with_columns_of_its_own_number_counts_by_its_mean_square() -> None:
    """The first two channels are read twice, the others once."""

    class Twice(Reads):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x).relu()
            return self.second(torch.cat([hidden, hidden[:, :2]], 1))

    model, x = Twice(nn.Linear(5, 4), nn.Linear(6, 3)).double().eval(), torch.randn(20, 5).double()
    hidden = model.first(x).relu()
    squares = model.second.weight.square() / model(x).var(0, unbiased=False)[:, None] / 3
    of_units = squares.sum(0)[:4] + F.pad(squares.sum(0)[4:], (0, 2))
    (found,) = flow_on(model, x)
    np.testing.assert_allclose(found, (of_units * hidden.square().mean(0)).numpy(), rtol=1e-4)


class Matrices(nn.Module):
    """Units on the inner axis of a product, with the weight on one side."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4, bias=False)
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        hidden, weight = self.first(x).relu(), self.weight
        match self.spelling:
            case "linear":
                return F.linear(hidden, weight.t())
            case "matmul":
                return hidden @ weight
            case "left":
                return (weight.t() @ hidden.t()).t()
            case "addmm":
                return torch.addmm(torch.ones(3, dtype=x.dtype), hidden, weight)
            case _:
                return torch.einsum("bi,io->bo", hidden, weight)


@pytest.mark.parametrize("spelling", ["linear", "matmul", "left", "addmm"])
@torch.no_grad()
def test_the_share_of_a_feature_however_the_product_is_spelled(spelling: str) -> None:
    model, x = Matrices(spelling).double().eval(), torch.randn(20, 5, dtype=torch.float64)
    hidden = model.first(x).relu()
    each = hidden.square().mean(0)[:, None] * model.weight.square()
    variance = (hidden @ model.weight).var(0, unbiased=False)
    (found,) = flow_on(model, x)
    np.testing.assert_allclose(found, (each / variance).mean(1).numpy(), rtol=1e-4)


@torch.no_grad()
def test_a_product_of_another_form_counts_by_squares_alone() -> None:
    model, x = Matrices("einsum").double().eval(), torch.randn(20, 5, dtype=torch.float64)
    squares = model.first(x).relu().square().mean(0) * model.weight.square().sum(1)
    (found,) = flow_on(model, x)
    np.testing.assert_allclose(found, (squares / squares.sum()).numpy(), rtol=1e-9)


def test_a_unit_that_no_weight_reads_counts_by_its_mean_square() -> None:
    class Averages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x).mean(1)

    model, x = Averages().double().eval(), torch.randn(20, 5, dtype=torch.float64)
    (found,) = flow_on(model, x)
    squares = model.first(x).square().mean(0).detach().numpy()
    np.testing.assert_allclose(found, squares / squares.sum(), rtol=1e-9)


def test_queries_and_keys_count_by_their_product() -> None:
    """Scaling a query's channel up and the key's down by as much changes nothing."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(6, 6, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))

    model, x = Attends().double().eval(), torch.randn(2, 5, 6, dtype=torch.float64)
    before = flow_on(model, x)
    with torch.no_grad():
        model.q.weight[2] *= 4
        model.k.weight[2] /= 4
    for one, other in zip(before, flow_on(model, x), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)
        assert len(set(one.tolist())) > 1


def test_batch_normalisations_use_their_own_batch_on_noise() -> None:
    model = Reads(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Conv2d(4, 2, 3))
    randomise(model).double().eval()
    before = flow_on(model, IMAGES, own_statistics=True)
    eager = flow_on(model, IMAGES)
    norm: Any = model.first[1]
    norm.running_mean += 3
    norm.running_var *= 7
    after = flow_on(model, IMAGES, own_statistics=True)
    np.testing.assert_array_equal(before[0], after[0])
    assert not np.allclose(eager[0], flow_on(model, IMAGES)[0])


# -- what does not change the function does not change the plan


def rescale(model: nn.Module, coupling: fxprune.Coupling, group: Any, factors: Tensor) -> None:
    """Scale each unit of a group by its factor, and what reads it by the inverse.

    Where a normalisation gives the units their scale, its weight and bias are scaled and not the
    filters before it.
    """
    parameters = dict(model.named_parameters())
    roles: dict[str, str] = {}
    for name in coupling.elements(group):
        for labels in coupling.parameter_labels(name):
            if np.isin(labels, group.units).any():
                roles[name] = coupling.role(name, coupling.shrinking_dim(labels))
    norms = {name.rpartition(".")[0] for name, role in roles.items() if role == "scale"}
    for name, indices in coupling.elements(group).items():
        if name not in parameters or len(indices) != 1:
            continue
        is_read = roles[name] == "dependent"
        if norms and not is_read and name.rpartition(".")[0] not in norms:
            continue
        index = indices[0].expand(parameters[name].shape)
        factor = torch.where(index >= 0, factors[index.clamp_min(0)], 1.0)
        with torch.no_grad():
            parameters[name].mul_(1 / factor if is_read else factor)


@pytest.mark.filterwarnings("ignore::fxprune.FxpruneWarning")  # some have nothing to prune
@networks_drawn(4)
@given(net=networks(), seed=st.integers(0, 2**16), share=st.sampled_from((0.8, 0.5)))
def test_rescaling_leaves_the_plan_as_it_is(net: Network, seed: int, share: float) -> None:
    """Powers of two are exact, so equal functions give equal plans."""
    model, x = build(net).double().eval(), example(net).double()
    options: Any = {"channels": share, "scope": "global", "criterion": FlowCPMC(seed=seed)}
    try:
        plan = fxprune.prune(model, x, **options).plan
    except BudgetError:
        return
    if rescaled(model, x, seed):
        assert fxprune.prune(model, x, **options).plan.groups == plan.groups


def rescaled(model: nn.Module, x: Tensor, seed: int) -> int:
    """Rescale every group whose rescaling leaves the function as it is; return their number."""
    generator, coupling, done = torch.Generator().manual_seed(seed), fxprune.analyze(model, x), 0
    with torch.no_grad():
        wanted = model(x)
    for group in coupling.groups:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        factors = 2.0 ** torch.randint(-6, 7, (group.size,), generator=generator).double()
        rescale(model, coupling, group, factors)
        with torch.no_grad():
            same = _are_alike(model(x), wanted)
        done += same
        if not same:  # units that are added to others, for instance
            model.load_state_dict(before, strict=False)
    return done


def test_most_networks_that_are_drawn_can_be_rescaled() -> None:
    """Otherwise the test above would prove nothing."""
    nodes = (Conv(0, out=4), Conv(1, out=4), Conv(2, out=2))
    plain = Network(input=(3, 8, 8), nodes=nodes, outputs=(3,))
    assert rescaled(build(plain).double().eval(), example(plain).double(), seed=0) == 2


def _are_alike(found: Any, wanted: Any) -> bool:
    pairs = zip(
        torch.utils._pytree.tree_leaves(found),
        torch.utils._pytree.tree_leaves(wanted),
        strict=True,
    )
    return all(torch.allclose(one, other, rtol=1e-9, atol=1e-12) for one, other in pairs)


def test_folding_a_batch_normalisation_changes_nothing_on_data() -> None:
    """On noise it does: a folded network does not remember which inputs it was trained on."""
    conv, norm, last = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Conv2d(12, 4, 3)
    plain = randomise(nn.Sequential(conv, norm, nn.ReLU(), last)).double().eval()
    folded = nn.Sequential(fuse_conv_bn_eval(conv, norm), nn.ReLU(), last)
    np.testing.assert_allclose(*(flow_on(model, IMAGES)[0] for model in (plain, folded)))


def test_permuting_channels_permutes_the_plan() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 9, 3), nn.ReLU(),
        nn.Conv2d(9, 4, 1),
    )  # fmt: skip
    randomise(model).double().eval()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    state = model.state_dict()
    moved = {
        name: tensor[order] for name, tensor in state.items() if name[0] in "01" and tensor.dim()
    }
    moved["3.weight"] = state["3.weight"][:, order]
    first = fxprune.prune(model, IMAGES, macs=0.5, criterion="cpmc_flow").plan.groups
    model.load_state_dict({**state, **moved})
    second = fxprune.prune(model, IMAGES, macs=0.5, criterion="cpmc_flow").plan.groups
    kept = sorted(order.tolist().index(unit) for unit in first[0].kept)
    assert list(second[0].kept) == kept
    assert second[1:] == first[1:]


# -- without data, and with


def test_equal_seeds_give_equal_scores_and_leave_the_user_alone() -> None:
    case = next(case for case in CASES if case.name.startswith("residual"))
    model, x = randomise(case.build(8)).train(), case.inputs(2).double()
    coupling, before, state = fxprune.analyze(model, x), snapshot(model), torch.get_rng_state()
    scores = [FlowCPMC(seed=seed).scores(coupling, model).tolist() for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2]
    assert torch.equal(torch.get_rng_state(), state)
    assert_unharmed(model, before)


def test_values_on_data_and_noise_are_blended_by_how_much_data_there_is() -> None:
    model, x = Reads(nn.Linear(5, 7), nn.Linear(7, 2)).double().eval(), torch.randn(64, 5).double()
    coupling = fxprune.analyze(model, x)
    on_noise = FlowCPMC()._flow(coupling, model)
    units = coupling.groups[0].units
    (on_data,) = flow_on(model, x)
    blended = FlowCPMC(data=[(x,)])._flow(coupling, model)[units]
    np.testing.assert_allclose(blended, (64 * on_data + 256 * on_noise[units]) / 320, rtol=1e-9)


def test_a_model_in_parts_is_ranked_as_one_graph() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6))
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    class Parts(Whole):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.body(x)
            if float(hidden.detach().abs().sum()) < 0:
                hidden = -hidden
            return self.head(hidden)

    whole, parts = Whole().eval(), Parts().eval()
    parts.load_state_dict(whole.state_dict())
    found = []
    for model in (whole, parts):
        coupling = fxprune.analyze(model, torch.zeros(2, 5))
        (group,) = [group for group in coupling.groups if group.name.startswith("body.0")]
        found.append(FlowCPMC()._flow(coupling, model)[group.units])
    assert fxprune.analyze(parts, torch.zeros(2, 5)).parts
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_a_model_that_takes_one_batch_size_is_ranked_on_that() -> None:
    class Fixed(Reads):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(3, 5))

    net = Fixed(nn.Linear(5, 8), nn.Linear(8, 2)).eval()
    pruned = fxprune.prune(net, torch.zeros(3, 5), channels=0.5, criterion="cpmc_flow")
    assert len(pruned.plan.groups[0].kept) == 4


def test_a_model_that_does_not_run_on_noise_says_so() -> None:
    class Checks(Reads):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            index = (x[:, :1] * 0 + 1e6 * (x[:, :1] != 0)).long()
            return self.second(hidden.relu()) + torch.arange(4.0)[index]

    model = Checks(nn.Linear(5, 8), nn.Linear(8, 1)).eval()
    with pytest.warns(FxpruneWarning, match="cannot run on noise"):
        pruned = fxprune.prune(model, torch.zeros(3, 5), channels=0.5, criterion="cpmc_flow")
    assert len(pruned.plan.groups[0].kept) == 4


def test_python_that_never_ends_on_noise_is_ended() -> None:
    class Waits(Reads):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            while float(x.abs().sum()) > 1:  # the example holds zeros
                hidden = hidden.relu()
            return self.second(hidden)

    body = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 2))
    model = Waits(body, nn.Linear(2, 1)).eval()
    with pytest.warns(FxpruneWarning, match="cannot run on noise"):
        pruned = fxprune.prune(model, torch.zeros(3, 5), channels=0.5, criterion="cpmc_flow")
    assert pruned.report.parts
    by_weights = fxprune.prune(model, torch.zeros(3, 5), channels=0.5, criterion="cpmc")
    assert pruned.plan.groups == by_weights.plan.groups


def test_embeddings_get_the_indices_of_the_example() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 8), nn.Linear(8, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids).relu())

    model, ids = Tokens().eval(), torch.tensor([[1, 2, 6], [5, 5, 0]])
    coupling = fxprune.analyze(model, ids)
    assert coupling.inputs.args[0] is ids or torch.equal(coupling.inputs.args[0], ids)
    scores = FlowCPMC().scores(coupling, model)[coupling.groups[0].units]
    assert (scores > 0).all()
    assert len(set(scores.tolist())) == 8


def test_noise_keeps_shapes_and_whole_numbers() -> None:
    call = Call((torch.zeros(2, 3, 16, 16), torch.tensor([4, 5])), {"scale": 2.0})
    wide, narrow = noise_like(call, seed=0)
    assert wide.args[0].shape == (64, 3, 16, 16)
    assert wide.args[1].tolist() == [4, 5] * 32
    assert narrow.args[0].shape == (2, 3, 16, 16)
    assert narrow.kwargs == {"scale": 2.0}
    image = wide.args[0].double()
    assert float(image.mean()) == pytest.approx(0, abs=1e-3)
    assert float(image.std()) == pytest.approx(1, rel=1e-2)
    neighbours = (image[..., 1:] * image[..., :-1]).mean()
    assert float(neighbours) > 0.4  # those of white noise: 0
    assert float((image[:, 0] * image[:, 1]).mean()) == pytest.approx(0.9, abs=0.03)
    features = next(noise_like(Call((torch.zeros(2, 8, 16, 16),), {}), seed=0)).args[0]
    assert float((features[:, 0] * features[:, 1]).mean()) == pytest.approx(0, abs=0.05)


def test_large_images_are_tried_small_first() -> None:
    shapes = [
        tuple(call.args[0].shape)
        for call in noise_like(Call((torch.zeros(2, 3, 224, 160),), {}), 0)
    ]
    assert shapes == [(10, 3, 64, 64), (2, 3, 224, 160), (2, 3, 224, 160)]


def test_the_cost_terms_are_handed_to_the_selection() -> None:
    model, x = Reads(nn.Linear(5, 8), nn.Linear(8, 2)).eval(), torch.zeros(2, 5)
    coupling = fxprune.analyze(model, x)
    assert rank(FlowCPMC(1.0, 0.25), coupling, model).costs == DividingCosts(1.0, 0.25)


@pytest.mark.parametrize(
    "slip",
    [
        lambda: FlowCPMC(computation=-1),
        lambda: FlowCPMC(parameters=math.nan),
        lambda: FlowCPMC(seed=-1),
        lambda: FlowCPMC(data=torch.zeros(2)),  # type: ignore[arg-type]
    ],
)
def test_settings_that_are_refused(slip: Callable[[], Any]) -> None:
    with pytest.raises(ArgumentError):
        slip()
