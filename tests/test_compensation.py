"""Tests of compensation: consumers replace what removed channels contributed.

The result is exact where it can be, and nearer to the original where it cannot.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.criteria import FlowCPMC


class Positional(nn.Module):
    """A network in which every second hidden unit is constant.

    The filters of these units are zero, so their value is their bias after the activation.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv = kind != "linear"
        self.first = nn.Conv2d(3, 12, 1) if conv else nn.Linear(3, 12)
        if kind == "grouped":
            self.second: nn.Module = nn.Conv2d(12, 8, 1, groups=2)
        elif kind == "norm":
            self.second = nn.Conv2d(12, 8, 1, bias=False)
        else:
            self.second = nn.Conv2d(12, 8, 1) if conv else nn.Linear(12, 8)
        self.norm = nn.BatchNorm2d(8) if kind == "norm" else nn.Identity()
        self.last = nn.Conv2d(8, 2, 1) if conv else nn.Linear(8, 2)
        with torch.no_grad():
            dead = torch.arange(12) % 2 == 0
            self.first.weight[dead] = 0
            self.first.bias.copy_(torch.linspace(0.5, 1.0, 12))
            if kind == "norm":
                self.norm.running_mean.normal_()
                self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.second(self.first(x).relu())))


def without_the_dead(model: nn.Module, x: Tensor) -> fxprune.Pruned:
    """Prune the units whose filters are zero, and no others."""

    def alive(view: fxprune.criteria.UnitView) -> Tensor:
        weights = (
            view.rows(("own",))[:, :3] if view.group.size == 12 else torch.ones(view.group.size, 1)
        )
        return (weights.abs().sum(dim=1) > 0).double()

    return fxprune.prune(model, x, layers={"first": 0.5}, criterion=alive)


@pytest.mark.parametrize("kind", ["linear", "conv", "norm", "grouped"])
def test_constants_are_folded_exactly(kind: str) -> None:
    model = Positional(kind).double().eval()
    x = torch.randn(16, 3) if kind == "linear" else torch.randn(16, 3, 4, 4)
    x = x.double()
    pruned = without_the_dead(model, x)
    assert pruned.model.get_submodule("first").weight.shape[0] == 6
    before = (pruned.model(x) - model(x)).abs().max()
    done = fxprune.compensate(model, pruned, [(x,)], method="constants")
    assert before > 1e-3
    torch.testing.assert_close(pruned.model(x), model(x))
    assert done.changed == ("second",)
    assert done.uncorrected == ()


def teacher() -> nn.Sequential:
    torch.manual_seed(1)
    first, second = (
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False),
    )
    return nn.Sequential(
        first,
        nn.ReLU(),
        second,
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 5),
    ).eval()


@pytest.mark.parametrize("method", ["constants", "least_squares"])
def test_outputs_come_nearer(method: str) -> None:
    """Compensation brings the outputs nearer to the original's, on data that it has not seen."""
    model, x, fresh = teacher(), torch.randn(64, 3, 8, 8) + 0.5, torch.randn(64, 3, 8, 8) + 0.5
    pruned = fxprune.prune(model, x, channels=0.75, criterion="l1")
    with torch.no_grad():
        before = (pruned.model(fresh) - model(fresh)).norm()
        fxprune.compensate(model, pruned, [(x[:32],), (x[32:],)], method=method)
        after = (pruned.model(fresh) - model(fresh)).norm()
    assert after < 0.8 * before


def test_least_squares_gives_back_what_is_redundant() -> None:
    """Removing a unit that is a multiple of a kept one loses nothing.

    The next layer reads the kept unit with larger weights instead.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double().eval()
    with torch.no_grad():
        model[0].weight[4:] = 2 * model[0].weight[:4]
        model[0].bias[4:] = 2 * model[0].bias[:4]
    x = torch.randn(200, 6).double()
    # keeps the last four units
    pruned = fxprune.prune(model, x, channels=0.5, criterion=lambda view: torch.arange(8.0))
    assert (pruned.model(x) - model(x)).abs().max() > 1e-2
    fxprune.compensate(model, pruned, [(x,)], method="least_squares", ridge=1e-12)
    torch.testing.assert_close(pruned.model(x), model(x), rtol=1e-6, atol=1e-6)


def test_the_original_is_left_alone() -> None:
    """Compensation leaves the original's mode and weights as they were, and no hooks on it."""
    model, x = teacher().train(), torch.randn(8, 3, 8, 8)
    pruned = fxprune.prune(model, x, channels=0.5)
    before = copy.deepcopy(model.state_dict())
    for method in ("constants", "least_squares"):
        fxprune.compensate(model, pruned, [(x,)], method=method)
    assert model.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    )


