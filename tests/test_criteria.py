"""Tests of criteria: scores equal those of plain loops, and depend on nothing else."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.coupling import Coupling, Group
from fxprune.criteria import (
    CPMC,
    CRITERIA,
    OBDC,
    Activation,
    ActivationVariance,
    AddedCosts,
    DividingCosts,
    Fisher,
    HessianDiagonal,
    Random,
    Taylor,
    UnitView,
    Views,
    Wanda,
    bn_scale,
    fpgm,
    l1,
    l2,
    lamp,
    rank,
)
from fxprune.criteria.views import ROLES
from fxprune.errors import ArgumentError, CallbackError
from tests.support import ranks
from tests.support.checking import as_dtype, assert_unharmed, call, randomise, snapshot
from tests.zoo import CASES
from tests.zoo.case import Case

BY_NAME = {case.name: case for case in CASES}


def cases(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [BY_NAME[name] for name in names], ids=names)


def analysed(case: Case, batch: int = 2) -> tuple[nn.Module, Any, Coupling]:
    """Return a network with random weights in float64 and eval mode, a batch, and its analysis."""
    model = randomise(case.build(8)).eval()
    inputs = as_dtype(case.inputs(batch), torch.float64)
    return model, inputs, fxprune.analyze(model, inputs)


def views(coupling: Coupling, model: nn.Module) -> Views:
    return Views(coupling, dict(model.named_parameters()))


def of_group(scores: np.ndarray, group: Group) -> list[float]:
    return scores[list(group.units)].tolist()


# -- the plainest loops


def role_of(coupling: Coupling, group: Group, name: str, field: Tensor) -> str:
    """Return the role of a group's elements in a parameter.

    It is the role of the group's axis along which the field varies.
    """
    varied = {d for d, size in enumerate(field.shape) if size > 1}
    found = {
        coupling.role(name, axis.dim)
        for axis in group.axes
        if axis.parameter == name and axis.dim in varied
    }
    assert len(found) == 1, f"{name} has {found} in {group.name}"
    return found.pop()


def elements(
    coupling: Coupling, group: Group, tensors: dict[str, Tensor], roles: tuple[str, ...] = ROLES
) -> list[list[list[float]]]:
    """Return each unit's elements, field by field of every parameter, in the order of memory."""
    out: list[list[list[float]]] = [[] for _ in range(group.size)]
    for name, fields in coupling.elements(group).items():
        for field in fields if name in tensors else ():
            if role_of(coupling, group, name, field) not in roles:
                continue
            for unit in out:
                unit.append([])
            units, values = (
                field.expand(tensors[name].shape).flatten().tolist(),
                tensors[name].flatten().tolist(),
            )
            for unit, value in zip(units, values, strict=True):
                if unit >= 0:
                    out[unit][-1].append(value)
    return out


def flat(unit: list[list[float]]) -> list[float]:
    return [value for field in unit for value in field]


def naive_l1(units: list[list[float]]) -> list[float]:
    return [math.fsum(abs(w) for w in unit) for unit in units]


def naive_l2(units: list[list[float]]) -> list[float]:
    return [math.fsum(w * w for w in unit) ** 0.5 for unit in units]


def naive_lamp(units: list[list[float]]) -> list[float]:
    squares = [math.fsum(w * w for w in unit) for unit in units]
    return [s / math.fsum(t for t in squares if t >= s) for s in squares]


def naive_cpmc(units: list[list[float]], blocks: list[int], mean: float) -> list[float]:
    """Return each unit's squared weight over the share of its block that weighs as much or more.

    Squared weights are relative to ``mean``. The share is the unit's rank in its block, the
    heaviest first and equal ones in order, divided by the size of the block.
    """
    values, scores = [math.fsum(w * w for w in unit) for unit in units], [0.0] * len(units)
    for block in set(blocks):
        own = [u for u, other in enumerate(blocks) if other == block]
        for rank_, u in enumerate(sorted(own, key=lambda u: (-values[u], u)), start=1):
            scores[u] = values[u] / mean / (rank_ / len(own))
    return scores


def naive_fpgm(units: list[list[float]], blocks: list[int]) -> list[float]:
    return [
        math.fsum(
            math.dist(u, v) for v, other in zip(units, blocks, strict=True) if other == block
        )
        for u, block in zip(units, blocks, strict=True)
    ]


SEVERAL = cases(
    "residual",
    "dense_block",
    "inception_branches",
    "grouped",
    "depthwise",
    "depth_multiplier",
    "transposed_grouped_2d",
    "attention_packed",
    "shared_modules",
    "embedding_tied",
    "two_inputs",
)


@SEVERAL
def test_every_criterion_against_loops(case: Case) -> None:
    model, _, coupling = analysed(case)
    tensors = dict(model.named_parameters())
    squares = [
        w * w
        for group in coupling.groups
        for unit in elements(coupling, group, tensors)
        for w in flat(unit)
    ]
    everywhere = math.fsum(squares) / sum(group.size for group in coupling.groups)
    for view in views(coupling, model):
        group = view.group
        found = elements(coupling, group, tensors)
        units = [flat(unit) for unit in found]
        for criterion, naive in ((l1, naive_l1), (l2, naive_l2), (lamp, naive_lamp)):
            np.testing.assert_allclose(
                criterion(view), naive(units), rtol=1e-12, err_msg=f"{criterion} {group.name}"
            )
        blocks = view.blocks.tolist()
        np.testing.assert_allclose(
            CPMC()(view), naive_cpmc(units, blocks, everywhere), rtol=1e-12, err_msg=group.name
        )
        own = [flat(unit) for unit in elements(coupling, group, tensors, ("own", "scale"))]
        mean = math.fsum(w * w for unit in own for w in unit) / len(own)
        alone = CPMC(roles=("own", "scale"), weigh_groups=False)(view)
        np.testing.assert_allclose(alone, naive_cpmc(own, blocks, mean or 1.0), rtol=1e-12)
        own = [flat(unit) for unit in elements(coupling, group, tensors, ("own",))]
        np.testing.assert_allclose(
            fpgm(view), naive_fpgm(own, coupling.blocks(group).tolist()), rtol=1e-9
        )


