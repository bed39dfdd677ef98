"""Tests of scripted functions and ``torch.func``, which call operations below Python.

The pruned model runs on any batch. Only the sizes that such a function reads are fixed to the
example's.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import fxprune
from tests.support.checking import TOLERANCE, masked, randomise, relative_error


def normed(x: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)


def spread(x: Tensor) -> Tensor:
    return x * torch.var(x, [1, 2], correction=0, keepdim=True)


def swapped(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.cat([b, a], 1)


def sliced(x: Tensor) -> Tensor:
    return torch.cat([x[:, 2:9], x[:, :5]], 1)


def padded(x: Tensor) -> Tensor:
    return F.pad(x, [0, 0, 0, 0, 1, 2])[:, :12]


def rolled(x: Tensor) -> Tensor:
    return x.roll([3], [1])


def grouped(x: Tensor) -> Tensor:
    return x.view(x.shape[0], 3, 4, x.shape[2], x.shape[3]).relu().flatten(1, 2)


def attended(x: Tensor) -> Tensor:
    q = x.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(x.shape)


def expanded(x: Tensor) -> Tensor:
    return x * x.mean([2, 3], keepdim=True).expand(-1, 12, 3, 4)


def scaled(x: Tensor) -> Tensor:
    return x * float(x.shape[1]) ** -0.5


FUNCTIONS = (normed, spread, swapped, sliced, padded, rolled, grouped, attended, expanded, scaled)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch.jit is deprecated
    SCRIPTED = {function.__name__: torch.jit.script(function) for function in FUNCTIONS}


def by_script(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: SCRIPTED[function.__name__](x)


def by_vmap(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return torch.vmap(lambda row: function(row[None]).squeeze(0))


class Between(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = (
            nn.Conv2d(3, 12, 3, padding=1),
            nn.Conv2d(12, 2, 1),
            function,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)))


@pytest.mark.parametrize("how", [by_script, by_vmap])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_channels_go_and_any_batch_runs(function: Callable[[Tensor], Tensor], how: Any) -> None:
    torch.manual_seed(0)
    model = randomise(Between(how(function))).eval()
    pruned = fxprune.prune(model, torch.randn(2, 3, 3, 4, dtype=torch.float64), channels=0.5).model
    assert pruned.get_parameter("a.bias").numel() < 12
    for batch in (2, 3, 5):
        x = torch.randn(batch, 3, 3, 4, dtype=torch.float64)
        with torch.no_grad():
            assert relative_error(pruned(x), masked(model, pruned)(x)) <= TOLERANCE


READS: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda row: row.shape[-1],
    "size": lambda row: row.size(1),
    "size()": lambda row: row.size()[2],
    "numel": lambda row: row.numel(),
    "len": lambda row: len(row[0]),
}


@pytest.mark.parametrize("name", READS)
def test_sizes_that_are_read_inside_of_vmap_are_held(name: str) -> None:
    read = READS[name]
    model = randomise(Between(torch.vmap(lambda row: row / read(row)))).eval()
    pruned = fxprune.prune(model, torch.randn(2, 3, 3, 4, dtype=torch.float64), channels=0.5).model
    x = torch.randn(5, 3, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(pruned(x), masked(model, pruned)(x)) <= TOLERANCE
        with pytest.raises(AssertionError, match="traced for inputs with"):
            pruned(torch.randn(2, 3, 6, 5, dtype=torch.float64))


def test_what_is_split_below_is_held() -> None:
    """A tensor that is reshaped under vmap fixes the size of the image."""
    model = randomise(Between(by_vmap(attended))).eval()
    pruned = fxprune.prune(model, torch.randn(2, 3, 3, 4, dtype=torch.float64), channels=0.5).model
    with torch.no_grad(), pytest.raises(AssertionError, match="traced for inputs with"):
        pruned(torch.randn(2, 3, 6, 5, dtype=torch.float64))


def halved(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 2)
    return torch.cat([b, a], 2)


def cut(x: Tensor) -> Tensor:
    return x[:, :, : x.size(2) // 2]


def capped(x: Tensor) -> Tensor:
    return x * float(min(x.shape[0], 4))


def by_last(x: Tensor) -> Tensor:
    sizes = x.shape[-2:]
    return x * 2 if sizes[0] > 5 else x


def handed(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.view(batch, channels, height * width).mean(2)[:, :, None, None] + x


def lent(x: Tensor) -> Tensor:
    return x.mean([0, 2, 3], keepdim=True).expand(x.size(0), -1, -1, -1).sum(0, keepdim=True) + x


def counted(x: Tensor) -> Tensor:
    numbers = [x.numel(), 1]
    return x * float(numbers[0] // 100)


def read(x: Tensor) -> Tensor:
    return x * 3 if bool(torch.tensor(x.size(0)) > 2) else x


def strided(x: Tensor) -> Tensor:
    return x * x.stride(0)


def pooled(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, [2, 2]).mean([2, 3], keepdim=True) + x


def numbered(x: Tensor) -> Tensor:
    return torch.stack([row * 2 for row in x.unbind(0)])


FREE = {
    (halved, by_script): "BHW",
    (halved, by_vmap): "BW",
    (cut, by_script): "BW",
    (capped, by_script): "HW",
}
FREE |= {
    (by_last, by_script): "B",
    (handed, by_script): "B",
    (lent, by_script): "HW",
    (counted, by_script): "",
}
FREE |= {
    (read, by_script): "",
    (strided, by_script): "",
    (strided, by_vmap): "B",
    (pooled, by_script): "BHW",
}
FREE |= {
    (pooled, by_vmap): "BHW",
    (attended, by_script): "B",
    (numbered, by_script): "HW",
    (handed, by_vmap): "B",
}
"""Function and how it is called -> the sizes (batch, height, width) that may still change."""

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    SCRIPTED |= {
        function.__name__: torch.jit.script(function) for function, how in FREE if how is by_script
    }


@pytest.mark.parametrize(("function", "how"), FREE, ids=lambda own: own.__name__)
def test_sizes_are_held_by_which_something_goes_and_no_others(
    function: Callable[[Tensor], Tensor], how: Any
) -> None:
    """A size that decides something is fixed to the example's, and every other size may change."""
    torch.manual_seed(0)
    model = randomise(Between(how(function))).eval()
    pruned = fxprune.prune(model, torch.randn(2, 3, 8, 6, dtype=torch.float64), channels=0.5).model
    assert pruned.get_parameter("a.bias").numel() < 12
    others = {
        "B": [(1, 8, 6), (5, 8, 6)],
        "H": [(2, 4, 6), (2, 12, 6)],
        "W": [(2, 8, 10), (2, 8, 3)],
    }
    for name, sizes in others.items():
        for batch, height, width in sizes:
            x = torch.randn(batch, 3, height, width, dtype=torch.float64)
            with torch.no_grad():
                if name in FREE[function, how]:
                    assert relative_error(pruned(x), masked(model, pruned)(x)) <= TOLERANCE
                else:
                    with pytest.raises(
                        AssertionError, match=r"traced for inputs with .*decided at test_below"
                    ):
                        pruned(x)