def test_what_cannot_be_compensated_is_said() -> None:
    """A consumer with neither a bias nor a normalisation behind it is reported."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1, bias=False)).eval()
    x = torch.randn(4, 3, 4, 4)
    done = fxprune.compensate(
        model, fxprune.prune(model, x, channels=0.5), [(x,)], method="constants"
    )
    assert done.changed == ()
    assert done.uncorrected == ("2",)


def test_unknown_method_and_no_data() -> None:
    model, x = teacher(), torch.randn(4, 3, 8, 8)
    pruned = fxprune.prune(model, x, channels=0.5)
    with pytest.raises(fxprune.ArgumentError, match=r"method='magic'.*least_squares.*constants"):
        fxprune.compensate(model, pruned, [(x,)], method="magic")
    with pytest.raises(fxprune.ArgumentError, match="no batch"):
        fxprune.compensate(model, pruned, [])


@pytest.mark.parametrize("method", ["constants", "least_squares"])
def test_what_is_no_number_is_refused(method: str) -> None:
    """A batch with NaN or infinity is refused, and the pruned model's weights stay unchanged."""
    model, x = teacher(), torch.randn(4, 3, 8, 8)
    pruned = fxprune.prune(model, x, channels=0.5)
    before = {name: tensor.clone() for name, tensor in pruned.model.state_dict().items()}
    spoilt = x.clone()
    spoilt[2, 1, 3, 3] = float("nan")
    for batch in (spoilt, torch.full_like(x, float("inf"))):
        with pytest.raises(fxprune.ArgumentError, match=r"NaN"):
            fxprune.compensate(model, pruned, [(x,), (batch,)], method=method)
    for name, tensor in pruned.model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("method", ["constants", "least_squares"])
def test_data_of_a_wrong_shape_is_named(method: str) -> None:
    model, x = teacher(), torch.randn(4, 3, 8, 8)
    pruned = fxprune.prune(model, x, channels=0.5)
    with pytest.raises(fxprune.ArgumentError, match=r"does not fit .*to have 3 channels"):
        fxprune.compensate(model, pruned, [(torch.randn(4, 5, 8, 8),)], method=method)
    with pytest.raises(fxprune.ArgumentError, match=r"the loader is a Tensor"):
        fxprune.compensate(model, pruned, x, method=method)


# -- whatever makes the call


class SamePadding(nn.Conv2d):
    """A subclass that pads by hand, as EfficientNets have it."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 1, 0))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Transposed(nn.Module):
    """A product with the weight on its right side, and an added bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


IMAGES = torch.randn(40, 3, 7, 7).double()
SIGNALS, VOLUMES = torch.randn(60, 3, 9).double(), torch.randn(20, 3, 4, 5, 4).double()
ROWS = torch.randn(90, 3).double()

READERS = {
    "subclass": (nn.Conv2d(3, 8, 1), SamePadding(8, 4, 2), IMAGES),
    "strided and dilated": (nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 2, 2, 1, 2), IMAGES),
    "in groups": (nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 2, groups=2), IMAGES),
    "same": (nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 2, padding="same"), IMAGES),
    "reflecting": (nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 2, 1, 1, padding_mode="reflect"), IMAGES),
    "one dimension": (nn.Conv1d(3, 8, 1), nn.Conv1d(8, 4, 3), SIGNALS),
    "three dimensions": (nn.Conv3d(3, 8, 1), nn.Conv3d(8, 4, 2), VOLUMES),
    "right side": (nn.Linear(3, 8), Transposed(), ROWS),
    "transposed": (nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 4, 2, 2), IMAGES),
    "transposed, overlapping, in groups": (
        nn.Conv2d(3, 8, 1),
        nn.ConvTranspose2d(8, 4, (3, 2), (2, 3), (1, 0), (1, 0), groups=2, dilation=(1, 2)),
        IMAGES,
    ),
    "transposed, cropped": (nn.Conv1d(3, 8, 1), nn.ConvTranspose1d(8, 4, 2, 1, 3), SIGNALS),
}


def redundant(first: nn.Module, second: nn.Module) -> nn.Module:
    """Return a network in which every second unit is twice the one before it."""
    with torch.no_grad():
        first.weight[1::2] = 2 * first.weight[::2]
        first.bias[1::2] = 2 * first.bias[::2]
    return nn.Sequential(first, nn.ReLU(), second).double().eval()


