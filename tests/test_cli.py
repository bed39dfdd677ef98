"""The command line, as a person and as a machine uses it."""

import json
import textwrap

import pytest
import safetensors.torch
import torch
import torchvision
from typer.testing import CliRunner

import fxprune
from fxprune.cli import app

TINY = """
    import torch
    from torch import nn

    def build():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6 * 16, 5))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Linear(4, 16), nn.Linear(6, 16), nn.Linear(16, 2)

        def forward(self, x, y):
            return self.head(torch.relu(self.left(x) + self.right(y)))

    NUMBER = 3
"""


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A module of the user's own, in the folder that the command runs in."""
    (tmp_path / "tinymodels.py").write_text(textwrap.dedent(TINY))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # taken back after the test, with what the command adds
    monkeypatch.delitem(__import__("sys").modules, "tinymodels", raising=False)
    return tmp_path


def fails(result, *parts):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for part in ("error:", *parts):
        assert part in result.stderr


def test_prune_prints_a_report_and_says_what_it_does_on_stderr():
    result = run("prune", "resnet18", "--channels", 0.5, "--input", "1,3,64,64", "--verify")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("parameters  11,689,512 -> ")
    assert "equals the masked original" in result.stdout
    assert "pruning and verifying" in result.stderr
    assert "weights are random" in result.stderr


def test_prune_json_alone_is_on_stdout():
    result = run("prune", "resnet18", "--channels", 0.5, "--input", "1,3,64,64", "--json")
    report = json.loads(result.stdout)
    assert report["params_before"] == 11_689_512
    assert report["params_after"] < 0.33 * report["params_before"]


def test_prune_writes_all_that_is_needed_to_load_the_model(tmp_path):
    out = tmp_path / "deep" / "out"
    result = run("prune", "resnet18", "--channels", 0.5, "--input", "1,3,64,64", "-o", out)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == [
        "model.safetensors",
        "plan.json",
        "report.json",
        "report.txt",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # nothing half-made is left beside it
    assert (out / "report.txt").read_text() == result.stdout

    plan = fxprune.Plan.from_json((out / "plan.json").read_text())
    loaded = fxprune.apply(plan, torchvision.models.resnet18(weights=None)).model.eval()
    safetensors.torch.load_model(loaded, out / "model.safetensors")
    torch.manual_seed(0)
    expected = fxprune.apply(plan, torchvision.models.resnet18(weights=None)).model.eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(image), expected(image))


def test_prune_replaces_an_earlier_result(tiny):
    for share in (0.5, 0.25):
        assert run("prune", "tinymodels:build", "--input", "1,3,8,8", "--channels", share, "-o", "out").exit_code == 0
    report = json.loads((tiny / "out" / "report.json").read_text())
    assert [group["kept"] for group in report["groups"] if group["total"] == 8] == [2]
    assert not list(tiny.glob(".out-*"))


def test_own_factory_keep_and_rounding(tiny):
    common = ["prune", "tinymodels:build", "--input", "1,3,8,8", "--channels", 0.5, "--json"]
    kept = {group["total"]: group["kept"] for group in json.loads(run(*common).stdout)["groups"]}
    assert kept == {8: 4, 6: 3}
    kept = {group["total"]: group["kept"] for group in json.loads(run(*common, "--min-channels", 5).stdout)["groups"]}
    assert kept == {8: 5, 6: 5}
    groups = json.loads(run(*common, "--keep", "0").stdout)["groups"]
    assert all(group["kept"] == group["total"] for group in groups if group["total"] == 8)


def test_own_class_with_two_inputs_and_a_checkpoint(tiny):
    import tinymodels

    model = tinymodels.Model()
    with torch.no_grad():
        model.left.weight[8:] = model.right.weight[8:] = 0
        model.head.weight[:, 8:] = 0
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, "weights.pt")
    safetensors.torch.save_model(model, "weights.safetensors")
    for checkpoint in ("weights.pt", "weights.safetensors"):
        result = run(
            "prune",
            "tinymodels:Model",
            "--input",
            "1,4",
            "--input",
            "1,6",
            "--checkpoint",
            checkpoint,
            "--channels",
            0.5,
            "-o",
            "out",
        )
        assert result.exit_code == 0, result.output
        assert "weights are random" not in result.stderr
        plan = fxprune.Plan.from_json((tiny / "out" / "plan.json").read_text())
        assert [group.kept for group in plan.groups if group.size == 16] == [tuple(range(8))]