def test_sizes_of_two_inputs_may_be_one() -> None:
    """Two inputs have one batch size, which may only change for both together."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 12), nn.Linear(12, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.b(torch.vmap(lambda row: torch.cat(row.chunk(2)[::-1]))(self.a(x)) * y)

    model = randomise(Two()).eval()
    inputs = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 1, dtype=torch.float64)
    pruned = fxprune.prune(model, inputs, channels=0.5).model
    inputs = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(pruned(*inputs), masked(model, pruned)(*inputs)) <= TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_a_batch_of_one_that_is_held_is_the_example() -> None:
    """A batch of one is fixed to one, although the analysis widens it to two rows."""
    model = randomise(Between(by_script(capped))).eval()
    x = torch.randn(1, 3, 3, 4, dtype=torch.float64)
    pruned = fxprune.prune(model, x, channels=0.5).model
    with torch.no_grad():
        assert relative_error(pruned(x), masked(model, pruned)(x)) <= TOLERANCE


def test_scripts_are_called_as_ever_after_a_trace() -> None:
    """A trace that fails restores the methods that call scripts."""
    before = torch.jit.ScriptFunction.__call__, torch._C.ScriptMethod.__call__
    model = randomise(Between(lambda x: by_script(swapped)(x).unknown)).eval()
    with pytest.raises(fxprune.FxpruneError):
        fxprune.prune(model, torch.randn(2, 3, 3, 4, dtype=torch.float64), channels=0.5)
    assert (torch.jit.ScriptFunction.__call__, torch._C.ScriptMethod.__call__) == before


class Squared(torch.autograd.Function):
    """A square whose own gradient is three times the input, not twice."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return 3 * grad * ctx.saved_tensors[0]


