"""Tests of the command line, with output for people and for machines."""

import json
import sys
import textwrap

import pytest
import safetensors.torch
import torch
import torchvision
from typer.testing import CliRunner

import fxprune
from fxprune.cli import app
from fxprune.latency import Timing

TINY = """
    import torch
    from torch import nn

    def build():
        first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        return nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(6 * 16, 5))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Linear(4, 16), nn.Linear(6, 16), nn.Linear(16, 2)

        def forward(self, x, y):
            return self.head(torch.relu(self.left(x) + self.right(y)))

    NUMBER = 3

    def first_units(view):
        return -torch.arange(view.group.size)

    class LastUnits:
        def scores(self, coupling, model):
            import numpy
            return numpy.arange(coupling.context.units.count)

    last_units = LastUnits()

    def norm(model):
        with torch.no_grad():
            return model(torch.ones(1, 3, 8, 8)).norm().item()
"""


def run(*arguments):
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], env={"COLUMNS": "200"}
    )


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Write a module of the user's into the folder that the command runs in."""
    (tmp_path / "tinymodels.py").write_text(textwrap.dedent(TINY))
    monkeypatch.chdir(tmp_path)
    # undone after the test, together with what the command adds to the path
    monkeypatch.syspath_prepend(str(tmp_path))
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
        "manifest.json",
        "model.safetensors",
        "plan.json",
        "report.json",
        "report.txt",
    ]
    # no partial result is left
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "report.txt").read_text() == result.stdout

    loaded = fxprune.load(out, torchvision.models.resnet18).model.eval()
    torch.manual_seed(0)
    plan = fxprune.Plan.from_json((out / "plan.json").read_text())
    expected = fxprune.apply(plan, torchvision.models.resnet18(weights=None)).model.eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(image), expected(image))


def test_prune_replaces_an_earlier_result(tiny):
    for share in (0.5, 0.25):
        assert (
            run(
                "prune", "tinymodels:build", "--input", "1,3,8,8", "--channels", share, "-o", "out"
            ).exit_code
            == 0
        )
    report = json.loads((tiny / "out" / "report.json").read_text())
    assert [group["kept"] for group in report["groups"] if group["total"] == 8] == [2]
    assert len(list((tiny / "out").iterdir())) == 5  # no partial result is left


