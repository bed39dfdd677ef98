"""Tests of errors on bad input.

There is one clear error from the project's own tree, which names what failed and the way out.
Tests with `refused` also check that the model is unchanged, bit for bit.
"""

import json
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import (
    ArgumentError,
    BudgetError,
    CallbackError,
    FxpruneError,
    InputError,
    ModelError,
    PlanError,
    TraceError,
    VerificationError,
)
from tests.support.checking import assert_unharmed, snapshot


class Small(nn.Module):
    """Two convolutions and a classifier, set up so that harm to the model would show.

    The model is in train mode, with a hook, a frozen weight and a norm in eval mode.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.dropout = nn.Conv2d(width, 2 * width, 3, padding=1), nn.Dropout(0.5)
        self.head = nn.Linear(2 * width, 10)
        self.conv1.register_forward_hook(lambda module, args, output: output)
        self.norm.eval()
        self.conv2.weight.requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.norm(self.conv1(image)))))
        return self.head(self.dropout(x.mean((2, 3))))


IMAGE = (2, 3, 8, 8)


def refused(
    error: type[FxpruneError] | tuple[type[FxpruneError], ...],
    *words: str,
    model: Any = None,
    inputs: Any = None,
    does: Callable[..., Any] = fxprune.prune,
    **options: Any,
) -> str:
    """Assert that a call raises `error`, and return the text of the error.

    The text must match each pattern in `words`, and the model must be unharmed.
    """
    model = Small() if model is None else model
    inputs = torch.randn(IMAGE) if inputs is None else inputs
    before = snapshot(model) if isinstance(model, nn.Module) else None
    if does is fxprune.prune:
        options.setdefault("channels", 0.5)
    with pytest.raises(error) as caught:
        does(model, inputs, **options)
    text = str(caught.value)
    assert isinstance(caught.value, FxpruneError)
    for word in words:
        assert re.search(word, text, re.IGNORECASE), f"{word!r} is not in: {text}"
    assert len(text) < 2000, "an error is to be read"
    if before is not None:
        assert_unharmed(model, before)
    return text


# -- options


@pytest.mark.parametrize("channels", [0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_channels_outside_of_zero_to_one(channels: float) -> None:
    refused(ArgumentError, "channels", re.escape(str(channels)), r"0.*1", channels=channels)


@pytest.mark.parametrize("budget", ["channels", "macs", "params"])
def test_budgets_that_are_no_share(budget: str) -> None:
    for value in ("half", 1.5, 0, float("nan"), True):
        refused(ArgumentError, budget, re.escape(str(value)), r"0.*1", **{budget: value})


def test_a_budget_is_not_forgotten() -> None:
    """If no budget is given, the error lists the arguments that set one."""
    refused(ArgumentError, "channels=", "macs=", "params=", "layers=", channels=None)


def test_a_budget_that_cannot_be_reached() -> None:
    """The error names the smallest budget that can be reached."""
    # all 64 channels of its output stay
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 64, 3))
    text = refused(
        BudgetError, "macs=0.01", "smallest", "keep=", model=model, channels=None, macs=0.01
    )
    least = float(re.search(r"allow has macs=([\d.]+)", text)[1])  # type: ignore[index]
    one = fxprune.prune(model, torch.randn(IMAGE), channels=1e-9).report
    assert least == pytest.approx(one.macs_after / one.macs_before, rel=1e-3)  # type: ignore[operator]
    fxprune.prune(model, torch.randn(IMAGE), macs=least)


def test_an_unknown_criterion() -> None:
    refused(ArgumentError, "magic", "cpmc", "l1", criterion="magic")
    refused(ArgumentError, "int", "callable", criterion=3)


def test_scores_of_a_wrong_shape() -> None:
    refused(ArgumentError, r"\(3,\)", "one score per unit", criterion=lambda view: torch.ones(3))
    refused(
        ArgumentError,
        "not finite",
        criterion=lambda view: torch.full((view.group.size,), float("nan")),
    )


def test_layers_that_match_nothing() -> None:
    refused(ArgumentError, "layer9", "matches no layer", "There are", layers={"layer9.*": 0.5})
    refused(ArgumentError, "layers", "1.5", layers={"*": 1.5})


def test_an_unknown_scope() -> None:
    refused(ArgumentError, "scope", "group", "global", scope="layer")


@pytest.mark.parametrize("round_to", [0, -8, 2.5])
def test_round_to_below_one(round_to: Any) -> None:
    refused(ArgumentError, "round_to", re.escape(str(round_to)), round_to=round_to)


@pytest.mark.parametrize("min_channels", [0, -1, 1.5])
def test_min_channels_below_one(min_channels: Any) -> None:
    refused(ArgumentError, "min_channels", re.escape(str(min_channels)), min_channels=min_channels)


@pytest.mark.parametrize("does", [fxprune.prune, fxprune.analyze])
def test_keep_that_matches_nothing(does: Callable[..., Any]) -> None:
    refused(ArgumentError, "keep", "convX", keep="convX", does=does)


def test_keep_with_a_typo_suggests_names() -> None:
    refused(ArgumentError, "haed", "head", keep=["conv1", "haed"])


def test_keep_glob_that_matches_nothing() -> None:
    refused(ArgumentError, "keep", re.escape("layer*.conv"), keep="layer*.conv")


def test_keep_of_a_module_of_another_model() -> None:
    refused(ArgumentError, "keep", "Conv2d", keep=Small().conv1)


def test_keep_of_a_wrong_kind() -> None:
    refused(ArgumentError, "keep", "int", keep=[3])


# -- example inputs


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 3), (3,), ()])
def test_example_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    refused((InputError, TraceError), "shape|size|input", inputs=torch.randn(shape))


def test_wrong_shape_names_the_layer() -> None:
    refused(
        InputError,
        "conv1",
        r"2, 4, 8, 8",
        r"weight \(\d+, 3, 3, 3\)",
        inputs=torch.randn(2, 4, 8, 8),
    )


@pytest.mark.parametrize(
    "inputs", ["image.png", 3, [1.0, 2.0], ("image",), {"image": 4}, (1, 3, 8, 8)]
)
def test_example_that_is_no_tensor(inputs: Any) -> None:
    refused(InputError, "example_inputs", "tensor", inputs=inputs)


def test_example_as_an_array() -> None:
    refused(InputError, "example_inputs", "ndarray", "tensor", inputs=torch.randn(IMAGE).numpy())


@pytest.mark.parametrize("inputs", [(), {}])
def test_example_without_any_tensor(inputs: Any) -> None:
    refused(InputError, "example_inputs", "empty|no tensor", inputs=inputs)


def test_too_many_arguments() -> None:
    refused(InputError, "image", inputs=(torch.randn(IMAGE), torch.randn(IMAGE)))


def test_unknown_keyword() -> None:
    refused(InputError, "picture", "image", inputs={"picture": torch.randn(IMAGE)})


def test_integer_example_for_a_convolution() -> None:
    refused((InputError, TraceError), "int64|long", inputs=torch.zeros(IMAGE, dtype=torch.long))


# -- models


def test_model_that_is_none() -> None:
    """A function in place of a model is refused."""
    refused((ModelError, ArgumentError), "nn.Module", "function|lambda", model=lambda x: x)


def test_class_instead_of_an_instance() -> None:
    refused((ModelError, ArgumentError), "nn.Module", "Small|class|type", model=Small)


class BranchesOnValues(nn.Module):
    """A model that branches on values, and has no submodule that could be traced alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line to blame
            return F.conv2d(x, self.weight)
        return x[:, :1]