def of_odd_units(model: nn.Module, x: Tensor) -> fxprune.Pruned:
    """Prune the units with even numbers."""
    return fxprune.prune(
        model, x[:2], channels=0.5, criterion=lambda view: torch.arange(view.group.size) % 2 + 0.0
    )


@pytest.mark.parametrize("name", READERS)
def test_least_squares_refits_any_contraction(name: str) -> None:
    """What is redundant comes back, whatever module or function makes the call."""
    first, second, x = READERS[name]
    model = redundant(first, second)
    pruned = of_odd_units(model, x)
    assert (pruned.model(x) - model(x)).abs().max() > 1e-2
    done = fxprune.compensate(model, pruned, [(x,)], method="least_squares", ridge=1e-12)
    assert done == fxprune.Compensation(("2",), ())
    torch.testing.assert_close(pruned.model(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", READERS)
def test_constants_keep_the_mean_of_any_contraction(name: str) -> None:
    first, second, x = READERS[name]
    model = redundant(first, second)
    pruned = of_odd_units(model, x)
    done = fxprune.compensate(model, pruned, [(x[:12],), (x[12:],)], method="constants")
    assert done == fxprune.Compensation(("2",), ())
    dims = [0, *range(2, x.dim())]
    torch.testing.assert_close(pruned.model(x).mean(dims), model(x).mean(dims))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_depthwise_layers_are_no_readers(kind: type[nn.Module]) -> None:
    """They lose what their inputs lose, so there is nothing to make up for."""
    depthwise = kind(8, 8, 3, padding=1, groups=8)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), depthwise, nn.Conv2d(8, 4, 1))
    model = model.double().eval()
    pruned = fxprune.prune(model, IMAGES[:2], channels=0.5)
    for method in ("constants", "least_squares"):
        done = fxprune.compensate(model, pruned, [(IMAGES,)], method=method)
        assert done == fxprune.Compensation(("2",), ())


def test_a_weight_that_is_computed_is_left() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight / 3, self.bias)

    model = redundant(nn.Linear(3, 8), Scaled(8, 4))
    for method in ("constants", "least_squares"):
        pruned = of_odd_units(model, ROWS)
        before = pruned.model(ROWS)
        done = fxprune.compensate(model, pruned, [(ROWS,)], method=method)
        assert done.changed == ()
        assert len(done.uncorrected) == 1
        torch.testing.assert_close(pruned.model(ROWS), before, rtol=0, atol=0)


def test_constants_of_a_model_in_parts() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU())
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.body(x)
            if float(hidden.detach().sum()) < 0:
                hidden = -hidden
            return self.head(hidden)

    model = Parts().double().eval()
    pruned = fxprune.prune(model, ROWS[:2], channels=0.5)
    done = fxprune.compensate(model, pruned, [(ROWS,)], method="constants")
    assert "body.2" in done.changed


# -- with prune


@pytest.mark.parametrize(
    ("method", "same_as"), [(None, "least_squares"), ("constants", "constants")]
)
def test_prune_with_data_compensates(method: str | None, same_as: str) -> None:
    model, x = teacher(), torch.randn(64, 3, 8, 8) + 0.5
    pruned = fxprune.prune(model, x[:2], channels=0.75, data=[(x,)], compensate=method)
    criterion = FlowCPMC(data=[(x,)])  # the default reads the data, too
    by_hand = fxprune.prune(model, x[:2], channels=0.75, criterion=criterion)
    done = fxprune.compensate(model, by_hand, [(x,)], method=same_as)
    torch.testing.assert_close(pruned.model(x), by_hand.model(x))
    assert pruned.report.compensated == done.changed
    assert pruned.report.uncompensated == done.uncorrected
    assert f"compensated {len(done.changed)} modules" in str(pruned.report)


def test_prune_with_data_proves_before_it_compensates() -> None:
    model, x = teacher(), torch.randn(64, 3, 8, 8)
    pruned = fxprune.prune(model, x[:2], channels=0.5, data=[(x,)], verify=True)
    assert pruned.report.error is not None
    assert pruned.report.error < 1e-9
    assert list(pruned.report.seconds)[-1] == "compensate"