def test_inspect_shows_groups_and_reasons(tiny):
    result = run("inspect", "tinymodels:build", "--input", "1,3,8,8")
    assert result.exit_code == 0, result.output
    assert "2 groups, 14 units" in result.stdout
    assert "0.weight:0" in result.stdout
    assert "pinned, never pruned" in result.stdout


def test_inspect_full_prints_the_coupling(tiny):
    result = run("inspect", "tinymodels:build", "--input", "1,3,8,8", "--full")
    import tinymodels

    assert result.stdout.strip() == str(fxprune.analyze(tinymodels.build().eval(), torch.randn(1, 3, 8, 8))).strip()


def test_inspect_json(tiny):
    data = json.loads(run("inspect", "tinymodels:build", "--input", "1,3,8,8", "--json").stdout)
    assert sorted(group["units"] for group in data["groups"]) == [6, 8]
    assert set(data) == {"groups", "pinned", "untouched", "decisions"}
    assert all(pinned["reason"] for pinned in data["pinned"])


def test_version_and_help():
    assert run("--version").stdout == "fxprune 0.1.0\n"
    assert "inspect" in run("--help").stdout


def test_unknown_model_suggests_a_name():
    fails(run("inspect", "resnet51"), "No torchvision model is named 'resnet51'", "Did you mean", "resnet50")


def test_unknown_weights_list_the_choices():
    fails(
        run("inspect", "resnet18", "--weights", "NONSENSE"), "resnet18 has no weights named 'NONSENSE'", "IMAGENET1K_V1"
    )


def test_own_model_needs_an_input_shape(tiny):
    fails(run("inspect", "tinymodels:build"), "pass --input")


@pytest.mark.parametrize("shape", ["3,x", "", "0,3", "1;3"])
def test_shape_that_is_none(tiny, shape):
    fails(run("inspect", "tinymodels:build", "--input", shape), "is not a shape", "1,3,224,224")


def test_own_model_that_is_not_there(tiny):
    fails(run("inspect", "nomodule:build", "--input", "1,3"), "Cannot import 'nomodule'")
    fails(run("inspect", "tinymodels:nothing", "--input", "1,3"), "has no 'nothing'")
    fails(run("inspect", "tinymodels:NUMBER", "--input", "1,3"), "gave int, not a torch.nn.Module")


def test_error_of_the_engine_is_one_line_without_traceback(tiny):
    fails(run("prune", "tinymodels:build", "--input", "1,3,8,8", "--channels", 1.5), "channels", "1.5")
    fails(run("prune", "tinymodels:build", "--input", "1,3,8,8", "--channels", 0.5, "--keep", "nowhere.*"), "nowhere.*")


def test_checkpoint_that_is_missing_or_does_not_fit(tiny):
    common = ["inspect", "tinymodels:build", "--input", "1,3,8,8", "--checkpoint"]
    fails(run(*common, "missing.pt"), "Cannot read checkpoint missing.pt")
    torch.save({"unknown.weight": torch.zeros(1)}, "other.pt")
    fails(run(*common, "other.pt"), "does not fit the model", "unknown.weight")
    (tiny / "broken.safetensors").write_bytes(b"nonsense")
    fails(run(*common, "broken.safetensors"), "does not fit the model")


def test_out_that_cannot_be_written(tiny):
    (tiny / "taken").write_text("a file")
    fails(
        run("prune", "tinymodels:build", "--input", "1,3,8,8", "--channels", 0.5, "-o", "taken"),
        "is a file, not a folder",
    )


def test_video_and_optical_flow_inputs_are_known_or_asked_for():
    from fxprune.cli import _usual_shape

    assert _usual_shape("resnet50") == "1,3,224,224"
    assert _usual_shape("inception_v3") == "1,3,299,299"
    assert _usual_shape("mvit_v2_s") == "1,3,16,224,224"
    assert _usual_shape("r3d_18") == "1,3,16,112,112"
    with pytest.raises(fxprune.InputError, match="two images"):
        _usual_shape("raft_small")
