"""Plans as text, and the architectures they belong to."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

import fxprune
from fxprune.errors import PlanError
from fxprune.plan import GroupPlan, Plan, fingerprint, pack_inputs, unpack_inputs

words = st.text(max_size=8)


@st.composite
def plans(draw: Any) -> Plan:
    groups = []
    for name in draw(st.lists(words, max_size=3)):
        size = draw(st.integers(1, 9))
        groups.append(GroupPlan(name, size, tuple(sorted(draw(st.sets(st.integers(0, size - 1), min_size=1))))))
    return Plan(tuple(groups), draw(words), tuple(draw(st.lists(words))), tuple(draw(st.lists(words))), draw(words))


@given(plan=plans())
def test_json_and_back(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan


GOOD = Plan((GroupPlan("conv.weight:0", 4, (0, 3)),), pack_inputs((torch.ones(1),), {}), (), (), "abc")


@given(cut=st.integers(0, len(GOOD.to_json()) - 1))
def test_cut_short(cut: int) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(GOOD.to_json()[:cut])


@pytest.mark.parametrize("key", ["schema", "groups", "inputs", "keep", "pinned_nodes", "fingerprint"])
def test_a_key_is_missing(key: str) -> None:
    data = json.loads(GOOD.to_json())
    del data[key]
    with pytest.raises(PlanError, match=f"not a plan.*{key}"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("kept", [[], [3, 0], [0, 0], [-1, 2], [4], None, "a", [None], 3])
def test_survivors_that_cannot_be(kept: Any) -> None:
    data = json.loads(GOOD.to_json())
    data["groups"][0]["kept"] = kept
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("schema", [0, 2, 99, "1", None])
def test_another_schema(schema: Any) -> None:
    data = {**json.loads(GOOD.to_json()), "schema": schema}
    with pytest.raises(PlanError, match=f"schema {schema}.*reads 1.*upgrade"):
        Plan.from_json(json.dumps(data))


def test_printing() -> None:
    assert str(GOOD) == "conv.weight:0: 2 of 4"


# -- inputs


leaf = st.builds(
    lambda shape, dtype: torch.empty(shape, dtype=dtype, device="meta"),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
nests = st.recursive(
    leaf, lambda n: st.one_of(st.lists(n, max_size=3), st.lists(n, max_size=3).map(tuple), st.dictionaries(words, n))
)


def described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return {key: described(item) for key, item in value.items()}
    return type(value)(map(described, value))


@given(args=st.lists(nests, max_size=3).map(tuple), kwargs=st.dictionaries(words, nests, max_size=2))
def test_inputs_and_back(args: Any, kwargs: Any) -> None:
    found = unpack_inputs(pack_inputs(args, kwargs))
    assert described(found) == described((args, kwargs))
    assert all(leaf.is_meta for leaf in tree_leaves(found))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"args": 3, "kwargs": {}}',
        '{"args": {"tuple": [{"shape": [-1], "dtype": "float32"}]}, "kwargs": {"dict": {}}}',
    ],
)
def test_damaged_inputs(text: str) -> None:
    with pytest.raises(PlanError, match="inputs are damaged"):
        unpack_inputs(text)


def test_inputs_of_an_unknown_dtype() -> None:
    with pytest.raises(PlanError, match="float33"):
        unpack_inputs(pack_inputs((torch.ones(1),), {}).replace("float32", "float33"))


def test_inputs_that_cannot_be_stored() -> None:
    with pytest.raises(PlanError, match="str"):
        pack_inputs(("text",), {})


# -- architectures


def net(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))


def test_the_fingerprint_is_of_names_and_shapes_only() -> None:
    assert fingerprint(net()) == fingerprint(net())
    assert fingerprint(net()) == fingerprint(net().double())
    assert fingerprint(net()) != fingerprint(net(9))
    assert fingerprint(net()) != fingerprint(nn.Sequential(net()))
    assert fingerprint(nn.BatchNorm1d(4)) != fingerprint(nn.BatchNorm1d(4, track_running_stats=False))


def test_replaying_on_another_architecture() -> None:
    plan = fxprune.prune(net(), torch.randn(2, 4), channels=0.5).plan
    with pytest.raises(PlanError, match="another architecture"):
        fxprune.apply(plan, net(9))


def test_replaying_where_the_code_differs() -> None:
    """Same names and shapes, another forward."""

    class Skips(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[2](torch.softmax(self[0](x), -1))

    plan = fxprune.prune(net(), torch.randn(2, 4), channels=0.5).plan
    with pytest.raises(PlanError, match="groups are not those"):
        fxprune.apply(plan, Skips(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))


def test_a_plan_holds_for_other_weights() -> None:
    plan, other = fxprune.prune(net(), torch.randn(2, 4), channels=0.5).plan, net()
    (group,) = plan.groups
    assert torch.equal(fxprune.apply(plan, other).model.get_parameter("0.weight"), other[0].weight[list(group.kept)])