def test_branch_on_values() -> None:
    refused(TraceError, r"test_errors\.py", "value|data", model=BranchesOnValues())


class CallsNumpy(nn.Module):
    """A model that computes with NumPy in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy().mean((2, 3))) @ self.weight.T


def test_numpy_inside() -> None:
    refused((TraceError, InputError), "numpy", r"test_errors\.py", model=CallsNumpy())


class RaisesItself(nn.Module):
    """A model that checks its input itself, and refuses the example."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 7:
            raise ValueError("seven channels, please")
        return self.head(x.mean((2, 3)))


def test_error_of_the_model_is_passed_on() -> None:
    refused(
        (InputError, TraceError), "RaisesItself", "seven channels, please", model=RaisesItself()
    )


def test_model_on_two_devices() -> None:
    model = Small()
    model.head.to("meta")
    refused(ModelError, "cpu", "meta", "head|conv1", "device", model=model)


@pytest.mark.parametrize("does", [fxprune.prune, fxprune.analyze])
def test_weights_that_are_no_numbers(does: Callable[..., Any]) -> None:
    model = Small()
    with torch.no_grad():
        model.conv2.weight[3, 1, 0, 0] = float("nan")
    refused(ModelError, r"conv2\.weight", "nan", "load|initialise", model=model, does=does)


