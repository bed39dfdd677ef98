"""Tests of functions of torch that are written in C++.

They are followed however forward reaches them. Whatever forward calls, the process survives.
"""

import copy
import ctypes
import functools
import importlib.util
import operator
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch import where as imported_where
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fxprune
from fxprune.trace import example_of, meta_copy_of, trace
from tests.support.callables import ALLOWED, apart, kind, names, outcome, outcomes


def scripted(function: Callable[..., Any]) -> Any:
    with warnings.catch_warnings():
        # newer versions of torch deprecate it, but models still use it
        warnings.simplefilter("ignore")
        return torch.jit.script(function)


@scripted
def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


@scripted
def in_place(x: Tensor) -> Tensor:
    y = x + 1
    y.mul_(0.5)
    return y


@scripted
def scripted_views(x: Tensor, groups: int) -> Tensor:
    a, b = torch.chunk(x, groups, dim=-1)
    return torch.cat([b, a], dim=-1).transpose(0, 1).contiguous().transpose(0, 1)


@torch.library.custom_op("fxprune_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fxprune_tests::double_", mutates_args=("x",))
def double_(x: Tensor) -> None:
    x.mul_(2)


def doubled(h: Tensor) -> Tensor:
    written = h.clone()
    double_(written)
    return written


def deep_copied(h: Tensor) -> Tensor:
    written = copy.deepcopy(h.detach())
    written.mul_(2)
    return h + written


class Chooses:
    """An object with functions as attributes, as configurable layers have."""

    pick = staticmethod(torch.where)

    def __init__(self) -> None:
        self.table = {"power": torch.pow, "where": torch.where}
        self.bound = functools.partial(torch.where, other=torch.zeros(()))

    def by_attribute(self, h: Tensor) -> Any:
        return self.pick(h > 0, h, 0.0)

    def by_table(self, h: Tensor) -> Any:
        return self.table["where"](h > 0, h, self.table["power"](h, 2))


def by_default(h: Tensor, op: Callable[..., Any] = torch.pow) -> Any:
    return op(h, 2)


FOLLOWED: dict[str, Callable[[Tensor], Any]] = {
    "scripted": lambda h: swish(h),
    "scripted, in place": lambda h: in_place(h),
    "scripted, views": lambda h: scripted_views(h, 2),
    "scripted, handed on": lambda h: functools.reduce(
        lambda x, f: f(x), [swish, torch.tanh, swish], h
    ),
    "vmap": torch.vmap(torch.relu),
    "vmap of Python": torch.vmap(lambda row: row.sin() * 0.5 + row),
    "vmap over columns": torch.vmap(torch.tanh, in_dims=1, out_dims=1),
    "vmap with a constant": lambda h: torch.vmap(
        lambda row, scale: row * scale, in_dims=(0, None)
    )(h, torch.tensor(2.0)),
    "a class attribute": Chooses().by_attribute,
    "a dict": Chooses().by_table,
    "a partial function": lambda h: functools.partial(torch.where, h > 0)(h, 0.0),
    "a default argument": by_default,
    "an imported name": lambda h: imported_where(h > 0, h, 0.5),
    "operator": lambda h: operator.pow(h, 2),
    "map": lambda h: sum(map(torch.special.xlog1py, (h, h), (0.5, 0.25))),
    "Variable": lambda h: torch.autograd.Variable(h).relu(),
    "asarray": lambda h: torch.asarray(h) * 2,
    "as_tensor": lambda h: torch.as_tensor(h) * 2,
    "an ATen operation": lambda h: torch.ops.aten.relu(h),
    "an overload": lambda h: torch.ops.aten.mul.Tensor(h, h),
    "torch._C": lambda h: torch._C._nn.gelu(h),
    "_VF": lambda h: torch._VF.tanh(h),
    "a pybind function": lambda h: h if torch._C._functorch.is_batchedtensor(h) else h.relu(),
    "a custom operation": lambda h: twice(h),
    "a custom operation that writes": doubled,
    "a deep copy that is written into": deep_copied,
    "a custom operation of torch.ops": lambda h: torch.ops.fxprune_tests.twice(h),
}

