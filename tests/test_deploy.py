"""Tests of the inference form: it computes the same, without what only training needs."""

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.errors import ModelError
from tests.support.checking import (
    TOLERANCE,
    as_dtype,
    assert_unharmed,
    call,
    randomise,
    relative_error,
    snapshot,
)
from tests.support.families import FAMILIES, Family
from tests.torchvision_models import small_detector
from tests.zoo import CASES
from tests.zoo.case import Case


class Calls(nn.Module):
    """A module whose forward is a function of the module and its input."""

    def __init__(self, forward: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.function = forward
        for name, member in members.items():
            if type(member) is Tensor:
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def deployed(model: nn.Module, *shape: int) -> tuple[nn.Module, nn.Module]:
    """Return a model pruned to half its channels, and its inference form.

    Check that both compute the same, and that the pruned model is unharmed.
    """
    torch.manual_seed(0)
    model = randomise(model).eval()
    x = torch.randn(*shape, dtype=torch.float64)
    pruned = fxprune.prune(model, x, channels=0.5).model
    before = snapshot(pruned)
    fast = fxprune.deploy(pruned)
    assert_unharmed(pruned, before)
    for batch in (shape[0], 3):
        x = torch.randn(batch, *shape[1:], dtype=torch.float64)
        assert relative_error(fast(x), pruned(x)) <= TOLERANCE
    assert not fast.training
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    return pruned, fast


def functional_norm(m: nn.Module, x: Tensor) -> Tensor:
    return F.batch_norm(
        m.conv(x), m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias, m.training
    )


def functional_both(m: nn.Module, x: Tensor) -> Tensor:
    # weight standardisation
    weight = m.conv.weight - m.conv.weight.mean(dim=(1, 2, 3), keepdim=True)
    return m.norm(F.conv2d(x, weight, m.conv.bias, padding=1))


def arithmetic(m: nn.Module, x: Tensor) -> Tensor:
    y = (m.conv(x) - m.norm.running_mean.reshape(1, -1, 1, 1)) / m.norm.running_var.sqrt().reshape(
        -1, 1, 1
    )
    y *= 3.0
    return 0.5 + m.norm.weight.reshape(1, -1, 1, 1) * y


def by_keywords(m: nn.Module, x: Tensor) -> Tensor:
    """Convolve and normalise, with as many keywords in each call as it takes."""
    weight = m.conv.weight - m.conv.weight.mean(dim=(1, 2, 3), keepdim=True)
    y = F.conv2d(padding=1, weight=weight, input=x)
    y = F.batch_norm(
        input=F.dropout(input=y, p=0.5, training=m.training),
        running_mean=m.norm.running_mean,
        running_var=m.norm.running_var,
        weight=m.norm.weight,
        training=m.training,
    )
    y = torch.mul(other=y, input=m.norm.weight.reshape(shape=(1, -1, 1, 1))).add(
        other=m.norm.bias.reshape(1, -1, 1, 1)
    )
    return m.other(input=m.conv(input=y))


def two_norms(m: nn.Module, x: Tensor) -> Tensor:
    """Call a head for two scales with a norm for each, and once more with the first norm."""
    return m.norm(m.conv(x)) + m.other(m.conv(x.roll(1, -1))) + m.norm(m.conv(2 * x))


def conv_and_norm(function: Callable[..., Any], **others: Any) -> nn.Module:
    members = {"conv": nn.Conv2d(8, 8, 3, padding=1), "norm": nn.BatchNorm2d(8)} | others
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), Calls(function, **members), nn.ReLU(), nn.Conv2d(8, 5, 1)
    )


