"""Emitted models are complete.

They train, switch modes, keep names, dtypes and ties, and can be compiled, exported and converted.
"""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from tests.support.checking import (
    TOLERANCE,
    as_dtype,
    call,
    count,
    nesting,
    randomise,
    relative_error,
    tensors,
)
from tests.support.families import FAMILIES, Family
from tests.zoo import CASES
from tests.zoo.blocks import Residual
from tests.zoo.case import Case
from tests.zoo.flow import Shared
from tests.zoo.tokens import LanguageModel, TiedBag

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
zoo = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

COMPOSITE = ("attention_module", "vit_module", "cross_attention", "encoder_layer")
"""Zoo cases with ``nn.MultiheadAttention``, which is decomposed.

Sums may be reordered, and some names may be missing.
"""

SLOW_TO_COMPILE = ("googlenet", "inception_v3")
"""Families with so many layers that capturing a graph takes ten seconds."""

QUICK_TO_CONVERT = ("mobilenet_v2", "resnet", "vit")
"""The families whose ONNX export is not marked slow."""


compiled_families = pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, id=f.name, marks=pytest.mark.slow if f.name in SLOW_TO_COMPILE else ())
        for f in FAMILIES
    ],
)


def randomised(model: nn.Module) -> nn.Module:
    """Return ``model`` in float32 with random weights and statistics, in evaluation mode."""
    return randomise(model, torch.float32).eval()


@functools.cache
def halved(family: Family) -> tuple[nn.Module, Any]:
    """Return a family's model and its ``Pruned`` at half the channels.

    Tests share both objects, so copy them before you change them.
    """
    torch.manual_seed(0)
    model = randomised(family.build())
    return model, fxprune.prune(model, torch.randn(2, *family.shape), channels=0.5)


def floating(output: Any) -> list[Tensor]:
    """Return the tensors of an output that can have a gradient."""
    return [tensor for tensor in tensors(output) if tensor.is_floating_point()]