ALIVE: dict[str, Callable[[Tensor], Any]] = {
    "func.grad": torch.func.grad(lambda h: h.tanh().sum()),
    "func.vjp": lambda h: torch.func.vjp(torch.tanh, h)[1](h)[0],
    "func.jvp": lambda h: torch.func.jvp(torch.tanh, (h,), (h,))[1],
    "func.jacrev": lambda h: torch.func.jacrev(lambda row: row.sum(0))(h),
    "func.hessian": lambda h: torch.func.hessian(lambda row: row.pow(3).sum())(h[0]),
    "func.vmap of grad": lambda h: torch.func.vmap(torch.func.grad(lambda row: row.sin().sum()))(
        h
    ),
    "autograd.grad": lambda h: torch.autograd.grad(h.sum(), h)[0],
    "numpy": lambda h: torch.from_numpy(np.tanh(h.detach().numpy())),
    "numpy by itself": lambda h: np.asarray(h).sum(),
    "dlpack": lambda h: torch.utils.dlpack.from_dlpack(h),
    "data_ptr": lambda h: ctypes.c_float.from_address(h.data_ptr()).value,
    "storage": lambda h: h.untyped_storage()[0],
    "tolist": lambda h: h.tolist(),
    "a buffer": lambda h: memoryview(h.numpy()),
    "a sparse tensor": lambda h: h.to_sparse().to_dense(),
    "a nested tensor": lambda h: torch.nested.nested_tensor([h, h]),
    "named axes": lambda h: h.refine_names("n", "c").rename(None),
    "a legacy constructor": lambda h: torch.FloatTensor([h.shape[0]]) + h,
    "complex numbers": lambda h: torch.view_as_real(torch.complex(h, h)).sum(-1),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FOLLOWED)
def test_functions_are_followed_however_they_are_reached(name: str) -> None:
    said = apart(lambda: outcome(FOLLOWED[name]))
    assert said == "pruned", said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALIVE)
def test_what_cannot_be_followed_leaves_the_process_alive(name: str) -> None:
    said = apart(lambda: outcome(ALIVE[name]))
    assert kind(said) in ALLOWED, said


@pytest.mark.slow  # compiling takes long
@pytest.mark.filterwarnings("ignore")
def test_an_extension_of_a_user() -> None:
    if importlib.util.find_spec("ninja") is None or shutil.which("c++") is None:
        pytest.skip("a C++ extension needs a compiler and ninja")
    from torch.utils.cpp_extension import load_inline

    source = (
        "torch::Tensor twice(torch::Tensor x) { return x * 2; } float first(torch::Tensor x) { "
        "return *x.data_ptr<float>(); }"
    )
    built = load_inline("fxprune_tests_extension", source, functions=["twice", "first"])
    assert apart(lambda: outcome(built.twice)) == "pruned"
    assert kind(apart(lambda: outcome(lambda h: h * built.first(h)))) in ("in parts", "refused")


def test_a_name_that_is_bound_later() -> None:
    """A global name in forward is looked up again in each trace."""
    space: dict[str, Any] = {"power": None}
    exec("def apply(x):\n    return x if power is None else power(x, 2)", space)
    assert apart(lambda: outcome(space["apply"])) == "pruned"
    space["power"] = torch.pow
    assert apart(lambda: outcome(space["apply"])) == "pruned"