FOLDED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 1)
        ),
        (2, 3, 9),
    ),
    "conv3d": (
        lambda: nn.Sequential(
            nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 4, 1)
        ),
        (2, 3, 5, 5, 5),
    ),
    "no bias, no scale": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8, affine=False),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1),
        ),
        (2, 3, 7, 7),
    ),
    "groups": (
        lambda: nn.Sequential(
            nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
        ),
        (2, 8, 7, 7),
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
        ),
        (2, 3, 7, 7),
    ),
    "transposed, groups": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(8, 12, 3, groups=2),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 4, 1),
        ),
        (2, 8, 7, 7),
    ),
    "linear": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)),
        (2, 6),
    ),
    "functional norm": (lambda: conv_and_norm(functional_norm), (2, 3, 7, 7)),
    "functional convolution": (lambda: conv_and_norm(functional_both), (2, 3, 7, 7)),
    "frozen": (
        lambda: conv_and_norm(
            lambda m, x: m.norm(m.conv(x)), norm=torchvision.ops.FrozenBatchNorm2d(8)
        ),
        (2, 3, 7, 7),
    ),
    "arithmetic": (lambda: conv_and_norm(arithmetic), (2, 3, 7, 7)),
    "keywords": (lambda: conv_and_norm(by_keywords, other=nn.BatchNorm2d(8)), (2, 3, 7, 7)),
    "shared": (lambda: conv_and_norm(two_norms, other=nn.BatchNorm2d(8)), (2, 3, 7, 7)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_what_scales_channels_goes_into_the_weights(name: str) -> None:
    """Batch norms and factors of channels are folded into the weights."""
    build, shape = FOLDED[name]
    _, fast = deployed(build(), *shape)
    left = [m for m in fast.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert left == []
    names = [
        getattr(node.target, "__name__", "")
        for node in fast.graph.nodes
        if node.op == "call_function"
    ]
    assert names.count("batch_norm") == 0
    assert names.count("mul") == (1 if name == "shared" else 0)  # there the input is doubled once


def test_a_head_with_two_norms_becomes_two_modules() -> None:
    _, fast = deployed(FOLDED["shared"][0](), 2, 3, 7, 7)
    called = sorted(node.target for node in fast.graph.nodes if node.op == "call_module")
    assert called == ["0", "1", "2.conv_1", "2.conv_1", "2.conv_2", "3", "4"]


def weight_normed() -> nn.Module:
    conv = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


STAYS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch statistics": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8, track_running_stats=False),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1),
        ),
        (2, 3, 7, 7),
    ),
    "read twice": (lambda: conv_and_norm(lambda m, x: (y := m.conv(x)) + m.norm(y)), (2, 3, 7, 7)),
    "another axis": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(9, 4)),
        (2, 5, 6),
    ),
    "after an activation": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        ),
        (2, 3, 7, 7),
    ),
    "parametrised": (weight_normed, (2, 3, 7, 7)),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_cannot_be_folded_stays(name: str) -> None:
    build, shape = STAYS[name]
    _, fast = deployed(build(), *shape)
    assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fast.modules()) == 1


def test_what_varies_over_the_image_is_not_folded() -> None:
    _, fast = deployed(
        conv_and_norm(lambda m, x: m.conv(x) * m.mask, mask=torch.rand(7, 7)), 2, 3, 7, 7
    )
    assert any(getattr(node.target, "__name__", "") == "mul" for node in fast.graph.nodes)


def test_a_constant_of_a_wider_type_is_not_folded() -> None:
    """Folding the constant would change the type of the result."""
    torch.manual_seed(0)
    model = conv_and_norm(
        lambda m, x: (m.conv(x) * m.wide).float(), wide=torch.rand(1, 8, 1, 1).double()
    )
    pruned = fxprune.prune(model.eval(), torch.zeros(1, 3, 7, 7), channels=0.5).model
    x = torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(fxprune.deploy(pruned)(x), pruned(x), rtol=0, atol=1e-6)


def test_training_code_goes() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = torchvision.ops.stochastic_depth(m.drop(m.conv(x)), 0.5, "row", m.training)
        x = F.dropout(m.nothing(x), 0.5, m.training)
        return m.auxiliary(x) if m.training else x

    model = conv_and_norm(
        forward, drop=nn.Dropout2d(0.5), nothing=nn.Identity(), auxiliary=nn.Conv2d(8, 8, 1)
    )
    _, fast = deployed(model, 2, 3, 7, 7)
    assert [n.target for n in fast.graph.nodes if n.op != "get_attr"] == [
        "input",
        "0",
        "1",
        "2.conv",
        "3",
        "4",
        "output",
    ]
    assert sorted({name.rpartition(".")[0] for name, _ in fast.named_parameters()}) == [
        "0",
        "2.conv",
        "4",
    ]


def test_what_is_random_stays_so() -> None:
    model = conv_and_norm(
        lambda m, x: m.conv(x) + 0 * torch.rand_like(m.norm.weight).reshape(1, -1, 1, 1)
    )
    _, fast = deployed(model, 2, 3, 7, 7)
    assert any(getattr(node.target, "__name__", "") == "rand_like" for node in fast.graph.nodes)


def test_what_the_graph_writes_to_is_no_constant() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        m.calls.view(-1).add_(1.0)
        return m.conv(x) * (m.calls + 1)

    _, fast = deployed(conv_and_norm(forward, calls=torch.zeros(1)), 2, 3, 7, 7)
    x = torch.ones(1, 3, 7, 7, dtype=torch.float64)
    first, second = fast(x), fast(x)
    assert relative_error(first, second) > 0.1


