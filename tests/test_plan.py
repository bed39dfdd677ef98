"""Plans: their text, the inputs that they store, their architectures and their chains."""

import copy
import json
import re
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

import fxprune
from fxprune.errors import PlanError
from fxprune.inputs import storable_values
from fxprune.result.plan import GroupPlan, Plan, fingerprint
from fxprune.result.stored_inputs import pack_inputs, unpack_inputs

words = st.text(max_size=8)


@st.composite
def plans(draw: Any) -> Plan:
    plan = None
    for _ in range(draw(st.integers(1, 3))):
        groups = []
        for name in draw(st.lists(words, max_size=3, unique=True)):
            size = draw(st.integers(1, 9))
            groups.append(
                GroupPlan(
                    name, size, tuple(sorted(draw(st.sets(st.integers(0, size - 1), min_size=1))))
                )
            )
        keep = tuple(draw(st.lists(words)))
        # an @ is followed by the number of an axis
        pinned = tuple(draw(st.lists(words.filter(lambda word: "@" not in word))))
        plan = Plan(
            tuple(groups),
            draw(words),
            keep,
            pinned,
            draw(words),
            plan,
            tuple(draw(st.lists(words))),
        )
    assert plan is not None
    return plan


@given(plan=plans())
def test_json_and_back(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan


GOOD = Plan(
    (GroupPlan("conv.weight:0", 4, (0, 3)),),
    pack_inputs((torch.ones(1, device="meta"),), {}),
    (),
    (),
    "abc",
)


@given(cut=st.integers(0, len(GOOD.to_json()) - 1))
def test_cut_short(cut: int) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(GOOD.to_json()[:cut])


@pytest.mark.parametrize(
    "key",
    ["schema", "groups", "inputs", "keep", "pinned_nodes", "fingerprint", "previous", "heads"],
)
def test_a_key_is_missing(key: str) -> None:
    data = json.loads(GOOD.to_json())
    del data[key]
    with pytest.raises(PlanError, match=f"not a plan.*{key}"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    "kept", [[], [3, 0], [0, 0], [-1, 2], [4], None, "a", "03", [None], 3, [0.0], [False]]
)
def test_survivors_that_cannot_be(kept: Any) -> None:
    data = json.loads(GOOD.to_json())
    data["groups"][0]["kept"] = kept
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("schema", [0, 5, 99, "1", None, True, 1.0, []])
def test_another_schema(schema: Any) -> None:
    data = {**json.loads(GOOD.to_json()), "schema": schema}
    with pytest.raises(
        PlanError, match=rf"schema {re.escape(str(schema))}.*reads 1 to 4.*upgrade"
    ):
        Plan.from_json(json.dumps(data))


def test_a_file_of_schema_1_still_loads() -> None:
    """The first version wrote plans like this, before a plan contained earlier plans."""
    text = """{"schema": 1, "groups": [{"name": "conv.weight:0", "size": 4, "kept": [0, 3]}],
        "inputs": "{\\"args\\": {\\"tuple\\": [{\\"shape\\": [1], \\"dtype\\": \\"float32\\"}]}, \\"kwargs\\": {\\"dict\\": {}}}",
        "keep": [], "pinned_nodes": [], "fingerprint": "abc"}"""  # noqa: E501
    assert Plan.from_json(text) == GOOD


def test_a_file_of_schema_2_still_loads() -> None:
    """Schema 2 is from before whole heads could be units, so no plan of the chain has any."""
    first = replace(GOOD, fingerprint="first")
    data = {**json.loads(replace(GOOD, previous=first).to_json()), "schema": 2}
    for stage in (data, *data["previous"]):
        del stage["heads"]
    assert Plan.from_json(json.dumps(data)) == replace(GOOD, previous=first)


@pytest.mark.parametrize("text", ["null", "3", "[]", '"text"', "{" * 100_000, "[" * 100_000])
def test_no_plan_at_all(text: str) -> None:
    with pytest.raises(PlanError, match="not a plan"):
        Plan.from_json(text)


def test_two_groups_of_one_name() -> None:
    data = json.loads(GOOD.to_json())
    data["groups"] *= 2
    with pytest.raises(PlanError, match="two groups of one name"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("previous", [None, {}, [3], [{}], "ab"])
def test_a_damaged_chain(previous: Any) -> None:
    data = {**json.loads(GOOD.to_json()), "previous": previous}
    with pytest.raises(PlanError, match="not a plan"):
        Plan.from_json(json.dumps(data))


def test_survivors_of_an_earlier_plan_are_checked_too() -> None:
    data = json.loads(replace(GOOD, previous=GOOD).to_json())
    data["previous"][0]["groups"][0]["kept"] = [4]
    with pytest.raises(PlanError, match=r"outside 0\.\.3"):
        Plan.from_json(json.dumps(data))


def test_printing() -> None:
    assert str(GOOD) == "conv.weight:0: 2 of 4"
    assert str(replace(GOOD, previous=GOOD)) == "after 1 earlier plan\nconv.weight:0: 2 of 4"


# -- inputs


leaf = st.builds(
    lambda shape, dtype: torch.empty(shape, dtype=dtype, device="meta"),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
nests = st.recursive(
    leaf,
    lambda n: st.one_of(
        st.lists(n, max_size=3), st.lists(n, max_size=3).map(tuple), st.dictionaries(words, n)
    ),
)


def described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return {key: described(item) for key, item in value.items()}
    return type(value)(map(described, value))


@given(
    args=st.lists(nests, max_size=3).map(tuple), kwargs=st.dictionaries(words, nests, max_size=2)
)
def test_inputs_and_back(args: Any, kwargs: Any) -> None:
    found = unpack_inputs(pack_inputs(args, kwargs))
    assert described(tuple(found)) == described((args, kwargs))
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


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([[5, 3], [1, 2]]),
        torch.tensor(7),
        torch.tensor([True, False]),
        torch.tensor([0.1, float("nan"), float("-inf")], dtype=torch.bfloat16),
        torch.tensor([1 + 2j]),
        torch.zeros(0, 3),
        torch.arange(6).view(2, 3).T,
        torch.zeros(300, 300),
    ],
)
def test_values_of_small_tensors_are_stored(tensor: torch.Tensor) -> None:
    (found,), _ = unpack_inputs(pack_inputs((tensor,), {}))
    assert found.dtype == tensor.dtype
    torch.testing.assert_close(found, tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "large",
    [
        torch.randn(3, 200, 200),
        torch.randint(-7, 50000, (300, 300)),
        torch.rand(800, 800) > 0.5,
        torch.randn(200, 200, dtype=torch.complex64),
        torch.rand(400, 400, dtype=torch.float16),
    ],
)
def test_of_large_tensors_the_range_is_stored(large: torch.Tensor) -> None:
    call = storable_values(((large,), {}))
    text = pack_inputs(*call)
    assert len(text) < 200
    (found,), _ = unpack_inputs(text)
    assert torch.equal(found, call[0][0])
    assert (found.shape, found.dtype) == (large.shape, large.dtype)
    if not large.is_complex():
        assert (found.min(), found.max()) == (large.min(), large.max())
    assert storable_values(((found,), {}))[0][0] is not large
    # storing it again changes nothing
    assert pack_inputs(*storable_values(((found,), {}))) == text


def test_a_large_tensor_that_is_no_draw_is_stored_whole() -> None:
    large = torch.randn(200, 200)
    (found,), _ = unpack_inputs(pack_inputs((large,), {}))
    assert torch.equal(found, large)


def test_constants_are_stored() -> None:
    call = (1, None, True, 0.5, "text", [(8, 8)], torch.float16, {"a": {"b": None}}), {"scale": 2}
    assert unpack_inputs(pack_inputs(*call)) == call


def test_objects_are_named_where_they_are_missed() -> None:
    with pytest.raises(PlanError, match=r"^the model was pruned on an example with object in it"):
        unpack_inputs(pack_inputs((object(),), {}))


@pytest.mark.parametrize("data", ["", "eJw=", "????", 3])
def test_damaged_data_of_inputs(data: Any) -> None:
    text = json.loads(pack_inputs((torch.tensor([1, 2]),), {}))
    text["args"]["tuple"][0]["data"] = data
    with pytest.raises(PlanError, match="inputs are damaged"):
        unpack_inputs(json.dumps(text))


# -- architectures


def net(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))