@SEVERAL
def test_rows_hold_every_element_once(case: Case) -> None:
    model, _, coupling = analysed(case)
    tensors = dict(model.named_parameters())
    for view in views(coupling, model):
        for roles in (*((role,) for role in ROLES), ROLES):
            rows = view.rows(roles)
            for row, unit in zip(
                rows.tolist(), elements(coupling, view.group, tensors, roles), strict=True
            ):
                assert sorted(value for value in row if value) == sorted(flat(unit))


@cases(
    "residual", "conv_batch_norm_2d", "conv_group_norm_2d", "encoder_layer", "inception_branches"
)
def test_bn_scale_against_loops(case: Case) -> None:
    model, _, coupling = analysed(case)
    tensors, scored = dict(model.named_parameters()), 0
    for view in views(coupling, model):
        scales = [flat(unit) for unit in elements(coupling, view.group, tensors, ("scale",))]
        if all(scales):
            expected = [math.fsum(map(abs, own)) / len(own) for own in scales]
            np.testing.assert_allclose(bn_scale(view), expected, rtol=1e-12)
            scored += 1
    assert scored


def test_the_scales_of_a_residual_stream_are_averaged() -> None:
    model, _, coupling = analysed(BY_NAME["residual"])
    stream = next(view for view in views(coupling, model) if view.group.name == "stem.0.weight:0")
    two = model.stem[1].weight, model.a2[1].weight
    np.testing.assert_allclose(
        bn_scale(stream), (two[0].abs() + two[1].abs()).detach() / 2, rtol=1e-12
    )


@pytest.mark.parametrize(
    "norm", [nn.Identity(), nn.BatchNorm2d(8, affine=False)], ids=["none", "not_affine"]
)
def test_bn_scale_refuses_a_group_without_scales_by_name(norm: nn.Module) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1), norm, nn.Conv2d(8, 2, 1)
    )
    with pytest.raises(ArgumentError, match=r"'bn_scale': group '2\.weight:0' .*keep=") as caught:
        fxprune.prune(model, torch.zeros(1, 3, 4, 4), channels=0.5, criterion="bn_scale")
    assert "0.weight" not in str(caught.value)
    fxprune.prune(model, torch.zeros(1, 3, 4, 4), channels=0.5, criterion="bn_scale", keep="2")


class NormalisedHeads(nn.Module):
    """Attention that normalises queries and keys but not values, which are in the same group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.proj, self.head = (
            nn.Linear(6, 8),
            nn.Linear(8, 24),
            nn.Linear(8, 8),
            nn.Linear(8, 3),
        )
        self.norm_q, self.norm_k = nn.LayerNorm(4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.stem(x)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v)
        return self.head(self.proj(y.transpose(1, 2).flatten(2)))


def test_bn_scale_refuses_a_group_of_which_a_part_has_scales() -> None:
    model = NormalisedHeads()
    coupling = fxprune.analyze(model, torch.zeros(2, 5, 6))
    view = next(
        view for view in views(coupling, model) if view.group.name.startswith("qkv.weight")
    )
    scales = view.sum(torch.ones_like, ("scale",))
    assert set(scales.tolist()) == {0.0, 2.0}
    with pytest.raises(
        ArgumentError, match=r"'bn_scale': group 'qkv\.weight:0.*for all of its units"
    ):
        bn_scale(view)


# -- roles


def role_sizes(model: nn.Module, x: Tensor) -> dict[str, dict[str, float]]:
    """Return for each group and role the number of elements of one unit."""
    coupling = fxprune.analyze(model, x)
    out = {}
    for view in views(coupling, model):
        counts = {role: view.sum(torch.ones_like, (role,)) for role in ROLES}
        for role, each in counts.items():
            assert (each == each[0]).all(), f"units of {view.group.name} differ in {role}"
        assert torch.equal(sum(counts.values()), view.sum(torch.ones_like))
        out[view.group.name] = {role: float(each[0]) for role, each in counts.items()}
    return out


IMAGE = torch.zeros(2, 3, 6, 6)


def test_roles_of_a_chain() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    assert role_sizes(model, IMAGE) == {
        "0.weight:0": {"own": 3 * 9 + 1 + 1, "scale": 1, "dependent": 4},  # filter, bias, shift
        # a channel is 16 inputs of the linear layer
        "3.weight:0": {"own": 8 + 1, "scale": 0, "dependent": 16 * 5},
    }


def test_roles_of_a_transposed_convolution() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 6, 2), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
    assert role_sizes(model, IMAGE) == {
        "0.weight:0": {"own": 3 + 1, "scale": 0, "dependent": 6 * 4},
        "1.weight:1": {"own": 8 * 4 + 1, "scale": 0, "dependent": 2},
    }


def test_roles_of_a_grouped_convolution() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 2, 1)
    )
    assert role_sizes(model, IMAGE) == {
        # three filters of its group read it
        "0.weight:0": {"own": 3 + 1, "scale": 0, "dependent": 3 * 9},
        "1.weight:0": {"own": 2 * 9 + 1, "scale": 0, "dependent": 2},
    }


def test_roles_of_a_depthwise_convolution() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    assert role_sizes(model, IMAGE) == {
        "0.weight:0": {"own": (3 + 1) + (9 + 1), "scale": 0, "dependent": 2}
    }


def test_roles_of_a_grouped_transposed_convolution() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 12, 2, groups=4), nn.ReLU(), nn.Conv2d(12, 2, 1)
    )
    assert role_sizes(model, IMAGE) == {
        "0.weight:0": {"own": 3 + 1, "scale": 0, "dependent": 3 * 4},
        # The outputs of the four groups share one axis of the weight, so a unit has one output of
        # each.
        "1.weight:1": {"own": 8 * 4 + 4, "scale": 0, "dependent": 4 * 2},
    }


class Adding(nn.Module):
    """Two producers and two consumers of one sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm, self.c, self.d = nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x) + self.norm(self.b(x))
        return self.c(x), self.d(x)


def test_roles_of_an_addition() -> None:
    assert role_sizes(Adding(), IMAGE) == {
        "a.weight:0": {"own": (3 + 1) + 3 * 9 + 1, "scale": 1, "dependent": 2 + 4 * 9}
    }


