"""Tracing: decisions of Python are listed and guarded, and sizes stay symbolic.

The model and the state around it stay as they were.
"""

import copy
import datetime
import itertools
import operator
import os
import random
import re
import secrets
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch import pow as power
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth
from torchvision.ops.stochastic_depth import stochastic_depth

import fxprune
from fxprune.errors import ChanceError, InputError, TraceError
from fxprune.trace import Trace, example_of, is_leaf, meta_copy_of, trace
from tests.support.checking import assert_unharmed, call, relative_error, snapshot


def traced(model: nn.Module, *inputs: Any, training: bool = False) -> Trace:
    return trace(meta_copy_of(model), *example_of(inputs), training=training)


class Computes(nn.Module):
    """A convolution, and a function of the module and its output."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 8, 1), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.conv(x))


def pruned(
    function: Callable[[nn.Module, Tensor], Any], *shape: int
) -> tuple[nn.Module, nn.Module]:
    """Return a model around a function, and the model emitted for it when nothing is pruned."""
    model = Computes(function).eval()
    return model, fxprune.prune(model, torch.randn(shape), channels=1.0).model


def runs_alike(model: nn.Module, emitted: nn.Module, inputs: Any) -> None:
    with torch.no_grad():
        assert relative_error(call(emitted, inputs), call(model, inputs)) <= 1e-6


# -- decisions and guards


def by_width(module: nn.Module, x: Tensor) -> Tensor:
    if x.shape[-1] % 4:
        return x.relu()
    return x.sigmoid()


LINE = by_width.__code__.co_firstlineno + 1


@pytest.mark.parametrize(("width", "same", "other"), [(8, 12, 9), (9, 13, 8)])
def test_a_branch_on_a_size_refuses_inputs_of_the_other_kind(
    width: int, same: int, other: int
) -> None:
    model, emitted = pruned(by_width, 2, 3, 4, width)
    if width == 8:
        runs_alike(model, emitted, torch.randn(5, 3, 4, same))
    with pytest.raises(AssertionError, match=rf"test_trace\.py:{LINE}"):
        emitted(torch.randn(2, 3, 4, other))


def test_a_branch_taken_for_true_holds_for_other_sizes_for_which_it_is_true() -> None:
    """9 % 4 and 10 % 4 differ, but both are true."""
    model, emitted = pruned(by_width, 2, 3, 4, 9)
    runs_alike(model, emitted, torch.randn(2, 3, 4, 10))


def test_a_decision_names_its_line_and_its_formula() -> None:
    decisions = traced(Computes(by_width), torch.randn(2, 3, 4, 8)).decisions
    assert decisions == [f"test_trace.py:{LINE}: mod(conv.size(3), 4) was taken as False"]


def test_no_line_outside_of_the_model_is_named() -> None:
    """All of this forward is torch's code, so no decision names a line of the caller.

    The graph is the same wherever tracing is called.
    """
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(
        nn.Linear(3, 8),
        nn.TransformerEncoder(layer, 1, enable_nested_tensor=False),
        nn.Linear(8, 3),
    ).eval()
    one = traced(model, torch.randn(2, 5, 3))
    other = traced(model, torch.randn(2, 5, 3))
    assert one.decisions == other.decisions
    assert str(one.graph) == str(other.graph)
    assert one.decisions
    assert "test_trace.py" not in str(one.graph) + str(one.decisions)


def test_a_loop_over_a_size_is_a_decision() -> None:
    model, emitted = pruned(lambda m, x: sum(x[:, :, i] for i in range(x.shape[2])), 2, 3, 4, 4)
    runs_alike(model, emitted, torch.randn(3, 3, 4, 6))
    with pytest.raises(AssertionError, match=r"test_trace\.py"):
        emitted(torch.randn(2, 3, 5, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x if x.dim() == 4 else x[0],
        lambda m, x: x.flatten(1),
        lambda m, x: x.view(x.size(0), -1),
    ],
)
def test_ranks_and_plain_reshapes_are_no_decisions(function: Callable[..., Any]) -> None:
    assert traced(Computes(function), torch.randn(2, 3, 4, 4)).decisions == []


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x if x.sum() > 0 else -x,
        lambda m, x: x if (x > 0).all() else -x,
        lambda m, x: x * float(x.mean()),
        lambda m, x: x[: int(x.argmax())],
        lambda m, x: x * x.max().item(),
        lambda m, x: x[x > 0],
        lambda m, x: x.nonzero(),
    ],
    ids=["sum", "all", "float", "int", "item", "mask", "nonzero"],
)
def test_values_are_never_read(function: Callable[..., Any]) -> None:
    model = Computes(function)
    with pytest.raises(TraceError, match=rf"test_trace\.py:{function.__code__.co_firstlineno}"):
        traced(model, torch.randn(2, 3, 4, 4))


def test_a_wrong_shape_names_the_line() -> None:
    function = lambda m, x: x @ torch.zeros(7, 7)  # noqa: E731
    line = rf"test_trace\.py:{function.__code__.co_firstlineno}"
    with pytest.raises(InputError, match=rf"matmul.*\(2, 8, 4, 4\), \(7, 7\).*{line}"):
        traced(Computes(function), torch.randn(2, 3, 4, 4))


# -- modes


def by_mode(module: nn.Module, x: Tensor) -> Tensor:
    return x.relu() if module.training else x.sigmoid()


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_decides_and_is_no_decision(training: bool) -> None:
    result = traced(Computes(by_mode), torch.randn(2, 3, 4, 4), training=training)
    assert result.asked_mode
    assert result.decisions == []
    assert ("relu" in str(result.graph), "sigmoid" in str(result.graph)) == (
        training,
        not training,
    )


def test_a_mode_that_is_passed_on_stays_open() -> None:
    model, emitted = pruned(lambda m, x: F.dropout(x, 0.5, m.training), 2, 3, 4, 4)
    assert not traced(model, torch.randn(2, 3, 4, 4)).asked_mode
    x = torch.randn(2, 3, 4, 4)
    assert (emitted.train()(x) == 0).float().mean() > 0.3
    assert torch.equal(emitted.eval()(x), model(x))


def test_classes_of_modules_are_given_back() -> None:
    meta_copy = meta_copy_of(Computes(by_mode))
    with pytest.raises(TraceError):
        trace(
            meta_copy_of(Computes(lambda m, x: x.sum().item())),
            *example_of(torch.zeros(2, 3, 4, 4)),
        )
    trace(meta_copy, *example_of(torch.zeros(2, 3, 4, 4)))
    assert [type(m) for m in meta_copy.model.modules()] == [Computes, nn.Conv2d]


# -- leaf functions


@torch.fx.wrap
def wrapped(x: Tensor, scale: Tensor) -> Tensor:
    """Marked as a leaf, although a parameter passes through it."""
    return torch.tanh(x) * scale


def test_leaf_functions_are_entered() -> None:
    model = Computes(lambda m, x: wrapped(x, m.conv.bias[:1]))
    graph = traced(model, torch.randn(2, 3, 4, 4)).graph
    names = [getattr(node.target, "__name__", node.target) for node in graph.nodes]
    assert "tanh" in names
    assert "wrapped" not in names


def test_leaf_functions_that_ask_for_the_mode_stay_whole() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), StochasticDepth(0.5, "row"))
    result = traced(model, torch.randn(2, 3, 4, 4))
    assert stochastic_depth in [node.target for node in result.graph.nodes]
    assert not result.asked_mode
    emitted = fxprune.prune(model, torch.randn(2, 3, 4, 4), channels=1.0).model
    x = torch.randn(64, 3, 4, 4)
    rows = emitted.train()(x).flatten(1).abs().sum(1)
    assert 10 < int((rows == 0).sum()) < 54
    assert torch.equal(emitted.eval()(x), model[0](x))


@pytest.mark.parametrize("name", ["arange", "zeros", "ones", "full", "tensor"])
def test_factories_are_themselves_again(name: str) -> None:
    before = getattr(torch, name)
    traced(Computes(by_width), torch.randn(2, 3, 4, 4))
    assert getattr(torch, name) is before


class ByName(nn.Module):
    def __init__(self, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.how = nn.Linear(4, 8), nn.Linear(8, 2), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.how(self.first(x)))


@pytest.mark.parametrize(
    "how",
    [
        lambda x: torch.pow(x, 2.0),
        lambda x: power(x, 2.0),
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: torch.where(x > 0, 0.5, x),
        lambda x: torch.remainder(x, 0.3),
        lambda x: torch.float_power(x, 2.0).to(x.dtype),
        lambda x: torch.special.xlog1py(x, 0.5),
    ],
)
def test_a_tensor_and_a_number(how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The first signatures of these functions take a number.

    With torch.fx's own proxies, such a call would end the process.
    """
    model, x = ByName(how), torch.randn(3, 4)
    before = torch.pow, torch.where, power
    assert torch.equal(fxprune.prune(model, x, channels=1.0).model(x), model(x))
    assert (torch.pow, torch.where, power) == before
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert pruned.model.get_submodule("second").weight.shape == (2, 4)


