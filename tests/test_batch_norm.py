"""Tests of ``compensate="batch_norm"``: statistics are those of the data, or stay as they are."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune

IMAGES = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(7)) + 0.5


class Functional(nn.Module):
    """A normalisation that is a function call, with buffers of its own names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 2, 1)
        self.register_buffer("centre", torch.zeros(12))
        self.register_buffer("spread", torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.batch_norm(self.conv(x), self.centre, self.spread).relu())


def trained() -> nn.Sequential:
    """Return a network whose statistics are those of the images."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 10, 3, bias=False),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Conv2d(10, 2, 1),
    )
    return by_training(model, IMAGES)


def by_training(model: nn.Module, x: Tensor) -> nn.Module:
    """Set the statistics as PyTorch does in training, from one batch."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches since the reset
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def test_statistics_of_one_batch_are_those_of_training() -> None:
    model = trained()
    pruned = fxprune.prune(model, IMAGES[:2], channels=0.5, criterion="cpmc")
    wanted = by_training(copy.deepcopy(pruned.model), IMAGES)
    before = (pruned.model(IMAGES) - model(IMAGES)).norm()
    done = fxprune.compensate(model, pruned, [(IMAGES,)], method="batch_norm")
    assert done == fxprune.Compensation(("1", "4"), ())
    for name in ("1", "4"):
        found, expected = (each.get_submodule(name) for each in (pruned.model, wanted))
        torch.testing.assert_close(found.running_mean, expected.running_mean)
        torch.testing.assert_close(found.running_var, expected.running_var)
    assert (pruned.model(IMAGES) - model(IMAGES)).norm() < before


def test_statistics_are_exact_over_batches_of_any_size() -> None:
    """The first normalisation reads the same in any batches: its statistics are those of all."""
    model = trained()
    pruned = fxprune.prune(model, IMAGES[:2], channels=0.5, criterion="bn_scale")
    batches = [(part,) for part in IMAGES.split([20, 16, 9, 3])]
    fxprune.compensate(model, pruned, batches, method="batch_norm")
    read = pruned.model.get_submodule("0")(IMAGES).detach().transpose(0, 1).flatten(1)
    norm = pruned.model.get_submodule("1")
    torch.testing.assert_close(norm.running_mean, read.mean(1))
    torch.testing.assert_close(norm.running_var, read.var(1))


def test_a_normalisation_is_found_as_an_operation() -> None:
    torch.manual_seed(0)
    model = Functional().eval()
    with torch.no_grad():
        read = model.conv(IMAGES)
        model.centre.copy_(read.mean((0, 2, 3)))
        model.spread.copy_(read.var((0, 2, 3)))
    pruned = fxprune.prune(model, IMAGES[:2], channels=0.5, criterion="cpmc")
    kept = pruned.model.state_dict()["centre"].clone()
    with torch.no_grad():
        pruned.model.get_buffer("centre").add_(1.0)  # pruning that changes the statistics
    done = fxprune.compensate(model, pruned, [(IMAGES,)], method="batch_norm")
    assert done.changed == ("",)
    torch.testing.assert_close(pruned.model.state_dict()["centre"], kept)


def test_data_that_changes_the_original_more_than_pruning_is_refused() -> None:
    model = trained()
    pruned = fxprune.prune(model, IMAGES[:2], channels=0.95, criterion="cpmc")
    before = copy.deepcopy(pruned.model.state_dict())
    dense = copy.deepcopy(model.state_dict())
    others = [(20 * part,) for part in IMAGES.split(16)]
    with pytest.warns(fxprune.FxpruneWarning, match="more samples, from more sources"):
        done = fxprune.compensate(model, pruned, others, method="batch_norm")
    assert done.changed == ()
    assert done.uncorrected == ("1", "4")
    assert "change the outputs of the dense model by" in done.notes[0]
    for was, model_now in ((before, pruned.model), (dense, model)):
        now = model_now.state_dict()
        assert all(torch.equal(value, now[name]) for name, value in was.items())


