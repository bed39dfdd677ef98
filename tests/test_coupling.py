"""Tests of the coupling as users see it: text, graph, reasons, and the elements of each unit."""

from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.coupling import Axis, Group, Pinned
from tests.zoo import CASES

SOME = [
    case
    for case in CASES
    if case.name in ("residual", "vit_packed", "two_inputs", "concat", "densenet", "shared")
]
IMAGE = (2, 3, 8, 8)


class Small(nn.Module):
    """A sum of two branches, a slice of the sum, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(6, 4, 1, bias=False),
        )
        self.unused = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.a(x) + self.b(x))[:, :6])


@pytest.fixture
def coupling() -> Any:
    return fxprune.analyze(Small(), torch.randn(IMAGE))


def names(group: Group) -> list[str]:
    return [str(axis) for axis in group.axes]


def test_segments_of_unlike_fate_are_groups_of_their_own(coupling: Any) -> None:
    """Channels inside the slice and channels outside of it are separate groups."""
    assert [(group.size, names(group)) for group in coupling.groups] == [
        (
            6,
            ["a.weight:0[0:6]", "a.bias:0[0:6]", "b.weight:0[0:6]", "b.bias:0[0:6]", "c.weight:1"],
        ),
        (2, ["a.weight:0[6:8]", "a.bias:0[6:8]", "b.weight:0[6:8]", "b.bias:0[6:8]"]),
    ]


def test_printing(coupling: Any) -> None:
    lines = str(coupling).splitlines()
    assert lines[0] == "2 groups, 8 units"
    assert (
        lines[1]
        == "  6 units: a.weight:0[0:6], a.bias:0[0:6], b.weight:0[0:6], b.bias:0[0:6], c.weight:1"
    )
    assert "untouched: unused.weight, unused.bias" in lines
    assert any(
        "c.weight:0: is an output of the model (at output)" in line
        for line in lines[lines.index("pinned") :]
    )


def test_shares_of_the_macs_that_pins_hold() -> None:
    """The MACs of a layer are divided equally among its axes.

    The pinned share of an axis counts for the reason of the pin.
    """
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
    )
    coupling = fxprune.analyze(net, torch.zeros(1, 3, 8, 8))
    first, depthwise, last = 36 * 8 * 27, 16 * 8 * 9, 16 * 8 * 4
    total = first + depthwise + last
    assert coupling.macs() == total
    found = coupling.pinned_macs()
    assert list(found) == ["reads an input of the model", "is an output of the model"]
    # the three channels of the image
    assert found["reads an input of the model"] == pytest.approx(first / 2 / total)
    assert found["is an output of the model"] == pytest.approx(last / 2 / total)
    assert (
        "multiply-accumulates held: 41.2% because it reads an input of the model, 2.7% because "
        "it is" in str(coupling)
    )

    kept = fxprune.analyze(net, torch.zeros(1, 3, 8, 8), keep="0").pinned_macs()
    assert kept["is kept by request"] == pytest.approx((first + depthwise + last / 2) / total)

    halves = Halves()
    part = fxprune.analyze(halves, torch.zeros(1, 3)).pinned_macs()
    assert part["is an output of the model"] == pytest.approx(
        (24 / 2 * 0.5) / (24 + 4 * 2) + (8 / 2) / (24 + 4 * 2)
    )


class Halves(nn.Module):
    """A layer whose output is split: one half is returned, and a second layer reads the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.first(x).chunk(2, dim=1)
        return a, self.second(b)


def test_long_lines_are_cut() -> None:
    axes = tuple(Axis(f"layer{i}.weight", 0, 0, 4, 4) for i in range(9))
    assert str(Group("g", 4, axes, 2, (), ())).startswith(
        "4 units in 2 balanced blocks: layer0.weight:0, "
    )
    assert str(Group("g", 4, axes, 2, (), ())).endswith("layer5.weight:0, ... (9 in all)")
    assert str(Pinned(axes, "why", "there")).endswith(
        "layer3.weight:0, ... (9 in all): why (at there)"
    )


