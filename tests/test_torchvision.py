"""Every torchvision model outside detection and optical flow is pruned exactly.

fxprune has no code for any of them.
"""

from __future__ import annotations

import contextlib

import filelock
import pytest
from torchvision import models

import fxprune
from tests.torchvision_models import CASES, EXCLUDED_MODULES, Case, parameter_count

#: At ``channels=0.5``, a weight keeps a quarter of its elements if both axes shrink, and half of
#: them if only one does (the classifier).
MOST_LEFT = 0.46
LARGEST_ERROR = 1e-9

GIANT = 250_000_000
"""Parameters above which models are checked one at a time.

In double precision, two such models need more than 24 GB together.
"""


def _parameter(case: Case) -> object:
    return pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else [])


def test_every_model_is_covered() -> None:
    """The list is torchvision's own, and no model is left out by its name."""
    excluded = [
        name
        for name in models.list_models()
        if models.get_model_builder(name).__module__.split(".")[2] in EXCLUDED_MODULES
    ]
    assert sorted([*excluded, *CASES]) == sorted(models.list_models())
    assert len(CASES) >= 107


@pytest.mark.parametrize("case", [_parameter(case) for case in CASES.values()])
def test_prunes_exactly(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    """At half the channels, a model equals its masked original and is less than half as large."""
    # the test processes of a run share this folder
    alone = filelock.FileLock(tmp_path_factory.getbasetemp().parent / "giants.lock")
    with alone if case.parameters > GIANT else contextlib.nullcontext():
        model = case.build()
        # in float64, with random weights and inputs
        pruned = fxprune.prune(model, case.inputs(), channels=0.5, verify=True)
    assert pruned.report.error is not None
    assert pruned.report.error <= LARGEST_ERROR
    left = parameter_count(pruned.model) / parameter_count(model)
    assert left <= MOST_LEFT, f"{left:.3f} of the parameters are left"