def test_a_message_about_sizes_costs_no_node() -> None:
    """Libraries write checks like this one, where the message is made even if the check passes."""

    def checked(model: nn.Module, x: Tensor) -> Tensor:
        torch._assert(
            x.ndim == 4,
            f"expected 4 dimensions, got {x.ndim} of {x.dtype}, {x.shape[1]} channels of {x}",
        )
        return x.relu()

    model, emitted = pruned(checked, 2, 3, 4, 4)
    assert "dtype" not in [argument for node in emitted.graph.nodes for argument in node.args]  # type: ignore[union-attr]
    assert torch.equal(emitted(torch.ones(1, 3, 5, 5)), model(torch.ones(1, 3, 5, 5)))


def test_the_mode_of_what_forward_makes() -> None:
    """A slice of a ``ModuleList`` is a new module with its own mode."""

    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers[:3]:
                x = layer(x).relu()
            return x

    pruned = fxprune.prune(Sliced(), torch.zeros(1, 8), channels=0.5, verify=True)
    assert pruned.model.get_submodule("layers.1").weight.shape == (4, 4)
    assert pruned.report.untouched == ("layers.3.weight", "layers.3.bias")

    class Switches(Sliced):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.training = False
            return super().forward(x)

    with pytest.raises(
        TraceError, match=r"changes the mode of a Switches \(at test_trace.py:\d+\)"
    ):
        traced(Switches(), torch.zeros(2, 8))


