"""Distillation: its loss by hand, features of surviving channels, and what it leaves behind."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from examples.digits import DigitNet, accuracy, load_data
from fxprune.errors import ArgumentError, CallbackError, ModelError, PlanError
from fxprune.training import Distillation, Gates, soft_target_loss
from tests.support.checking import as_dtype, call, masked, randomise
from tests.support.gating import REFUSED, close
from tests.zoo import CASES
from tests.zoo.case import Case


def dense() -> nn.Sequential:
    """Return a network whose ReLU writes into the features before it."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 4 * 4, 4),
    ).eval()


IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_targets_are_those_of_the_formula(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    p, q = ((logits / temperature).softmax(1) for logits in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum() / 4
    torch.testing.assert_close(soft_target_loss(student, teacher, temperature), expected)
    maps = soft_target_loss(student[..., None], teacher[..., None], temperature, dim=1)
    torch.testing.assert_close(maps, expected)
    assert soft_target_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-6)


def test_gradients_have_the_size_of_the_logits_difference() -> None:
    """For large T, the gradient is (z - v) / N for zero-mean logits (Hinton et al., eq. 4)."""
    student = torch.tensor([[0.3, -0.1, -0.2]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-0.4, 0.1, 0.3]], dtype=torch.float64)
    soft_target_loss(student, teacher, temperature=1e4).backward()
    torch.testing.assert_close(
        student.grad, ((student - teacher) / 3).detach(), rtol=1e-3, atol=1e-6
    )


def test_the_loss_by_hand() -> None:
    model = dense()
    pruned = fxprune.prune(model, IMAGES, channels=0.5)
    kept = list(pruned.plan.groups[0].kept)
    with torch.no_grad():
        wide, narrow = (
            model[:2](IMAGES)[:, kept],
            pruned.model.get_submodule("1")(pruned.model.get_submodule("0")(IMAGES)),
        )
        logits, target = pruned.model(IMAGES), model(IMAGES)
    relative = (narrow - wide).square().sum() / wide.square().sum()
    expected = 0.5 * soft_target_loss(logits, target, 4.0) + 3 * relative
    distillation = Distillation(
        model,
        pruned.model,
        temperature=4,
        logit_strength=0.5,
        features="1",
        feature_strength=3,
    )
    with distillation:
        loss = distillation.loss(pruned.model(IMAGES), IMAGES)
    torch.testing.assert_close(loss.detach(), expected)


def test_a_pruned_model_has_the_features_of_its_masked_original() -> None:
    """Only the surviving channels are compared, and they are equal up to rounding."""
    model, x = randomise(dense()), IMAGES.double()
    pruned = fxprune.prune(model, x, channels=0.5, criterion="l1")
    names = ["0", "1", "2", "3", "5", "6"]
    teacher = masked(model, pruned.model)
    with Distillation(teacher, pruned.model, features=names, logit_strength=0) as distillation:
        assert distillation.loss(pruned.model(x), x).item() < 1e-24
        pruned.model.get_parameter("3.bias").data[0] += 1
        assert distillation.loss(pruned.model(x), x).item() > 1e-3


EVERYWHERE = [
    pytest.param(case, id=case.name, marks=() if number % 4 == 0 else pytest.mark.slow)
    for number, case in enumerate(CASES)
    # no gate masks a unit in these, or the graph calls a module that the dense model does not
    if not case.name.startswith((*REFUSED, "attention_module", "cross_attention"))
]


@pytest.mark.parametrize("case", EVERYWHERE)
def test_every_module_has_the_features_of_the_masked_original(case: Case) -> None:
    torch.manual_seed(0)
    model = randomise(case.build(8)).eval()
    x: Any = as_dtype(case.inputs(3), torch.float64)
    coupling = fxprune.analyze(model, x)
    pruned = fxprune.prune(model, x, channels=0.5, criterion="random")
    names = [str(n.target) for n in pruned.model.graph.nodes if n.op == "call_module"]
    if not names or any(group.normalised for group in coupling.groups):
        pytest.skip("no module is called, or statistics are those of the survivors")
    with Gates(model, coupling) as gates:
        close(gates, coupling, pruned.plan)
    with (
        torch.no_grad(),
        Distillation(model, pruned.model, features=names, logit_strength=0) as distillation,
    ):
        assert distillation.loss(call(pruned.model, x), x).item() < 1e-18