def test_decisions_are_printed() -> None:
    class Branch(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.shape[2] > 4 else x

    text = str(fxprune.analyze(Branch(), torch.randn(IMAGE)))
    assert "decided while tracing" in text
    assert "test_coupling.py" in text.split("decided while tracing")[1]


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_components_of_the_graph_are_the_groups(case: Any) -> None:
    coupling = fxprune.analyze(case.build(case.width), case.inputs(2))
    components = {
        frozenset(component) for component in nx.connected_components(coupling.to_networkx())
    }
    assert components == {frozenset(group.axes) for group in coupling.groups}
    assert len(components) > 1


def test_edges_name_the_nodes_that_tied(coupling: Any) -> None:
    graph = coupling.to_networkx()
    a, b = Axis("a.weight", 0, 0, 6, 8), Axis("b.weight", 0, 0, 6, 8)
    assert graph.edges[a, b]["nodes"] == ("add",)
    assert graph.edges[a, Axis("a.bias", 0, 0, 6, 8)]["nodes"] == ("a",)


def test_the_graph_is_a_copy(coupling: Any) -> None:
    coupling.to_networkx().clear()
    assert coupling.to_networkx().number_of_nodes() == 9


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_axes_of_the_graph_are_axes_of_the_model(case: Any) -> None:
    model = case.build(case.width)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for axis in fxprune.analyze(model, case.inputs(2)).to_networkx().nodes:
        assert tensors[axis.parameter].shape[axis.dim] == axis.length
        assert 0 <= axis.start < axis.stop <= axis.length


REASONS = [
    (lambda m, x: m.c(m.a(x)[:, :6]), "c.weight:0", "is an output of the model", "output"),
    (lambda m, x: m.c(m.a(x)[:, :6]), "a.weight:1", "reads an input of the model", "a"),
    (
        lambda m, x: m.c((m.a(x).cumsum(1).relu() * 2)[:, :6]),
        "c.weight:1",
        "is mixed by cumsum",
        "cumsum",
    ),
    (
        lambda m, x: m.c(m.a(x)[:, :6].amax(1, keepdim=True).expand(-1, 6, -1, -1)),
        "a.weight:0[0:6]",
        "reduce|maximum",
        "amax",
    ),
]


@pytest.mark.parametrize(("function", "axis", "reason", "node"), REASONS)
def test_reasons_of_pins(function: Any, axis: str, reason: str, node: str) -> None:
    model = type("Other", (Small,), {"forward": function})()
    pinned = [
        p for p in fxprune.analyze(model, torch.randn(IMAGE)).pinned if axis in map(str, p.axes)
    ]
    assert [p.node for p in pinned] == [node]
    assert any(word in pinned[0].reason for word in reason.split("|"))


def test_what_is_kept_says_so() -> None:
    coupling = fxprune.analyze(Small(), torch.randn(IMAGE), keep="b")
    assert coupling.groups == ()
    kept = [p for p in coupling.pinned if p.reason == "is kept by request"]
    assert {axis.parameter for p in kept for axis in p.axes} >= {"b.weight", "b.bias"}


def test_untouched_parameters(coupling: Any) -> None:
    assert coupling.untouched == ("unused.weight", "unused.bias")


# -- elements and blocks


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_elements_lie_on_the_axes_of_the_group(case: Any) -> None:
    model = case.build(case.width)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    coupling = fxprune.analyze(model, case.inputs(2))
    for group in coupling.groups:
        elements = coupling.elements(group)
        assert set(elements) == {axis.parameter for axis in group.axes}
        for name, fields in elements.items():
            found = torch.cat([field.flatten() for field in fields])
            assert set(found.tolist()) - {-1} <= set(range(group.size))
            assert all(
                torch.broadcast_shapes(field.shape, tensors[name].shape) == tensors[name].shape
                for field in fields
            )


def test_elements_of_a_segment(coupling: Any) -> None:
    elements = coupling.elements(coupling.groups[1])
    assert elements["a.bias"][0].tolist() == [-1] * 6 + [0, 1]
    assert elements["b.weight"][0].shape == (8, 1, 1, 1)
    assert "c.weight" not in elements


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_blocks_number_every_unit(case: Any) -> None:
    coupling = fxprune.analyze(case.build(case.width), case.inputs(2))
    for group in coupling.groups:
        blocks = coupling.blocks(group)
        assert blocks.shape == (group.size,)
        assert len(blocks.unique()) >= max(group.blocks, 1)


# -- statistics and modes


def test_normalised_names_the_nodes() -> None:
    model = nn.Sequential(
        nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)
    )
    groups = fxprune.analyze(model, torch.randn(2, 4)).groups
    assert [group.normalised for group in groups] == [("_1",), ()]