def test_containers_come_out_as_what_they_are() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> Any:
            return OrderedDict(b=self.second(self.first(x)), a={"c": [x]})

    out = fxprune.prune(Named(), torch.zeros(2, 4), channels=0.5, verify=True).model(
        torch.zeros(3, 4)
    )
    assert type(out) is OrderedDict
    assert list(out) == ["b", "a"]
    assert type(out["a"]) is dict


# -- parameters, buffers, constants


def test_buffers_stay_buffers() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), FrozenBatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()
    model[1].running_var.uniform_(0.5, 2)
    emitted = fxprune.prune(model, torch.randn(2, 3, 4, 4), channels=0.5).model
    assert [name for name, _ in emitted.named_buffers()] == [
        name for name, _ in model.named_buffers()
    ]
    assert [name for name, _ in emitted.named_parameters()] == [
        name for name, _ in model.named_parameters()
    ]
    kept = torch.isin(model[0].weight[:, 0, 0, 0], emitted.get_parameter("0.weight")[:, 0, 0, 0])
    assert torch.equal(emitted.get_buffer("1.running_var"), model[1].running_var[kept])


def test_a_constant_in_the_code_keeps_its_value() -> None:
    table = torch.arange(8.0).view(8, 1, 1)
    model, emitted = pruned(lambda m, x: x * table, 2, 3, 4, 4)
    runs_alike(model, emitted, torch.randn(3, 3, 5, 5))


def test_constants_of_both_modes() -> None:
    tables = {mode: torch.full((1, 1, 4), 2.0 + mode) for mode in (True, False)}
    model, emitted = pruned(
        lambda m, x: x * tables[True] if m.training else x * tables[False], 2, 3, 4, 4
    )
    for training in (True, False):
        runs_alike(model.train(training), emitted.train(training), torch.randn(3, 3, 5, 4))


def test_tensors_that_are_plain_attributes() -> None:
    model = Everything().eval()
    emitted = fxprune.prune(model, torch.randn(2, 4), channels=1.0).model
    runs_alike(model, emitted, torch.randn(3, 4))


