"""Tests of the pages and settings for contributors.

Files and commands that they name exist. Hooks and workflows run what the project runs.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PAGES = ["CONTRIBUTING.md", "SECURITY.md"]
YAML = [
    ".pre-commit-config.yaml",
    "CITATION.cff",
    *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(".github/**/*.yml"))),
]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def parsed(name: str) -> Any:
    return pytest.importorskip("yaml").safe_load(text(name))


@pytest.mark.parametrize("page", PAGES)
def test_files_that_it_links_to_exist(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text(page)):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_checkout_exist(page: str) -> None:
    for command in re.findall(r"(?<!\w)\.ci/\w+(?:\.py)?", text(page)):
        assert (ROOT / command).exists(), command
    for command in re.findall(r"\./run (\w+)", text(page)):
        assert re.search(
            rf"^    (\w+ \| )*{command}( \| \w+)*\)$", text("run"), flags=re.MULTILINE
        ), command


def test_the_newest_version_is_the_same_everywhere() -> None:
    """The changelog, the citation and the fallback version name the same newest version.

    The version of the package itself is the git tag.
    """
    first, *others = re.findall(r"^## (.+)$", text("CHANGELOG.md"), flags=re.MULTILINE)
    assert first == "[Unreleased]"
    newest, released = re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", others[0]).groups()
    assert PROJECT["tool"]["hatch"]["version"]["fallback-version"] == newest
    citation = parsed("CITATION.cff")
    assert (citation["version"], str(citation["date-released"])) == (newest, released)
    assert f"\n[{newest}]: " in text("CHANGELOG.md")


@pytest.mark.parametrize("name", YAML)
def test_it_is_yaml(name: str) -> None:
    assert parsed(name)


def test_hooks_have_the_versions_of_the_test_environment() -> None:
    (local,) = parsed(".pre-commit-config.yaml")["repos"]
    assert {hook["id"] for hook in local["hooks"]} == {"ruff", "ruff-format", "mypy", "codespell"}
    for hook in local["hooks"]:
        assert set(hook["additional_dependencies"]) <= set(
            PROJECT["project"]["optional-dependencies"]["test"]
        ), hook["id"]


def test_workflows_run_the_projects_own_commands() -> None:
    for name in (name for name in YAML if "/workflows/" in name):
        for job in parsed(name)["jobs"].values():
            commands = [step["run"] for step in job["steps"] if "run" in step]
            assert commands, name
            assert all((ROOT / command.split()[0]).exists() for command in commands), name


def test_the_workflow_has_every_environment_of_the_matrix() -> None:
    (environments,) = re.findall(r"^all=\((.*)\)$", text(".ci/matrix"), flags=re.MULTILINE)
    assert (
        parsed(".github/workflows/tests.yml")["jobs"]["matrix"]["strategy"]["matrix"][
            "environment"
        ]
        == environments.split()
    )


def test_the_source_distribution_holds_what_these_tests_read() -> None:
    included = {
        path.strip("/")
        for path in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    }
    for name in [*PAGES, *YAML, ".ci/matrix", "CHANGELOG.md", "run"]:
        assert included & {name, Path(name).parts[0]}, name