def test_a_constant_that_is_changed_on_the_way_is_none() -> None:
    """A copy of a parameter that is written to through a view is no constant.

    torchvision's second version of Swin does this with its biases.
    """

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        shift = m.shift.clone()
        shift[2:5].zero_()
        shift += m.shift
        return m.conv(x) * shift.sum()

    deployed(conv_and_norm(forward, shift=torch.arange(6.0)), 2, 3, 7, 7)


def seen_by_both(m: nn.Module, x: Tensor) -> Tensor:
    y = m.conv(x)
    flat = y.view(y.shape[0], -1)
    flat += 1
    return y * flat.mean()


def seen_through_a_slice(m: nn.Module, x: Tensor) -> Tensor:
    y = m.conv(x)
    part = y.flatten(1)[:, 3:]
    part *= 2
    return y


def seen_under_a_keyword(m: nn.Module, x: Tensor) -> Tensor:
    y = m.conv(x)
    flat = torch.flatten(input=y, start_dim=1)
    F.relu(input=flat, inplace=True)
    return y * flat.mean()


def seen_by_the_view(m: nn.Module, x: Tensor) -> Tensor:
    y = m.conv(x)
    same = y.contiguous()
    y += 1
    return same


@pytest.mark.parametrize(
    "forward",
    [seen_by_both, seen_through_a_slice, seen_under_a_keyword, seen_by_the_view],
    ids=lambda f: f.__name__,
)
def test_what_would_be_a_copy_channels_last_is_refused(forward: Callable[..., Tensor]) -> None:
    """A view that is written to is refused, because it would be a copy in channels-last layout."""
    model = randomise(conv_and_norm(forward)).eval()
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    pruned = fxprune.prune(model, x, channels=0.5).model
    with pytest.raises(ModelError, match=r"written to later.*channels_last=False"):
        fxprune.deploy(pruned)
    assert relative_error(fxprune.deploy(pruned, channels_last=False)(x), pruned(x)) <= TOLERANCE