class Remembers(nn.Module):
    """A convolution and a table for the last size; with ``memory`` also the last result."""

    def __init__(self, buffer: bool, memory: bool) -> None:
        super().__init__()
        self.conv, self.memory = nn.Conv2d(3, 8, 1), memory
        if buffer:
            self.register_buffer("table", torch.zeros(1, 1), persistent=False)
            self.register_buffer("last", torch.zeros(()), persistent=False)
        else:
            self.table, self.last = torch.zeros(1, 1), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[1] != x.shape[3]:
            self.table = torch.arange(x.shape[3], dtype=x.dtype)[None]
        y = self.conv(x) + self.table
        if self.memory:
            y = y + self.last
            self.last = y.mean()
        return y


@pytest.mark.parametrize("buffer", [False, True], ids=["attribute", "buffer"])
def test_a_table_that_forward_sets_is_computed_in_the_graph(buffer: bool) -> None:
    """Only the size of the previous table is read."""
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), Remembers(buffer, memory=False), nn.Conv2d(8, 2, 1)
    ).eval()
    pruned = fxprune.prune(model, torch.zeros(2, 3, 4, 5), channels=0.5, verify=True)
    assert pruned.report.error is not None
    assert pruned.report.error < 1e-12
    assert pruned.model.get_submodule("2").in_channels == 4
    # the table of the last call is not used, and a decision says so
    assert any("size(3)" in decision for decision in pruned.report.decisions)
    assert model[1].table.shape == (1, 1)


@pytest.mark.parametrize("buffer", [False, True], ids=["attribute", "buffer"])
def test_what_forward_remembers_for_its_next_call_is_in_no_graph(buffer: bool) -> None:
    x = torch.randn(2, 3, 4, 5)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.Conv2d(6, 3, 1), Remembers(buffer, memory=True)
    ).eval()
    with pytest.raises(TraceError, match=r"reads '2\.last' and sets it for its next call"):
        traced(model, x)
    pruned = fxprune.prune(model, x, channels=0.5)
    assert pruned.report.parts
    for _ in range(2):
        runs_alike(model, fxprune.prune(model, x, channels=1.0).model, x)
    assert not torch.equal(pruned.model(x), pruned.model(x))


# -- functions with custom gradients, and checkpoints


class Doubled(torch.autograd.Function):
    """Twice the input, with three times its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


doubled = Doubled.apply


def applied(m: nn.Module, x: Tensor) -> Tensor:
    return Doubled.apply(x)


def applied_by_a_name(m: nn.Module, x: Tensor) -> Tensor:
    return doubled(x)


def applied_by_an_attribute(m: Any, x: Tensor) -> Tensor:
    return m.conv.twice(x)


@pytest.mark.parametrize(
    "function",
    [applied, applied_by_a_name, applied_by_an_attribute],
    ids=lambda function: function.__name__,
)
def test_functions_with_gradients_of_their_own(function: Callable[..., Tensor]) -> None:
    """C++ code takes a proxy for the tensor that it claims to be, which can end the process."""
    x = torch.randn(2, 3, 4, 5)
    model = nn.Sequential(Computes(function), nn.Conv2d(8, 4, 1))
    model[0].conv.twice = Doubled.apply
    half = fxprune.prune(model, x, channels=0.5, verify=True)
    assert half.report.error is not None
    assert half.report.error < 1e-12
    assert half.model.get_submodule("1").in_channels == 4
    assert not half.report.parts
    whole = fxprune.prune(model, x, channels=1.0).model
    for net in (model, whole, copy.deepcopy(whole)):
        net(x).sum().backward()
    assert (
        relative_error(whole.get_submodule("0.conv").weight.grad, model[0].conv.weight.grad) < 1e-6
    )
    assert Doubled.apply(x).equal(2 * x)
    assert type(doubled) is type(Doubled.apply)


# a warning from the original, which runs without gradients here
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("imported", [False, True], ids=["from torch", "imported"])
def test_a_checkpoint_is_what_it_computes(imported: bool, reentrant: bool) -> None:
    x = torch.randn(2, 3, 4, 5)

    def forward(m: nn.Module, y: Tensor) -> Tensor:
        called = checkpoint if imported else torch.utils.checkpoint.checkpoint
        return called(F.gelu, y, use_reentrant=reentrant, preserve_rng_state=False)

    runs_alike(*pruned(forward, *x.shape), x)
    assert torch.utils.checkpoint.checkpoint is checkpoint


def gate_in_place(x: Tensor) -> Tensor:
    return x.sigmoid().mul_(x)


class Checkpointed(nn.Module):
    """A checkpoint in which ``activation`` may overwrite what is saved for the gradient."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.inner, self.last = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 4, 1),
        )
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(
            lambda y: self.activation(self.inner(y)), self.first(x), use_reentrant=False
        )
        return self.last(x)