def test_the_fingerprint_is_of_names_and_shapes_only() -> None:
    assert fingerprint(net()) == fingerprint(net())
    assert fingerprint(net()) == fingerprint(net().double())
    assert fingerprint(net()) != fingerprint(net(9))
    assert fingerprint(net()) != fingerprint(nn.Sequential(net()))
    assert fingerprint(nn.BatchNorm1d(4)) != fingerprint(
        nn.BatchNorm1d(4, track_running_stats=False)
    )


def test_replaying_on_another_architecture() -> None:
    plan = fxprune.prune(net(), torch.randn(2, 4), channels=0.5).plan
    with pytest.raises(PlanError, match="another architecture"):
        fxprune.apply(plan, net(9))


def test_replaying_where_the_code_differs() -> None:
    """Names and shapes are the same, but forward differs."""

    class Skips(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[2](torch.softmax(self[0](x), -1))

    plan = fxprune.prune(net(), torch.randn(2, 4), channels=0.5).plan
    with pytest.raises(PlanError, match="groups are not those"):
        fxprune.apply(plan, Skips(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))


def test_a_plan_holds_for_other_weights() -> None:
    plan, other = fxprune.prune(net(), torch.randn(2, 4), channels=0.5).plan, net()
    (group,) = plan.groups
    assert torch.equal(
        fxprune.apply(plan, other).model.get_parameter("0.weight"),
        other[0].weight[list(group.kept)],
    )


# -- chains


def twice() -> tuple[nn.Module, fxprune.Pruned, fxprune.Pruned]:
    """Return a network, the result of pruning it, and the result of pruning that again."""
    model = net(16)
    once = fxprune.prune(model, torch.randn(2, 4), channels=0.75)
    return model, once, fxprune.prune(once.model, torch.randn(2, 4), channels=0.5)


def test_a_second_plan_knows_the_first() -> None:
    model, once, again = twice()
    assert once.plan.previous is None
    assert again.plan.previous == once.plan
    assert again.plan.chain == (once.plan, again.plan)
    assert (once.plan.fingerprint, again.plan.fingerprint) == (
        fingerprint(model),
        fingerprint(once.model),
    )
    assert [group.size for plan in again.plan.chain for group in plan.groups] == [16, 12]


def test_a_chain_takes_the_original_or_any_stage() -> None:
    model, once, again = twice()
    plan = Plan.from_json(again.plan.to_json())
    assert plan == again.plan
    for start, first in (
        (model, model),
        (once.model, once.model),
        (copy.deepcopy(once.model), once.model),
    ):
        found = fxprune.apply(plan, start)
        assert found.plan == plan
        assert {n: t.tolist() for n, t in found.model.state_dict().items()} == {
            n: t.tolist() for n, t in again.model.state_dict().items()
        }
        assert found.report.params_before == sum(p.numel() for p in first.parameters())
        assert found.report.params_after == again.report.params_after


def test_a_chain_applied_to_a_model_that_was_built_small() -> None:
    """The model has a stage's names and shapes but no plan, so the new plan starts with it."""
    _, _, again = twice()
    found = fxprune.apply(again.plan, net(12))
    assert found.plan == replace(again.plan, previous=None)


def test_a_chain_of_stages_that_remove_nothing() -> None:
    model = net()
    once = fxprune.prune(model, torch.randn(2, 4), channels=1.0)
    again = fxprune.prune(once.model, torch.randn(2, 4), channels=0.5)
    for start in (model, once.model):
        assert fxprune.apply(again.plan, start).plan == again.plan


def test_another_architecture_for_a_chain() -> None:
    _, _, again = twice()
    with pytest.raises(PlanError, match="another architecture"):
        fxprune.apply(again.plan, net(9))


def test_a_chain_is_verified_from_any_stage() -> None:
    model, once, again = twice()
    # as if fine-tuned: only the structure matters
    nn.init.normal_(again.model.get_parameter("0.weight"))
    for start in (model, once.model):
        found = fxprune.verify(start, again)
        assert (found.outputs, found.error < 1e-12) == (1, True)


def test_a_chain_with_a_wrong_stage_is_not_verified() -> None:
    model, once, again = twice()
    (group,) = once.plan.groups
    others = replace(group, kept=tuple(range(1, len(group.kept) + 1)))
    swapped = replace(
        again, plan=replace(again.plan, previous=replace(once.plan, groups=(others,)))
    )
    assert fxprune.verify(model, swapped).error < 1e-12  # same number of units, so same structure
    fewer = replace(group, kept=group.kept[:-1])
    wrong = replace(again, plan=replace(again.plan, previous=replace(once.plan, groups=(fewer,))))
    with pytest.raises(PlanError, match="another architecture"):
        fxprune.verify(model, wrong)


def test_a_changed_model_starts_a_new_chain() -> None:
    """The old plan would not lead to the changed model."""
    _, once, _ = twice()
    once.model.add_module("2", nn.Linear(12, 5))
    assert fxprune.prune(once.model, torch.randn(2, 4), channels=0.5).plan.previous is None


def test_plans_are_frozen_and_not_copied() -> None:
    with pytest.raises(FrozenInstanceError):
        GOOD.keep = ()  # type: ignore[misc]
    assert copy.deepcopy(GOOD) is GOOD


def test_a_plan_that_keeps_an_unknown_parameter() -> None:
    plan = fxprune.prune(net(), torch.randn(2, 4), channels=0.5).plan
    with pytest.raises(PlanError, match="names 'nowhere'"):
        fxprune.apply(replace(plan, keep=("nowhere",)), net())