def test_data_without_compensation_is_for_the_criterion() -> None:
    model, x = teacher(), torch.randn(64, 3, 8, 8)
    options: Any = {"channels": 0.5, "data": [(x,)], "compensate": "none"}
    plain = fxprune.prune(model, x[:2], criterion="l1", **options)
    assert plain.report.compensated == ()
    assert plain.plan == fxprune.prune(model, x[:2], channels=0.5, criterion="l1").plan
    read = fxprune.prune(model, x[:2], criterion="cpmc_flow", **options)
    given = FlowCPMC(data=[(x,)])
    assert read.plan == fxprune.prune(model, x[:2], channels=0.5, criterion=given).plan


class Parts(nn.Module):
    """Python between two parts asks how often the second one runs."""

    def __init__(
        self, times: Callable[[Tensor], int], layer: Callable[..., nn.Module] = nn.Linear
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = redundant(layer(4, 8), layer(8, 4))
        self.again = redundant(layer(4, 8), layer(8, 4))
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.body(x)
        for _ in range(self.times(x)):
            x = x + self.again(x)
        return x


def grouped(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv1d(inputs, outputs, 3, padding=1, groups=2 if inputs == 8 else 1)


def transposed(inputs: int, outputs: int) -> nn.Module:
    if inputs < outputs:  # its units are made redundant along the first dimension of a weight
        return nn.Conv1d(inputs, outputs, 1)
    return nn.ConvTranspose1d(inputs, outputs, 3, padding=1, groups=2)


@pytest.mark.parametrize("layer", [nn.Linear, grouped, transposed])
def test_least_squares_of_a_model_in_parts(layer: Callable[..., nn.Module]) -> None:
    """All calls of a part count; what is redundant comes back."""
    model = Parts(lambda x: 3 if float(x.detach().sum()) < 1e9 else 1, layer).double().eval()
    x = torch.randn(120, 4).double() if layer is nn.Linear else torch.randn(50, 4, 5).double()
    pruned = of_odd_units(model, x)
    assert pruned.report.parts
    assert (pruned.model(x) - model(x)).abs().max() > 1e-2
    batches = [(x[:40],), (x[40:],)]
    done = fxprune.compensate(model, pruned, batches, method="least_squares", ridge=1e-12)
    assert done == fxprune.Compensation(("body.2", "again.2"), ())
    torch.testing.assert_close(pruned.model(x), model(x), rtol=1e-5, atol=1e-5)
    by_default = fxprune.prune(model, x[:2], channels=0.5, data=batches)
    assert set(by_default.report.compensated) == {"body.2", "again.2"}
    assert by_default.report.compensation_notes == ()


def test_a_part_that_runs_in_another_way_is_fitted_to_the_originals_inputs() -> None:
    """The pruned model runs a part once more, so its calls are not those of the original."""
    model = Parts(lambda x: 1 if float(x.detach().sum()) < 1e9 else 2).double().eval()
    x = torch.randn(120, 4).double()
    pruned = of_odd_units(model, x)
    pruned.model.times = lambda x: 2
    done = fxprune.compensate(model, pruned, [(x,)], method="least_squares", ridge=1e-12)
    assert done.changed == ("body.2", "again.2")
    note = "fitted to the original's inputs, as the pruned model runs it another number of times"
    assert done.notes == (f"again.2: {note}",)
    pruned.model.times = model.times
    torch.testing.assert_close(pruned.model(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["constants", "least_squares"])
def test_projections_of_attention_are_consumers(method: str) -> None:
    """They are, although the original's own attention runs on another path than the graph."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = redundant(nn.Linear(3, 8), nn.Linear(8, 8))
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.last = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(self.attention(x, x, x, need_weights=False)[0])

    model, x = Attends().double().eval(), torch.randn(60, 4, 3).double()
    pruned = fxprune.prune(model, x[:2], channels=0.75, criterion="l1")
    fresh = torch.randn(60, 4, 3).double()
    before = (pruned.model(fresh) - model(fresh)).norm()
    done = fxprune.compensate(model, pruned, [(x,)], method=method)
    projections = ("attention", "attention.out_proj")
    assert done == fxprune.Compensation(("first.2", *projections, "last"), ())
    assert (pruned.model(fresh) - model(fresh)).norm() < 0.8 * before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compensate": "constants"}, "needs data="),
        ({"data": [(ROWS,)], "compensate": "magic"}, "none of 'least_squares', 'constants'"),
        ({"data": iter([(ROWS,)])}, "read only once"),
        ({"data": ROWS}, "holds no batches"),
    ],
)
def test_data_and_compensate_that_prune_refuses(options: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)).double()
    with pytest.raises(fxprune.ArgumentError, match=message):
        fxprune.prune(model, ROWS[:2], channels=0.5, **options)