def test_memory_of_a_stand_in_is_nobodys() -> None:
    """Reading the memory of a tensor during tracing raises an error that names the user's line."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.linear(x).numpy()

    with pytest.raises(fxprune.TraceError, match=r"numpy.*test_cpp\.py:\d+"):
        trace(meta_copy_of(Reads()), *example_of(torch.zeros(2, 4)))


def test_sizes_below_python_are_those_of_the_example() -> None:
    """A size that a scripted function computes with is fixed to the example's.

    Nothing can follow the computation, so another batch is refused. A size that the function only
    passes on may change.
    """

    @scripted
    def flat(x: Tensor) -> Tensor:
        return x.view(x.size(0), -1, 2).sum(-1)

    @scripted
    def counted(x: Tensor) -> Tensor:
        return x.view(x.size(0) * 2 // 2, -1, 2).sum(-1)

    class Scripted(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.first, self.second, self.function = nn.Linear(4, 8), nn.Linear(4, 2), function

        def forward(self, x: Tensor) -> Any:
            return self.second(self.function(self.first(x)))

    x = torch.randn(3, 4)
    assert fxprune.prune(Scripted(lambda h: flat(h)), x, channels=0.5, verify=True).model(
        torch.randn(5, 4)
    ).shape == (5, 2)
    emitted = fxprune.prune(Scripted(lambda h: counted(h)), x, channels=0.5, verify=True).model
    with pytest.raises(AssertionError, match=r"size.* == 3 \(decided at test_cpp"):
        emitted(torch.randn(5, 4))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("start", range(32))
def test_every_callable_of_torch(start: int) -> None:
    """Every public callable of torch is followed or refused, and the process survives.

    Each call runs in a process of its own; see ``python -m tests.support.callables``.
    """
    found = {
        f"{name} {text}": said
        for name in names()[start::32]
        for text, said in outcomes(name).items()
    }
    assert {call: said for call, said in found.items() if kind(said) not in ALLOWED} == {}


def test_a_mask_made_under_vmap() -> None:
    """A mask that is made under vmap can be traced: an input is indexed by the mapped values.

    The transformers library makes its masks like this.
    """

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            place = torch.arange(x.shape[1])
            seen = torch.vmap(
                torch.vmap(lambda q, k: (q >= k) & mask[0, k], (None, 0)), (0, None)
            )(place, place)
            h = self.first(x)
            return self.second(torch.where(seen[None, :, :, None], h[:, None], 0.0).sum(2))

    x, mask = torch.randn(2, 5, 4), torch.tensor([[True, True, True, False, True]]).expand(2, 5)
    pruned = fxprune.prune(Masked().eval(), (x, mask), channels=0.5, verify=True)
    assert not pruned.report.parts
    assert pruned.model.get_submodule("second").in_features == 4


@scripted
def if_many(x: Tensor) -> Tensor:
    if x.size(0) > 1:
        return x * 2
    return x


@scripted
def row_by_row(x: Tensor) -> Tensor:
    rows: list[Tensor] = []
    for i in range(x.size(0)):
        rows.append(x[i] * 2)
    return torch.stack(rows)


@scripted
def unbound(x: Tensor) -> Tensor:
    rows: list[Tensor] = []
    for row in x.unbind(0):
        rows.append(row * 2)
    return torch.stack(rows)


def powers(x: Tensor) -> Tensor:
    """Return the mean of each element's powers, from an operation mapped over the rows."""
    return torch.vmap(torch.linalg.vander)(x).mean(-1)


class Between(nn.Module):
    """Three linear layers, with a call before the last one."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third, self.call = (
            nn.Linear(4, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 2),
            call,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.call(self, self.first(x).relu()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "function",
    [if_many, row_by_row, unbound, torch.vmap(torch.detach_copy)],
    ids=["if", "rows", "unbind", "vmap"],
)
def test_what_goes_by_sizes_below_python_holds_the_graph_to_them(
    function: Callable[[Tensor], Tensor],
) -> None:
    """A batch size that decides something below Python is fixed to the example's."""
    model, x = Between(lambda model, h: function(h)), torch.randn(2, 4)
    emitted = fxprune.prune(model, x, channels=0.5, verify=True).model
    assert emitted(x).shape == (2, 2)
    for batch in (1, 3):
        with pytest.raises(AssertionError, match="decided at test_cpp"):
            emitted(torch.randn(batch, 4))


