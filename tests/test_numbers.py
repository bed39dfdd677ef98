"""Numbers that forward computes from sizes.

At every size, the pruned model uses the original's number, or says that it was pruned for another
size. A spec is two texts: an expression of the sizes of ``h``, and an expression of ``h`` and the
resulting number ``n``. A failure prints both; paste them into ``judge``.
"""

import math
import operator
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import fxprune
from fxprune.errors import FxpruneError
from tests.support.checking import masked, randomise, relative_error

KNOWN = {"math": math, "torch": torch, "F": F, "operator": operator, "Tensor": Tensor}
SIZES = [(2, 3, 8, 6), (3, 3, 8, 6), (1, 3, 4, 9), (2, 3, 12, 12), (5, 3, 6, 8)]
"""Sizes of the image. The first one is the example's."""


class Counting(nn.Module):
    """Convolutions with an expression of ``h`` and ``n`` between them.

    ``h`` is the output of the first convolution, and ``n`` is a number computed from its sizes.
    """

    def __init__(self, number: str, use: str) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 4, 1),
        )
        self.number, self.use = (
            eval(f"lambda h: {number}", KNOWN),
            eval(f"lambda h, n: {use}", KNOWN),
        )

    def forward(self, x: Tensor) -> Any:
        h = self.a(x).relu()
        h = self.use(h, self.number(h))
        h, *others = h if isinstance(h, tuple) else (h,)
        return self.c(self.b(h).relu()), *others


def runs(model: nn.Module, x: Tensor) -> Any:
    """Return a model's output, or None if the model refuses the size."""
    try:
        with torch.no_grad():
            return model(x)
    except Exception:
        return None


def judge(number: str, use: str, left: float = 0.8, kind: Any = Counting) -> list[bool]:
    """Prune a model, and compare it with its masked original at every size.

    Return whether the pruned model accepts each size, for the sizes that the original accepts.
    Where it does, its output must equal the masked original's. ``left`` is the largest share of
    parameters that may be left.
    """
    torch.manual_seed(0)
    model = randomise(kind(number, use).eval())
    images = [torch.randn(size, dtype=torch.float64) for size in SIZES]
    pruned = fxprune.prune(model, images[0], channels=0.5).model
    assert sum(p.numel() for p in pruned.parameters()) <= left * sum(
        p.numel() for p in model.parameters()
    )
    reference, taken = masked(model, pruned), []
    for x in images:
        wanted = runs(reference, x)
        if wanted is None:
            continue
        try:
            with torch.no_grad():
                got = pruned(x)
        except AssertionError as error:
            if not str(error).startswith("this graph was "):
                raise
            taken.append(False)
            continue
        taken.append(True)
        assert relative_error(got[0], wanted[0]) <= 1e-9, f"at {tuple(x.shape)}"
        assert got[1:] == wanted[1:], f"at {tuple(x.shape)}"
    assert taken[0], "the example is refused"
    return taken


READ = [
    "h.size(1)",
    "h.shape[1]",
    "h.size(-3)",
    "h.shape[-3]",
    "h.size(dim=1)",
    "h[0].shape[0]",
    "h[:, :, 0].shape[1]",
    "len(h[0])",
]
"""Expressions that read a width."""

