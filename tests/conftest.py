"""Settings that every test shares."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# registers the Hypothesis profiles before pytest looks one up
from tests.specs import profiles  # noqa: F401


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast",
        action="store_true",
        help="one case of every test, without those marked slow or long",
    )


def pytest_configure(config: pytest.Config) -> None:
    # tensors are small, so threads cost more than they gain, and xdist uses the cores
    torch.set_num_threads(1)
    if config.getoption("--fast"):
        settings.load_profile("fast")


@pytest.hookimpl(trylast=True)  # after slow tests have been deselected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--fast"):
        return
    first: dict[tuple[Path, str], pytest.Item] = {}
    for item in items:
        if item.get_closest_marker("long") is None:
            first.setdefault((item.path, getattr(item, "originalname", item.name)), item)
    kept = list(first.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same seed and leaves the caller's random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
