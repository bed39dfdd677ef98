"""Wrong values for every argument of every public function.

Each gives a result or an error of fxprune that is not an ``InternalError``.
"""

import copy
import dataclasses
import functools
import inspect
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprune
from fxprune import cost, criteria, latency, training
from fxprune.common.public import calling_user_code, iterate_user_input, public
from fxprune.errors import (
    ArgumentError,
    CallbackError,
    FxpruneError,
    InternalError,
    ResourceError,
    SignatureError,
)
from fxprune.result.report import Report


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)
    ).eval()


def raising(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("the user's own")


class RaisesWhenRead:
    def __iter__(self) -> Iterator[Any]:
        raise OSError("the disk is gone")


WRONG: dict[str, Any] = {
    "None": None,
    "True": True,
    "0": 0,
    "-1": -1,
    "2.5": 2.5,
    "nan": math.nan,
    "infinity": math.inf,
    "1j": 1j,
    "text": "nowhere",
    "empty text": "",
    "bytes": b"bytes",
    "[]": [],
    "[None]": [None],
    "[text]": ["nowhere"],
    "()": (),
    "{}": {},
    "{0: 0.5}": {0: 0.5},
    "{text: text}": {"nowhere": "nothing"},
    "object": object(),
    "class": nn.Conv2d,
    "module": nn.Conv2d(1, 1, 1),
    "tensor": torch.zeros(2),
    "integers": torch.zeros(2, 3, dtype=torch.int64),
    "NaN": torch.full((2, 3), math.nan),
    "strings": np.array(["nowhere"]),
    "array": np.zeros(3),
    "dtype": torch.int32,
    "function": lambda: 1,
    "raising": raising,
    "raises when read": RaisesWhenRead(),
    "path": Path("nowhere"),
}


@functools.cache
def made() -> dict[str, Any]:
    """Return the objects with which the functions are called; no call changes them."""
    model, x = network(), torch.randn(4, 3)
    pruned = fxprune.prune(model, x, channels=0.5)
    folder = tempfile.mkdtemp()
    pruned.save(folder)
    return {
        "model": model,
        "x": x,
        "pruned": pruned,
        "folder": folder,
        "coupling": fxprune.analyze(model, x),
    }


def loader() -> list[Any]:
    return [(made()["x"], torch.zeros(4, 2))]


def steps(**arguments: Any) -> None:
    for _ in fxprune.Steps(**arguments):
        pass


def penalty(kind: Callable[..., Any], model: Any, **arguments: Any) -> None:
    made_of_it = kind(model, **arguments)
    try:
        made_of_it()
        made_of_it.step()
    finally:
        getattr(made_of_it, "remove", lambda: None)()


def penalised(model: nn.Module | None = None, **more: Any) -> dict[str, Any]:
    model = network() if model is None else model
    return {"model": model, "coupling": fxprune.analyze(model, made()["x"]), **more}


def distilled(inputs: Any, output: Any, **arguments: Any) -> None:
    with training.Distillation(**arguments) as distillation:
        arguments["student"](made()["x"])
        distillation.loss(output, inputs)


def scheduled(kind: Callable[..., Any], step: Any = 3, **arguments: Any) -> None:
    kind(**arguments)(step)


def scored(kind: Any) -> Callable[..., None]:
    return lambda coupling, model, **options: kind(**options).scores(coupling, model)


@functools.cache
def moved() -> criteria.Movement:
    model = copy.deepcopy(made()["model"])
    movement = criteria.Movement(model)
    model(made()["x"]).sum().backward()
    movement.update()
    return movement


def registered(rule: Any, **arguments: Any) -> None:
    known = fxprune.ops.OPS
    before = dict(known)
    try:
        fxprune.register_rule(**arguments)(rule)
    finally:
        known.clear()
        known.update(before)


def pruning(**more: Any) -> dict[str, Any]:
    return {"model": made()["model"], "example_inputs": made()["x"], "channels": 0.5, **more}


def stepping() -> dict[str, Any]:
    return {"model": network(), "example_inputs": made()["x"], "count": 2, "macs": 0.6}


def both(**more: Any) -> dict[str, Any]:
    return {"model": made()["model"], "pruned": made()["pruned"], **more}


def data(**more: Any) -> dict[str, Any]:
    return {"coupling": made()["coupling"], "model": made()["model"], "loader": loader(), **more}


def viewed() -> dict[str, Any]:
    return {"coupling": made()["coupling"], "tensors": dict(made()["model"].named_parameters())}


def view() -> criteria.UnitView:
    return next(iter(criteria.Views(**viewed())))


def normalised() -> criteria.UnitView:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return next(
        iter(criteria.Views(fxprune.analyze(model, made()["x"]), dict(model.named_parameters())))
    )


def fields_of(value: Any) -> dict[str, Any]:
    return {own.name: getattr(value, own.name) for own in dataclasses.fields(value)}


def planned(**parts: Any) -> None:
    plan = fxprune.Plan(**parts)
    str(plan), plan.to_json(), fxprune.apply(plan, made()["model"])


def reported(**parts: Any) -> None:
    report = Report(**parts)
    str(report), report.to_dict()


SHARES = {"channels": 0.9, "macs": 0.9, "params": 0.9}
OPTIONS = {
    "scope": "global",
    "layers": {"2": 0.9},
    "criterion": "l1",
    "keep": "1",
    "units": "dims",
    "round_to": 2,
    "max_ratio": {"0": 0.8},
    "scopes": {"all": ["0", "2"]},
}

DOORS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "prune": (
        fxprune.prune,
        lambda: pruning(
            **SHARES, **OPTIONS, min_channels=2, verify=True, data=loader(), compensate="constants"
        ),
    ),
    "prune in time": (fxprune.prune, lambda: pruning(device=None)),
    "analyze": (
        fxprune.analyze,
        lambda: {
            "model": made()["model"],
            "example_inputs": made()["x"],
            "keep": (),
            "units": "dims",
        },
    ),
    "apply": (fxprune.apply, lambda: {"plan": made()["pruned"].plan, "model": made()["model"]}),
    "load": (
        fxprune.load,
        lambda: {"folder": made()["folder"], "model_factory": network, "device": None},
    ),
    "save": (lambda folder: made()["pruned"].save(folder), lambda: {"folder": "saved"}),
    "verify": (
        fxprune.verify,
        lambda: both(
            example_inputs=made()["x"], dtype=torch.float64, randomize=True, seed=0, numeric=True
        ),
    ),
    "constants": (
        fxprune.compensate,
        lambda: both(loader=loader(), method="constants", ridge=1e-4),
    ),
    "least squares": (
        fxprune.compensate,
        lambda: both(loader=loader(), method=["least_squares", "batch_norm"], ridge=1e-4),
    ),
    "deploy": (fxprune.deploy, lambda: {"model": made()["pruned"].model, "channels_last": False}),
    "export": (
        lambda **arguments: fxprune.export(example_inputs=made()["x"], **arguments),
        lambda: {
            "model": made()["model"],
            "path": "net.pt2",
            "dynamic_batch": False,
            "check": False,
        },
    ),
    "Steps": (steps, lambda: {**stepping(), "params": 0.6, "folder": None}),
    "Steps with options": (steps, lambda: {**stepping(), "criterion": "l1", "keep": ()}),
    "Steps with a schedule": (steps, lambda: {**stepping(), "schedule": training.Cubic}),
    "GroupSparsity": (
        functools.partial(penalty, training.GroupSparsity),
        lambda: penalised(unit_strengths=[1.0] * 14, strength=0.1),
    ),
    "BNScaleSparsity": (
        functools.partial(penalty, training.BNScaleSparsity),
        lambda: penalised(
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
            unit_strengths=[1.0] * 4,
            strength=training.Linear(0, 1, 2),
        ),
    ),
    "GrowingRegularisation": (
        functools.partial(penalty, training.GrowingRegularisation),
        lambda: penalised(plan=made()["pruned"].plan, delta=0.1, every=1, ceiling=1.0),
    ),
    "Gates": (functools.partial(penalty, training.Gates), lambda: penalised(strength=0.1)),
    "HardConcreteGates": (
        functools.partial(penalty, training.HardConcreteGates),
        lambda: penalised(strength=0.1),
    ),
    "Distillation": (
        distilled,
        lambda: {
            "teacher": made()["model"],
            "student": made()["pruned"].model,
            "inputs": made()["x"],
            "output": torch.zeros(4, 2),
            "temperature": 2.0,
            "logit_strength": 1.0,
            "features": ["1"],
            "feature_strength": 1.0,
            "logits": lambda output: output,
            "dim": 1,
        },
    ),
    "soft_target_loss": (
        training.soft_target_loss,
        lambda: {
            "student": torch.zeros(4, 2),
            "teacher": torch.ones(4, 2),
            "temperature": 2.0,
            "dim": -1,
        },
    ),
    "Constant": (
        functools.partial(scheduled, training.Constant),
        lambda: {"value": 1.0, "step": 0},
    ),
    **{
        kind.__name__: (
            functools.partial(scheduled, kind),
            lambda: {"start": 1.0, "end": 0.5, "steps": 4, "step": 2},
        )
        for kind in (training.Linear, training.Cosine, training.Cubic, training.Geometric)
    },
    "Growing": (
        functools.partial(scheduled, training.Growing),
        lambda: {"delta": 0.1, "every": 2, "ceiling": 1.0, "step": 3},
    ),
    "register_rule": (
        registered,
        lambda: {"name": "slips::none", "like": None, "rule": lambda *arguments: None},
    ),
    "cost_of": (cost.cost_of, lambda: {"module": made()["model"], "example_inputs": made()["x"]}),
    "count_parameters": (cost.count_parameters, lambda: {"module": made()["model"]}),
    "Plan.from_json": (fxprune.Plan.from_json, lambda: {"text": made()["pruned"].plan.to_json()}),
    "Report.from_dict": (Report.from_dict, lambda: {"data": made()["pruned"].report.to_dict()}),
    "Setting": (
        latency.Setting,
        lambda: {
            "device": "cpu",
            "precision": "fp32",
            "mode": "eager",
            "channels_last": True,
            "batch": 2,
        },
    ),
    "measure": (
        latency.measure,
        lambda: {
            "models": {"one": made()["model"]},
            "example_inputs": made()["x"],
            "setting": latency.Setting("cpu"),
            "rounds": 1,
            "seconds": 1e-4,
        },
    ),
    "time_in_turns": (
        latency.time_in_turns,
        lambda: {
            "runs": {"one": lambda: None},
            "device": "cpu",
            "rounds": 1,
            "seconds": 1e-4,
            "warm_up": 0,
        },
    ),
    "roofline": (
        latency.roofline,
        lambda: {"device": torch.device("cpu"), "dtype": torch.float32, "tf32": False},
    ),
    "CPMC": (
        criteria.CPMC,
        lambda: {"alpha": 1.0, "beta": 0.1, "gamma": 0.1, "roles": ("own",), "weigh_groups": True},
    ),
    "FlowCPMC": (
        scored(criteria.FlowCPMC),
        lambda: (
            {"computation": 0.5, "parameters": 0.1, "seed": 1, "data": data()["loader"]}
            | {"coupling": made()["coupling"], "model": made()["model"]}
        ),
    ),
    "AddedCosts": (criteria.AddedCosts, lambda: {"alpha": 1.0, "beta": 0.1, "gamma": 0.1}),
    "DividingCosts": (criteria.DividingCosts, lambda: {"computation": 0.5, "parameters": 0.1}),
    "Random": (
        scored(criteria.Random),
        lambda: {"seed": 1, "coupling": made()["coupling"], "model": made()["model"]},
    ),
    "Taylor": (scored(criteria.Taylor), lambda: data(loss=F.mse_loss)),
    "Fisher": (scored(criteria.Fisher), lambda: data(loss=F.mse_loss)),
    "Activation": (scored(criteria.Activation), lambda: data()),
    "ActivationVariance": (scored(criteria.ActivationVariance), lambda: data()),
    "Wanda": (scored(criteria.Wanda), lambda: data()),
    "SurgeonOrder": (
        scored(criteria.SurgeonOrder),
        lambda: data(loader=[(torch.randn(32, 3),)], computation=0.5, parameters=0.1, ridge=0.1),
    ),
    "HessianDiagonal": (
        scored(criteria.HessianDiagonal),
        lambda: data(loss=F.mse_loss, probes=1, seed=1),
    ),
    "OBDC": (scored(criteria.OBDC), lambda: data(loss=None, probes=1, seed=1)),
    "Movement": (criteria.Movement, lambda: {"model": made()["model"]}),
    "Movement.scores": (
        lambda **given: moved().scores(**given),
        lambda: {"coupling": made()["coupling"], "model": made()["model"]},
    ),
    "Views": (
        lambda **given: [each.sum(torch.abs) for each in criteria.Views(**given)],
        lambda: viewed(),
    ),
    "sum": (
        lambda **given: view().sum(**given),
        lambda: {"function": torch.abs, "roles": ("own",)},
    ),
    "network_mean": (
        lambda **given: view().network_mean(**given),
        lambda: {"function": torch.abs, "roles": ("own",)},
    ),
    "rows": (lambda **given: view().rows(**given), lambda: {"roles": ("own",)}),
    "l1": (criteria.l1, lambda: {"view": view()}),
    "l2": (criteria.l2, lambda: {"view": view()}),
    "bn_scale": (criteria.bn_scale, lambda: {"view": normalised()}),
    "lamp": (criteria.lamp, lambda: {"view": view()}),
    "fpgm": (criteria.fpgm, lambda: {"view": view()}),
    "CPMC of a view": (lambda view: criteria.CPMC()(view), lambda: {"view": view()}),
    "role": (
        lambda **given: made()["coupling"].role(**given),
        lambda: {"name": "0.weight", "dim": 0},
    ),
    "parameter_labels": (
        lambda name: made()["coupling"].parameter_labels(name),
        lambda: {"name": "0.weight"},
    ),
    "elements": (
        lambda group: made()["coupling"].elements(group),
        lambda: {"group": made()["coupling"].groups[0]},
    ),
    "blocks": (
        lambda group: made()["coupling"].blocks(group),
        lambda: {"group": made()["coupling"].groups[0]},
    ),
    "GroupPlan": (fxprune.GroupPlan, lambda: {"name": "0.weight:0", "size": 8, "kept": (0, 1)}),
    "Plan": (planned, lambda: fields_of(made()["pruned"].plan)),
    "Report": (reported, lambda: fields_of(made()["pruned"].report)),
    "rank": (
        criteria.rank,
        lambda: {"criterion": "l1", "coupling": made()["coupling"], "model": made()["model"]},
    ),
}


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name, (_, arguments) in DOORS.items() for argument in arguments()],
)
def test_a_wrong_value(
    name: str, argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each value is accepted, or refused with a short error that is not ``InternalError``."""
    monkeypatch.chdir(tmp_path)
    function, arguments = DOORS[name]
    function(**arguments())
    for label, value in WRONG.items():
        error = outcome(function, {**arguments(), argument: value})
        told = (
            isinstance(error, FxpruneError)
            and not isinstance(error, InternalError)
            and len(str(error)) < 1200
        )
        assert error is None or told, f"{argument}={label}: {type(error).__name__}: {error}"


def outcome(function: Callable[..., Any], arguments: dict[str, Any]) -> Exception | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function(**arguments)
        except Exception as error:
            return error
    return None


@pytest.mark.parametrize(
    "name",
    [
        "prune",
        "analyze",
        "apply",
        "load",
        "verify",
        "constants",
        "deploy",
        "cost_of",
        "GroupSparsity",
        "Gates",
        "Distillation",
    ],
)
def test_arguments_in_a_wrong_order(name: str) -> None:
    function, arguments = DOORS[name]
    given = list(arguments().values())
    names = list(arguments())
    for one in range(min(2, len(given) - 1)):
        swapped = dict(zip(names, given, strict=True))
        swapped[names[one]], swapped[names[one + 1]] = given[one + 1], given[one]
        with pytest.raises(FxpruneError) as caught:
            function(**swapped)
        assert not isinstance(caught.value, InternalError)


PUBLIC = [
    getattr(fxprune, name)
    for name in fxprune.__all__
    if inspect.isfunction(getattr(fxprune, name))
    or (
        inspect.isclass(getattr(fxprune, name))
        and not issubclass(getattr(fxprune, name), (Exception, Warning))
    )
] + [
    criteria.l1,
    criteria.l2,
    criteria.bn_scale,
    criteria.lamp,
    criteria.fpgm,
    criteria.Views,
    criteria.UnitView,
    criteria.Taylor,
    training.BNScaleSparsity,
    training.Distillation,
    training.Gates,
    training.Growing,
    training.GrowingRegularisation,
    training.HardConcreteGates,
    training.Linear,
    training.soft_target_loss,
]


def required(public: Any) -> list[str]:
    parameters = inspect.signature(public).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.__name__)
def test_a_call_without_its_arguments(public: Any) -> None:
    """The error is a ``TypeError`` of Python and an error of fxprune; unknown names are named."""
    with pytest.raises(SignatureError, match="missing"):
        public()
    with pytest.raises(TypeError, match=r"unexpected keyword.*nowhere"):
        public(**dict.fromkeys(required(public)), nowhere=None)
    # documentation and editors see the arguments
    assert list(inspect.signature(public).parameters)


def test_a_misspelt_keyword() -> None:
    with pytest.raises(SignatureError, match=r"'chanels'.*channels="):
        fxprune.prune(made()["model"], made()["x"], chanels=0.5)  # type: ignore[call-arg]


# ---- numbers


@pytest.mark.parametrize(
    "half",
    [
        np.float16(0.5),
        np.float32(0.5),
        np.float64(0.5),
        np.array(0.5),
        torch.tensor(0.5),
        torch.tensor(0.5).half(),
    ],
)
def test_numbers_of_other_libraries(half: Any) -> None:
    model, x = made()["model"], made()["x"]
    wanted = fxprune.prune(model, x, channels=0.5, round_to=2, layers={"2": 0.5}).plan
    whole: Any
    for whole in (np.int64(2), np.uint8(2), np.array(2), torch.tensor(2)):
        assert (
            fxprune.prune(model, x, channels=half, round_to=whole, layers={"2": half}).plan
            == wanted
        )


@pytest.mark.parametrize("kind", [np.float16, np.float32, torch.tensor])
def test_a_number_of_few_digits_is_the_decimal_that_it_is_written_as(kind: Any) -> None:
    """0.7 in float32 is a little less than 0.7, which would cost one unit of ten."""
    model = nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 2))
    assert fxprune.prune(model, made()["x"], channels=kind(0.7)).report.groups[0].kept == 7


@pytest.mark.parametrize(
    "value",
    [np.bool_(True), torch.tensor(True), np.complex64(0.5), torch.tensor([0.5, 0.5]), np.zeros(1)],
)
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"channels=.*outside \(0, 1\]"):
        fxprune.prune(made()["model"], made()["x"], channels=value)


# ---- the guard around public functions


def test_an_unforeseen_error_is_told_as_a_bug() -> None:
    @public
    def fails() -> None:
        {}["missing"]

    with pytest.raises(
        InternalError, match=r"fails failed where it should not: KeyError: 'missing'.*report"
    ) as caught:
        fails()
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, SystemExit, DeprecationWarning, FxpruneError, ArgumentError]
)
def test_what_passes_as_it_is(error: type[BaseException]) -> None:
    @public
    def fails() -> None:
        with calling_user_code("the callback"):
            raise error("as it is")

    with pytest.raises(error, match="as it is") as caught:
        fails()
    assert caught.value.__cause__ is None


def test_memory_that_ran_out_is_no_bug() -> None:
    @public
    def fails() -> None:
        raise torch.OutOfMemoryError("20 GiB were asked for")

    with pytest.raises(ResourceError, match=r"20 GiB.*smaller example"):
        fails()


def test_code_of_the_caller_is_named() -> None:
    with (
        pytest.raises(
            CallbackError,
            match=r"the loss raised RuntimeError: the user's own \(at test_slips.py:\d+\)",
        ),
        calling_user_code("the loss"),
    ):
        raising()
    with pytest.raises(CallbackError, match="the loader raised OSError: the disk is gone"):
        list(iterate_user_input(RaisesWhenRead()))
    assert list(iterate_user_input([1, 2])) == [1, 2]


def test_a_factory_that_fails_or_wants_arguments(tmp_path: Path) -> None:
    made()["pruned"].save(tmp_path)
    with pytest.raises(
        CallbackError,
        match=r"model_factory raised RuntimeError: the user's own \(at test_slips.py",
    ):
        fxprune.load(tmp_path, raising)
    with pytest.raises(CallbackError, match=r"model_factory raised TypeError.*missing"):
        fxprune.load(tmp_path, nn.Linear)
    with pytest.raises(FxpruneError, match="another architecture"):
        fxprune.load(
            tmp_path,
            lambda: nn.Sequential(
                nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 2)
            ),
        )


def test_a_criterion_that_fails_is_named() -> None:
    with pytest.raises(
        CallbackError, match=r"criterion raising.*the user's own \(at test_slips.py"
    ):
        fxprune.prune(made()["model"], made()["x"], channels=0.5, criterion=raising)
    with pytest.raises(ArgumentError, match=r"'lampp' is unknown.*Did you mean 'lamp'"):
        fxprune.prune(made()["model"], made()["x"], channels=0.5, criterion="lampp")


# ---- data from which nothing can be measured


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((torch.zeros(0, 3), torch.zeros(0, 2)), "holds no sample"),
        ((torch.zeros(4, 3, device="meta"), torch.zeros(4, 2)), "meta device"),
        ((torch.zeros(2, 4, 3), torch.zeros(2, 4, 2)), "3 dimensions, and had 2"),
    ],
)
def test_a_batch_that_cannot_be_measured(batch: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        criteria.Activation([batch]).scores(made()["coupling"], made()["model"])
    with pytest.raises(ArgumentError, match=words):
        fxprune.compensate(
            made()["model"], copy.deepcopy(made()["pruned"]), [batch], method="least_squares"
        )


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (lambda output, target: (output * 1j).sum(), ArgumentError, "complex64"),
        (
            lambda output, target: torch.ones((), requires_grad=True),
            ArgumentError,
            "depends on no parameter",
        ),
        (
            lambda output, target: [loss := output.sum(), loss.backward()][0],
            CallbackError,
            "the gradient of the loss raised",
        ),
    ],
    ids=["complex", "of nothing", "used up"],
)
@pytest.mark.parametrize("kind", [criteria.Taylor, criteria.Fisher])
def test_a_loss_without_a_gradient(
    loss: Any, error: type[FxpruneError], words: str, kind: Any
) -> None:
    with pytest.raises(error, match=words):
        kind(loader(), loss).scores(made()["coupling"], made()["model"])


@pytest.mark.parametrize("change", [lambda ones: ones.to("meta"), lambda ones: ones * 1j])
def test_scores_without_numbers(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    count = made()["coupling"].context.units.count

    class Own:
        def scores(self, coupling: Any, model: nn.Module) -> torch.Tensor:
            return change(torch.ones(count))

    for criterion in (Own(), lambda view: change(torch.ones(view.group.size))):
        with pytest.raises(ArgumentError, match="no numbers to rank by"):
            criteria.rank(criterion, made()["coupling"], made()["model"])


@pytest.mark.parametrize(
    "change",
    [
        lambda ones: ones.to_sparse(),
        lambda ones: ones.bfloat16(),
        lambda ones: ones.requires_grad_(),
    ],
)
def test_scores_of_any_kind_of_tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    count = made()["coupling"].context.units.count

    class Own:
        def scores(self, coupling: Any, model: nn.Module) -> torch.Tensor:
            return change(torch.ones(count))

    for criterion in (Own(), lambda view: change(torch.ones(view.group.size))):
        assert criteria.rank(criterion, made()["coupling"], made()["model"]).value.sum() > 0


def test_an_error_leaves_the_weights_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer is refitted before the second one fails."""
    pruned = copy.deepcopy(made()["pruned"])
    before = {name: tensor.clone() for name, tensor in pruned.model.state_dict().items()}
    real, calls = torch.linalg.solve, []

    def solve(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.linalg.LinAlgError("singular")
        return real(*arguments)

    monkeypatch.setattr(torch.linalg, "solve", solve)
    with pytest.raises(ArgumentError, match="does not determine"):
        fxprune.compensate(made()["model"], pruned, loader(), method="least_squares")
    assert len(calls) == 2
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in pruned.model.state_dict().items()
    )


@pytest.mark.parametrize("method", ["constants", "least_squares"])
def test_a_pruned_model_that_is_not_the_plans(method: str) -> None:
    swapped = dataclasses.replace(made()["pruned"], model=network())
    with pytest.raises(ArgumentError, match=r"no '2\.weight' as its plan left it"):
        fxprune.compensate(made()["model"], swapped, loader(), method=method)


def test_steps_of_a_model_that_costs_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps(
            model=nn.Sequential(nn.ReLU()),
            example_inputs=made()["x"],
            count=2,
            macs=0.5,
            params=0.5,
        )