class Tied(nn.Module):
    """A small language model whose embedding is its output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.down = (
            nn.Embedding(11, 6),
            nn.Linear(6, 10),
            nn.Linear(10, 6),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        return F.linear(x + self.down(torch.relu(self.up(x))), self.embedding.weight)


def test_a_tied_embedding_counts_once() -> None:
    found = role_sizes(Tied(), torch.zeros(2, 4, dtype=torch.int64))
    assert sum(found["embedding.weight:1"].values()) == 11 + 10 + (10 + 1)
    # a weight that reads units is dependent, even if it also produces them
    assert found["embedding.weight:1"]["dependent"] == 11 + 10


def test_roles_that_there_are_not() -> None:
    with pytest.raises(ArgumentError, match=r"'onw'.*'own', 'scale', 'dependent'"):
        CPMC(roles=("onw",))
    with pytest.raises(ArgumentError, match="choose one"):
        CPMC(roles=())
    with pytest.raises(ArgumentError, match="'dep'"):
        rank(lambda view: view.sum(torch.abs, ("dep",)), *chain_coupling())


# -- what scores must not depend on


def chain(width: int = 8) -> nn.Sequential:
    layers = [nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 1)]
    return randomise(nn.Sequential(*layers))  # type: ignore[return-value]


def chain_coupling() -> tuple[Coupling, nn.Module]:
    model = chain()
    return fxprune.analyze(model, IMAGE.double()), model


PURE: dict[str, Callable[[UnitView], Tensor]] = {
    name: criterion for name, criterion in CRITERIA.items() if callable(criterion)
}
pure = pytest.mark.parametrize("criterion", PURE.values(), ids=list(PURE))


@pure
def test_permuting_units_permutes_scores(criterion: Callable[[UnitView], Tensor]) -> None:
    (coupling, model), order = chain_coupling(), torch.randperm(8)
    (view,) = views(coupling, model)
    before = criterion(view)
    with torch.no_grad():
        for parameter in (model[0].weight, model[0].bias, model[1].weight, model[1].bias):
            parameter.copy_(parameter[order].clone())
        model[3].weight.copy_(model[3].weight[:, order].clone())
    (view,) = views(coupling, model)
    np.testing.assert_allclose(criterion(view), before[order], rtol=1e-12)
    assert len(set(before.tolist())) == 8


def test_l2_ranks_as_before_when_units_move() -> None:
    """The same filters survive in whatever order they are in the layer."""
    (coupling, model), order = chain_coupling(), torch.randperm(8)
    (view,) = views(coupling, model)
    kept = set(l2(view).argsort()[4:].tolist())
    with torch.no_grad():
        for parameter in (model[0].weight, model[0].bias, model[1].weight, model[1].bias):
            parameter.copy_(parameter[order].clone())
        model[3].weight.copy_(model[3].weight[:, order].clone())
    (view,) = views(coupling, model)
    assert {int(order[i]) for i in l2(view).argsort()[4:]} == kept


@cases("residual", "dense_block", "grouped", "attention_packed")
def test_rescaling_a_group_leaves_the_value_of_cpmc(case: Case) -> None:
    """Scaling a group leaves CPMC's values within the group unchanged.

    The values of groups relative to each other change by the square of the scale.
    """
    model, _, coupling = analysed(case)
    alone = CPMC(weigh_groups=False)

    def scored(view: UnitView) -> tuple[Tensor, Tensor, Tensor]:
        return alone(view), l1(view), CPMC()(view) * view.network_mean(torch.square)

    for group in coupling.groups:
        tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
        before = {view.group.name: scored(view) for view in Views(coupling, tensors)}[group.name]
        for name, fields in coupling.elements(group).items():
            for field in fields if name in tensors else ():
                tensors[name] *= torch.where(field >= 0, 4.0, 1.0)
        (after,) = [scored(view) for view in Views(coupling, tensors) if view.group is group]
        np.testing.assert_allclose(after[0], before[0], rtol=1e-12)
        assert (after[1] > 3 * before[1]).all()
        np.testing.assert_allclose(after[2], 16 * before[2], rtol=1e-12)


@pure
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(criterion: Callable[[UnitView], Tensor], dtype: torch.dtype) -> None:
    """Sums of narrow weights are taken in a wider type.

    300 squared overflows float16, and bfloat16 cannot represent 2049.
    """
    coupling, model = chain_coupling()
    narrow = {name: (300 * p.detach()).to(dtype) for name, p in model.named_parameters()}
    (found,) = [criterion(view) for view in Views(coupling, narrow)]
    (exact,) = [
        criterion(view)
        for view in Views(coupling, {name: p.double() for name, p in narrow.items()})
    ]
    assert found.dtype is torch.float64
    np.testing.assert_allclose(found, exact, rtol=1e-12 if dtype is torch.float64 else 1e-5)


@pure
def test_memory_formats(criterion: Callable[[UnitView], Tensor]) -> None:
    coupling, model = chain_coupling()
    (plain,) = map(criterion, views(coupling, model))
    model.to(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    (last,) = map(criterion, views(coupling, model))
    np.testing.assert_allclose(last, plain, rtol=1e-12)


@pure
def test_weights_of_zero_have_finite_scores(criterion: Callable[[UnitView], Tensor]) -> None:
    coupling, model = chain_coupling()
    (scores,) = map(
        criterion,
        Views(coupling, {name: torch.zeros_like(p) for name, p in model.named_parameters()}),
    )
    assert scores.tolist() == [0.0] * 8


def test_what_is_no_unit_scores_nothing() -> None:
    """Weights that read the image belong to no unit, so they do not count in a score."""
    model = randomise(ReadsTheImageToo())
    coupling = fxprune.analyze(model, IMAGE.double())
    scores = views(coupling, model).totals(torch.abs)
    units = [unit for group in coupling.groups for unit in group.units]
    assert scores[0] == 0
    assert np.count_nonzero(scores) == np.count_nonzero(scores[units]) == 8


def test_buffers_are_no_weights() -> None:
    """A running mean is removed with its channel, but is not counted in the channel's score."""
    coupling, model = chain_coupling()
    (before,) = map(l1, views(coupling, model))
    model[1].running_mean.fill_(1e9)
    np.testing.assert_array_equal(
        rank(lambda view: l1(view), coupling, model).value[list(coupling.groups[0].units)], before
    )


# -- one by one