def test_only_names_of_torchvision_need_torchvision(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    fails(
        run("inspect", "resnet18"),
        "'resnet18' is read as the name of a torchvision model",
        'pip install "fxprune[cli]"',
    )
    assert run("inspect", "tinymodels:build", "--input", "1,3,8,8").exit_code == 0


def test_own_factory_keep_and_rounding(tiny):
    common = ["prune", "tinymodels:build", "--input", "1,3,8,8", "--channels", 0.5, "--json"]
    kept = {group["total"]: group["kept"] for group in json.loads(run(*common).stdout)["groups"]}
    assert kept == {8: 4, 6: 3}
    kept = {
        group["total"]: group["kept"]
        for group in json.loads(run(*common, "--min-channels", 5).stdout)["groups"]
    }
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
    assert "% is an output of the model" in result.stdout


def test_inspect_full_prints_the_coupling(tiny):
    result = run("inspect", "tinymodels:build", "--input", "1,3,8,8", "--full")
    import tinymodels

    assert (
        result.stdout.strip()
        == str(fxprune.analyze(tinymodels.build().eval(), torch.randn(1, 3, 8, 8))).strip()
    )


def test_inspect_json(tiny):
    data = json.loads(run("inspect", "tinymodels:build", "--input", "1,3,8,8", "--json").stdout)
    assert sorted(group["units"] for group in data["groups"]) == [6, 8]
    assert set(data) == {
        "groups",
        "pinned",
        "pinned_macs",
        "untouched",
        "decisions",
        "not_one_graph",
        "not_set",
    }
    assert data["not_one_graph"] == ""
    assert 0 < sum(data["pinned_macs"].values()) < 1
    assert all(pinned["reason"] for pinned in data["pinned"])


def test_version_and_help():
    assert run("--version").stdout == f"fxprune {fxprune.__version__}\n"
    for command in ("inspect", "plan", "prune", "apply", "compare"):
        assert command in run("--help").stdout


def test_unknown_model_suggests_a_name():
    fails(
        run("inspect", "resnet51"),
        "No torchvision model is named 'resnet51'",
        "Did you mean",
        "resnet50",
    )


def test_unknown_weights_list_the_choices():
    fails(
        run("inspect", "resnet18", "--weights", "NONSENSE"),
        "resnet18 has no weights named 'NONSENSE'",
        "IMAGENET1K_V1",
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


FACTORIES = """
    import sys
    import torch
    from torch import nn

    def raises():
        raise RuntimeError("the user's own")

    def wants(width):
        return nn.Linear(3, width)

    def pinned():
        return nn.Sequential(nn.Conv2d(3, 4, 3))

    class Odd:
        @property
        def build(self):
            raise OSError("the property's own")

    odd = Odd()
"""


@pytest.fixture
def factories(tiny):
    (tiny / "factories.py").write_text(textwrap.dedent(FACTORIES))
    (tiny / "unfinished.py").write_text("def build(:\n")
    (tiny / "failing.py").write_text("raise ValueError('the import itself fails')\n")
    return tiny


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            "factories:raises",
            [
                "factories:raises, called without arguments, raised RuntimeError: the user's own",
                "factories.py:",
            ],
        ),
        (
            "factories:wants",
            ["factories:wants, called without arguments, raised TypeError", "width"],
        ),
        ("factories:odd.build", ["the property's own"]),
        ("unfinished:build", ["import of 'unfinished' raised SyntaxError"]),
        (
            "failing:build",
            ["import of 'failing' raised ValueError: the import itself fails (at failing.py:1)"],
        ),
        (
            "../factories:raises",
            ["'../factories:raises' is no Python name", "package.module:attribute"],
        ),
        ("factories.py:raises", ["Cannot import 'factories.py'"]),
        (".factories:raises", ["is no Python name"]),
        ("factories:", ["must be named as package.module:attribute"]),
        (":raises", ["must be named as package.module:attribute"]),
        ("factories:a b", ["is no Python name"]),
    ],
)
def test_a_model_that_cannot_be_built(spec, said, factories):
    fails(run("prune", spec, "--input", "1,3,8,8", "--channels", 0.5), *said)


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune", "tinymodels:build", "--input", "1,3,8,8", "--latency", 0.5, "--device", "tpu"),
        (
            "prune",
            "tinymodels:build",
            "--input",
            "1,3,8,8",
            "--latency",
            0.5,
            "--device",
            "nonsense",
        ),
        ("bench", "tinymodels:build", "--input", "1,3,8,8", "--device", "tpu"),
        ("bench", "tinymodels:build", "--input", "1,3,8,8", "--batch", ","),
        ("bench", "tinymodels:build", "--input", "1,3,8,8", "--rounds", 0),
        ("bench", "tinymodels:build", "--input", "1,3,8,8", "--seconds", "nan"),
        ("prune", "tinymodels:build", "--input", "1,3,8,8"),
        ("prune", "tinymodels:build", "--input", "99999999999,99999999999", "--channels", 0.5),
        ("prune", "tinymodels:build", "--input", "1,5,8,8", "--channels", 0.5),
        (
            "prune",
            "tinymodels:build",
            "--input",
            "1,3,8,8",
            "--channels",
            0.5,
            "--criterion",
            "tinymodels:build",
        ),
        (
            "prune",
            "tinymodels:build",
            "--input",
            "1,3,8,8",
            "--channels",
            0.5,
            "--criterion",
            "l9",
        ),
        (
            "prune",
            "tinymodels:build",
            "--input",
            "1,3,8,8",
            "--channels",
            0.5,
            "-o",
            "/proc/nowhere",
        ),
        (
            "plan",
            "tinymodels:build",
            "--input",
            "1,3,8,8",
            "--channels",
            0.5,
            "-o",
            "/proc/nowhere",
        ),
        (
            "export",
            "tinymodels:build",
            "--input",
            "1,3,8,8",
            "--pt2",
            "/proc/nowhere/net.pt2",
            "--no-check",
        ),
        ("export", "tinymodels:build", "--input", "1,3,8,8", "--pt2", "net.txt"),
        ("apply", "missing.json", "tinymodels:build"),
        ("apply", ".", "tinymodels:build"),
        ("apply", "broken.json", "tinymodels:build"),
        (
            "plan",
            "tinymodels:build",
            "--input",
            "1,3,8,8",
            "--channels",
            0.5,
            "--saved",
            "missing",
        ),
        ("inspect", "tinymodels:build", "--input", "1,3,8,8", "--checkpoint", "."),
    ],
    ids=lambda arguments: " ".join(map(str, arguments[:1] + arguments[4:])),
)
def test_a_slip_is_told_in_a_sentence(arguments, tiny):
    """A wrong argument or file gives exit status 2 and an error without a traceback."""
    (tiny / "broken.json").write_text('{"schema": 3, "groups": [{"name": 3}]}')
    fails(run(*arguments))