class Refines(nn.Module):
    """Calls one part as often as its values ask for, and another one once."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1))
        self.head = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        steps = 0
        while steps < 3 and x.abs().max().item() >= 0:
            x, steps = self.body(x), steps + 1
        return self.head(x).mean((2, 3))


def test_a_part_that_runs_repeatedly() -> None:
    model, x = randomise(Refines()).eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    pruned = fxprune.prune(model, x, channels=0.5)
    assert pruned.report.parts == ("body", "head")
    names = ["body.0", "body.1", "body.2", "head.1"]
    options: dict[str, Any] = {"features": names, "logit_strength": 0}
    for teacher, equal in ((masked(model, pruned.model), True), (model, False)):
        with Distillation(teacher, pruned.model, **options) as distillation:
            assert (distillation.loss(pruned.model(x), x).item() < 1e-18) is equal


class Auxiliary(nn.Module):
    """Has a second head in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.head, self.second = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        out = self.head(x).mean((2, 3))
        return (out, self.second(x).mean((2, 3))) if self.training else out


def test_the_teacher_evaluates_while_the_student_trains() -> None:
    model = Auxiliary().train()
    student = fxprune.prune(model, IMAGES, channels=0.5).model

    def first(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    with Distillation(model, student, features=["body.1"], logits=first) as distillation:
        loss = distillation.loss(student(IMAGES), IMAGES)
    loss.backward()
    assert student.get_parameter("second.weight").grad is None
    with pytest.raises(ArgumentError, match="'second' is no module that the graph"):
        Distillation(model, student, features=["second"])


def test_other_sizes_and_modules_that_are_called_twice() -> None:
    """A residual network calls one ReLU twice in a block, and takes images of any size."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5).double().eval()
    pruned = fxprune.prune(model, torch.zeros(1, 3, 64, 64, dtype=torch.float64), channels=0.5)
    x = torch.randn(2, 3, 40, 48, dtype=torch.float64)
    calls: list[tuple[int, ...]] = []
    relu = pruned.model.get_submodule("layer2.0.relu")
    with Distillation(model, pruned.model, features=["layer2.0.relu"]) as distillation:
        relu.register_forward_hook(lambda module, given, out: calls.append(tuple(out.shape)))
        loss = distillation.loss(pruned.model(x), x)
    assert calls == [(2, 64, 5, 6)] * 2
    assert 0 < loss.item() < torch.inf


def test_a_chain_of_prunings_leads_to_the_surviving_channels() -> None:
    model = dense().double()
    x = IMAGES.double()
    once = fxprune.prune(model, x, channels=0.5, criterion="l1")
    twice = fxprune.prune(once.model, x, channels=0.5, criterion="l1")
    first, second = (result.plan.groups[0].kept for result in (once, twice))
    expected = [first[unit] for unit in second]
    with torch.no_grad():
        narrow = twice.model.get_submodule("0")(x)
        wide = model[0](x)[:, expected]
    torch.testing.assert_close(narrow, wide)  # weights that stay are the original's
    with Distillation(model, twice.model, features=["0"], logit_strength=0) as distillation:
        assert distillation.loss(twice.model(x), x).item() < 1e-24
    # the result of the first pruning may be the teacher, too
    with Distillation(once.model, twice.model, features=["0"], logit_strength=0) as distillation:
        assert distillation.loss(twice.model(x), x).item() < 1e-24


@dataclass
class Answer:
    logits: Tensor
    mask: Tensor


class Answering(nn.Module):
    """Gives its logits inside of another object."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.wrap = nn.Linear(3, 8), nn.Linear(8, 4), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.head(self.first(x).relu()))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: y,
        lambda y: {"out": y},
        lambda y: [(y,)],
        lambda y: Answer(y, y > 0),
    ],
    ids=["tensor", "dict", "nested", "dataclass"],
)
def test_outputs_of_any_kind(wrap: Callable[[Tensor], Any]) -> None:
    model, x = Answering(wrap).eval(), torch.randn(5, 3)
    pruned = fxprune.prune(model, x, channels=0.5)
    plain = [copy.deepcopy(one) for one in (model, pruned.model)]
    with Distillation(model, pruned.model) as distillation:
        loss = distillation.loss(pruned.model(x), x)
    heads = [
        one.get_submodule("head")(one.get_submodule("first")(x).relu()).detach() for one in plain
    ]
    torch.testing.assert_close(loss.detach(), soft_target_loss(heads[1], heads[0]))