def test_lamp_of_equal_units_is_equal() -> None:
    coupling, _ = chain_coupling()
    bias = torch.tensor([2.0, 1.0, 2.0, 0.0, 1.0, 2.0, 1.0, 3.0], dtype=torch.float64)
    (scores,) = map(lamp, Views(coupling, {"0.bias": bias}))
    top, middle, low = 4 / (3 * 4 + 9), 1 / (3 * 1 + 3 * 4 + 9), 0.0
    np.testing.assert_allclose(
        scores, [top, middle, top, low, middle, top, middle, 1.0], rtol=1e-12
    )


def test_fpgm_sums_the_distances_of_filters() -> None:
    """Scores of FPGM are summed distances of filters, and exactly 0 if all filters are alike."""
    coupling, _ = chain_coupling()
    filters = (
        torch.eye(8, dtype=torch.float64)[:, :3].repeat(1, 9).reshape(8, 3, 3, 3)
        + torch.randn(8, 3, 3, 3).double() / 10
    )
    filters[[1, 4, 6]] = 5 * filters[1]
    (scores,) = map(fpgm, Views(coupling, {"0.weight": filters}))
    np.testing.assert_allclose(
        scores, torch.cdist(filters.flatten(1), filters.flatten(1)).sum(1), rtol=1e-9
    )
    (alike,) = map(
        fpgm, Views(coupling, {"0.weight": torch.full((8, 3, 3, 3), 0.1, dtype=torch.float64)})
    )
    assert alike.tolist() == [0.0] * 8  # not rounding errors


