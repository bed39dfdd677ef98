"""Whole attention heads as units, found without a declaration however attention is written."""

import re
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxprune
from fxprune.errors import ArgumentError, PlanError
from tests.support.checking import check_exact
from tests.zoo.attention import (
    ATTENTIONS,
    CASES,
    HEADS,
    BareAttention,
    CrossAttention,
    Decoder,
    Transformer,
)
from tests.zoo.case import Case

parametrised = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@parametrised
def test_half_of_the_heads(case: Case) -> None:
    torch.manual_seed(0)
    check_exact(
        case.build(case.width),
        case.inputs(2),
        at_most=case.bound(),
        zeroable=case.zeroable,
        batches=case.inputs,
        units="heads",
    )


@pytest.mark.parametrize("name", sorted(set(ATTENTIONS) - {"einsum"}))
def test_a_head_keeps_all_its_dimensions_or_none(name: str) -> None:
    """In every projection, all rows of a head belong to the same unit."""
    torch.manual_seed(0)
    model, x = BareAttention(16, ATTENTIONS[name]), torch.zeros(1, 5, 6)
    width = 16 // HEADS
    coupling = fxprune.analyze(model, x, units="heads")
    # number of query heads for each head of the keys and values
    shared = 2 if name.startswith("grouped") else 1
    (heads,) = [
        g
        for g in coupling.groups
        if g.size == HEADS // shared and g.axes[0].parameter.startswith("attention.")
    ]
    checked = 0
    for parameter, (field,) in coupling.elements(heads).items():
        # only rows of projections, not columns of the layer that reads the heads
        if field.dim() == 2 and field.shape[0] > 1:
            rows = field[:, 0].reshape(-1, width)
            assert (rows == rows[:, :1]).all(), parameter
            assert rows[:, 0].unique().tolist() == list(range(HEADS // shared)), parameter
            checked += 1
    assert checked in (1, 3)  # one packed projection, or three


def test_attention_weights_that_nobody_reads_hold_no_head() -> None:
    """Attention weights pin the heads only if they are used.

    By default nn.MultiheadAttention also returns its weights, averaged over the heads; most
    callers drop them.
    """

    class Kept(CrossAttention):
        def forward(self, x: Tensor, memory: Tensor) -> Any:
            q, memory = self.q(x), self.kv(memory)
            q, weights = self.attention(q, memory, memory)
            return self.head(self.up(q)), weights

    inputs = (torch.zeros(1, 5, 6), torch.zeros(1, 7, 5))
    dropped = fxprune.analyze(CrossAttention(16), inputs, units="heads")
    assert HEADS in [group.size for group in dropped.groups]
    kept = fxprune.analyze(Kept(16), inputs, units="heads")
    assert HEADS not in [group.size for group in kept.groups]
    assert any("removed elements are not zero" in pinned.reason for pinned in kept.pinned)


def test_what_nobody_reads_is_not_emitted() -> None:
    """Unused operations are not emitted: they have no labels, so they could not be checked.

    An unused operation that draws random numbers stays, so that later draws do not change.
    """

    class Idle(BareAttention):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            torch.relu(x[:, None]).mean()
            torch.dropout(x, 0.5, self.training)
            return self.head(self.up(x + self.attention(x)))

    pruned = fxprune.prune(
        Idle(16, ATTENTIONS["packed"]),
        torch.zeros(1, 5, 6),
        channels=0.5,
        units="heads",
        verify=True,
    )
    code = pruned.model.code
    assert "relu" not in code
    assert "dropout" in code


def test_each_layer_may_have_its_own() -> None:
    model, x = Transformer(16, ATTENTIONS["packed"]), torch.zeros(1, 3, 8, 8)
    sizes = {}
    for name, units in {
        "dims": "dims",
        "heads": "heads",
        "first": {"attentions.0": "heads"},
        "all but the first": {"attentions.*": "heads", "attentions.0": "dims"},
    }.items():
        groups = fxprune.analyze(model, x, units=units).groups
        sizes[name] = [
            next(g.size for g in groups if g.name.startswith(f"attentions.{i}.qkv.weight:0"))
            for i in range(2)
        ]
    assert sizes["heads"] == [HEADS, HEADS]
    assert sizes["dims"][0] > HEADS
    assert sizes["first"] == [HEADS, sizes["dims"][1]]
    assert sizes["all but the first"] == [sizes["dims"][0], HEADS]


def test_a_plan_knows_its_units() -> None:
    torch.manual_seed(0)
    model, x = Decoder(16), torch.zeros(1, 6, dtype=torch.long)
    pruned = fxprune.prune(model, x, channels=0.5, units={"attentions.1": "heads"})
    plan = fxprune.Plan.from_json(pruned.plan.to_json())
    assert plan == pruned.plan
    assert plan.heads == tuple(
        f"attentions.1.{name}"
        for name in ("q.weight", "out.weight", "k.weight", "v.weight", "rotary.frequencies")
    )
    again = fxprune.apply(plan, model)
    tokens = torch.randint(20, (3, 9))
    assert torch.equal(again.model(tokens), pruned.model(tokens))
    twice = fxprune.prune(pruned.model, x, channels=0.5)
    assert fxprune.verify(model, twice).error < 1e-9
    changed = plan.to_json().replace("attentions.1.q.weight", "attentions.9.q.weight")
    with pytest.raises(PlanError, match=re.escape("the plan names 'attentions.9.q.weight'")):
        fxprune.apply(fxprune.Plan.from_json(changed), model)


def test_a_module_whose_result_nobody_reads_stays() -> None:
    """A module whose result is unused is still called: in training, a norm updates statistics."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head, self.norm = (
                BareAttention(16, ATTENTIONS["packed"]),
                nn.Linear(6, 6),
                nn.BatchNorm1d(5),
            )

        def forward(self, x: Tensor) -> Tensor:
            self.norm(x)
            self.head(x).relu()
            return self.attention(x)

    model, x = Counting(), torch.randn(4, 5, 6)
    pruned = fxprune.prune(model, x, channels=0.5, units="heads", verify=True)
    pruned.model.train()(x)
    assert torch.allclose(pruned.model.get_buffer("norm.running_mean"), 0.1 * x.mean((0, 2)))


@pytest.mark.parametrize(
    ("units", "says"),
    [
        ("channels", '"heads"'),
        ({"attentions": "head"}, '"heads"'),
        ({"nowhere.*": "heads"}, "matches no module"),
    ],
)
def test_units_that_are_refused(units: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        fxprune.analyze(Decoder(16), torch.zeros(1, 6, dtype=torch.long), units=units)


def test_without_attention_heads_change_nothing() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, groups=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 4, 1)
    )
    x = torch.zeros(1, 3, 8, 8)
    assert str(fxprune.analyze(net, x, units="heads")) == str(fxprune.analyze(net, x))


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["swin_t", "swin_v2_t", pytest.param("vit_b_16", marks=pytest.mark.slow)]
)
def test_transformers_of_torchvision(name: str) -> None:
    """Half of the heads are removed from every attention layer of torchvision's transformers.

    They have windows, tables of relative positions, a learned scale per head, and a network that
    computes biases per head.
    """
    size = 224 if name.startswith("vit") else 64
    model = torchvision.models.get_model(name, weights=None).eval()
    pruned = fxprune.prune(
        model, torch.zeros(1, 3, size, size), channels=0.5, units="heads", verify=True
    )
    assert pruned.report.error is not None
    assert pruned.report.error < 1e-9
    assert pruned.report.params_after < 0.27 * pruned.report.params_before
    telling = [module for module in model.modules() if hasattr(module, "num_heads")]
    innermost = [
        module
        for module in telling
        if not any(inner in telling for inner in list(module.modules())[1:])
    ]
    heads = [module.num_heads for module in innermost]
    found = [row for row in pruned.report.groups if row.total in heads]
    assert len(heads) >= 12
    assert len([row for row in found if row.kept == max(1, row.total // 2)]) >= len(heads)


def test_one_dimension_of_a_shared_head() -> None:
    """A key head that is repeated for several query heads may keep a single dimension.

    Then its dimensions have no order that could go wrong, and nothing is pinned.
    """

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.q, self.kv, self.proj = (
                nn.Linear(6, 8),
                nn.Linear(8, 12),
                nn.Linear(8, 8),
                nn.Linear(12, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            q = self.q(x).unflatten(2, (3, 4)).transpose(1, 2)
            k, v = (
                t.unflatten(2, (1, 4)).transpose(1, 2).repeat_interleave(3, dim=1)
                for t in self.kv(x).chunk(2, dim=2)
            )
            return self.proj(
                nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            )

    torch.manual_seed(0)
    pruned = fxprune.prune(
        Shared().double().eval(),
        torch.randn(2, 5, 6, dtype=torch.float64),
        channels=0.25,
        verify=True,
    )
    assert pruned.report.error is not None
    assert pruned.report.error < 1e-12
    assert pruned.plan.pinned_nodes == ()
    assert pruned.model.get_submodule("q").out_features == 3