def test_what_a_checkpoint_computes_again_stays_python() -> None:
    """A graph computes once, and autograd would refuse a saved tensor that was overwritten."""
    x = torch.randn(2, 3, 8, 8)
    half = fxprune.prune(Checkpointed(gate_in_place), x, channels=0.5)
    assert re.search(r"Its checkpoint \(at test_trace.py:\d+\)", half.report.not_one_graph)
    half.model(x).sum().backward()
    whole = fxprune.prune(model := Checkpointed(gate_in_place), x, channels=1.0, verify=True).model
    for net in (model, whole):
        net(x).sum().backward()
    assert relative_error(whole.get_submodule("first").weight.grad, model.first.weight.grad) < 1e-6


def test_a_checkpoint_that_overwrites_nothing_that_is_kept_is_followed() -> None:
    x = torch.randn(2, 3, 8, 8)
    half = fxprune.prune(Checkpointed(F.relu_), x, channels=0.5, verify=True)
    assert not half.report.parts
    half.model(x).sum().backward()


# -- writing in place


def sum_into(m: nn.Module, x: Tensor) -> Tensor:
    y = x
    y += x.sigmoid()
    return x * y


def scaled_in_place(m: nn.Module, x: Tensor) -> Tensor:
    x *= 2
    x -= 1
    x /= 3
    x **= 2
    return x


def relu_then_sum(m: nn.Module, x: Tensor) -> Tensor:
    y = F.relu(x, inplace=True)
    y += 1
    return x + y


def through_a_view(m: nn.Module, x: Tensor) -> Tensor:
    flat = x.view(x.shape[0], -1)
    flat += 1.5
    return x.sigmoid()


def behind_a_view(m: nn.Module, x: Tensor) -> Tensor:
    flat = x.view(x.shape[0], -1)
    x += x.sigmoid()
    return x * flat.view(x.shape)


def its_data(m: nn.Module, x: Tensor) -> Tensor:
    x.data += 1
    return x


def numbers(m: nn.Module, x: Tensor) -> Tensor:
    count = width = x.shape[-1]
    count += 1
    count *= 2
    return x * count + width


WRITING = [
    sum_into,
    scaled_in_place,
    relu_then_sum,
    through_a_view,
    behind_a_view,
    its_data,
    numbers,
]


@pytest.mark.parametrize("function", WRITING, ids=lambda function: function.__name__)
def test_what_is_written_is_seen_under_every_name(function: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 3, 4, 5)
    runs_alike(*pruned(function, *x.shape), x)
    model = nn.Sequential(Computes(function), nn.Conv2d(8, 4, 1)).eval()
    assert not traced(model, x).path
    half = fxprune.prune(model, x, channels=0.5, verify=True)
    assert half.report.error is not None
    assert half.report.error < 1e-12
    assert half.model.get_submodule("1").in_channels == 4


def test_augmented_assignment_to_a_buffer_is_kept() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x = self.conv(x)
            self.mean *= 0.5
            self.mean += x.mean((0, 2, 3))
            return x * self.calls - self.mean[:, None, None]

    model, x = nn.Sequential(Counts(), nn.Conv2d(8, 4, 1)).eval(), torch.randn(2, 3, 4, 5)
    emitted = fxprune.prune(model, x, channels=1.0)
    assert not emitted.report.parts
    assert float(model[0].calls) == 0
    for _ in range(3):
        runs_alike(model, emitted.model, x)
    half = fxprune.prune(model, x, channels=0.5, verify=True)
    assert half.report.error is not None
    assert half.report.error < 1e-12
    assert half.model.get_buffer("0.mean").shape == (4,)


def fills_a_constant(m: nn.Module, x: Tensor) -> Tensor:
    table = torch.zeros(1, 8, 1, 1)
    table += x.mean((0, 2, 3), keepdim=True)
    return x * table


def fills_a_part_of_a_constant(m: nn.Module, x: Tensor) -> Tensor:
    table = torch.zeros(1, 8, 1, 1)
    table[:, :4] = x[:1, :4, :1, :1]
    return x * (table + 1)


