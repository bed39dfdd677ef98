"""Settings that every test shares."""

from collections.abc import Iterator

import pytest
import torch

from tests.specs import profiles  # noqa: F401  registers the Hypothesis profiles before pytest looks one up


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # small tensors: a thread per core costs more than it brings, and xdist has the cores


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same seed and leaves the caller's random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