@pytest.mark.parametrize(
    "arguments",
    [(), ("prune",), ("prune", "resnet18", "--channels", "half"), ("prune", "--nonsense")],
)
def test_a_command_line_that_is_none(arguments):
    """A command line that cannot be parsed shows the usage."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert "Usage" in result.output


def test_a_warning_is_a_sentence(factories):
    """A warning is printed without the file that raised it."""
    result = run("prune", "factories:pinned", "--input", "1,3,8,8", "--channels", 0.5)
    assert result.exit_code == 0, result.output
    assert (
        "warning: channels=0.5 was asked for, and nothing in this model can be pruned"
        in result.stderr
    )
    assert "advice.py" not in result.stderr


def test_a_bug_has_another_exit_status_and_its_traceback_on_demand(tiny, monkeypatch):
    def fails_inside(*arguments, **options):
        return {}["missing"]

    monkeypatch.setattr("fxprune.cli.coupling_to_dict", fails_inside)
    result = run("inspect", "tinymodels:build", "--input", "1,3,8,8", "--json")
    assert result.exit_code == 1
    assert "KeyError: 'missing'" in result.stderr
    assert "FXPRUNE_DEBUG=1" in result.stderr
    monkeypatch.setenv("FXPRUNE_DEBUG", "1")
    result = run("inspect", "tinymodels:build", "--input", "1,3,8,8", "--json")
    assert isinstance(result.exception, fxprune.InternalError)
    assert isinstance(result.exception.__cause__, KeyError)


def test_error_of_the_engine_is_one_line_without_traceback(tiny):
    fails(
        run("prune", "tinymodels:build", "--input", "1,3,8,8", "--channels", 1.5),
        "channels",
        "1.5",
    )
    fails(
        run(
            "prune",
            "tinymodels:build",
            "--input",
            "1,3,8,8",
            "--channels",
            0.5,
            "--keep",
            "nowhere.*",
        ),
        "nowhere.*",
    )


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


def test_inputs_of_torchvision_models_are_known():
    from fxprune.cli.loading import usual_shapes

    assert usual_shapes("resnet50") == ["1,3,224,224"]
    assert usual_shapes("inception_v3") == ["1,3,299,299"]
    assert usual_shapes("mvit_v2_s") == ["1,3,16,224,224"]
    assert usual_shapes("r3d_18") == ["1,3,16,112,112"]
    assert usual_shapes("raft_small") == 2 * ["1,3,128,128"]
    assert usual_shapes("ssd300_vgg16") == ["3,320,320+3,300,400+"]


@pytest.mark.long
def test_an_optical_flow_from_the_command_line():
    result = run("prune", "raft_small", "--channels", 0.5, "--verify")
    assert result.exit_code == 0, result.output
    assert "in the model's own class" in result.stdout
    assert "equals the masked original" in result.stdout


def test_a_list_of_tensors_is_an_input(tiny):
    from fxprune.cli.loading import example

    assert [tuple(t.shape) for t in example("3,8,8+3,16,4+")] == [
        tuple(t.shape) for t in example("3,8,8+3,16,4")
    ]
    assert isinstance(example("3,8,8+"), list)
    assert isinstance(example("3,8,8"), torch.Tensor)
    for text in ("3,8+x", "+", "3,8++3,8"):
        fails(
            run("inspect", "tinymodels:build", "--input", text), "is not a shape", "+ behind each"
        )


# ---- budgets and criteria

TINY_ARGS = ["tinymodels:build", "--input", "1,3,8,8"]


def groups_of(result):
    assert result.exit_code == 0, result.output
    return {group["total"]: group["kept"] for group in json.loads(result.stdout)["groups"]}


def test_every_budget_is_an_option(tiny):
    import tinymodels

    model, image = tinymodels.build().eval(), torch.zeros(1, 3, 8, 8)
    for options, arguments in (
        (["--macs", 0.5], {"macs": 0.5}),
        (["--params", 0.6], {"params": 0.6}),
        (["--macs", 0.7, "--params", 0.6], {"macs": 0.7, "params": 0.6}),
        (["--channels", 0.5, "--scope", "global"], {"channels": 0.5, "scope": "global"}),
        (["--layer", "0=0.25", "--layer", "2.*=0.5"], {"layers": {"0": 0.25, "2.*": 0.5}}),
        (["--macs", 0.8, "--units", "heads"], {"macs": 0.8, "units": "heads"}),
        (
            ["--macs", 0.8, "--units", "heads", "--units", "0=dims"],
            {"macs": 0.8, "units": {"*": "heads", "0": "dims"}},
        ),
        (["--macs", 0.6, "--round-to", 2], {"macs": 0.6, "round_to": 2}),
        (["--macs", 0.6, "--min-channels", 5], {"macs": 0.6, "min_channels": 5}),
        (["--macs", 0.6, "--max-ratio", 0.5], {"macs": 0.6, "max_ratio": 0.5}),
        (
            ["--macs", 0.6, "--max-ratio", 0.9, "--max-ratio", "2=0.25"],
            {"macs": 0.6, "max_ratio": {"*": 0.9, "2": 0.25}},
        ),
        (["--macs", 0.6, "--scopes", "isomorphic"], {"macs": 0.6, "scopes": "isomorphic"}),
        (["--macs", 0.6, "--scopes", "a=0"], {"macs": 0.6, "scopes": {"a": "0"}}),
        (["--macs", 0.8, "--keep", "0"], {"macs": 0.8, "keep": "0"}),
        (["--macs", 0.5, "--criterion", "l2"], {"macs": 0.5, "criterion": "l2"}),
    ):
        torch.manual_seed(0)
        expected = fxprune.prune(tinymodels.build().eval(), image, **arguments).plan
        result = run("plan", *TINY_ARGS, *options, "--json")
        assert result.exit_code == 0, result.output
        assert fxprune.Plan.from_json(result.stdout) == expected, options
    assert fxprune.prune(model, image, layers={"0": 0.25}).plan.groups[0].kept


def test_a_latency_budget(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path))
    # Calls of a tenth of a millisecond cannot be timed reliably on a busy machine.
    monkeypatch.setattr(
        "fxprune.latency_budget.time_models",
        lambda models, *_, **__: dict.fromkeys(models, Timing(1, 1, 1, 1)),
    )
    result = run("prune", *TINY_ARGS, "--latency", 1.0, "--device", "cpu", "--batch", 2, "--json")
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)["latency"]
    assert row["setting"] == "on cpu, fp32, eager, channels-last, batch 2"
    assert (row["before"], row["after"], row["forecast"]) == (1, 1, 1)
    result = run(
        "compare",
        *TINY_ARGS,
        "--criteria",
        "cpmc,l2",
        "--latency",
        1.0,
        "--device",
        "cpu",
        "--json",
    )
    assert result.exit_code == 0, result.output
    result = run("plan", *TINY_ARGS, "--macs", 0.5, "--device", "cpu")
    assert result.exit_code == 2
    assert "say how --latency is measured" in result.stderr
    result = run("plan", *TINY_ARGS, "--latency", 0.5, "--device", "cpu", "--mode", "cudagraph")
    assert result.exit_code == 2
    assert "needs a GPU" in result.stderr


def test_a_criterion_of_ones_own(tiny):
    kept = []
    for name in ("first_units", "last_units"):
        result = run(
            "plan", *TINY_ARGS, "--channels", 0.5, "--criterion", f"tinymodels:{name}", "--json"
        )
        kept.append([group.kept for group in fxprune.Plan.from_json(result.stdout).groups])
    assert kept == [[(0, 1, 2, 3), (0, 1, 2)], [(4, 5, 6, 7), (3, 4, 5)]]


def test_the_sensitivity_to_a_score_of_ones_own(tiny):
    given = ("sensitivity", *TINY_ARGS, "--score", "tinymodels:norm", "--removed", "0.5")
    result = run(*given, "--json", "--cache", tiny / "scores.json", "--criterion", "l2")
    found = fxprune.Sensitivity.from_dict(json.loads(result.stdout))
    assert [(p.group, p.kept, p.total) for p in found.points] == [
        ("0.weight:0", 4, 8),
        ("2.weight:0", 3, 6),
    ]
    assert (tiny / "scores.json").exists()
    assert "units removed" in run(*given).stdout
    assert "2.weight:0" not in run(*given, "--keep", "2").stdout


def test_sensitivity_refuses(tiny):
    given = ("sensitivity", *TINY_ARGS, "--score")
    fails(run(*given, "tinymodels:norm", "--removed", "half"), "--removed 'half'", "0.25,0.5")
    fails(run(*given, "tinymodels:NUMBER"), "no function")
    fails(run(*given, "tinymodels:nothing"), "has no 'nothing'")


def test_options_that_make_no_sense(tiny):
    fails(run("plan", *TINY_ARGS), "nothing says how much to prune")
    fails(run("prune", *TINY_ARGS, "--macs", 0.5, "--scope", "everywhere"), "scope='everywhere'")
    fails(run("prune", *TINY_ARGS, "--macs", 0.001), "macs=0.001 cannot be reached")
    for layer in ("0.5", "0=half", "=0.5"):
        fails(run("prune", *TINY_ARGS, "--layer", layer), f"--layer {layer!r} is not GLOB=SHARE")
    fails(run("prune", *TINY_ARGS, "--layer", "nothing*=0.5"), "'nothing*' matches no layer")
    fails(run("prune", *TINY_ARGS, "--max-ratio", "half"), "is not GLOB=SHARE")
    fails(run("prune", *TINY_ARGS, "--scopes", "a=0", "--scopes", "b"), "'b' is not NAME=GLOB")
    fails(run("prune", *TINY_ARGS, "--macs", 0.5, "--scopes", "alike"), "scopes is 'alike'")
    fails(
        run("prune", *TINY_ARGS, "--macs", 0.5, "--criterion", "l3"),
        "No criterion is named 'l3'",
        "cpmc",
    )
    fails(run("prune", *TINY_ARGS, "--macs", 0.5, "--criterion", "tinymodels:NUMBER"), "is a int")
    fails(
        run("prune", *TINY_ARGS, "--macs", 0.5, "--criterion", "tinymodels:none"), "has no 'none'"
    )
    fails(
        run("prune", *TINY_ARGS, "--macs", 0.5, "--criterion", "tinymodels:"),
        "a criterion 'tinymodels:'",
    )


# ---- plan and apply


def test_plan_writes_one_file_and_says_what_it_brings(tiny):
    result = run("plan", *TINY_ARGS, "--channels", 0.5, "-o", "deep/plan.json")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("parameters ")
    assert "0.weight:0: 4 of 8" in result.stdout
    assert [path.name for path in (tiny / "deep").iterdir()] == ["plan.json"]
    plan = fxprune.Plan.from_json((tiny / "deep" / "plan.json").read_text())
    assert str(plan) in result.stdout


def test_apply_is_prune_in_two_steps(tiny):
    import tinymodels

    torch.save(tinymodels.build().state_dict(), "weights.pt")
    common = [*TINY_ARGS, "--checkpoint", "weights.pt"]
    assert run("plan", *common, "--channels", 0.5, "-o", "plan.json").exit_code == 0
    applied = run(
        "apply",
        "plan.json",
        "tinymodels:build",
        "--checkpoint",
        "weights.pt",
        "-o",
        "one",
        "--verify",
    )
    assert applied.exit_code == 0, applied.output
    assert "equals the masked original" in applied.stdout
    assert run("prune", *common, "--channels", 0.5, "-o", "two").exit_code == 0
    for name in ("plan.json", "model.safetensors"):
        assert (tiny / "one" / name).read_bytes() == (tiny / "two" / name).read_bytes()
    report = json.loads(run("apply", "plan.json", "tinymodels:build", "--json").stdout)
    assert (
        report["params_after"]
        == json.loads((tiny / "two" / "report.json").read_text())["params_after"]
    )


def test_apply_that_cannot_be(tiny):
    """``apply`` refuses a plan of another model, and a file that holds no plan."""
    assert run("plan", *TINY_ARGS, "--channels", 0.5, "-o", "plan.json").exit_code == 0
    fails(run("apply", "plan.json", "tinymodels:Model"), "another architecture than this Model")
    fails(run("apply", "missing.json", "tinymodels:build"), "Cannot read missing.json")
    (tiny / "text.json").write_text("text")
    fails(run("apply", "text.json", "tinymodels:build"), "not a plan")
    (tiny / "binary.json").write_bytes(b"\xff\xfe")
    fails(run("apply", "binary.json", "tinymodels:build"), "is not text")
    (tiny / "file").write_text("text")
    fails(
        run("plan", *TINY_ARGS, "--channels", 0.5, "-o", "file/plan.json"), "Cannot write to --out"
    )


def test_an_earlier_result_is_pruned_again(tiny):
    import tinymodels

    assert run("prune", *TINY_ARGS, "--channels", 0.5, "-o", "one").exit_code == 0
    again = run("prune", *TINY_ARGS, "--saved", "one", "--channels", 0.5, "-o", "two")
    assert again.exit_code == 0, again.output
    loaded = fxprune.load("two", tinymodels.build)
    assert [len(plan.groups[0].kept) for plan in loaded.plan.chain] == [4, 2]
    first = fxprune.load("one", tinymodels.build).model.get_parameter("0.weight")
    assert torch.equal(
        loaded.model.get_parameter("0.weight"), first[list(loaded.plan.groups[0].kept)]
    )
    replayed = run("apply", "two/plan.json", "tinymodels:build", "--json")
    assert json.loads(replayed.stdout)["params_after"] == loaded.report.params_after
    fails(
        run("prune", *TINY_ARGS, "--saved", "one", "--checkpoint", "w.pt", "--channels", 0.5),
        "leave out",
    )
    (tiny / "one" / "model.safetensors").write_bytes(b"")
    fails(run("prune", *TINY_ARGS, "--saved", "one", "--channels", 0.5), "0 bytes where")


# ---- compare


def test_compare_for_machines(tiny):
    first, last = "tinymodels:first_units", "tinymodels:last_units"
    result = run(
        "compare", *TINY_ARGS, "--criteria", f"cpmc,{first},{last}", "--channels", 0.5, "--json"
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert list(data["criteria"]) == ["cpmc", first, last]
    assert data["groups"] == [
        {"name": name, "units": units, "kept": dict.fromkeys(data["criteria"], units // 2)}
        for name, units in (("0.weight:0", 8), ("2.weight:0", 6))
    ]
    assert data["overlap"][first][last] == data["overlap"][last][first] == 0
    assert data["overlap"]["cpmc"]["cpmc"] == data["overlap"][first][first] == 1
    # Each criterion removes 7 units. Those of first and last are complementary, so each of cpmc's
    # 7 units is removed by one of these two. With x common units the overlap is x / (14 - x).
    shared = [
        round(14 * o / (1 + o))
        for o in (data["overlap"]["cpmc"][first], data["overlap"]["cpmc"][last])
    ]
    assert sum(shared) == 7
    report = json.loads(run("prune", *TINY_ARGS, "--channels", 0.5, "--json").stdout)
    for key in ("macs_before", "macs_after", "params_before", "params_after"):
        assert data["criteria"]["cpmc"][key] == report[key]
    assert {row["units_after"] for row in data["criteria"].values()} == {7}


def test_compare_for_people(tiny):
    result = run("compare", *TINY_ARGS, "--criteria", "cpmc, l1,random", "--macs", 0.5)
    assert result.exit_code == 0, result.output
    assert "what is left" in result.stdout
    assert "removed by both" in result.stdout
    for name in ("cpmc", "l1", "random"):
        assert f"pruning by {name}" in result.stderr
    full = run("compare", *TINY_ARGS, "--criteria", "l1,l2", "--channels", 0.5, "--full").stdout
    short = run("compare", *TINY_ARGS, "--criteria", "l1,l2", "--channels", 0.5).stdout
    assert "2 of 2 groups" in full
    assert "0.weight:0" in full
    assert "0.weight:0" not in short  # the criteria keep equally many there


def test_compare_that_removes_nothing_agrees(tiny):
    data = json.loads(
        run("compare", *TINY_ARGS, "--criteria", "l1,l2", "--channels", 1.0, "--json").stdout
    )
    assert data["overlap"] == {"l1": {"l1": 1.0, "l2": 1.0}, "l2": {"l1": 1.0, "l2": 1.0}}


@pytest.mark.parametrize("criteria", ["", "cpmc", "l1,l1", "l1,l1,l2"])
def test_compare_needs_two(criteria, tiny):
    fails(
        run("compare", *TINY_ARGS, "--criteria", criteria, "--macs", 0.5),
        "must name two criteria or more",
    )


def test_compare_names_an_unknown_criterion(tiny):
    fails(
        run("compare", *TINY_ARGS, "--criteria", "cpmc,nonsense", "--macs", 0.5),
        "No criterion is named 'nonsense'",
    )


@pytest.mark.long
def test_bench_prints_a_line_per_model_and_setting(tiny):
    quick = ("--rounds", 2, "--seconds", 0.005, "--device", "cpu")
    result = run(
        "bench",
        *TINY_ARGS,
        "--channels",
        0.5,
        "--batch",
        "1,4",
        "--precision",
        "fp32,bf16",
        *quick,
        "--json",
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    names = ["as given", "pruned", "pruned, deployed"]
    assert [(row["precision"], row["batch"], row["model"]) for row in rows] == [
        (precision, batch, name)
        for precision in ("fp32", "bf16")
        for batch in (1, 4)
        for name in names
    ]
    assert all(
        row["quartiles"][0] <= row["milliseconds"] <= row["quartiles"][1]
        and row["measurements"] == 2
        for row in rows
    )
    result = run("bench", *TINY_ARGS, *quick)
    assert result.exit_code == 0, result.output
    assert "fp32, eager, batch 1, on the CPU" in result.stdout
    assert "as given" in result.stdout
    assert "pruned" not in result.stdout


def test_bench_refuses(tiny):
    fails(run("bench", *TINY_ARGS, "--precision", "fp8"), "precision='fp8'", "bf16")
    fails(run("bench", *TINY_ARGS, "--batch", "many"), "--batch 'many' is not a list of sizes")


@pytest.mark.long
def test_export_of_a_saved_model(tiny):
    assert run("prune", *TINY_ARGS, "--channels", 0.5, "--out", "small").exit_code == 0
    result = run("export", *TINY_ARGS, "--saved", "small", "--pt2", "small.pt2")
    assert result.exit_code == 0, result.output
    assert "small.pt2: largest relative error" in result.stdout
    program = torch.export.load(tiny / "small.pt2")
    assert max(t.shape[0] for t in program.state_dict.values() if t.dim() == 4) == 4
    fails(run("export", *TINY_ARGS), "nothing to write: give --onnx FILE.onnx or --pt2 FILE.pt2")


def test_a_module_that_ends_the_program(tiny):
    (tiny / "ending.py").write_text("import sys\nsys.exit(0)\n")
    fails(run("inspect", "ending:build", "--input", "1,3,8,8"), "sys.exit(0)", "code of yours")


def test_text_is_printed_as_it_is(tiny):
    fails(run("inspect", "a:b:c", "--input", "1,3,8,8"), "'a:b:c'")


@pytest.mark.parametrize("held", [[1], None, {0: torch.zeros(1)}, {"state_dict": "text"}])
def test_a_checkpoint_that_holds_something_else(held, tiny):
    torch.save(held, tiny / "other.pt")
    fails(
        run("inspect", "tinymodels:build", "--input", "1,3,8,8", "--checkpoint", "other.pt"),
        "other.pt",
        "state_dict()",
    )