def changes_a_constant(m: nn.Module, x: Tensor) -> Tensor:
    table = torch.zeros(1, 8, 1, 1)
    x = x + table
    table += 1
    return x * table


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            fills_a_constant,
            r"written into a tensor that forward makes without it \(at test_trace.py:\d+\)"
            r".*x.new_zeros",
        ),
        (
            fills_a_part_of_a_constant,
            r"written into a tensor that forward makes without it \(at test_trace.py:\d+\)",
        ),
        (
            changes_a_constant,
            r"changed after a graph has taken it for a constant \(at test_trace.py:\d+\)",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_constant_that_is_written_to_is_in_no_graph(
    function: Callable[..., Tensor], message: str
) -> None:
    """Every call would write to the same constant."""
    x = torch.randn(2, 3, 4, 5)
    with pytest.raises(TraceError, match=message):
        traced(Computes(function), x)
    model, emitted = pruned(function, *x.shape)
    with torch.inference_mode():
        for _ in range(2):
            assert relative_error(emitted(x), model(x)) <= 1e-6


def test_what_is_set_on_a_tensor_is_in_no_graph() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x.data = x.relu()
        return x

    with pytest.raises(
        TraceError, match=r"'data' of a tensor is set \(at test_trace.py:\d+\).*copy_"
    ):
        traced(Computes(forward), torch.randn(2, 3, 4, 5))


def test_a_parameter_read_twice_is_one_node() -> None:
    graph = traced(
        Computes(lambda m, x: x * m.conv.bias[0] + m.conv.bias[1]), torch.randn(2, 3, 4, 4)
    ).graph
    assert [node.target for node in graph.nodes if node.op == "get_attr"] == ["conv.bias"]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x + torch.arange(x.shape[-1]),
        lambda m, x: x + torch.zeros(x.shape[0], 8, 1, x.size(-1)),
        lambda m, x: x + torch.ones(x.shape[2:]),
        lambda m, x: x + torch.full((x.shape[0], 1, 1, 1), 2.0),
        lambda m, x: x + torch.linspace(0, 1, x.shape[-1]),
        lambda m, x: x * x.shape[0] / x.shape[-1],
        lambda m, x: x.reshape(x.shape[0] * x.shape[2], -1),
        lambda m, x: x.mean((2, 3)).expand(x.shape[2], -1, -1),
        lambda m, x: F.interpolate(x, size=(x.shape[2] * 2, x.shape[3] + 1)),
        lambda m, x: x.new_zeros(x.shape[0], 3),
        lambda m, x: x + torch.eye(x.shape[-1])[:1],
    ],
)
def test_sizes_stay_symbolic(function: Callable[..., Any]) -> None:
    model, emitted = pruned(function, 2, 3, 4, 4)
    assert not traced(model, torch.randn(2, 3, 4, 4)).decisions
    for batch, size in itertools.product((1, 5), (4, 6)):
        runs_alike(model, emitted, torch.randn(batch, 3, size, size))


# -- inputs and outputs


class Nested(nn.Module):
    """A model that takes a dict with a list in it, and an option."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(
        self, batch: dict[str, Any], scale: Tensor | None = None, *, flip: bool = False
    ) -> dict[str, Any]:
        hidden = self.a(batch["x"]) + sum(self.a(item) for item in batch["rest"])
        hidden = hidden if scale is None else hidden * scale
        return {"out": self.b(hidden), "all": [hidden, (hidden.flip(0) if flip else hidden)]}


def nested(batch: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 4), "rest": [torch.randn(batch, 4), torch.randn(batch, 4)]}


@pytest.mark.parametrize("scaled", [True, False])
def test_nested_inputs(scaled: bool) -> None:
    def inputs(batch: int) -> dict[str, Any]:
        return {"batch": nested(batch), **({"scale": torch.randn(batch, 1)} if scaled else {})}

    model = Nested()
    emitted = fxprune.prune(model, inputs(2), channels=1.0).model  # its hidden units are outputs
    runs_alike(model, emitted, inputs(5))


def test_positional_dict() -> None:
    model = Nested()
    runs_alike(model, fxprune.prune(model, (nested(2),), channels=1.0).model, (nested(3),))


def test_example_of_keeps_dtypes() -> None:
    args, _ = example_of((torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bfloat16)))
    assert [a.dtype for a in args] == [torch.int64, torch.bfloat16]


# -- the meta copy


class Everything(nn.Module):
    """Tied parameters, float and integer buffers, a plain tensor and a shared module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("index", torch.tensor([3, 1, 2, 0]), persistent=False)
        self.table, self.options = torch.tensor([1.0, 2.0, 3.0, 4.0]), {"depth": [1, 2]}
        self.again = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.again(x) * self.scale)[:, self.index] * self.table