def gradients(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Run one forward and backward pass; return the gradients by name."""
    model.zero_grad()
    sum(output.square().mean() for output in floating(call(model, inputs))).backward()  # type: ignore[union-attr]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# -- batch and resolution


@families
def test_any_batch(family: Family) -> None:
    model, pruned = halved(family)
    for batch in (1, 2, 5):
        x = torch.randn(batch, *family.shape)
        with torch.no_grad():
            output, original = pruned.model(x), model(x)
        assert nesting(output) == nesting(original)
        assert [out.shape for out in tensors(output)] == [out.shape for out in tensors(original)]


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.other], ids=lambda family: family.name
)
def test_another_resolution(family: Family) -> None:
    """A model pruned at one resolution is exact at another."""
    model, pruned = halved(family)
    assert family.other is not None
    check = fxprune.verify(
        model, pruned, torch.randn(2, *family.other), dtype=torch.float64, randomize=True
    )
    assert check.error <= TOLERANCE


# -- training


def check_trains(model: nn.Module, pruned: nn.Module, inputs: Any) -> None:
    """Check that ``pruned`` trains as ``model`` does, and switches between its modes."""
    # Both are changed below, and the given model is used again.
    model, pruned = copy.deepcopy(model).train(), pruned.train()
    assert all(module.training for module in pruned.modules())
    before = {name: p.detach().clone() for name, p in pruned.named_parameters()}
    buffers = [
        {name: b.clone() for name, b in network.named_buffers()} for network in (model, pruned)
    ]
    arrived = gradients(pruned, inputs)
    assert set(arrived) == set(gradients(model, inputs))
    assert all(torch.isfinite(gradient).all() for gradient in arrived.values())
    for name in buffers[1]:
        moved = [
            not torch.equal(b[name], n.get_buffer(name))
            for b, n in zip(buffers, (model, pruned), strict=True)
        ]
        assert moved[0] == moved[1], (
            f"{name} is updated in training mode by one model and not by the other"
        )
    torch.optim.SGD(pruned.parameters(), lr=1e-3).step()
    parameters = dict(pruned.named_parameters())
    assert any(not torch.equal(parameters[name], before[name]) for name in arrived)

    pruned.eval()
    assert not any(module.training for module in pruned.modules())
    with torch.no_grad():
        assert relative_error(*(floating(call(pruned, inputs)) for _ in range(2))) == 0, (
            "eval mode is not deterministic"
        )


@families
def test_families_train(family: Family) -> None:
    model, pruned = halved(family)
    check_trains(model, copy.deepcopy(pruned.model), torch.randn(2, *family.shape))


@zoo
def test_zoo_trains(case: Case) -> None:
    model, inputs = randomised(case.build(case.width)), case.inputs(2)
    if case.name == "weight_norm_old_hook":
        pytest.skip(
            "torch cannot copy a module under the old weight_norm, nor give it back its hook"
        )
    check_trains(model, fxprune.prune(model, inputs, channels=0.5).model, inputs)


def check_identity(model: nn.Module, inputs: Any, tolerance: float) -> None:
    """Check that at full width the emitted model trains like ``model``, including random draws."""
    pruned = fxprune.prune(model, inputs, channels=1.0).model
    assert count(pruned) == count(model)
    model.train(), pruned.train()
    outputs = []
    for network in (model, pruned):
        torch.manual_seed(7)
        outputs.append([call(network, inputs) for _ in range(2)])
    if tolerance:
        assert relative_error(outputs[1], outputs[0]) <= tolerance
    else:
        for original, output in zip(tensors(outputs[0]), tensors(outputs[1]), strict=True):
            assert torch.equal(original, output)
        for name, buffer in pruned.named_buffers():
            assert torch.equal(buffer, model.get_buffer(name)), name


@families
def test_families_at_full_width(family: Family) -> None:
    model = randomised(family.build())
    check_identity(model, torch.randn(2, *family.shape), 1e-6 if family.composite else 0.0)


@zoo
def test_zoo_at_full_width(case: Case) -> None:
    model = randomised(case.build(case.width))
    check_identity(model, case.inputs(2), 1e-6 if case.name.startswith(COMPOSITE) else 0.0)


@pytest.mark.parametrize("name", ["convnext", "densenet", "efficientnet", "swin", "vit"])
def test_dropout_and_stochastic_depth_stay_alive(name: str) -> None:
    """Two seeds differ in training mode and agree in evaluation mode.

    This holds whichever mode the model was pruned in.
    """
    family = next(f for f in FAMILIES if f.name == name)
    x = torch.randn(2, *family.shape)
    for training in (False, True):
        model = randomised(family.build()).train(training)
        pruned = fxprune.prune(model, x, channels=0.5).model
        assert model.training == training
        outputs = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            outputs.append((pruned.train()(x), pruned.eval()(x)))
        assert not torch.equal(outputs[0][0], outputs[1][0]), (
            "nothing random is left in train mode"
        )
    # Statistics changed in the two training passes, so evaluation mode runs again.
    assert torch.equal(pruned(x), pruned(x))


@pytest.mark.parametrize("training", [False, True])
def test_mode_is_kept(training: bool) -> None:
    model = Residual(16).train(training)
    assert fxprune.prune(model, torch.randn(2, 3, 8, 8), channels=0.5).model.training == training


# -- names, types, ties


def check_names(model: nn.Module, pruned: nn.Module, composite: bool) -> None:
    """Check that tensors keep their names and ranks, and that none is larger than before."""
    original, emitted = model.state_dict(), pruned.state_dict()
    assert set(emitted) <= set(original), set(emitted) - set(original)
    assert composite or set(emitted) == set(original), set(original) - set(emitted)
    for name, value in emitted.items():
        assert value.dtype == original[name].dtype, name
        assert value.dim() == original[name].dim(), name
        assert all(
            new <= old for new, old in zip(value.shape, original[name].shape, strict=True)
        ), name
    kinds = {name: (p.dtype, p.device, p.requires_grad) for name, p in model.named_parameters()}
    assert {
        name: (p.dtype, p.device, p.requires_grad) for name, p in pruned.named_parameters()
    }.items() <= kinds.items()
    persistent = {name for name, _ in pruned.named_buffers()}
    assert persistent <= {name for name, _ in model.named_buffers()}
    pruned.load_state_dict(copy.deepcopy(emitted), strict=True)


@families
def test_names_of_families(family: Family) -> None:
    model, pruned = halved(family)
    check_names(model, copy.deepcopy(pruned.model), family.composite)


@zoo
def test_names_of_zoo(case: Case) -> None:
    model = randomised(case.build(case.width))
    check_names(
        model,
        fxprune.prune(model, case.inputs(2), channels=0.5).model,
        case.name.startswith(COMPOSITE),
    )


@families
def test_emitted_model_is_a_graph_module(family: Family) -> None:
    _, pruned = halved(family)
    assert isinstance(pruned.model, torch.fx.GraphModule)
    pruned.model.graph.lint()
    assert count(pruned.model) < count(halved(family)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    model, inputs = Residual(16).to(dtype).eval(), torch.randn(2, 3, 8, 8, dtype=dtype)
    pruned = fxprune.prune(model, inputs, channels=0.5).model
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    assert pruned(inputs).dtype == dtype


def test_mixed_dtypes_are_kept() -> None:
    """Each parameter keeps its dtype, such as float32 for normalisations in mixed precision."""
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 16).bfloat16(), nn.Linear(16, 4))

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[1](self.layers[0](x).bfloat16())
            return self.layers[2](x.float())

    pruned = fxprune.prune(Mixed(), torch.randn(2, 6), channels=0.5).model
    kinds = {name: p.dtype for name, p in pruned.named_parameters()}
    assert kinds == {name: p.dtype for name, p in Mixed().named_parameters()}
    assert count(pruned) < count(model)


def test_frozen_parameters_stay_frozen() -> None:
    model = Residual(16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("stem" not in name and "bias" not in name)
    pruned = fxprune.prune(model, torch.randn(2, 3, 8, 8), channels=0.5).model
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in pruned.named_parameters()} == asked
    assert len(set(asked.values())) == 2
    assert all(p.is_leaf and p.grad is None for p in pruned.parameters())


def test_parameters_are_the_emitted_models_own() -> None:
    """No storage is shared, so training one model does not change the other.

    No storage of a larger tensor is kept alive either.
    """
    model = Residual(16)
    for channels in (0.5, 1.0):
        pruned = fxprune.prune(model, torch.randn(2, 3, 8, 8), channels=channels).model
        ours = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        for name, tensor in (*pruned.named_parameters(), *pruned.named_buffers()):
            assert tensor.untyped_storage().data_ptr() not in ours, name
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, (
                f"{name} keeps the original's memory alive"
            )


@pytest.mark.parametrize(
    ("model", "inputs", "first", "second"),
    [
        (
            LanguageModel(16, tied=True),
            torch.randint(20, (2, 8)),
            "embedding.weight",
            "head.weight",
        ),
        (Shared(16), torch.randn(2, 3, 8, 8), "a.weight", "b.weight"),
    ],
    ids=["embedding and head", "two convolutions"],
)
def test_tied_parameters_stay_tied(
    model: nn.Module, inputs: Tensor, first: str, second: str
) -> None:
    pruned = fxprune.prune(model.eval(), inputs, channels=0.5).model
    assert pruned.get_parameter(first) is pruned.get_parameter(second)
    assert pruned.get_parameter(first).numel() < model.get_parameter(first).numel()
    assert len(list(pruned.parameters())) == len(list(model.parameters()))


def test_functional_tie_stays_one_parameter() -> None:
    pruned = fxprune.prune(TiedBag(16), torch.randint(20, (2, 8)), channels=0.5).model
    assert pruned.embedding.weight.shape == (20, 8)
    assert [name for name, p in pruned.named_parameters() if p.shape[0] == 20] == [
        "embedding.weight"
    ]


@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last_is_kept(dims: int) -> None:
    memory_format = torch.channels_last if dims == 2 else torch.channels_last_3d
    conv = nn.Conv2d if dims == 2 else nn.Conv3d
    model = nn.Sequential(
        conv(3, 16, 3, padding=1), nn.ReLU(), conv(16, 16, 3, padding=1), nn.ReLU(), conv(16, 4, 1)
    )
    model = model.to(memory_format=memory_format)
    x = torch.randn(2, 3, *[8] * dims).to(memory_format=memory_format)
    pruned = fxprune.prune(model, x, channels=0.5).model
    for name, parameter in pruned.named_parameters():
        assert parameter.dim() == 1 or parameter.is_contiguous(memory_format=memory_format), name
    assert pruned.get_parameter("2.weight").shape[:2] == (8, 8)
    assert not pruned.get_parameter("2.weight").is_contiguous()
    assert (
        pruned.get_parameter("4.weight").stride()
        == pruned.get_parameter("4.weight").clone(memory_format=memory_format).stride()
    )


def test_contiguous_is_kept() -> None:
    pruned = fxprune.prune(Residual(16), torch.randn(2, 3, 8, 8), channels=0.5).model
    assert all(tensor.is_contiguous() for tensor in (*pruned.parameters(), *pruned.buffers()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@families
def test_device_is_kept(family: Family) -> None:
    model, x = randomised(family.build()).cuda(), torch.randn(2, *family.shape, device="cuda")
    pruned = fxprune.prune(model, x, channels=0.5)
    assert {t.device.type for t in (*pruned.model.parameters(), *pruned.model.buffers())} == {
        "cuda"
    }
    assert fxprune.verify(model, pruned, x, dtype=torch.float64, randomize=True).error <= TOLERANCE
    check_trains(model, pruned.model, x)


# -- compile, export, convert


@pytest.mark.filterwarnings("ignore")
@compiled_families
def test_compiles_as_one_graph(family: Family) -> None:
    _, pruned = halved(family)
    x = torch.randn(2, *family.shape)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(pruned.model), fullgraph=True, backend="eager")
    with torch.no_grad():
        assert relative_error(compiled(x), pruned.model(x)) <= 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet", "swin", "vit"])
def test_compiles_with_inductor(name: str) -> None:
    """Inductor is the default backend."""
    family = next(f for f in FAMILIES if f.name == name)
    model, x = halved(family)[1].model, torch.randn(2, *family.shape)
    torch._dynamo.reset()
    with torch.no_grad():
        assert relative_error(torch.compile(model, fullgraph=True)(x), model(x)) <= 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet", "swin", "vit"])
def test_trains_with_inductor(name: str) -> None:
    """Inductor's gradients equal those of the uncompiled model.

    The model is in float64 and freshly initialised. With random weights of order one, a network of
    this depth is chaotic in training mode: in the original, too, an input that differs by 1e-12
    changes gradients by several percent. Rounding alone would then decide.
    """
    family = next(f for f in FAMILIES if f.name == name)
    torch.manual_seed(0)
    model = family.build()
    for module in model.modules():
        if "Dropout" in type(module).__name__ or "StochasticDepth" in type(module).__name__:
            module.p = 0.0
    x = torch.randn(4, *family.shape)
    pruned = fxprune.prune(model, x, channels=0.5).model.double().train()
    expected = gradients(copy.deepcopy(pruned), x.double())
    torch._dynamo.reset()
    compiled = torch.compile(pruned, fullgraph=True)
    compiled(x.double()).square().mean().backward()
    flat = torch.cat([gradient.flatten() for gradient in expected.values()])
    assert (
        relative_error(torch.cat([pruned.get_parameter(n).grad.flatten() for n in expected]), flat)
        <= 1e-7
    )


@pytest.mark.filterwarnings("ignore")
@zoo
def test_zoo_compiles_as_one_graph(case: Case) -> None:
    model, inputs = randomised(case.build(case.width)), case.inputs(2)
    if case.name == "weight_norm_old_hook" or any(
        isinstance(module, nn.RNNBase) for module in model.modules()
    ):
        pytest.skip("torch.compile breaks the graph on the original already")
    pruned = fxprune.prune(model, inputs, channels=0.5).model
    torch._dynamo.reset()
    compiled = torch.compile(pruned, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert (
            relative_error(floating(call(compiled, inputs)), floating(call(pruned, inputs)))
            <= 1e-5
        )


@pytest.mark.filterwarnings("ignore")
@compiled_families
def test_exports(family: Family) -> None:
    _, pruned = halved(family)
    x = torch.randn(2, *family.shape)
    with torch.no_grad():
        program = torch.export.export(copy.deepcopy(pruned.model), (x,))
        assert relative_error(floating(program.module()(x)), floating(pruned.model(x))) <= 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet", "vit"])
def test_exports_with_any_batch(name: str) -> None:
    family = next(f for f in FAMILIES if f.name == name)
    _, pruned = halved(family)
    with torch.no_grad():
        dynamic = ({0: torch.export.Dim("batch", min=2)},)
        program = torch.export.export(
            copy.deepcopy(pruned.model), (torch.randn(2, *family.shape),), dynamic_shapes=dynamic
        )
        x = torch.randn(7, *family.shape)
        assert relative_error(program.module()(x), pruned.model(x)) <= 1e-5


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, id=f.name, marks=() if f.name in QUICK_TO_CONVERT else pytest.mark.slow)
        for f in FAMILIES
    ],
)
def test_converts_to_onnx(family: Family, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    _, pruned = halved(family)
    x = torch.randn(2, *family.shape)
    path = tmp_path / "model.onnx"
    torch.onnx.export(copy.deepcopy(pruned.model), (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = floating(pruned.model(x))
    assert relative_error([torch.from_numpy(output) for output in outputs], expected) <= 1e-4


# -- the options


@pytest.mark.parametrize("channels", [0.25, 0.5, 0.75])
def test_every_group_keeps_its_share(channels: float) -> None:
    plan = fxprune.prune(Residual(16), torch.randn(2, 3, 8, 8), channels=channels).plan
    assert plan.groups
    for group in plan.groups:
        assert len(group.kept) == int(group.size * channels), group.name
        assert list(group.kept) == sorted(set(group.kept))
        assert 0 <= group.kept[0] <= group.kept[-1] < group.size


def test_round_to_gives_multiples() -> None:
    pruned = fxprune.prune(Residual(16), torch.randn(2, 3, 8, 8), channels=0.4, round_to=4).model
    assert all(m.out_channels % 4 == 0 for m in pruned.modules() if isinstance(m, nn.Conv2d))


def test_min_channels_are_left() -> None:
    pruned = fxprune.prune(
        Residual(16), torch.randn(2, 3, 8, 8), channels=0.05, min_channels=3
    ).model
    assert all(m.out_channels >= 3 for m in pruned.modules() if isinstance(m, nn.Conv2d))


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in module.named_parameters()}


@pytest.mark.parametrize("how", ["name", "glob", "module", "list"])
def test_keep(how: str) -> None:
    """A kept module stays as it is, however it is named, and the rest is pruned."""
    model, x = Residual(16), torch.randn(2, 3, 8, 8)
    keep: Any = {
        "name": "a1",
        "glob": "a?",
        "module": model.a1,
        "list": ["a1.0", model.a2, "hea?"],
    }[how]
    pruned = fxprune.prune(model, x, channels=0.5, keep=keep).model
    assert _shapes(pruned.get_submodule("a1.0")) == _shapes(model.a1[0])
    if how in ("glob", "list"):
        assert _shapes(pruned.get_submodule("a2.0")) == _shapes(model.a2[0])
    assert count(pruned) < count(model)


def test_layer_attributes_follow_the_shapes() -> None:
    """``print(pruned.model)`` shows the real sizes."""
    pruned = fxprune.prune(Residual(16), torch.randn(2, 3, 8, 8), channels=0.5).model
    for module in pruned.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (
                module.out_channels,
                module.in_channels // module.groups,
            )
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.shape == module.running_mean.shape == (module.num_features,)  # type: ignore[union-attr]
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("residual", "vit_packed")], ids=lambda case: case.name
)
def test_plan_replays(case: Case) -> None:
    """The same plan gives the same model, also after a round trip through JSON."""
    model, inputs = randomised(case.build(case.width)), case.inputs(2)
    pruned = fxprune.prune(model, inputs, channels=0.5)
    plan = fxprune.Plan.from_json(pruned.plan.to_json())
    assert plan == pruned.plan
    again = fxprune.apply(plan, model)
    assert {k: v.tolist() for k, v in again.model.state_dict().items()} == {
        k: v.tolist() for k, v in pruned.model.state_dict().items()
    }
    assert relative_error(call(again.model, inputs), call(pruned.model, inputs)) == 0


def test_float64_of_the_same_model_is_the_same_plan() -> None:
    model, x = Residual(16), torch.randn(2, 3, 8, 8)
    plan = fxprune.prune(model, x, channels=0.5).plan
    double = copy.deepcopy(model).double()
    assert (
        fxprune.prune(double, as_dtype(x, torch.float64), channels=0.5).plan.groups == plan.groups
    )
