"""Checks that code, commands and links in the README work."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.long
def test_python_blocks_run_one_after_the_other():
    names = {"__name__": "readme"}
    assert len(blocks("python")) >= 3
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["pruned"].report.params_after < names["pruned"].report.params_before


def test_checkout_commands_are_known_to_the_run_script():
    script = (ROOT / "run").read_text(encoding="utf-8")
    commands = re.findall(r"\./run (\w+)", README)
    assert {"demo", "test", "fxprune"} <= set(commands)
    for command in commands:
        assert re.search(rf"^    (\w+ \| )*{command}( \| \w+)*\)$", script, flags=re.MULTILINE), (
            command
        )


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX script")
def test_run_script_explains_itself():
    found = subprocess.run(["sh", ROOT / "run"], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "./run demo" in found.stderr
    assert "./run test" in found.stderr


def test_command_lines_use_options_that_exist():
    from fxprune.cli import app

    lines = [
        line
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith("fxprune ")
    ]
    assert len(lines) >= 3
    for line in lines:
        command = line.split()[1]
        # The terminal is wide, so that the help does not fold option names.
        help_text = (
            CliRunner()
            .invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
            .output
        )
        for option in re.findall(r"(?<= )--?[a-z][a-z-]*", line):
            assert option in help_text, f"{line}: {option}"


def test_files_that_it_links_to_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_example_is_importable_and_has_an_honest_split():
    pytest.importorskip("sklearn")
    from examples import digits

    train_images, test_images, train_labels, test_labels = digits.load_data()
    assert len(train_images) == len(train_labels) == 1347
    assert len(test_images) == len(test_labels) == 450
    assert set(test_labels.tolist()) == set(range(10))
    # The split is the same every time, and no test image is among the training images.
    assert (digits.load_data()[1] == test_images).all()
    seen = {image.numpy().tobytes() for image in train_images}
    assert not any(image.numpy().tobytes() in seen for image in test_images)


@pytest.mark.slow
def test_example_runs(tmp_path):
    import json

    figures = tmp_path / "figures.json"
    subprocess.run(
        [
            sys.executable,
            ROOT / "examples/digits.py",
            "--epochs=4",
            "--finetune=2",
            f"--json={figures}",
        ],
        check=True,
    )
    found = json.loads(figures.read_text())
    assert found["test accuracy, %"]["after"] > 80
    assert found["test accuracy after compensation, %"] > 80
    assert found["test accuracy before fine-tuning, %"] < 50
    assert found["MACs"]["after"] < 0.4 * found["MACs"]["before"]