def test_outputs_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    inputs = {"input_ids": torch.randint(20, (2, 6))}
    pruned = fxprune.prune(model, inputs, channels=0.5)
    name = "bert.encoder.layer.0.intermediate.dense"
    with Distillation(model, pruned.model, features=[name]) as distillation:
        output = pruned.model(**inputs)
        assert type(output).__name__ == "SequenceClassifierOutput"
        distillation.loss(output, inputs).backward()
    assert pruned.model.get_parameter(f"{name}.weight").grad is not None


def hooks(model: nn.Module) -> int:
    """Return the number of hooks on all modules of a model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails: bool) -> None:
    model = dense().train()
    model[1].eval()  # a mode of its own
    pruned = fxprune.prune(model, IMAGES, channels=0.5)
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with Distillation(model, pruned.model, features=["1"]) as distillation:
            assert hooks(model) == hooks(pruned.model) == 2
            distillation.loss(pruned.model(IMAGES), IMAGES).backward()
            assert [module.training for module in model.modules()] == modes
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert hooks(model) == hooks(pruned.model) == 0
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in pruned.model.parameters())
    with pytest.raises(ArgumentError, match="inside `with"):
        distillation.loss(pruned.model(IMAGES), IMAGES)


@pytest.mark.long
def test_a_pruned_network_learns_digits_from_the_dense_one() -> None:
    """Unlabelled images and the dense model's outputs restore most of its accuracy."""
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    images, test_images, labels, test_labels = load_data()
    model = DigitNet(width=8)

    def train(student: nn.Module, epochs: int, loss: Callable[[Tensor, Tensor], Tensor]) -> float:
        optimiser = torch.optim.AdamW(student.parameters(), lr=3e-3)
        student.train()
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(64):
                optimiser.zero_grad()
                loss(student(images[batch]), batch).backward()
                optimiser.step()
        student.eval()
        return accuracy(student, test_images, test_labels)

    whole = train(model, 4, lambda output, batch: F.cross_entropy(output, labels[batch]))
    pruned = fxprune.prune(model, images[:1], channels=0.5).model
    at_once = accuracy(pruned, test_images, test_labels)
    with Distillation(model, pruned, features=["blocks.1.bn2", "blocks.3.bn2"]) as distillation:
        taught = train(pruned, 2, lambda output, batch: distillation.loss(output, images[batch]))
    assert whole > 90
    assert at_once < 60
    assert taught > 85


# -- what is refused


def test_names_that_do_not_survive() -> None:
    model = torchvision.models.resnet18(num_classes=5).eval()
    student = fxprune.prune(model, torch.zeros(1, 3, 64, 64), channels=0.5).model
    with pytest.raises(ArgumentError, match=r"'layer1\.0' is no module.*'layer1\.0\.relu'"):
        Distillation(model, student, features=["layer1.0"])
    with pytest.raises(ArgumentError, match=r"'layer1\.0\.con1' is no module.*'layer1\.0\.conv1'"):
        Distillation(model, student, features=["layer1.0.con1"])