def test_quantised_model() -> None:
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = quantize_dynamic(
            nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(512, 10)), {nn.Linear}
        )
        refused(
            ModelError, "quanti[sz]ed", "2|DynamicQuantizedLinear", "before|first", model=model
        )


def test_lazy_model() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with pytest.raises(FxpruneError, match=r"(?i)lazy|uninitiali[sz]ed"):
        fxprune.prune(model, torch.randn(IMAGE), channels=0.5)


def test_scripted_model() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(
            nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
        )
    with pytest.raises(FxpruneError, match=r"(?i)script"):
        fxprune.prune(scripted, torch.randn(IMAGE), channels=0.5)


def with_tensor(name: str, tensor: Tensor, *, buffer: bool = False) -> nn.Module:
    model = Small()
    if buffer:
        model.register_buffer(name, tensor)
    else:
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, nn.Parameter(tensor, requires_grad=False))
    return model


class Kind(Tensor):
    """A tensor of a user's class."""


TENSORS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "8 bits": (
        lambda: with_tensor("conv2.weight", torch.ones(16, 8, 3, 3).to(torch.float8_e4m3fn)),
        (r"conv2\.weight", "float8_e4m3fn", "bfloat16"),
    ),
    "8 bits, a buffer": (
        lambda: with_tensor("scale", torch.ones(3).to(torch.float8_e5m2), buffer=True),
        ("scale", "float8_e5m2"),
    ),
    "a kind of its own": (
        lambda: with_tensor("conv1.bias", torch.ones(8).as_subclass(Kind)),
        (r"conv1\.bias", "Kind", "plain"),
    ),
    "sparse": (
        lambda: with_tensor("head.weight", torch.ones(10, 16).to_sparse()),
        (r"head\.weight", "sparse", "to_dense"),
    ),
    "infinite": (
        lambda: with_tensor("conv1.weight", torch.full((8, 3, 3, 3), float("inf"))),
        (r"conv1\.weight", "infinity", "load|initialise"),
    ),
    "without values": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).to(
            "meta"
        ),
        (r"0\.weight", "meta", "load the weights"),
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_cannot_be_pruned(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own sparse tensors
        build, words = TENSORS[name]
        with pytest.raises(ModelError) as caught:
            fxprune.prune(build(), torch.randn(IMAGE), channels=0.5)
    for word in words:
        assert re.search(word, str(caught.value)), str(caught.value)


def test_a_sparse_buffer_stays_as_it_is() -> None:
    """A sparse buffer stays as it is, as none of it has to be removed."""

    class OnAGraph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
            self.register_buffer("adjacency", (torch.rand(5, 5) > 0.5).float().to_sparse())

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.sparse.mm(self.adjacency, self.a(x)).relu())

    pruned = fxprune.prune(OnAGraph(), torch.randn(5, 4), channels=0.5, verify=True)
    assert pruned.report.error < 1e-9  # type: ignore[operator]
    assert pruned.model.get_buffer("adjacency").is_sparse
    assert pruned.model.get_parameter("a.weight").shape == (4, 4)


@pytest.mark.parametrize("does", [fxprune.prune, fxprune.analyze, fxprune.cost.cost_of])
def test_a_module_that_contains_itself(does: Callable[..., Any]) -> None:
    """A module that contains itself is refused, as a walk over its modules would not end.

    A module that is held twice is accepted.
    """
    model = nn.Sequential(Small(), nn.ReLU())
    model[0].conv1.owner = model[0]
    with pytest.raises(ModelError, match=r"0\.conv1\.owner is '0'.*contains itself.*list"):
        does(model, torch.randn(IMAGE), **({"channels": 0.5} if does is fxprune.prune else {}))
    twice = nn.Sequential(relu := nn.ReLU(), nn.Conv2d(3, 8, 1), relu, nn.Conv2d(8, 4, 1))
    does(twice, torch.randn(IMAGE), **({"channels": 0.5} if does is fxprune.prune else {}))