MIXED = [
    *(
        "h.shape[1] * h.shape[2]",
        "h.flatten(1).shape[1]",
        "h.flatten(1, 2).size(-2)",
        "h[0].numel()",
        "h.numel()",
        "h.nelement()",
    ),
    *(
        "torch.numel(h)",
        "h.shape.numel()",
        "math.prod(h.shape)",
        "math.prod(h.shape[1:])",
        "sum(h.shape)",
        "h.transpose(1, 3).flatten(2).shape[2]",
    ),
    *(
        "h.permute(0, 2, 3, 1).reshape(h.shape[0], -1).shape[1]",
        "h.view(h.shape[0], -1).size(1)",
        "h.shape[1] * h.shape[2] + 1",
    ),
    *(
        "h.shape[2] - h.shape[1]",
        "h.shape[1] * h.shape[2] // 5",
        "h.shape[1] * h.shape[2] % 7",
        "h.shape[2] ** 2 / h.shape[1]",
    ),
    *(
        "torch.cat([h, h], 1).flatten(1).shape[1]",
        "F.max_pool2d(h, 2).flatten(1).shape[1]",
        "h.mean(3).flatten(1).shape[1]",
    ),
    *(
        "(h @ h.transpose(2, 3)).flatten(1).shape[1]",
        "h.chunk(2, 1)[0].flatten(1).shape[1]",
        "F.unfold(h, 3).shape[1] * h.shape[2]",
        "torch.stack([h, h], 1).flatten(1).shape[1]",
        "h.repeat(1, 2, 1, 1).flatten(1).shape[1]",
        "h.expand(2, *h.shape).flatten(1, 2).shape[1]",
        "F.pixel_shuffle(h, 2).flatten(1).shape[1]",
        "F.interpolate(h, scale_factor=2).flatten(1).shape[1]",
        "F.pad(h, (0, 1, 0, 0, 0, 2)).flatten(2).shape[1] * h.shape[2]",
        "h[:, 2:].flatten(1).shape[1]",
        "h.narrow(1, 2, 3).numel()",
        "torch.cat([h.flatten(1), h.mean((2, 3))], 1).shape[1]",
        "torch.zeros_like(h).flatten(1).shape[1]",
        "h.movedim(1, 3).movedim(-1, 1).flatten(1).shape[1]",
        "h.moveaxis((1, 2), (2, 1)).flatten(2).shape[1] * h.shape[2]",
        "h.adjoint().flatten(1).shape[1]",
        "h.flatten(0, 1).shape[0]",
        "h.nbytes",
    ),
]
"""Numbers that combine a width with a batch size or a resolution, and follow both."""

HELD = [
    "int(h.shape[1] * h.shape[2] / 3)",
    "h.stride(0)",
    "torch.cat([h.flatten(1), torch.ones(h.shape[0], 5).to(h)], 1).shape[1]",
    "max(h.shape)",
    "max(h.shape[1], h.shape[2])",
    "math.log(h.shape[1] * h.shape[2])",
    "math.sqrt(h[0].numel())",
]
"""Numbers that Python computes once, for the example; the graph is valid only for these."""

USES = [
    *(
        "h / (abs(n) + 1)",
        "h * n",
        "torch.mul(h, other=n)",
        "torch.add(h, h, alpha=n)",
        "h - torch.full_like(h, n)",
        "h.clamp(max=n / 100)",
    ),
    *(
        "F.pad(h, (1, 1), value=n)",
        "h + h.new_full((h.shape[1], 1, 1), n)",
        "h + h.new_full((1, 1, 1), fill_value=n)",
        "(h, n)",
        "(h, {'n': [n]})",
    ),
    *(
        "h[:, :, : n % 3 + 1]",
        "F.interpolate(h, size=(n % 4 + 2, h.shape[3]))",
        "h.pow(1 + 1 / (n ** 2 + 1))",
        "h.mul_(n)",
        "h.__mul__(n)",
    ),
    *(
        "h * (h.new_zeros(n % 5 + 1).numel())",
        "h.softmax(2) * n ** 0.5",
        "F.leaky_relu(-h, negative_slope=1 / (n ** 2 + 1))",
    ),
]

BRANCHES = [
    "h.sigmoid() if n > 40 else h",
    "h.sigmoid() if n % 3 else h.tanh()",
    "h.sigmoid() if 20 < n < 70 else h",
    "h[:, :, ::2] if n == 64 else h",
]


