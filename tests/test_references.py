"""Copies of Python objects in which some objects are replaced by others."""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import TraceError
from fxprune.trace.copying import copy_hooks, copy_rebound, rebind_hooks
from fxprune.trace.reach.holders import have_same_value


class Old:
    def __init__(self, name: str = "old") -> None:
        self.name = name

    def says(self, *_: Any) -> str:
        return self.name


OLD, NEW = Old(), Old("new")
MEMO = {id(OLD): NEW}


def closure(value: Any) -> Any:
    return lambda *_: value.says()


def nested(value: Any) -> Any:
    inner = closure(value)
    return lambda *_: inner()


def defaults(value: Any) -> Any:
    def read(held: Any = value, *, also: Any = value) -> str:
        assert held is also
        return held.says()

    return read


def recursive(value: Any) -> Any:
    def read(depth: int = 2) -> str:
        return read(depth - 1) if depth else value.says()

    return read


REFERENCES = {
    "itself": (lambda value: value, lambda found: found.says()),
    "list": (lambda value: [value], lambda found: found[0].says()),
    "dict": (lambda value: {"a": [value]}, lambda found: found["a"][0].says()),
    "key": (lambda value: {value: 1}, lambda found: next(iter(found)).says()),
    "ordered": (lambda value: collections.OrderedDict(a=value), lambda found: found["a"].says()),
    "tuple": (lambda value: (1, value), lambda found: found[1].says()),
    "set": (lambda value: {value}, lambda found: next(iter(found)).says()),
    "deque": (lambda value: collections.deque([value]), lambda found: found[0].says()),
    "method": (lambda value: value.says, lambda found: found()),
    "partial": (lambda value: functools.partial(Old.says, value), lambda found: found()),
    "closure": (closure, lambda found: found()),
    "nested closures": (nested, lambda found: found()),
    "defaults": (defaults, lambda found: found()),
    "recursive": (recursive, lambda found: found()),
    "list of closures": (lambda value: [closure(value)], lambda found: found[0]()),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_copy_refers_to_what_stands_in_the_place(name: str) -> None:
    make, read = REFERENCES[name]
    held = make(OLD)
    assert read(copy_rebound(held, dict(MEMO))) == "new"
    assert read(held) == "old"


def test_a_list_that_holds_itself() -> None:
    held: list[Any] = [OLD]
    held.append(held)
    new = copy_rebound(held, dict(MEMO))
    assert new[0] is NEW
    assert new[1] is new


def test_a_copy_of_what_autograd_made_is_apart_from_it() -> None:
    """The copy of a tensor with a ``grad_fn``, such as a kept activation, is detached."""
    kept = torch.ones(2, requires_grad=True) * 2
    held = {"first": kept, "again": [kept]}
    new = copy_rebound(held, {})
    assert torch.equal(new["first"], kept)
    assert new["first"].grad_fn is None
    assert new["first"] is new["again"][0]
    assert new["first"] is not kept


def test_functions_that_share_a_variable_go_on_sharing_it() -> None:
    def pair() -> Any:
        value, count = OLD, 0

        def add() -> str:
            nonlocal count
            count += 1
            return value.says()

        return add, lambda: (count, value.says())

    add, read = copy_rebound(pair(), dict(MEMO))
    add()
    assert read() == (1, "new")


def test_what_refers_to_nothing_replaced_is_the_same_object() -> None:
    seen: list[Any] = []
    collect = lambda value: seen.append(value)  # noqa: E731
    collector = Old()
    says = collector.says
    assert copy_rebound(collect, dict(MEMO)) is collect
    assert copy_rebound(says, dict(MEMO)) is says


def test_hooks_collect_apart_in_a_trial_and_where_the_user_looks_afterwards() -> None:
    seen: list[Any] = [OLD]
    hooks = {1: lambda: seen.append(OLD.says()), 2: lambda: seen.append("second")}
    trial = copy_hooks(hooks, dict(MEMO))
    trial[1](), trial[2]()
    assert seen == [OLD]
    for hook in rebind_hooks(hooks, dict(MEMO)).values():
        hook()
    # OLD is a global of this file, and copies do not change globals
    assert seen == [OLD, "old", "second"]


def test_an_object_whose_method_is_a_hook_is_left_alone_in_a_trial() -> None:
    collector = Old()
    (trial,) = copy_hooks({1: collector.says}, {}).values()
    trial.__self__.name = "changed"
    assert collector.name == "old"
    (kept,) = rebind_hooks({1: collector.says}, {}).values()
    assert kept.__self__ is collector


class Held(nn.Module):
    """Two layers, and an object stored next to them."""

    def __init__(self, beside: Any) -> None:
        super().__init__()
        self.first, self.last, self.beside = nn.Linear(4, 8), nn.Linear(8, 2), beside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.beside if hasattr(self.beside, "__enter__") else contextlib.nullcontext():
            return self.last(self.first(x).relu())


def lock_below() -> Any:
    return SimpleNamespace(locks=[threading.Lock()], number=3)


@pytest.mark.parametrize(
    "make", [threading.Lock, threading.Condition, threading.local, lambda: threading, lock_below]
)
def test_what_cannot_be_copied_is_shared(make: Any) -> None:
    model, x = Held(make()), torch.randn(2, 4)
    pruned = fxprune.prune(model, x, channels=0.5)
    assert fxprune.verify(model, pruned, x).error < 1e-9


def test_only_what_cannot_be_copied_is_shared() -> None:
    beside = lock_below()
    made = copy_rebound({"beside": beside}, {})["beside"]
    assert made is not beside
    assert made.locks is not beside.locks
    assert made.locks[0] is beside.locks[0]


class Uncopied:
    """An object that refuses to be copied; ``counted`` and ``seen`` change with each call."""

    def __init__(self) -> None:
        self.counted, self.seen = 0, []

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("no copies")

    __copy__ = __reduce__ = None  # type: ignore[assignment]


class Slots(Uncopied):
    __slots__ = ("counted", "seen")


class Table(Uncopied, dict[str, Any]):
    pass


class Pair(Uncopied, tuple[Any, ...]):
    pass


class Local(threading.local):
    def __init__(self) -> None:
        self.counted, self.seen = 0, []


@pytest.mark.parametrize(
    "below",
    [
        lambda own: own,
        lambda own: [own],
        lambda own: SimpleNamespace(own=own, lock=threading.Lock()),
    ],
)
@pytest.mark.parametrize("kind", [Uncopied, Slots, Table, Pair, Local])
def test_what_a_class_refuses_to_copy_is_not_changed(kind: Any, below: Any) -> None:
    """A trial run does not change such objects, because the user's next call reads them."""
    model, x, own = Held(None), torch.randn(2, 4), kind()
    model.beside = below(own)

    def note(module: Any, args: Any, out: torch.Tensor) -> None:
        held = module.beside
        held = held[0] if type(held) is list else getattr(held, "own", held)
        held.counted += 1
        if bool((out > 1e9).any()):
            held.seen.append(out)

    model.register_forward_hook(note)
    pruned = fxprune.prune(model, x, channels=0.5)
    fxprune.verify(model, pruned, x)
    assert (own.counted, own.seen) == (0, [])
    pruned.model(x)
    assert own.counted == 0
    model(x)
    assert own.counted == 1


class Handle(Uncopied):
    def __del__(self) -> None:
        pass


def test_what_gives_back_a_resource_is_refused_by_name() -> None:
    """A handle can be neither copied nor shared.

    A copy would release the resource for both objects when it is deleted, and a shared object
    would be changed by a trial run.
    """
    model = nn.Sequential(nn.Linear(4, 8), Held([Handle()]))
    with pytest.raises(TraceError, match=r"'1\.beside' is a list .*no copies"):
        fxprune.analyze(model, torch.randn(2, 4))


def test_an_iterator_is_refused_by_name() -> None:
    """A trial run would consume items that the user's next call should get."""
    model = nn.Sequential(nn.Linear(4, 8), Held(iter_of := (n for n in range(3))))
    with pytest.raises(TraceError, match=r"'1\.beside' is a generator"):
        fxprune.analyze(model, torch.randn(2, 4))
    assert next(iter_of) == 0


class Switched(nn.Module):
    """With ``asks``, forward branches on a value of the input before the layers run."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.drop, self.asks = nn.Dropout(), asks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.asks and bool((x > 1e9).any()):
            x = x.clamp(-1, 1)
        return self.head(self.drop(self.norm(self.stem(x)).relu()))


NET: Any = None
NORM: Any = None


def freeze(mode: bool = True) -> Any:
    nn.Module.train(NET, mode)
    NORM.eval()
    return NET


def frozen_norm() -> None:
    NORM.eval()
    NORM.train = lambda mode=True: NORM


def frozen_by_the_model() -> None:
    NET.train = freeze


def frozen_through_a_function() -> None:
    NET.train = lambda mode=True: freeze(mode)


def adapting() -> None:
    def evaluate() -> Any:
        nn.Module.train(NET, False)
        NORM.training = True
        return NET

    NET.eval = evaluate


def evaluated() -> None:
    NET.eval = lambda: NET.train(False)


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize(
    "set_up", [frozen_norm, frozen_by_the_model, frozen_through_a_function, adapting, evaluated]
)
def test_modes_that_functions_of_the_model_give_are_kept(
    set_up: Any, asks: bool, tmp_path: Any
) -> None:
    """Copied functions that refer to the model or a layer by a global name refer to the copy."""

    def make() -> nn.Module:
        globals()["NET"] = model = Switched(asks).eval()
        globals()["NORM"] = model.norm
        set_up()
        return model

    model, x = make(), torch.randn(2, 3, 8, 8)
    before = [module.training for module in model.modules()]
    pruned = fxprune.prune(model, x, channels=0.5)
    fxprune.verify(model, pruned, x)
    assert fxprune.deploy(pruned.model) is not model
    assert [module.training for module in model.modules()] == before
    pruned.save(tmp_path)
    for training in (True, False, True):
        model.train() if training else model.eval()
        modes = [model.get_submodule(name).training for name in ("", "norm", "drop")]
        pruned.model.train() if training else pruned.model.eval()
        assert [
            pruned.model.get_submodule(name).training for name in ("", "norm", "drop")
        ] == modes
    loaded = fxprune.load(tmp_path, make).model  # the globals refer to the new model from now on
    for training in (True, False):
        loaded.train() if training else loaded.eval()
        NET.train() if training else NET.eval()
        modes = [NET.get_submodule(name).training for name in ("", "norm", "drop")]
        assert [loaded.get_submodule(name).training for name in ("", "norm", "drop")] == modes


def test_a_layer_whose_forward_knows_it_as_a_global_is_pruned() -> None:
    globals()["NET"] = model = Switched(asks=False).eval()
    model.drop = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
    model.drop.forward = lambda x: NET.drop[1](NET.drop[0](x))
    x = torch.randn(2, 3, 8, 8)
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert {p.data_ptr() for p in pruned.model.parameters()}.isdisjoint(
        p.data_ptr() for p in model.parameters()
    )
    assert dict(pruned.model.named_parameters())["drop.0.weight"].shape == (4, 4, 1, 1)


def test_globals_that_are_not_replaced_stay_what_they_are() -> None:
    """A copied function also sees values that such globals are set to later."""
    globals()["NET"], globals()["NORM"] = nn.ReLU(), 1
    made = copy_rebound(lambda: (NET, NORM), {id(NET): OLD})
    assert made() == (OLD, 1)
    globals()["NORM"] = 2
    assert made() == (OLD, 2)


@pytest.mark.parametrize("made", [torch.tensor, np.array])
def test_values_that_are_no_numbers_are_equal_to_their_copies(made: Any) -> None:
    one, other = made([1.0, math.nan]), made([1.0, math.nan])
    assert have_same_value(one, other)
    assert not have_same_value(one, made([math.nan, 1.0]))


LEAVES_NOTHING = """
import gc, sys, weakref
import torch
from torch import nn
import fxprune

def prune():
    class Own(nn.Linear):
        pass
    model = nn.Sequential(Own(2, 4), nn.Linear(4, 2))
    fxprune.prune(model, torch.ones(1, 2), channels=0.5, verify=True)
    return weakref.ref(Own), weakref.ref(model)

kind, model = prune()
gc.collect()
sys.exit(f"alive: {kind()} {model()}" if kind() or model() else 0)
"""


def test_the_first_model_of_a_process_and_its_class_are_released() -> None:
    """Caches that PyTorch and fxprune fill in their first calls keep no model alive."""
    ran = subprocess.run([sys.executable, "-c", LEAVES_NOTHING], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