def test_fpgm_of_a_group_that_is_read_only() -> None:
    """A group with dependent elements only is compared by these: columns of a tied embedding."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 6)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.relu(self.embedding(x)), self.embedding.weight)

    model = Bare().double()
    (view,) = views(fxprune.analyze(model, torch.zeros(2, 4, dtype=torch.int64)), model)
    columns = model.embedding.weight.detach().T
    np.testing.assert_allclose(fpgm(view), torch.cdist(columns, columns).sum(1), rtol=1e-9)


def test_fpgm_compares_within_a_block() -> None:
    """FPGM compares only filters of the same group of a convolution.

    Equal filters of different groups read different channels, so neither can replace the other.
    """
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1, groups=2, bias=False), nn.Conv2d(6, 2, 1)
    )
    coupling = fxprune.analyze(model, IMAGE)
    weight = (
        torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 0.0]], dtype=torch.float64)
        .repeat(2, 1)
        .reshape(6, 2, 1, 1)
    )
    grouped = next(
        view for view in Views(coupling, {"1.weight": weight}) if view.group.name == "1.weight:0"
    )
    np.testing.assert_allclose(fpgm(grouped), [5 + 3, 5 + 4, 3 + 4] * 2, rtol=1e-12)


def test_random_is_equal_for_equal_seeds() -> None:
    coupling, model = chain_coupling()
    state = np.random.get_state()[1].copy()  # type: ignore[index]
    scores = [Random(seed).scores(coupling, model).tolist() for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2]
    assert all(0 <= score < 1 for score in scores[0])
    assert np.array_equal(np.random.get_state()[1], state), "the user's random state changed"  # type: ignore[index]
    plans = [
        fxprune.prune(model, IMAGE.double(), channels=0.5, criterion=Random(seed)).plan
        for seed in (0, 0, 1)
    ]
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize("weights", [(-1, 1, 1), (0, 0, 0), (math.nan, 1, 1), (1, math.inf, 0)])
def test_weights_that_cpmc_refuses(weights: tuple[float, float, float]) -> None:
    with pytest.raises(ArgumentError, match=r"alpha, beta and gamma"):
        CPMC(*weights)


def test_cpmc_hands_its_weights_to_the_selection() -> None:
    coupling, model = chain_coupling()
    found = rank(CPMC(0.5, 2.0, 3.0), coupling, model)
    assert found.costs == AddedCosts(0.5, 2.0, 3.0)
    assert rank("l2", coupling, model).costs == AddedCosts(1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("costs", "narrowed"),
    [(None, "cheap.weight:0"), (DividingCosts(computation=1.0), "dear.weight:0")],
)
def test_any_criterion_may_divide_by_costs(costs: DividingCosts | None, narrowed: str) -> None:
    """A layer whose units are worth twice as much and cost eight times as much is cut first."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dear, self.cheap = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
            self.ends = nn.ModuleList(nn.Conv2d(8, 2, 1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.ends[0](self.dear(x)) + self.ends[1](self.cheap(x))

    class Given:
        def scores(self, coupling: Coupling, model: nn.Module) -> np.ndarray:
            values = np.ones(coupling.context.units.count)
            for group in coupling.groups:
                values[group.units] = 2.0 if group.name.startswith("dear") else 1.0
            return values

    criterion = Given()
    if costs is not None:
        criterion.costs = costs  # type: ignore[attr-defined]
    pruned = fxprune.prune(Two().eval(), IMAGE, macs=0.9, criterion=criterion)
    cut = [group.name for group in pruned.plan.groups if len(group.kept) < group.size]
    assert cut == [narrowed]


@pytest.mark.parametrize("exponents", [(-1, 0), (math.nan, 0), (0, math.inf), ("a", 0)])
def test_exponents_of_costs_that_are_refused(exponents: tuple[Any, Any]) -> None:
    with pytest.raises(ArgumentError, match=r"computation and parameters are"):
        DividingCosts(*exponents)


def test_scores_of_groups_compare() -> None:
    """Scores that do not compare between groups are divided by their group's mean.

    LAMP and CPMC compare by themselves. A user's scores stay as they are.
    """
    model, x, coupling = analysed(BY_NAME["residual"])
    batches = [(x,)]
    for criterion in (
        "l1",
        "l2",
        "fpgm",
        Taylor(batches, energy),
        Fisher(batches, energy),
        Activation(batches),
    ):
        value = rank(criterion, coupling, model).value
        for group in coupling.groups:
            assert np.mean(of_group(value, group)) == pytest.approx(1)
    for name in ("lamp", "cpmc"):
        value = rank(name, coupling, model).value
        for view in views(coupling, model):
            np.testing.assert_array_equal(of_group(value, view.group), CRITERIA[name](view))
    value = rank(lambda view: 100 + torch.arange(view.group.size), coupling, model).value
    for group in coupling.groups:
        assert of_group(value, group) == [100.0 + i for i in range(group.size)]


def test_a_class_in_the_place_of_an_object() -> None:
    coupling, model = chain_coupling()
    for kind in (Taylor, Random, CPMC):
        with pytest.raises(ArgumentError, match=rf"{kind.__name__}\(\.\.\.\)"):
            rank(kind, coupling, model)


def test_an_object_whose_scores_have_a_wrong_shape() -> None:
    class Short:
        def scores(self, coupling: Coupling, model: nn.Module) -> np.ndarray:
            return np.ones(3)

    coupling, model = chain_coupling()
    with pytest.raises(ArgumentError, match=rf"shape \(3,\).*\({coupling.context.units.count},\)"):
        rank(Short(), coupling, model)


# -- data


def energy(output: Any, *targets: Any) -> Tensor:
    """Return a loss for any output: the mean over the batch of each sample's loss."""
    leaves = [
        leaf
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    return sum(((leaf.double() - 0.3) ** 2).flatten(1).mean() for leaf in leaves)  # type: ignore[return-value]


def naive_products(coupling: Coupling, group: Group, model: nn.Module) -> list[float]:
    """Return each unit's sum of weight times ``.grad`` over its elements, one by one."""
    products = {
        name: (p * p.grad).detach() for name, p in model.named_parameters() if p.grad is not None
    }
    return [math.fsum(flat(unit)) for unit in elements(coupling, group, products)]


@cases(
    "residual",
    "dense_block",
    "grouped",
    "depthwise",
    "attention_packed",
    "shared_modules",
    "language_model_tied",
    "two_inputs",
    "two_inputs_by_keyword",
    "nested_inputs",
    "lstm_in_the_middle",
)
def test_taylor_and_fisher_against_autograd_on_the_model(case: Case) -> None:
    model, first, coupling = analysed(case, 3)
    batches = [(first, "unread"), (as_dtype(case.inputs(1), torch.float64), "unread")]
    taylor = Taylor(batches, energy).scores(coupling, model)
    fisher = Fisher(batches, energy).scores(coupling, model)
    for group in coupling.groups:
        sums, squares = np.zeros(group.size), np.zeros(group.size)
        for (inputs, _), size in zip(batches, (3, 1), strict=True):
            model.zero_grad()
            energy(call(model, inputs)).backward()
            own = size * np.array(naive_products(coupling, group, model))
            sums, squares = sums + own, squares + own**2
        scale = np.abs(sums).max()
        np.testing.assert_allclose(
            of_group(taylor, group), np.abs(sums) / 4, rtol=1e-9, atol=1e-12 * scale
        )
        np.testing.assert_allclose(
            of_group(fisher, group), squares / 4, rtol=1e-9, atol=1e-12 * scale**2
        )
        assert scale > 0


def unit_of_inputs(
    coupling: Coupling, name: str, weight: Tensor, groups: int
) -> Iterator[list[int]]:
    """Yield, for each labelling of a layer's inputs, the unit (a label) of each channel.

    A label of 0 means no unit.
    """
    per_group, outputs = weight.shape[1], weight.shape[0] // groups
    dim = 1 if per_group > 1 else 0
    for labels in coupling.parameter_labels(name):
        if labels.shape[dim] > 1:
            whole = np.broadcast_to(labels, weight.shape).reshape(*weight.shape[:2], -1)[:, :, 0]
            yield [
                int(whole[c // per_group * outputs, c % per_group])
                for c in range(groups * per_group)
            ]


def naive_activation(coupling: Coupling, model: nn.Module, batches: list[Any]) -> np.ndarray:
    """Return each unit's mean absolute activation, over all layers that read it.

    Hooks see what enters each layer.
    """
    readings: dict[tuple[int, str, int], list[float]] = {}
    calls = itertools.count()

    def hook(name: str) -> Callable[[nn.Module, Any], None]:
        def see(module: nn.Module, args: Any) -> None:
            x, call_number = args[0].detach(), next(calls)
            weight, groups = module.weight, getattr(module, "groups", 1)
            channels = x.movedim(-1, 1) if isinstance(module, nn.Linear) else x
            for units in unit_of_inputs(coupling, f"{name}.weight", weight, groups):
                for channel, unit in enumerate(units):
                    values = channels[:, channel].abs()
                    key = (unit, name, call_number)
                    readings.setdefault(key, []).append((float(values.mean()), len(x)))  # type: ignore[arg-type]

        return see

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
        and module.weight.dim() > 1
        and not isinstance(module, nn.Embedding)
    ]
    with torch.no_grad():
        for inputs in batches:
            call(model, inputs)
    for handle in handles:
        handle.remove()
    total, times = np.zeros(coupling.context.units.count), np.zeros(coupling.context.units.count)
    # in one call of one layer, all positions of a unit have equal weight
    for (unit, _, _), seen in readings.items():
        size = seen[0][1]  # type: ignore[index]
        total[unit] += size * math.fsum(mean for mean, _ in seen) / len(seen)  # type: ignore[misc]
        times[unit] += size
    return total / np.maximum(times, 1)


@cases(
    "residual",
    "dense_block",
    "inception_branches",
    "grouped",
    "depthwise",
    "depth_multiplier",
    "flatten_nchw",
    "masked_conv",
    "in_place_fill_by_slices",
    "two_inputs",
    "two_inputs_by_keyword",
    "nested_inputs",
    "frames_folded_into_batch",
    "containers",
)
def test_activation_against_hooks(case: Case) -> None:
    model, _, coupling = analysed(case)
    batches = [as_dtype(case.inputs(size), torch.float64) for size in (3, 1)]
    scores = Activation([(inputs,) for inputs in batches]).scores(coupling, model)
    expected = naive_activation(coupling, model, batches)
    for group in coupling.groups:
        np.testing.assert_allclose(
            of_group(scores, group), of_group(expected, group), rtol=1e-9, err_msg=group.name
        )
    assert any(np.any(of_group(scores, group)) for group in coupling.groups)


class WritesInPlace(nn.Module):
    """A model that changes its input and the convolution's result in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        y = self.a(x)
        F.relu(y, inplace=True)
        return self.b(y)


def test_activations_are_what_the_layer_reads() -> None:
    model, x = WritesInPlace().double(), torch.randn(3, 3, 4, 4, dtype=torch.float64)
    coupling, given = fxprune.analyze(model, x), x.clone()
    scores = Activation([(x,)]).scores(coupling, model)
    Taylor([(x,)], energy).scores(coupling, model)
    assert torch.equal(x, given), "the loader's batch was written to"
    expected = torch.relu(model.a(2 * x)).mean((0, 2, 3))
    np.testing.assert_allclose(of_group(scores, coupling.groups[0]), expected.detach(), rtol=1e-12)


class SumsChannels(nn.Module):
    """A model that adds up channels; nothing multiplies them by a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x)).sum(1)


def test_a_sum_over_channels_reads_them() -> None:
    model, x = SumsChannels().double(), torch.randn(3, 3, 4, 4, dtype=torch.float64)
    coupling = fxprune.analyze(model, x)
    scores = Activation([(x,)]).scores(coupling, model)
    np.testing.assert_allclose(
        of_group(scores, coupling.groups[0]),
        torch.relu(model.a(x)).mean((0, 2, 3)).detach(),
        rtol=1e-12,
    )


class ReadsTheImageToo(nn.Module):
    """A convolution over removable channels and the input's channels, which stay.

    In training mode there is a second output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.aux = (
            nn.Conv2d(3, 8, 1),
            nn.BatchNorm2d(8),
            nn.Conv2d(11, 2, 1),
            nn.Conv2d(8, 2, 1),
        )

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.a(x))
        out = self.b(torch.cat([x, y], 1))
        return (out, self.aux(y)) if self.training else out


def test_activations_are_those_of_evaluation_mode() -> None:
    """Activations are those of evaluation mode, though training mode was traced last.

    What cannot be removed has no score.
    """
    model, x = randomise(ReadsTheImageToo()), torch.randn(3, 3, 4, 4, dtype=torch.float64)
    coupling = fxprune.analyze(model, x)
    assert [trace.training for trace in coupling.traces] == [False, True]
    scores = Activation([(x,)]).scores(coupling, model)
    expected = model.eval().norm(model.a(x)).abs().mean((0, 2, 3))
    np.testing.assert_allclose(of_group(scores, coupling.groups[0]), expected.detach(), rtol=1e-12)
    assert np.count_nonzero(scores) == coupling.groups[0].size


def test_attention_reads_queries_and_values() -> None:
    model, x, coupling = analysed(BY_NAME["attention_packed"])
    scores = Activation([(x,)]).scores(coupling, model)
    for group in coupling.groups:
        assert min(of_group(scores, group)) > 0, group.name


def data(samples: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 3, 6, 6, dtype=torch.float64), torch.randint(4, (samples,))


def split(*tensors: Tensor, sizes: tuple[int, ...]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(tensor.split(sizes) for tensor in tensors), strict=True))


def classifier() -> nn.Sequential:
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(8, 6, 1),
        nn.Flatten(),
    ]
    return randomise(nn.Sequential(*layers, nn.Linear(96, 4)))  # type: ignore[return-value]


def test_the_split_into_batches_makes_no_difference() -> None:
    """Scores are means over samples, however the samples are split into batches.

    The losses are means over batches of uneven sizes. Fisher scores of single samples do not
    depend on the order of the samples.
    """
    model, (x, y) = classifier(), data()
    coupling = fxprune.analyze(model, x[:1])
    splits = [split(x, y, sizes=sizes) for sizes in ((7,), (1, 2, 4), (4, 3), (1,) * 7)]
    for make in (
        lambda loader: Taylor(loader, F.cross_entropy),
        Activation,
        ActivationVariance,
        Wanda,
        lambda loader: HessianDiagonal(loader, F.cross_entropy),
        lambda loader: OBDC(loader, F.cross_entropy),
    ):
        whole, *parts = (make(loader).scores(coupling, model) for loader in splits)
        for part in parts:
            np.testing.assert_allclose(part, whole, rtol=1e-9, atol=1e-14)
        assert np.count_nonzero(whole)
    alone, *order = (
        Fisher(split(x[i], y[i], sizes=(1,) * 7), F.cross_entropy)
        for i in (torch.arange(7), torch.randperm(7))
    )
    np.testing.assert_allclose(
        order[0].scores(coupling, model), alone.scores(coupling, model), rtol=1e-9
    )


def test_fisher_of_single_samples_is_the_mean_square_of_the_gates_gradients() -> None:
    """Fisher scores of single samples are mean squared gradients of a unit's gate.

    The gate is a factor of 1 on the unit's output, which only one layer reads.
    """
    first, second, (x, y) = (
        nn.Linear(5, 6),
        nn.Linear(6, 4),
        (torch.randn(9, 5).double(), torch.randint(4, (9,))),
    )
    model = nn.Sequential(first, nn.ReLU(), second).double()
    coupling = fxprune.analyze(model, x)
    scores = Fisher(split(x, y, sizes=(1,) * 9), F.cross_entropy).scores(coupling, model)
    squares = torch.zeros(6, dtype=torch.float64)
    for sample, target in zip(x, y, strict=True):
        gate = torch.ones(6, dtype=torch.float64, requires_grad=True)
        F.cross_entropy(second(torch.relu(first(sample)) * gate), target).backward()
        squares += gate.grad**2  # type: ignore[operator]
    # A unit has its filter with bias, and the slice that reads it. For each of the two, the
    # products sum to the gate's gradient, so together to twice that.
    np.testing.assert_allclose(of_group(scores, coupling.groups[0]), 4 * squares / 9, rtol=1e-9)


READERS: list[Callable[[Any], Any]] = [
    lambda loader: Taylor(loader, F.cross_entropy),
    lambda loader: Fisher(loader, F.cross_entropy),
    lambda loader: HessianDiagonal(loader, F.cross_entropy),
    lambda loader: OBDC(loader, F.cross_entropy),
    HessianDiagonal,
    OBDC,
    Activation,
    ActivationVariance,
    Wanda,
]


def test_a_data_loader_and_every_kind_of_inputs() -> None:
    model, (x, y) = classifier(), data(8)
    coupling = fxprune.analyze(model, x[:1])
    loaders: list[Any] = [
        DataLoader(TensorDataset(x, y), batch_size=3),
        split(x, y, sizes=(3, 3, 2)),
        [((a,), b) for a, b in split(x, y, sizes=(3, 3, 2))],
        [[[a], b] for a, b in split(x, y, sizes=(3, 3, 2))],
        [({"input": a}, b) for a, b in split(x, y, sizes=(3, 3, 2))],
    ]
    for make in READERS:
        first, *others = (make(loader).scores(coupling, model) for loader in loaders)
        for other in others:
            np.testing.assert_array_equal(other, first)
        again = make(loaders[0])
        np.testing.assert_array_equal(again.scores(coupling, model), again.scores(coupling, model))


def test_the_old_name_of_weigh_groups() -> None:
    with pytest.warns(DeprecationWarning, match="standing is called weigh_groups") as seen:
        assert CPMC(standing=False) == CPMC(weigh_groups=False)
    assert seen[0].filename == __file__


class OfImages(nn.Module):
    """A model that takes a list of images, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.body(torch.stack(images))


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_images_is_one_argument_where_the_example_has_one(kind: type) -> None:
    model, images = OfImages(), [torch.randn(3, 6, 6) for _ in range(4)]
    coupling = fxprune.analyze(model, (images[:2],))
    plain = fxprune.analyze(model.body, torch.zeros(1, 3, 6, 6))
    loader = [(kind(images[:2]), 0), (kind(images[2:]), 0)]
    of_tensors = [(torch.stack(images[:2]), 0), (torch.stack(images[2:]), 0)]
    for make in (lambda loader: Taylor(loader, energy), Activation):
        scores = make(loader).scores(coupling, model)
        expected = make(of_tensors).scores(plain, model.body)
        np.testing.assert_allclose(
            of_group(scores, coupling.groups[0]), of_group(expected, plain.groups[0]), rtol=1e-5
        )


def test_inputs_go_by_name() -> None:
    """Inputs are matched by name, however the example and the loader pass them."""
    case = BY_NAME["two_inputs_by_keyword"]
    model, inputs, coupling = analysed(case)
    args = inputs["image"], inputs["meta"]
    positional = fxprune.analyze(model, args)
    backwards = dict(reversed(list(inputs.items())))
    assert list(backwards) != list(inputs)
    for make in (lambda loader: Taylor(loader, energy), Activation):
        expected = make([(inputs,)]).scores(coupling, model)
        np.testing.assert_array_equal(make([(backwards,)]).scores(coupling, model), expected)
        np.testing.assert_array_equal(make([(args,)]).scores(coupling, model), expected)
        other = make([(backwards,)]).scores(positional, model)
        for a, b in zip(coupling.groups, positional.groups, strict=True):
            assert of_group(other, b) == of_group(expected, a)


class AddsASlice(nn.Module):
    """A model that reads channels that stay by a slice, and the other channels by a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(11, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x, self.a(x)], 1)
        return self.b(torch.relu(y)) + y[:, :3]


def test_a_slice_reads_only_what_it_takes() -> None:
    model, x = AddsASlice().double(), torch.randn(3, 3, 4, 4, dtype=torch.float64)
    coupling = fxprune.analyze(model, x)
    scores = Activation([(x,)]).scores(coupling, model)
    expected = torch.relu(model.a(x)).mean((0, 2, 3))
    np.testing.assert_allclose(of_group(scores, coupling.groups[0]), expected.detach(), rtol=1e-12)


def passes_on(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap ``forward`` as decorators of libraries do."""

    @functools.wraps(forward)
    def wrapped(self: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return forward(self, *args, **kwargs)

    return wrapped


class Optional(nn.Module):
    """A model whose second argument is optional."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        x = torch.relu(self.a(x))
        return self.b(x if shift is None else x + shift)


class Wrapped(Optional):
    """The same model with a forward whose signature accepts any arguments."""

    forward = passes_on(Optional.forward)


@pytest.mark.parametrize("kind", [Optional, Wrapped])
def test_arguments_that_may_be_left_out(kind: type[nn.Module]) -> None:
    model, x, shift = kind(), torch.randn(4, 3), torch.randn(4, 6)
    one, two = fxprune.analyze(model, x), fxprune.analyze(model, (x, torch.zeros(4, 1)))
    scores = Activation([(x,)]).scores(one, model)
    np.testing.assert_allclose(
        of_group(scores, one.groups[0]), torch.relu(model.a(x)).mean(0).detach(), rtol=1e-6
    )
    scores = Activation([((x, torch.ones(4, 1)),)]).scores(two, model)
    np.testing.assert_allclose(
        of_group(scores, two.groups[0]), 1 + torch.relu(model.a(x)).mean(0).detach(), rtol=1e-6
    )
    for coupling, inputs in ((one, (x, shift)), (two, (x,))):
        with pytest.raises(ArgumentError, match=r"analysed with .*give the same"):
            Activation([(inputs,)]).scores(coupling, model)


def test_a_model_is_unharmed() -> None:
    """Scoring leaves modes, gradients, statistics and flags of a model as they were.

    They do not affect the scores either.
    """
    model, (x, y) = classifier(), data()
    coupling = fxprune.analyze(model, x[:1])
    batches = split(x, y, sizes=(3, 4))
    criteria = [make(batches) for make in READERS]
    plain = [criterion.scores(coupling, model.eval()) for criterion in criteria]
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.full_like(model[4].weight, 7.0)
    before, twin_modes = (
        snapshot(model),
        [module.training for module in coupling.traces[0].meta_copy.model.modules()],
    )
    for criterion, expected in zip(criteria, plain, strict=True):
        np.testing.assert_array_equal(criterion.scores(coupling, model), expected)
        assert_unharmed(model, before)
        assert model[4].weight.grad.unique().tolist() == [7.0]
        assert all(p.grad is None for name, p in model.named_parameters() if name != "4.weight")
    assert [
        module.training for module in coupling.traces[0].meta_copy.model.modules()
    ] == twin_modes
    for criterion, expected in zip(criteria, plain, strict=True):
        with torch.no_grad():
            np.testing.assert_array_equal(criterion.scores(coupling, model), expected)
        with torch.inference_mode():
            np.testing.assert_array_equal(criterion.scores(coupling, model), expected)
    assert_unharmed(model, before)


class Counts(nn.Module):
    """A model that writes to a buffer on every run, also in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)
        self.register_buffer("peak", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.peak.add_(1)
        return self.b(torch.relu(self.a(x)) * torch.sigmoid(self.peak))


def test_buffers_that_a_model_writes_to() -> None:
    model, x = Counts(), torch.randn(4, 3)
    coupling, before = fxprune.analyze(model, x), snapshot(model)
    for criterion in (Taylor([(x,)], energy), Fisher([(x,)], energy), Activation([(x,)])):
        criterion.scores(coupling, model)
        assert_unharmed(model, before)


def test_a_loss_that_fails_leaves_the_model_as_it_was() -> None:
    model, (x, y) = classifier(), data()
    coupling, before = fxprune.analyze(model, x[:1]), snapshot(model)

    def fails(output: Tensor, target: Tensor) -> Tensor:
        raise KeyError("the user's own")

    for kind in (Taylor, Fisher):
        with pytest.raises(CallbackError, match=r"the loss.*KeyError.*the user's own") as caught:
            kind([(x, y)], fails).scores(coupling, model)
        assert_unharmed(model, before)  # while the error still holds all its frames
        assert caught.tb is not None


class TwoHeads(nn.Module):
    """A model with two outputs, of which the loss below uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(6, 5)
        self.head_a, self.head_b, self.unused = nn.Linear(5, 2), nn.Linear(5, 2), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.stem(x))
        return self.head_a(torch.relu(self.a(x))), self.head_b(torch.relu(self.b(x)))


def test_parameters_without_a_gradient() -> None:
    model, x = TwoHeads().double(), torch.randn(4, 3).double()
    coupling = fxprune.analyze(model, x)
    for kind in (Taylor, Fisher):
        scores = kind([(x,)], lambda output: energy(output[0])).scores(coupling, model)
        got = {group.name: np.any(of_group(scores, group)) for group in coupling.groups}
        assert got == {"stem.weight:0": True, "a.weight:0": True, "b.weight:0": False}
    pruned = fxprune.prune(
        model, x, macs=0.5, criterion=Taylor([(x,)], lambda output: energy(output[0]))
    )
    assert pruned.model(x)[0].shape == (4, 2)


def test_half_precision_sums_in_single() -> None:
    """Scores of half-precision models are summed in single precision.

    The sum of a gradient of 3000 over 64 samples overflows float16.
    """
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 1, bias=False)).half()
    x = torch.full((64, 2), 50.0, dtype=torch.float16)
    coupling = fxprune.analyze(model, x)
    for kind in (Taylor, Fisher):
        narrow = kind([(x,)], lambda output: 60 * output.float().mean()).scores(coupling, model)
        wide = kind([(x.double(),)], lambda output: 60 * output.mean()).scores(
            coupling, nn.Sequential(*model).double()
        )
        model.half()
        np.testing.assert_allclose(
            of_group(narrow, coupling.groups[0]), of_group(wide, coupling.groups[0]), rtol=0.01
        )


def wrong_loaders() -> dict[str, tuple[Any, str]]:
    x, y = data(4)
    return {
        "bare_tensors": ([x], "Tensor.*tuples"),
        "mappings": ([{"input": x, "target": y}], "dict.*tuples"),
        "empty_batches": ([()], "empty batch.*tuples"),
        "no_tensors": ([("text", y)], r"without a tensor.*str"),
        "no_batch": ([], "no batch.*read again"),
    }


@pytest.mark.parametrize("loader", wrong_loaders().values(), ids=list(wrong_loaders()))
def test_loaders_that_are_refused(loader: tuple[Any, str]) -> None:
    model = classifier()
    coupling, before = fxprune.analyze(model, IMAGE.double()), snapshot(model)
    batches, words = loader
    for make in READERS:
        with pytest.raises(ArgumentError, match=words):
            rank(make(batches), coupling, model)
        assert_unharmed(model, before)


@pytest.mark.parametrize("criterion", READERS)
def test_what_can_be_read_only_once_is_refused_at_once(criterion: Callable[[Any], Any]) -> None:
    with pytest.raises(ArgumentError, match=r"generator.*only once.*DataLoader"):
        criterion(batch for batch in [data(4)])


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda output, y: F.cross_entropy(output, y, reduction="none"), r"shape \(4,\)"),
        (lambda output, y: 0.5, "a float"),
        (lambda output, y: F.cross_entropy(output.detach(), y), "differentiable"),
        (lambda output, y: (output.argmax(1) == y).double().mean(), "differentiable"),
    ],
    ids=["not_reduced", "a_number", "detached", "accuracy"],
)
def test_losses_that_are_refused(loss: Callable[..., Any], words: str) -> None:
    model = classifier()
    coupling = fxprune.analyze(model, IMAGE.double())
    for kind in (Taylor, Fisher, HessianDiagonal, OBDC):
        with pytest.raises(ArgumentError, match=words):
            kind([data(4)], loss).scores(coupling, model)


def test_batches_that_do_not_fit_the_graph() -> None:
    model, inputs, coupling = analysed(BY_NAME["two_inputs_by_keyword"])
    name, value = next(iter(inputs.items()))
    with pytest.raises(ArgumentError, match=r"forward.*missing"):
        Activation([({name: value},)]).scores(coupling, model)
    with pytest.raises(ArgumentError, match=r"forward.*wrong"):
        Activation([({**inputs, "wrong": value},)]).scores(coupling, model)
    model, inputs, coupling = analysed(BY_NAME["control_flow_on_shapes"])
    for kind in (Activation, ActivationVariance, Wanda):
        with pytest.raises(ArgumentError, match=r"does not fit the example.*size"):
            kind([(torch.randn(2, 3, 8, 9, dtype=torch.float64),)]).scores(coupling, model)


# -- several processes


@pytest.mark.long
def test_two_processes_score_as_one(tmp_path: Path) -> None:
    alone = ranks.scores(ranks.batches())
    torch.multiprocessing.spawn(ranks.work, (2, str(tmp_path)), nprocs=2)
    for number in range(2):
        found = np.load(tmp_path / f"{number}.npz")
        for kind in ranks.KINDS:
            np.testing.assert_allclose(
                found[kind], alone[kind], rtol=1e-9, atol=1e-14, err_msg=kind
            )
            np.testing.assert_allclose(
                found[f"lopsided_{kind}"], alone[kind], rtol=1e-9, atol=1e-14, err_msg=kind
            )
        assert "no batch" in str(found["refusal"])
    half = ranks.scores(ranks.batches()[::2])
    for kind in ranks.KINDS:
        assert not np.allclose(half[kind], alone[kind]), (
            "a process's own batches must not be enough"
        )