AS_SIZES = {
    "both": (
        "h.shape[1] * h.shape[2]",
        "h.reshape(h.shape[0], n, h.shape[3]).reshape(h.shape) / n",
    ),
    "read off": (
        "h.flatten(1, 2).shape[1]",
        "h.reshape(h.shape[0], n, h.shape[3]).reshape(h.shape) / n",
    ),
    "a quotient": (
        "h[0].numel() // h.shape[3]",
        "h.reshape(h.shape[0], n, h.shape[3]).reshape(h.shape) / n",
    ),
    "a sum": (
        "h.shape[1] * (h.shape[2] - 1) + h.shape[1]",
        "h.reshape(h.shape[0], n, -1).reshape(h.shape) / n",
    ),
    "a difference": (
        "h.shape[1] * h.shape[2] + 1",
        "h.reshape(h.shape[0], n - 1, -1).reshape(h.shape) / n",
    ),
    "all": ("h.numel()", "h.view(n).view(h.shape) / n"),
    "by keyword": (
        "h.shape[1] * h.shape[2]",
        "h.reshape(shape=(h.shape[0], n, -1)).reshape(*h.shape) / n",
    ),
    "unflattened": ("h.shape[1]", "h.flatten(1, 2).unflatten(1, (n, -1)) / n"),
    "expanded": ("h.shape[1]", "h * h.mean(1, keepdim=True).expand(-1, n, -1, -1) / n"),
    "repeated": ("h.shape[1]", "h * h.mean(1, keepdim=True).repeat(1, n, 1, 1) / n"),
    "made": ("h.shape[1] * h.shape[2]", "h + h.new_ones(n).view(h.shape[1], -1, 1) * n"),
    "made by torch": ("h.shape[1] * h.shape[2]", "h + torch.ones(n).view(h.shape[1], -1, 1) * n"),
    "the larger one": ("max(h.shape[1], h.shape[2])", "h / n + h.new_ones(n).sum()"),
    "another axis": (
        "h.shape[1] - 8 + h.shape[2]",
        "h.reshape(h.shape[0], -1, n, h.shape[3]) / n",
    ),
}
"""Numbers that are also used as sizes. As sizes they follow the smaller model."""

AT_POSITIONS = {
    "split": (
        "h.flatten(1, 2).shape[1] // 2",
        "torch.cat(h.flatten(1, 2).split(n, 1)[::-1], 1).reshape(h.shape)",
    ),
    "chunk": ("2", "torch.cat(h.flatten(1, 2).chunk(n, 1)[::-1], 1).reshape(h.shape)"),
    "slice": (
        "h.shape[2]",
        "h - h.flatten(1, 2)[:, n : 2 * n].reshape(h.shape[0], 1, *h.shape[2:])",
    ),
    "slice of literals": ("8", "h - h.flatten(1, 2)[:, n:16].sum(1)[:, None, None]"),
    "narrow": (
        "h.shape[2]",
        "h - h.flatten(1, 2).narrow(1, n, n).reshape(h.shape[0], 1, *h.shape[2:])",
    ),
    "select": ("h.shape[2]", "h - h.flatten(1, 2).select(1, n)[:, None, None]"),
    "item": ("h.shape[2]", "h - h.flatten(1, 2)[:, n][:, None, None]"),
    "roll": ("h.shape[2]", "h.flatten(1, 2).roll(n, 1).reshape(h.shape)"),
    "step": ("16", "h - h.flatten(1)[:, ::n].sum(1)[:, None, None, None]"),
    "rows": ("16", "h - h.reshape(-1, n)[:, 0].sum()"),
    "rows of each": ("16", "h - h.view(h.shape[0], -1, n)[..., 0].sum(1)[:, None, None, None]"),
    "unflattened rows": (
        "16",
        "h - h.flatten(1).unflatten(1, (-1, n))[..., 0].sum(1)[:, None, None, None]",
    ),
    "rows of places first": (
        "3",
        "h - h.movedim(1, -1).reshape(h.shape[0], n, -1).cumsum(2).sum((1, 2))[:, None, None, "
        "None]",
    ),
}
"""Positions on an axis that combines a width with a resolution.

The pruned model is right at the example's size, and may refuse others.
"""


@pytest.mark.parametrize("read", READ)
def test_a_width_is_the_originals_as_a_number(read: str) -> None:
    assert all(judge(read, "h / n"))
    assert all(judge(read, "h.sigmoid() if n > 7 else h"))


@pytest.mark.parametrize("number", MIXED)
def test_a_width_and_a_resolution(number: str) -> None:
    assert all(judge(number, "h / (abs(n) + 1)"))
    judge(number, "h.sigmoid() if n > 40 else h")