@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda module: torch.jit.trace(module, torch.randn(IMAGE))]
)
def test_a_scripted_module_inside_is_named(make: Callable[..., nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 3, 1), make(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh()))),
            nn.Conv2d(8, 4, 1),
        )
        with pytest.raises(ModelError, match=r"'0\.1' is a TorchScript module.*nn\.Module"):
            fxprune.prune(model, torch.randn(IMAGE), channels=0.5)


class NotMade(nn.Module):
    """A module whose ``__init__`` does not call that of its base class."""

    def __init__(self) -> None:
        pass


def without(attribute: str) -> nn.Module:
    model = Small()
    del vars(model.conv1)[attribute]
    return model


def holding(store: str, name: str, value: Any) -> nn.Module:
    model = Small()
    vars(model.norm)[store][name] = value
    return model


BROKEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "not made": (NotMade, r"this NotMade has no _parameters.*super\(\)\.__init__\(\)"),
    "without parameters": (lambda: without("_parameters"), r"'conv1' has no _parameters"),
    "without buffers": (lambda: without("_buffers"), r"'conv1' has no _buffers"),
    "without modules": (lambda: without("_modules"), r"'conv1' has no _modules"),
    "without a mode": (lambda: without("training"), r"'conv1' has no training"),
    "an array as a buffer": (
        lambda: holding("_buffers", "running_mean", np.zeros(8)),
        r"_buffers\['running_mean'\] of 'norm' is a ndarray, no Tensor",
    ),
    "a function as a module": (
        lambda: holding("_modules", "act", torch.relu),
        r"_modules\['act'\] of 'norm' is a .*, no Module",
    ),
    "nothing to call": (lambda: nn.ModuleList([Small()]), "a ModuleList has no forward"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("does", [fxprune.prune, fxprune.cost.cost_of])
def test_a_module_that_is_no_whole_one(name: str, does: Callable[..., Any]) -> None:
    """A module that lacks its own attributes, or holds values of a wrong type, is refused."""
    build, words = BROKEN[name]
    with pytest.raises(ModelError, match=words):
        does(build(), torch.randn(IMAGE), **({"channels": 0.5} if does is fxprune.prune else {}))


def test_a_bias_of_another_length() -> None:
    """A bias of a wrong length is refused.

    Kernels that compute shapes alone accept it, and real kernels do not.
    """
    model = Small()
    model.conv2.bias = nn.Parameter(torch.zeros(7))
    refused(InputError, "conv2", r"bias \(7,\)|bias of shape \(7,\)", model=model)


class ReturnsAModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, nn.Module]:
        return self.body(x), self.body


def test_an_output_that_is_a_module() -> None:
    """A model that returns a module is pruned in parts, as no graph can return one."""
    report = fxprune.prune(ReturnsAModule(), torch.randn(IMAGE), channels=0.5, verify=True).report
    assert "Sequential" in report.not_one_graph
    assert report.params_after < report.params_before


def test_a_message_names_no_line_of_the_call_of_a_module() -> None:
    """For a model of torch's own modules, the error names the line that calls the layer.

    It does not name the line in module.py that calls every module.
    """
    text = refused(
        InputError,
        r"container\.py",
        model=nn.Sequential(nn.Conv2d(3, 4, 1)),
        inputs=torch.randn(2, 4, 8, 8),
    )
    assert "module.py" not in text


def test_a_hook_with_keywords_of_a_graph_module() -> None:
    """A GraphModule with a hook that takes keywords is pruned in parts.

    Its copies call the hook as it was registered, and hold what the hook reads.
    """
    model = torch.fx.symbolic_trace(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    )
    model.scale = 1.0  # type: ignore[assignment]
    model.register_forward_pre_hook(
        lambda own, args, kwargs: ((args[0] * own.scale,), kwargs), with_kwargs=True
    )
    report = fxprune.prune(model, torch.randn(IMAGE), channels=0.5).report
    assert "hook is registered on this GraphModule" in report.not_one_graph
    assert report.params_after < report.params_before


class HasNoText:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


class HasNoKeys(dict[str, Tensor]):
    def __iter__(self) -> Any:
        raise RuntimeError("no keys")

    keys = __iter__


def quantised() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own quantised tensors
        return torch.quantize_per_tensor(torch.randn(IMAGE), 0.1, 0, torch.quint8)