def test_the_twin_allocates_nothing_and_shares_nothing() -> None:
    model = Everything()
    meta_copy = meta_copy_of(model)
    assert all(tensor.is_meta for tensor in (*meta_copy.model.parameters(), meta_copy.model.scale))
    ours = {id(tensor) for tensor in (*model.parameters(), *model.buffers(), model.table)}
    assert not ours & {
        id(t)
        for t in (*meta_copy.model.parameters(), *meta_copy.model.buffers(), meta_copy.model.table)
    }
    assert meta_copy.model.index.data_ptr() != model.index.data_ptr()
    assert meta_copy.model.options["depth"] is not model.options["depth"]
    assert not {id(m) for m in model.modules()} & {id(m) for m in meta_copy.model.modules()}


def test_the_twin_has_the_structure_of_the_model() -> None:
    model = Everything().eval()
    meta_copy = meta_copy_of(model).model
    assert meta_copy.a.weight is meta_copy.b.weight
    assert meta_copy.again is meta_copy.a
    assert list(meta_copy.state_dict()) == list(model.state_dict())
    assert meta_copy.index.tolist() == model.index.tolist()
    assert meta_copy.table.tolist() == model.table.tolist()
    assert [type(m) for m in meta_copy.modules()] == [type(m) for m in model.modules()]


def test_the_twin_knows_what_it_stands_for() -> None:
    model = Everything()
    meta_copy = meta_copy_of(model)
    for name, tensor in meta_copy.model.named_parameters():
        assert meta_copy.real[tensor] is model.get_parameter(name)
    assert meta_copy.real[meta_copy.model.scale] is model.scale


def test_tracing_leaves_the_model_alone() -> None:
    model = Everything()
    before = snapshot(model)
    traced(model, torch.randn(2, 4))
    assert_unharmed(model, before)


def test_a_model_that_cannot_be_copied() -> None:
    model = Everything()
    model.stream = (i for i in range(3))
    with pytest.raises(TraceError, match=r"Everything cannot be copied.*generator"):
        meta_copy_of(model)


def test_a_large_model_costs_no_memory() -> None:
    """The model has 400 GB of weights, none of which are allocated."""
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Linear(4, 100_000), nn.Linear(100_000, 1_000_000), nn.Linear(1_000_000, 4)
        )
    assert traced(model, torch.zeros(2, 4, device="meta")).graph.nodes


@pytest.mark.parametrize(
    ("module", "leaf"),
    [
        (nn.Linear(2, 2), True),
        (nn.Sequential(nn.Linear(2, 2)), False),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), True),
        (Everything(), False),
    ],
    ids=["layer", "container", "parametrised", "of a user"],
)
def test_what_is_a_leaf(module: nn.Module, leaf: bool) -> None:
    assert is_leaf(module) == leaf


