"""Running the nodes of a graph under labels.

Operations with a rule apply it, operations without one pin their inputs, and errors name the node.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.coupling.propagation import LabelMode, run_node
from fxprune.errors import RewriteError
from fxprune.ops import Context


def labelled(*shape: int) -> tuple[Context, Tensor]:
    context, x = Context(), torch.empty(shape, device="meta")
    context.parameter(x, "x", tuple(range(len(shape))))
    return context, x


def run(context: Context, function: Any) -> Any:
    with torch.inference_mode(), LabelMode(context):
        return function()


def test_an_op_without_a_rule_pins_what_enters() -> None:
    context, x = labelled(3, 4)
    out = run(context, lambda: torch.cdist(x, x))
    assert out.shape == (3, 3)
    assert context.fields(x) == context.fields(out) == []
    assert any("has no rule" in why for why, _ in context.reasons)


def test_a_composite_is_followed_through_its_parts() -> None:
    context, x = labelled(3, 4)
    out = run(context, lambda: torch.ops.aten.square(x))
    assert {dim for f in context.fields(out) for dim in f.dims} == {0, 1}


def test_what_carries_no_labels_runs_for_real() -> None:
    assert run(Context(), lambda: torch.arange(3).cumsum(0)).tolist() == [0, 1, 3]


def call(target: Any, *args: Any) -> fx.Node:
    graph = fx.Graph()
    return (
        graph.call_function(target, args) if callable(target) else graph.call_method(target, args)
    )


@pytest.mark.parametrize("target", [torch.matmul, "matmul"])
def test_errors_name_the_node_and_the_shapes(target: Any) -> None:
    context, x = labelled(3, 4)
    with (
        torch.inference_mode(),
        pytest.raises(RewriteError, match=r"node 'matmul' .*\(3, 4\), \(3, 4\)") as caught,
    ):
        run_node(context, nn.Module(), call(target, x, x), lambda n: n, "train.")
    assert caught.value.node == "matmul"
    assert (context.node, [*context.found.ran]) == ("", ["train.matmul"])


def test_values_of_parameters_by_dotted_names() -> None:
    root = nn.Sequential(nn.Linear(2, 3))
    node = fx.Graph().create_node("get_attr", "0.weight")
    assert run_node(Context(), root, node, lambda n: n) is root[0].weight


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_seen_as_one_op(layer: Any) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.r, self.b = (
                nn.Linear(3, 6),
                layer(6, 5, batch_first=True),
                nn.Linear(5, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.r(self.a(x))[0])

    coupling = fxprune.analyze(Recurrent(), torch.randn(2, 4, 3))
    assert [group.size for group in coupling.groups] == [6, 5]
    assert not any("has no rule" in p.reason for p in coupling.pinned)