def given() -> dict[str, Any]:
    model = dense()
    return {"teacher": model, "student": fxprune.prune(model, IMAGES, channels=0.5).model}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher": "dense"}, ModelError, "teacher is a str"),
        ({"student": dense(), "features": ["0"]}, ArgumentError, "student with its plan"),
        ({"teacher": nn.Linear(3, 4), "features": ["0"]}, PlanError, "another architecture"),
        ({"temperature": 0}, ArgumentError, "temperature=0 must be a finite number above 0"),
        ({"logit_strength": -1}, ArgumentError, "logit_strength=-1 must be"),
        ({"features": [1]}, ArgumentError, "1 is no name of a module"),
    ],
)
def test_arguments_that_do_not_fit(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Distillation(**{**given(), **change})


def test_a_result_in_the_place_of_its_model() -> None:
    model = dense()
    pruned = fxprune.prune(model, IMAGES, channels=0.5)
    with pytest.raises(ModelError, match=r"student is a Pruned.*Give its \.model"):
        Distillation(model, pruned)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="cannot teach itself"):
        Distillation(model, model)


@pytest.mark.parametrize(
    ("options", "output", "inputs", "error", "message"),
    [
        ({}, {"a": torch.zeros(5, 4), "b": torch.zeros(5, 4)}, IMAGES, ArgumentError, "logits="),
        ({}, torch.zeros(5, 4, 2, 2), IMAGES, ArgumentError, "give dim=-1 for tokens or dim=1"),
        ({}, torch.zeros(4, 4), IMAGES, ArgumentError, r"\(4, 4\) and \(5, 4\)"),
        ({}, torch.zeros(5, 4), IMAGES[:, :2], CallbackError, "the teacher, given these inputs"),
        ({"features": ["0"]}, torch.zeros(5, 4), IMAGES, ArgumentError, "called 0 times"),
        ({"logit_strength": 0}, torch.zeros(5, 4), IMAGES, ArgumentError, "nothing is compared"),
        (
            {"logits": lambda output: output.logits},
            torch.zeros(5, 4),
            IMAGES,
            CallbackError,
            "the function logits raised AttributeError",
        ),
    ],
)
def test_calls_that_do_not_fit(
    options: dict[str, Any], output: Any, inputs: Tensor, error: type[Exception], message: str
) -> None:
    with (
        Distillation(**given(), **options) as distillation,
        pytest.raises(error, match=message),
    ):
        distillation.loss(output, inputs)


def test_features_are_those_of_the_latest_call() -> None:
    models = given()
    student, other = models["student"], IMAGES + 1
    with Distillation(**models, features=["0"]) as distillation:
        first = distillation.loss(student(IMAGES), IMAGES)
        with torch.no_grad():  # a validation between two steps
            student(other)
            student(other[:2])
        assert torch.equal(distillation.loss(student(IMAGES), IMAGES), first)
        with torch.no_grad():
            assert torch.equal(distillation.loss(student(IMAGES), IMAGES), first)
        with pytest.raises(ArgumentError, match="called 0 times with gradients since"):
            distillation.loss(torch.zeros(5, 4), IMAGES)
        output, _ = student(IMAGES), student(other)
        with pytest.raises(ArgumentError, match="2 times with gradients since the last loss"):
            distillation.loss(output, IMAGES)
        output = student(IMAGES)
        with torch.no_grad():
            student(other)
        with pytest.raises(ArgumentError, match="1 times with gradients since the last loss"):
            distillation.loss(output, IMAGES)


def test_features_of_other_inputs_are_refused() -> None:
    models = given()
    with Distillation(**models, features=["0"], logit_strength=0) as distillation:
        output = models["student"](IMAGES)
        with pytest.raises(
            ArgumentError, match=r"'0' gives \(5, 4, 6, 6\).*\(2, 4, 6, 6\) survives"
        ):
            distillation.loss(output, IMAGES[:2])