def test_what_is_computed_from_constants_can_be_trained_through() -> None:
    """It is computed during tracing, in inference mode, whose tensors autograd refuses."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.order = nn.Linear(4, 4), torch.arange(4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(self.order > 1, self.linear(x), 0.0)

    graph = fxprune.prune(Masked(), torch.randn(2, 4), channels=1.0).model
    assert isinstance(graph, torch.fx.GraphModule)
    graph(torch.randn(2, 4)).sum().backward()
    assert (graph.get_parameter("linear.weight").grad != 0).any(dim=1).tolist() == [
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize(
    "text",
    [
        lambda x: f"{x.shape[1]}" == "4",
        lambda x: f"{x.size(1):03d}" == "004",
        lambda x: "%d" % x.shape[1] == "4",  # noqa: UP031 - another way to the same
        lambda x: str(x.dim()) == "2",
        lambda x: str(x.dtype) == "torch.float32",
        lambda x: f"in {x.dtype}" == "in torch.float32",
    ],
)
def test_the_text_of_a_size_or_dtype_is_its_own(text: Callable[[Tensor], bool]) -> None:
    """It is not the text of the stand-in that tracing uses."""

    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if text(x) else x

    found = traced(Reads(), torch.zeros(3, 4))
    assert [node.target for node in found.graph.nodes if node.op == "call_function"][
        -1
    ] is operator.mul


# -- randomness


@pytest.mark.parametrize(
    "draw",
    [lambda: torch.rand([]), lambda: torch.rand(1).item(), random.random, np.random.rand],
    ids=["torch", "item", "random", "numpy"],
)
def test_what_is_decided_by_chance_is_in_no_graph(draw: Callable[[], Any]) -> None:
    model, x = Computes(lambda m, x: x if draw() < 0.5 else -x), torch.randn(2, 3, 4, 4)
    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(ChanceError):
        traced(model, x)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


OWN, ARRAYS, TURNS, CALLS = (
    random.Random(0),
    np.random.default_rng(0),
    itertools.cycle([True, False]),
    {"n": 0},
)


def counted() -> int:
    CALLS["n"] += 1
    return CALLS["n"]


EACH_CALL: dict[str, Callable[[], Any]] = {
    "a generator": lambda: OWN.random(),
    "one of NumPy": lambda: ARRAYS.random(),
    "a new generator": lambda: np.random.default_rng().random(),
    "the system's": lambda: random.SystemRandom().random(),
    "secrets": lambda: secrets.randbelow(10**9),
    "bytes": lambda: os.urandom(4)[0],
    "an identifier": lambda: uuid.uuid4().int % 10**9,
    "a clock": lambda: time.perf_counter_ns() % 10**9,
    "a date": lambda: datetime.datetime.now().microsecond,
    "turns": lambda: next(TURNS),
    "a count": counted,
}


@pytest.mark.parametrize("name", EACH_CALL)
def test_what_python_computes_anew_at_each_call_is_in_no_graph(name: str) -> None:
    with pytest.raises(ChanceError):
        traced(Computes(lambda m, x: x * EACH_CALL[name]()), torch.randn(2, 3, 4, 4))


def test_generators_of_a_model_stand_afterwards_where_they_stood() -> None:
    before = OWN.getstate(), ARRAYS.bit_generator.state
    for name in ("a generator", "one of NumPy"):
        with pytest.raises(ChanceError):
            traced(
                Computes(lambda m, x, draw=EACH_CALL[name]: x * draw()), torch.randn(2, 3, 4, 4)
            )
    assert (OWN.getstate(), ARRAYS.bit_generator.state) == before


class OwnGenerator(nn.Module):
    """A model that draws from a generator in one of its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.rng.random() < 0.5 else -x


def test_a_generator_of_a_module_is_no_constant() -> None:
    with pytest.raises(ChanceError):
        traced(OwnGenerator(), torch.randn(2, 3))


TABLES: dict[int, int] = {}


def test_what_calls_leave_behind_and_do_not_go_by_is_no_chance() -> None:
    def tabled(model: Any, x: Tensor) -> Tensor:
        started = time.perf_counter()
        if x.dim() not in TABLES:
            TABLES[x.dim()] = x.dim()
        CALLS["spent"] = CALLS.get("spent", 0) + time.perf_counter() - started
        return x * TABLES[x.dim()]

    assert traced(Computes(tabled), torch.randn(2, 3, 4, 4)).graph is not None


def test_a_buffer_that_forward_writes_is_not_read_as_a_number() -> None:
    with pytest.raises(TraceError, match="a buffer that it writes"):
        traced(nn.BatchNorm1d(4, momentum=None), torch.randn(3, 4), training=True)


class OwnList(list[Any]):
    pass


class OwnTuple(tuple[Any, ...]):
    pass


@pytest.mark.parametrize("kind", [OwnList, OwnTuple, set])
def test_what_no_graph_can_make_is_refused_as_a_result(kind: Any) -> None:
    class Gives(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3))

        def forward(self, x: Tensor) -> Any:
            return kind([x @ self.weight.t()])

    with pytest.raises(
        TraceError, match=f"gives back a {kind.__name__}, which a graph cannot make. Give back"
    ):
        fxprune.prune(Gives(), torch.randn(2, 3), channels=0.5)