def differentiated(x: Tensor) -> Tensor:
    return torch.func.grad(lambda h: (Squared.apply(h) * h).sum())(x) + x


def differentiated_twice(x: Tensor) -> Tensor:
    inner = torch.func.grad(lambda h: (Squared.apply(h) * h).sum())
    return torch.func.grad(lambda h: inner(h).pow(2).sum())(x)


def mapped(x: Tensor) -> Tensor:
    return torch.vmap(Squared.apply)(x)


def made_inside(x: Tensor) -> Tensor:
    kind = type("Inside", (Squared,), {"forward": staticmethod(lambda h: h * h * h)})
    return kind.apply(x)


@pytest.mark.parametrize("function", [differentiated, differentiated_twice, mapped, made_inside])
def test_gradients_of_a_function_of_its_own_stay_its_own(
    function: Callable[[Tensor], Tensor],
) -> None:
    """A custom autograd function keeps its own gradient.

    This holds inside the transforms of ``torch.func`` too, and if its class is made anew at each
    call.
    """

    class Applies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(function(self.a(x)))

    model, x = Applies().eval(), torch.randn(3, 4)
    pruned = fxprune.prune(model, x, channels=0.5)
    assert {name: tuple(p.shape) for name, p in pruned.model.named_parameters()}["a.weight"] == (
        4,
        4,
    )
    assert "gradients" in fxprune.verify(model, pruned, x).compared


def linearized(x: Tensor) -> Tensor:
    _, jvp = torch.func.linearize(torch.tanh, x)
    return jvp(x)


def nested(x: Tensor) -> Tensor:
    return torch.nested.to_padded_tensor(torch.nested.nested_tensor([x[:1], x[1:]]), 0.0).sum(1)


def flexible(x: Tensor) -> Tensor:
    rows = F.pad(x[None, None], (0, 8))
    return flex_attention(rows, rows, rows)[0, 0, :, :8]


def laid_out_anew(x: Tensor) -> Tensor:
    return torch.empty(0).resize_as_(x).copy_(x)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (linearized, r"torch's linearize reads the number .* in C\+\+ \(at test_below\.py:\d+\)"),
        (
            nested,
            r"torch's nested_tensor asks on which device a tensor is \(at test_below\.py:\d+\)",
        ),
        (
            flexible,
            r"forward calls torch's flex_attention \(at test_below\.py:\d+\), "
            r"an operation that takes functions",
        ),
        (
            laid_out_anew,
            r"forward gives a tensor another size or other memory in place "
            r"\(at test_below\.py:\d+\)",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_no_graph_can_do_is_said_with_its_line(
    function: Callable[[Tensor], Tensor], said: str
) -> None:
    """An error about what no graph can do names the user's line."""

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return function(x @ self.weight.t())

    with pytest.raises(fxprune.TraceError, match=said):
        fxprune.prune(Calls().eval(), torch.randn(3, 4), channels=0.5)