def test_writing_before_or_beside_a_view_is_no_reason() -> None:
    """A write before a view is allowed, and one after which the viewed tensor is not read."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.conv(x)
        y += 1
        flat = y.view(y.shape[0], -1)
        flat += flat.mean()
        return flat.unflatten(1, y.shape[1:])

    _, fast = deployed(conv_and_norm(forward), 2, 3, 7, 7)
    assert [str(node.target) for node in fast.graph.nodes if node.op == "call_method"].count(
        "reshape"
    ) == 1


def test_constants_are_computed_once() -> None:
    """Values that do not depend on the input are computed once.

    Here a table of relative positions is read at constant indices.
    """
    model = torchvision.models.swin_transformer.ShiftedWindowAttention(12, [4, 4], [0, 0], 3)
    model.relative_position_bias_table.data.normal_()
    wrapped = nn.Sequential(nn.Linear(5, 12), model, nn.Linear(12, 3))
    pruned, fast = deployed(wrapped, 2, 8, 8, 5)
    names = (
        [getattr(node.target, "__name__", "") for node in pruned.graph.nodes],
        [n.name for n in fast.graph.nodes],
    )
    assert "getitem" in names[0]
    assert not any(n.op == "get_attr" and "index" in str(n.target) for n in fast.graph.nodes)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_zoo(case: Case) -> None:
    torch.manual_seed(0)
    model, inputs = (
        randomise(case.build(case.width)).eval(),
        as_dtype(case.inputs(2), torch.float64),
    )
    pruned = fxprune.prune(model, inputs, channels=0.5).model
    torch.manual_seed(1)
    expected = call(pruned, copy.deepcopy(inputs))
    torch.manual_seed(1)
    assert (
        relative_error(call(fxprune.deploy(pruned), copy.deepcopy(inputs)), expected) <= TOLERANCE
    )


@functools.cache
def fast_family(family: Family) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = randomise(family.build()).eval(), torch.randn(2, *family.shape, dtype=torch.float64)
    pruned = fxprune.prune(model, x, channels=0.5).model
    return pruned, fxprune.deploy(pruned), x


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families(family: Family) -> None:
    pruned, fast, x = fast_family(family)
    with torch.no_grad():
        assert relative_error(fast(x), pruned(x)) <= TOLERANCE
    assert len(fast.graph.nodes) < len(pruned.graph.nodes)


def test_a_detector_keeps_its_class() -> None:
    torch.manual_seed(0)
    model = randomise(small_detector()).eval()
    images = [torch.rand(3, 48, 64, dtype=torch.float64)]
    pruned = fxprune.prune(model, (images,), channels=0.5).model
    fast = fxprune.deploy(pruned)
    assert isinstance(fast, type(model))
    with torch.no_grad():
        features = pruned.backbone(images[0][None]), fast.backbone(images[0][None])
    assert relative_error(*features[::-1]) <= TOLERANCE
    called = [
        fast.backbone.get_submodule(n.target)
        for n in fast.backbone.graph.nodes
        if n.op == "call_module"
    ]
    assert sum(isinstance(module, nn.Conv2d) for module in called) == 3
    assert not any(isinstance(module, nn.BatchNorm2d) for module in called)


class Between(nn.Module):
    """A model whose Python code takes views of the outputs of parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 4, 3, padding=1),
            nn.Linear(144, 2),
        )
        self.second.register_forward_hook(lambda module, args, output: output * 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y.flatten(1).mul_(2)
        if y.is_contiguous():
            y = y.view(y.shape[0], -1).view(y.shape)
        return self.head(self.second(y.relu()).flatten(1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_python_beside_parts_gets_images_laid_out_as_it_expects_them(
    layout: torch.memory_format,
) -> None:
    """Python code between parts gets images in the layout that it expects.

    The layout decides whether ``view`` works and whether a write goes to a copy.
    """
    x = torch.randn(2, 3, 6, 6).to(memory_format=layout)
    pruned = fxprune.prune(Between().eval(), x, channels=0.5).model
    assert torch.allclose(fxprune.deploy(pruned)(x), pruned(x), atol=1e-5)


def test_it_compiles_and_exports() -> None:
    pruned, fast = deployed(FOLDED["functional convolution"][0](), 2, 3, 7, 7)
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    torch._dynamo.reset()
    torch.testing.assert_close(
        torch.compile(fast, fullgraph=True, backend="aot_eager")(x), pruned(x)
    )
    exported = torch.export.export(
        fast, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    x = torch.randn(5, 3, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(exported.module()(x), pruned(x))


def test_a_weight_that_a_hook_computes_before_the_first_call() -> None:
    net = nn.Sequential(
        torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
    ).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated by torch, but in use everywhere
        torch.nn.utils.weight_norm(net[2])
    x = torch.randn(2, 3, 8, 8)
    pruned = fxprune.prune(net, x, channels=0.5).model
    fast = fxprune.deploy(pruned)  # not called yet, so no hook has run
    assert relative_error(fast(x), pruned(x)) < 1e-5


def test_an_operation_that_views_inside_gets_what_is_contiguous() -> None:
    """``torch.kron`` gets a contiguous input in the inference form.

    torch composes it from other operations, and one of them fails on channels-last tensors.
    """

    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.kron(self.first(x).relu(), torch.ones(2, 2)))

    x = torch.randn(2, 3, 8, 8)
    pruned = fxprune.prune(Repeats().eval(), x, channels=0.5).model
    fast = fxprune.deploy(pruned)
    assert relative_error(fast(x), pruned(x)) <= 1e-5
    assert [node.target for node in fast.graph.nodes].count("contiguous") == 1


def test_weights_are_laid_out_channels_last() -> None:
    _, fast = deployed(FOLDED["groups"][0](), 2, 8, 7, 7)
    assert all(
        p.is_contiguous(memory_format=torch.channels_last)
        for p in fast.parameters()
        if p.dim() == 4
    )


def test_half_precision_stays() -> None:
    torch.manual_seed(0)
    model = randomise(FOLDED["no bias, no scale"][0](), torch.float32).eval()
    pruned = fxprune.prune(model, torch.zeros(1, 3, 7, 7), channels=0.5).model.bfloat16()
    assert {p.dtype for p in fxprune.deploy(pruned).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("what", [nn.Linear(2, 2), "resnet18"], ids=["dense", "text"])
def test_only_pruned_models(what: Any) -> None:
    with pytest.raises(ModelError, match=r"holds no graph.*channels=1\.0"):
        fxprune.deploy(what)


def test_hooks_of_what_is_deployed_are_its_own() -> None:
    """A hook that stores a layer's output for forward stores it in the deployed copy."""

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)
            self.kept: dict[str, Tensor] = {}
            self.up.register_forward_hook(
                lambda module, args, output: self.kept.update(out=output)
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.up(x).tanh()
            return self.down(x + self.kept.pop("out"))

    pruned = fxprune.prune(Watching().eval(), torch.randn(4, 6), channels=0.5).model
    fast = fxprune.deploy(pruned)
    for batch in (4, 2):
        x = torch.randn(batch, 6)
        assert torch.allclose(fast(x), pruned(x), atol=1e-6)