def test_both_modes_are_labelled_together() -> None:
    """Units that only the training path couples are in one group."""

    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (
                nn.Linear(*s) for s in ((4, 8), (4, 8), (8, 2), (8, 2))
            )

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            return self.c(a + b) if self.training else self.c(a) + self.d(b)

    (group,) = fxprune.analyze(Modes(), torch.randn(2, 4)).groups
    assert {axis.parameter for axis in group.axes} == {
        "a.weight",
        "a.bias",
        "b.weight",
        "b.bias",
        "c.weight",
        "d.weight",
    }


# -- roles


def standardised(weight: Tensor) -> Tensor:
    return (weight - weight.mean(1, keepdim=True)) / (
        weight.std(1, keepdim=True) + weight.norm() + 1e-5
    )


COMPUTED = {
    "transposed": lambda x, weight: x @ weight.t(),
    "standardised": lambda x, weight: F.linear(x, standardised(weight)),
    "einsum": lambda x, weight: torch.einsum("ni,oi->no", x, weight * 2),
    "convolution": lambda x, weight: F.conv1d(x[..., None], torch.tanh(weight)[..., None]).flatten(
        1
    ),
    "transposed_convolution": lambda x, weight: F.conv_transpose1d(
        x[..., None], -weight.t()[..., None]
    ).flatten(1),
}


class Reads(nn.Module):
    """Two layers whose parameters go through a computation before they meet the input."""

    def __init__(self, product: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(4, 8))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(F.relu(self.product(x, self.first)), self.second)


@pytest.mark.parametrize("how", COMPUTED)
def test_a_computed_weight_is_read_where_its_parameter_is(how: str) -> None:
    coupling = fxprune.analyze(Reads(COMPUTED[how]), torch.randn(2, 6))
    assert [names(group) for group in coupling.groups] == [["first:0", "second:1"]]
    assert [coupling.role("first", 0), coupling.role("second", 1)] == ["own", "dependent"]


def test_overrides_by_name_mean_the_layer_though_its_weight_is_computed() -> None:
    """``layers=`` finds a layer by name, also if a parametrization computes its weight."""

    def normed() -> nn.Sequential:
        layers = (
            nn.utils.parametrizations.weight_norm(nn.Linear(a, b))
            for a, b in ((6, 8), (8, 8), (8, 3))
        )
        return nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))

    pruned = fxprune.prune(normed(), torch.randn(2, 6), layers={"2.*": 0.5})
    assert [(g.name.split(".")[0], len(g.kept)) for g in pruned.plan.groups] == [
        ("0", 8),
        ("2", 4),
    ]


def test_a_product_of_weights_alone_reads_its_own_factors() -> None:
    """In a product of two weights, the axis between them is dependent in both."""

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Linear(5, 6), nn.Linear(8, 2)
            self.left, self.right = (
                nn.Parameter(torch.randn(8, 4)),
                nn.Parameter(torch.randn(4, 6)),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.after(F.relu(F.linear(F.relu(self.before(x)), self.left @ self.right)))

    coupling = fxprune.analyze(LowRank(), torch.randn(2, 5))
    roles = {
        str(axis): coupling.role(axis.parameter, axis.dim)
        for group in coupling.groups
        for axis in group.axes
    }
    assert {name for name, role in roles.items() if role == "dependent"} == {
        "after.weight:1",
        "left:1",
        "right:0",
        "right:1",
    }


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(8, 3)), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.linear(x, self.weight.flatten(1)))


def test_a_view_that_is_its_parameter_itself() -> None:
    """``flatten`` of a matrix returns the parameter itself, which is still a weight."""
    (group,) = fxprune.analyze(Flattened(), torch.zeros(2, 3)).groups
    assert names(group) == ["weight:0", "head.weight:1"]
