"""Which calls write, and which results share memory with an argument.

Names and schemas say so; the answers are compared with what torch does.
"""

import operator
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxprune.trace import aliasing as memory
from fxprune.trace.aliasing import (
    AUGMENTED,
    Memory,
    Snapshot,
    shared_argument,
    writes,
    written_arguments,
)


def call(target: Any, *args: Any, **kwargs: Any) -> tuple[fx.Node, fx.Node]:
    """Return an input node, and a call of a function or of a named method on it."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    make = graph.call_method if isinstance(target, str) else graph.call_function
    return x, make(target, (x, *args), kwargs)


def test_augmented_assignments_are_those_of_tensors() -> None:
    tensors = {name for name in fx.graph.inplace_methods if hasattr(torch.Tensor, f"__{name}__")}
    assert tensors - {"setitem"} == set(AUGMENTED)


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "answer"),
    [
        (operator.iadd, (1,), {}, True),
        (operator.setitem, (0, 1), {}, True),
        ("__iadd__", (1,), {}, True),
        ("__setitem__", (0, 1), {}, True),
        ("add_", (1,), {}, True),
        (torch.relu_, (), {}, True),
        (nn.functional.relu, (), {"inplace": True}, True),
        (nn.functional.relu, (), {"inplace": False}, False),
        ("__add__", (1,), {}, False),
        (operator.add, (1,), {}, False),
        (operator.invert, (), {}, False),
        (operator.index, (), {}, False),
        (operator.is_, (1,), {}, False),
    ],
)
def test_writes(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], answer: bool) -> None:
    x, node = call(target, *args, **kwargs)
    assert writes(node) is answer
    assert list(written_arguments(node)) == [x] * answer


def test_what_is_written_is_the_first_argument_or_out() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    assert list(written_arguments(graph.call_function(operator.iadd, (x, y)))) == [x]
    assert set(written_arguments(graph.call_function(torch.add, (x, y), {"out": y}))) == {x, y}
    # nothing is known about this function
    assert set(written_arguments(graph.call_function(call, (x, y), {"inplace": True}))) == {x, y}


@pytest.mark.parametrize(
    "target",
    [
        "view",
        "reshape",
        "flatten",
        "__getitem__",
        "contiguous",
        "chunk",
        "dropout",
        "unheard_of",
        operator.getitem,
        torch.squeeze,
    ],
)
def test_what_may_share_memory(target: Any) -> None:
    x, node = call(target)
    assert shared_argument(node, nn.Module()) is x


@pytest.mark.parametrize(
    "target",
    ["clone", "relu", "mean", "matmul", operator.add, operator.truediv, nn.functional.linear],
)
def test_what_does_not(target: Any) -> None:
    assert shared_argument(call(target)[1], nn.Module()) is None


def test_modules() -> None:
    root = nn.ModuleDict(
        {"conv": nn.Conv2d(3, 3, 1), "flatten": nn.Flatten(), "relu": nn.ReLU(inplace=True)}
    )
    graph = fx.Graph()
    x = graph.placeholder("x")
    nodes = {name: graph.call_module(name, (x,)) for name in root}
    assert {name: shared_argument(node, root) for name, node in nodes.items()} == {
        "conv": None,
        "flatten": x,
        "relu": x,
    }
    assert {name: writes(node, root) for name, node in nodes.items()} == {
        "conv": False,
        "flatten": False,
        "relu": True,
    }


_VALUES: dict[str, Any] = {"int": 1, "float": 0.5, "bool": False, "number": 1, "List[int]": [1]}


def results(operation: Any, x: torch.Tensor) -> list[Any]:
    """Return an operation's results for one tensor and made-up numbers.

    Return an empty list if the operation does not accept them.
    """
    first, *rest = operation._schema.arguments or [None]
    kinds = [str(argument.type) for argument in rest if not argument.has_default_value()]
    if first is None or str(first.type) != "Tensor" or any(kind not in _VALUES for kind in kinds):
        return []
    try:
        found = operation(x, *(_VALUES[kind] for kind in kinds))
    except (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError):
        return []
    return list(found) if isinstance(found, (tuple, list)) else [found]


def is_memory_of(result: Any, x: torch.Tensor) -> bool:
    if (
        not isinstance(result, torch.Tensor)
        or not result.numel()
        or result.layout != torch.strided
        or result.is_meta
    ):
        return False
    try:
        return result.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    except NotImplementedError:  # a library's own tensor, which has no storage
        return False


# deprecated and experimental operations are tried, too, and warn once per process
@pytest.mark.filterwarnings("ignore")
def test_schemas_can_be_believed() -> None:
    """No operation that is known to make new memory returns the memory of its argument."""
    silent, tried = set(), 0
    known = {
        name.removeprefix("aten::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if "aten::" in name
    }
    for name in sorted(known):
        public = not name.startswith("_") and any(
            hasattr(space, name) for space in (torch.Tensor, torch, nn.functional)
        )
        if not public or not memory._op_makes_new(name):
            continue
        packet = getattr(torch.ops.aten, name)
        tried += 1
        for operation in (getattr(packet, overload) for overload in packet.overloads()):
            for x in (torch.ones(2, 3, 4, 4), torch.ones(3), torch.ones(3, 4, dtype=torch.long)):
                if not operation._schema.is_mutable and any(
                    is_memory_of(result, x) for result in results(operation, x)
                ):
                    silent.add(name)
    assert not silent
    assert tried > 300


def test_must_stay_view() -> None:
    """A write to a tensor or to its view matters if the other one is read afterwards."""

    def answer(write_view: bool, read_view: bool, order: str) -> bool:
        graph = fx.Graph()
        x = graph.call_function(torch.abs, (graph.placeholder("x"),))
        view: Any = None
        for step in order:
            if step == "v":
                view = graph.call_method("view", (x, -1))
            else:
                graph.call_function(
                    operator.iadd, (view if write_view and view is not None else x, 1)
                )
        graph.output(view if read_view else x)
        return Memory(graph, nn.Module()).must_stay_view(view)

    assert answer(True, False, "vw")
    assert answer(False, True, "vw")
    assert not answer(True, True, "vw")
    assert not answer(False, False, "vw")
    assert not answer(False, True, "wv")


def test_an_input_outlives_the_graph() -> None:
    graph = fx.Graph()
    view = graph.call_method("view", (graph.placeholder("x"), -1))
    graph.output(graph.call_function(operator.iadd, (view, 1)))
    assert Memory(graph, nn.Module()).must_stay_view(view)


def test_snapshot() -> None:
    taken, x, y = Snapshot(), torch.tensor([1.0, float("nan")]), torch.zeros(2, 2)
    taken.take(x, "x")
    taken.take(y, "y")
    taken.take(torch.empty(2, device="meta"), "no data")
    assert taken.changed() is None
    assert taken.shares_memory_with(y[1:])
    assert not taken.shares_memory_with(y + 1)
    assert not taken.shares_memory_with(torch.empty(2, device="meta"))
    y[0, 0] = float("nan")
    assert taken.changed() == "y"