@pytest.mark.filterwarnings("ignore")
def test_sizes_that_a_scripted_function_only_notes_hold_nothing() -> None:
    """A scripted function that decides nothing by the batch size does not fix it."""
    emitted = fxprune.prune(
        Between(lambda model, h: swish(h)), torch.randn(2, 4), channels=0.5, verify=True
    ).model
    assert emitted(torch.randn(5, 4)).shape == (5, 2)


class Doubles(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return (
            out * 2
            if getattr(func, "__name__", "") in ("linear", "__add__", "__iadd__", "add")
            else out
        )


class DoublesBelow(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is torch.ops.aten.tanh.default else out


def under(mode: Any) -> Callable[[Any, Tensor], Tensor]:
    def call(model: Any, h: Tensor) -> Tensor:
        with mode():
            h = (model.second(h) + 1.0).tanh()
            h += 1.0
        return h

    return call


WITH_OTHERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "computed": lambda model, h: torch.func.functional_call(
        model.second, {"weight": model.second.weight * 0.5}, (h,)
    ),
    "constant": lambda model, h: torch.func.functional_call(
        model.second, {"weight": torch.eye(16).to(h)}, (h,)
    ),
    "own": lambda model, h: torch.func.functional_call(
        model.second, dict(model.second.named_parameters()), (h,)
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", WITH_OTHERS.values(), ids=WITH_OTHERS)
def test_a_module_that_is_called_with_other_parameters(
    call: Callable[[Any, Tensor], Tensor],
) -> None:
    """``functional_call`` with computed, constant or own parameters is pruned exactly."""
    fxprune.prune(Between(call), torch.randn(2, 4), channels=0.5, verify=True)


@pytest.mark.parametrize("mode", [Doubles, DoublesBelow])
def test_modes_of_the_model_change_what_they_change(mode: Any) -> None:
    """Modes that forward enters change the results of the pruned model as those of the original.

    A dispatch mode keeps the model from being one graph.
    """
    pruned = fxprune.prune(Between(under(mode)), torch.randn(2, 4), channels=0.5, verify=True)
    assert bool(pruned.report.parts) == (mode is DoublesBelow)
    assert pruned.model.get_submodule("third").in_features == 8


def test_a_module_that_is_called_with_other_parameters_has_both_modes() -> None:
    """A norm under ``functional_call`` updates its statistics in training mode only."""
    model = Between(
        lambda model, h: torch.func.functional_call(
            model.norm, {"weight": model.norm.weight * 0.5}, (h,)
        )
    )
    model.norm = nn.BatchNorm1d(16)
    emitted = fxprune.prune(model.eval(), torch.randn(8, 4), channels=0.5, verify=True).model
    x, mean = torch.randn(8, 4), emitted.get_buffer("norm.running_mean").clone()
    assert torch.equal(emitted(x), emitted(x))
    assert torch.equal(emitted.get_buffer("norm.running_mean"), mean)
    emitted.train()(x)
    assert not torch.equal(emitted.get_buffer("norm.running_mean"), mean)


def test_what_a_cut_gives_is_a_tree_as_the_list_is() -> None:
    """The parts that ``chunk`` returns are still a container for functions of pytree.

    These functions know containers by their class.
    """
    model = Between(
        lambda model, h: torch.cat(tree_leaves(h.chunk(2, 1))[::-1], 1) * len(tree_leaves(h.shape))
    )
    pruned = fxprune.prune(model, torch.randn(2, 4), channels=0.5, verify=True)
    assert pruned.report.error < 1e-9


@pytest.mark.parametrize("dim", [0, 1])
def test_a_function_that_works_out_what_its_operation_takes(dim: int) -> None:
    """``fftshift`` computes the arguments of its operation from the size of an axis.

    Every second unit goes, so that both halves keep equally many, and the shift stays one half.
    """
    fxprune.prune(
        Between(lambda model, h: torch.fft.fftshift(h, dim)),
        torch.randn(2, 4),
        channels=0.5,
        criterion=lambda view: torch.arange(view.group.size) % 2,
        verify=True,
    )


def turned(h: Tensor) -> Tensor:
    out = h.clone()
    seen = out.view(-1, 16)
    out.t_()
    out.add_(1)
    return seen + out.T


@pytest.mark.parametrize(
    "call",
    [lambda h: h + torch.frexp(h).mantissa, lambda h: h * torch.equal(h, h)],
    ids=["two", "none"],
)
def test_pointwise_operations_that_give_two_tensors_or_none(
    call: Callable[[Tensor], Tensor],
) -> None:
    pruned = fxprune.prune(
        Between(lambda model, h: call(h)), torch.randn(2, 4), channels=0.5, verify=True
    )
    assert pruned.model.get_submodule("second").in_features == 16  # it is not called
    assert pruned.model.get_submodule("first").out_features == 8


LAID_OUT_ANEW: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "in place": lambda model, h: turned(h),
    "a layer under vmap": lambda model, h: torch.vmap(model.second)(h),
    "a constant under vmap": lambda model, h: torch.vmap(lambda row: F.linear(row, torch.eye(16)))(
        h
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", LAID_OUT_ANEW.values(), ids=LAID_OUT_ANEW)
def test_tensors_that_are_laid_out_anew_in_place(call: Callable[[Any, Tensor], Tensor]) -> None:
    pruned = fxprune.prune(Between(call), torch.randn(2, 4), channels=0.5, verify=True)
    assert not pruned.report.parts
    assert pruned.report.error < 1e-9


class Number(float):
    """A number of a user's class."""


CONSTANTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a double": lambda model, h: np.float64(2.0) * h,
    "a float": lambda model, h: h * np.float32(2.0),
    "a whole number": lambda model, h: h.sum(np.int64(1), keepdim=True) * h,
    "a truth value": lambda model, h: h * np.bool_(True),
    "a long double": lambda model, h: h.clamp(max=np.longdouble(0.5)),
    "a complex number": lambda model, h: h * np.complex64(2.0),
    "an own class": lambda model, h: h * Number(2.0),
    "a type of tensors": lambda model, h: h.type(torch.DoubleTensor).type(torch.FloatTensor),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", CONSTANTS.values(), ids=CONSTANTS)
def test_constants_are_written_in_the_words_of_code(call: Callable[[Any, Tensor], Tensor]) -> None:
    """Constants of any type of number can be written into the code of a graph."""
    model, x = Between(call), torch.randn(2, 4)
    pruned = fxprune.prune(model, x, channels=0.5)
    assert not pruned.report.parts
    assert pruned.model(x).shape == model(x).shape
    assert fxprune.verify(model, pruned, x, dtype=torch.float32).error < 1e-5


def forward_mode(h: Tensor) -> Any:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(h, torch.ones_like(h))
        return torch.autograd.forward_ad.unpack_dual(dual.sin()).tangent


def backward(h: Tensor) -> Any:
    with torch.enable_grad():
        leaf = h.detach().clone().requires_grad_()
        leaf.tanh().sum().backward()
    return leaf.grad


def to_other_memory(h: Tensor) -> Tensor:
    out = torch.empty(0)
    out.set_(h.detach())
    return out


TOLD: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "backward": (backward, "forward takes gradients"),
    "autograd.grad": (ALIVE["autograd.grad"], "forward takes gradients"),
    "forward mode": (forward_mode, "forward takes gradients"),
    "a branch on values": (
        lambda h: torch.cond(h.sum() > 0, torch.sin, torch.cos, (h,)),
        "torch compiles what forward does",
    ),
    "other memory": (to_other_memory, "other memory in place"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TOLD)
def test_a_graph_says_what_it_cannot_do_and_where(name: str) -> None:
    call, text = TOLD[name]
    with pytest.raises(fxprune.TraceError, match=rf"(?s){text}.*test_cpp\.py:\d+"):
        trace(meta_copy_of(Between(lambda model, h: call(h))), *example_of(torch.zeros(2, 4)))