@pytest.mark.parametrize("use", USES)
def test_every_place_for_a_number(use: str) -> None:
    assert all(judge("h.shape[1] * h.shape[2] + 1", use))


@pytest.mark.parametrize("number", HELD)
def test_what_python_takes_is_held_by_the_originals_value(number: str) -> None:
    taken = judge(number, "h * n")
    assert taken[1]
    assert not all(taken)


@pytest.mark.parametrize(
    "number",
    [
        "float(f'{h.shape[1] * h.shape[2]}')",
        "int(str(h.shape[1] * h.shape[2]))",
        "len(repr(h[0].shape))",
    ],
)
def test_a_text_is_held_by_the_originals_value(number: str) -> None:
    assert judge(number, "h * n")[1]


def test_a_number_that_something_is_looked_up_by() -> None:
    assert not all(judge("{64: 2.0, 96: 3.0}.get(h.shape[1] * h.shape[2], 4.0)", "h * n"))
    assert all(judge("2.0 if h.shape[1] in {8, 16} else 3.0", "h * n"))


def test_the_message_of_an_assertion_holds_nothing() -> None:
    checked = "(torch._assert(n % 2 == 0, f'{n} rows, {n * 2} in all, of {h.shape}'), h)[1]"
    assert all(judge("h.shape[2] * 2", checked))


@pytest.mark.parametrize("use", BRANCHES)
def test_a_branch_is_held_by_the_originals_value(use: str) -> None:
    taken = judge("h.shape[1] * h.shape[2]", use)
    assert taken[1]
    assert not all(taken)


@pytest.mark.parametrize("case", AS_SIZES)
def test_a_number_that_is_a_size_too(case: str) -> None:
    taken = judge(*AS_SIZES[case], left=0.85)
    assert all(taken) or case == "the larger one"


@pytest.mark.parametrize("case", AT_POSITIONS)
def test_positions_on_a_mixed_axis(case: str) -> None:
    assert judge(*AT_POSITIONS[case], left=1.0)[1]


@pytest.mark.parametrize("use", ["h * n[0]", "h.as_strided(h.size(), n)"])
def test_how_axes_lie_in_memory(use: str) -> None:
    """The strides of a channels-last tensor are right at the example's size."""
    assert judge(
        "h.stride()",
        f"(lambda h, n: {use})(m := h.movedim(1, -1).contiguous().movedim(-1, 1), m.stride())",
        left=1.0,
    )[0]


class Hooked(Counting):
    """A model that uses the number in Python between parts, because of a hook."""

    def __init__(self, number: str, use: str) -> None:
        super().__init__(number, use)
        self.a.register_forward_hook(lambda module, args, output: output.relu())


@pytest.mark.parametrize("case", ["step", "rows", "rows of each", "unflattened rows"])
def test_positions_on_a_mixed_axis_in_python(case: str) -> None:
    """Python between parts sees the original's width, so the result is right at every size."""
    assert all(judge(*AT_POSITIONS[case], kind=Hooked))


def test_literals_that_take_whole_channels_are_right_at_every_size() -> None:
    assert all(judge("8", "h + h.reshape(h.shape[0], n, -1).mean(2)[..., None, None]"))
    assert all(
        judge(
            "4",
            "h + h.movedim(1, -1).reshape(h.shape[0], -1, n, 2).mean(1).flatten(1)[..., None, "
            "None]",
            left=0.85,
        )
    )
    assert all(
        judge(
            "2",
            "h + h.flatten(1).unflatten(1, (n, -1)).mean(1).view_as(h[:, :4]).repeat(1, n, 1, 1)",
            left=0.85,
        )
    )


def test_a_guard_on_widths_alone_is_dropped() -> None:
    model = Counting("h.shape[1]", "h.sigmoid() if n % 4 == 0 else h").eval()
    pruned = fxprune.prune(model, torch.randn(SIZES[0]), channels=0.5).model
    assert "assert" not in pruned.code