def test_the_report_says_that_data_was_refused() -> None:
    with pytest.warns(fxprune.FxpruneWarning):
        pruned = fxprune.prune(
            trained(),
            IMAGES[:2],
            channels=0.95,
            criterion="l1",
            data=[(20 * IMAGES,)],
            compensate="batch_norm",
        )
    (note,) = pruned.report.compensation_notes
    assert note in str(pruned.report)
    assert fxprune.Report.from_dict(pruned.report.to_dict()) == pruned.report


def test_statistics_follow_the_weights() -> None:
    """Whatever the order of the names, the weights are corrected first."""
    model, results = trained(), []

    def disturbed() -> fxprune.Pruned:
        """Return a pruned network with statistics that have to be estimated again."""
        pruned = fxprune.prune(model, IMAGES[:2], channels=0.5, criterion="cpmc")
        pruned.model.get_submodule("1").running_var.mul_(9)
        return pruned

    for method in (["constants", "batch_norm"], ("batch_norm", "constants")):
        pruned = disturbed()
        done = fxprune.compensate(model, pruned, iter([(IMAGES,)]), method=method)
        assert done == fxprune.Compensation(("3", "6", "1", "4"), ())
        results.append(pruned.model.state_dict())
    by_hand = disturbed()
    for method in ("constants", "batch_norm"):
        fxprune.compensate(model, by_hand, [(IMAGES,)], method=method)
    for result in results:
        for name, value in by_hand.model.state_dict().items():
            torch.testing.assert_close(result[name], value, rtol=0, atol=0)


def test_statistics_that_do_not_help_are_refused() -> None:
    """Least squares have fitted the layers to the statistics that there are."""
    model = trained()
    pruned = fxprune.prune(model, IMAGES[:2], channels=0.5, criterion="cpmc")
    fitted = fxprune.compensate(model, pruned, [(IMAGES,)], method="least_squares")
    before = copy.deepcopy(pruned.model.state_dict())
    with pytest.warns(fxprune.FxpruneWarning, match=r"error would be 0\.\d+, and is 0\.\d+"):
        done = fxprune.compensate(model, pruned, [(IMAGES,)], method="batch_norm")
    assert fitted.changed == ("3", "6")
    assert done.uncorrected == ("1", "4")
    now = pruned.model.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in before.items())


def test_a_single_value_per_channel_has_no_variance() -> None:
    """Where each batch is one sample, a normalisation of rows keeps its statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    rows = torch.randn(4, 3)
    pruned = fxprune.prune(model, rows, channels=0.5, criterion="cpmc")
    done = fxprune.compensate(model, pruned, [(row[None],) for row in rows], method="batch_norm")
    assert done == fxprune.Compensation((), ("1",))
    assert torch.equal(pruned.model.get_submodule("1").running_mean, torch.zeros(4))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (("least_squares", "constants"), "the same weights twice"),
        ((), "none of 'least_squares', 'constants', 'batch_norm'"),
        (["batch_norm", 3], "none of"),
        (None, "none of"),
    ],
)
def test_methods_that_are_refused(method: object, message: str) -> None:
    model = trained()
    pruned = fxprune.prune(model, IMAGES[:2], channels=0.5, criterion="cpmc")
    with pytest.raises(fxprune.ArgumentError, match=message):
        fxprune.compensate(model, pruned, [(IMAGES,)], method=method)


def test_statistics_that_are_not_finite_are_refused() -> None:
    model = trained()
    pruned = fxprune.prune(model, IMAGES[:2], channels=0.5, criterion="cpmc")
    before = copy.deepcopy(pruned.model.state_dict())
    spoilt = torch.full_like(IMAGES, float("inf"))
    with pytest.raises(fxprune.ArgumentError, match="NaN or infinite"):
        fxprune.compensate(model, pruned, [(IMAGES,), (spoilt,)], method="batch_norm")
    now = pruned.model.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in before.items())