def in_itself() -> list[Any]:
    held: list[Any] = [torch.randn(IMAGE)]
    held.append(held)
    return held


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        (in_itself(), InputError, "holds itself"),
        (HasNoText(), InputError, "a HasNoText"),
        (HasNoKeys(image=torch.randn(IMAGE)), CallbackError, "no keys"),
        (quantised(), InputError, "quantised.*dequantize"),
    ],
    ids=["in itself", "without text", "without keys", "quantised"],
)
@pytest.mark.parametrize("does", [fxprune.prune, fxprune.cost.cost_of])
def test_an_example_that_cannot_be_read(
    inputs: Any, error: type[FxpruneError], words: str, does: Callable[..., Any]
) -> None:
    refused(error, words, inputs=inputs, does=does)


def test_a_nested_example() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ragged = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)])
    with pytest.raises(InputError, match=r"nested.*pad"):
        fxprune.prune(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)), ragged, channels=0.5)


class FailsLate(nn.Module):
    """A model that runs most of its code and then fails in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.small = Small()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image: Tensor) -> Tensor:
        x = self.small(image)
        if not self.training:
            raise RuntimeError("not for evaluation")
        return x * self.scale


def test_gradients_survive_an_error() -> None:
    model = FailsLate()
    model(torch.randn(IMAGE)).sum().backward()
    gradient = model.small.head.weight.grad
    assert gradient is not None
    refused(InputError, "FailsLate", "not for evaluation", r"test_errors\.py", model=model)
    assert model.small.head.weight.grad is gradient


# -- plans and verification


def _pruned(width: int = 8) -> tuple[Small, Any]:
    model = Small(width)
    return model, fxprune.prune(model, torch.randn(IMAGE), channels=0.5)


def test_plan_of_another_model() -> None:
    _, pruned = _pruned()
    other = Small(16)
    before = snapshot(other)
    with pytest.raises(PlanError, match="another architecture than this Small"):
        fxprune.apply(pruned.plan, other)
    assert_unharmed(other, before)


def test_plan_of_a_model_with_other_names() -> None:
    _, pruned = _pruned()
    with pytest.raises(PlanError, match="another architecture than this Sequential"):
        fxprune.apply(
            pruned.plan, nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        )


@pytest.mark.parametrize("text", ["", "not json", "[]", "{}", "null", '{"version": 1}'])
def test_plan_that_is_none(text: str) -> None:
    """Text that is not a plan is refused."""
    with pytest.raises(PlanError, match=r"(?i)plan"):
        fxprune.Plan.from_json(text)


def test_damaged_plan() -> None:
    model, pruned = _pruned()
    damaged = re.sub(r'("kept": \[\s*)\d+', r"\g<1>999", pruned.plan.to_json(), count=1)
    if damaged == pruned.plan.to_json():  # written without spaces
        damaged = re.sub(r'("kept":\[)\d+', r"\g<1>999", pruned.plan.to_json(), count=1)
    assert json.loads(damaged) != json.loads(pruned.plan.to_json())
    before = snapshot(model)
    with pytest.raises(PlanError, match=r"conv1.*outside 0\.\.7"):
        fxprune.apply(fxprune.Plan.from_json(damaged), model)
    assert_unharmed(model, before)


def test_verification_against_another_model() -> None:
    model, _ = _pruned()
    _, other = _pruned(16)
    before = snapshot(model)
    with pytest.raises((VerificationError, PlanError), match="another architecture"):
        fxprune.verify(model, other, torch.randn(IMAGE))
    assert_unharmed(model, before)


def test_verification_sees_a_wrong_model() -> None:
    """Channels in another order have the right shapes and the wrong numbers."""
    model, pruned = _pruned()
    good = fxprune.verify(model, pruned, torch.randn(IMAGE))
    assert good.error <= 1e-9
    with torch.no_grad():
        weight = dict(pruned.model.named_parameters())["conv1.weight"]
        weight.copy_(weight.flip(0))
    try:
        bad = fxprune.verify(model, pruned, torch.randn(IMAGE), randomize=False)
    except VerificationError:
        return
    assert bad.error > 1e-3


# -- the tree


def test_every_error_is_in_one_tree() -> None:
    from fxprune import errors

    raised = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ]
    assert all(issubclass(kind, (FxpruneError, Warning)) for kind in raised)
    assert set(errors.__all__) == {kind.__name__ for kind in raised} <= set(fxprune.__all__)
    assert all(kind.__doc__ for kind in raised)