class Equalised(nn.Module):
    """A parametrisation that divides a weight by the square root of its fan-in."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / weight[0].numel() ** 0.5


def test_numbers_in_a_parametrisation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
    parametrize.register_parametrization(randomise(model.eval())[1], "weight", Equalised())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    pruned = fxprune.prune(model, x, channels=0.5).model
    assert relative_error(pruned(x), masked(model, pruned)(x)) <= 1e-9


class InModes(Counting):
    """A model with a separate branch for training, which divides by ``n + 1``."""

    def forward(self, x: Tensor) -> Any:
        h = self.a(x).relu()
        n = self.number(h)
        return self.c(self.b(h / (n + 1) if self.training else h / n).relu())


def test_numbers_in_both_modes() -> None:
    model = randomise(InModes("h.shape[1] * h.shape[2]", "h").eval())
    pruned = fxprune.prune(model, torch.randn(SIZES[0], dtype=torch.float64), channels=0.5).model
    reference = masked(model, pruned)
    for training in (True, False):
        for size in SIZES:
            x = torch.randn(size, dtype=torch.float64)
            assert relative_error(pruned.train(training)(x), reference.train(training)(x)) <= 1e-9


class InPython(Counting):
    """A model that uses the number in Python between parts, because it branches on values."""

    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        return (h,) if x.flatten()[0] < -100 else self.rest(h.relu())

    def rest(self, h: Tensor) -> Any:
        h = self.use(h, self.number(h))
        h, *others = h if isinstance(h, tuple) else (h,)
        return self.c(self.b(h).relu()), *others


IN_PYTHON = [
    *(
        ("h.shape[1]", use)
        for use in (
            "h / int(n)",
            "h / round(n)",
            "h * math.log(n)",
            "h * math.gcd(n, 6)",
            "h / n ** 0.5",
            "h * len([0] * n)",
        )
    ),
    *(
        ("h.shape[1]", use)
        for use in (
            "h * sum(0.9 for _ in range(n))",
            "h * [*range(9)][n]",
            "h * {4: 2.0}.get(n, 3.0)",
            "h * float(f'{n}')",
        )
    ),
    *(
        ("h.shape[1]", use)
        for use in (
            "(h, n)",
            "(h, {'n': [n]})",
            "h * torch.full((3,), n).sum()",
            "h + h.new_full((n, 1, 1), n)",
            "h.clamp(max=n)",
        )
    ),
    *(
        ("h.shape[1]", use)
        for use in (
            "h.view(h.shape[0], n, -1).view(h.shape)",
            "h * (2.0 if isinstance(n, int) else 3.0)",
            "h / n.bit_length()",
        )
    ),
    *(
        ("h.shape", use)
        for use in (
            "(h, n)",
            "h * torch.tensor(n).prod()",
            "h / n[1:].numel()",
            "h / max(n)",
            "h / sum(n)",
        )
    ),
    *(
        (number, "h / n")
        for number in (
            "h.stride(0)",
            "h.nbytes",
            "h.untyped_storage().nbytes()",
            "h[0].numel()",
            "h.flatten(1).shape[1]",
        )
    ),
]


@pytest.mark.parametrize(("number", "use"), IN_PYTHON)
def test_numbers_in_python_between_parts(number: str, use: str) -> None:
    assert all(judge(number, use, left=1.0, kind=InPython))


expressions = st.recursive(
    st.sampled_from([*READ, *MIXED, "h.shape[0]", "h.shape[2]", "h.shape[3]", "1", "3", "8"]),
    lambda inner: st.one_of(
        st.builds(
            "({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "//", "%", "/"]), inner
        ),
        st.builds("{}({}, {})".format, st.sampled_from(["max", "min"]), inner, inner),
        st.builds("{}({})".format, st.sampled_from(["math.sqrt", "abs", "int", "float"]), inner),
    ),
    max_leaves=4,
)


@given(number=expressions, use=st.sampled_from([*USES, *BRANCHES]))
@settings(max_examples=60)
def test_any_expression(number: str, use: str) -> None:
    """Right at every size, or refused: when pruning, or at that size."""
    try:
        taken = judge(number, use)
    except FxpruneError:
        event("not pruned")
    else:
        event("right at all sizes" if all(taken) else "held to some")
