"""Tests of pruning on a device other than the CPU.

Where torch sees a GPU, tests/test_whole.py prunes on that as well.
"""

import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parent / "elsewhere" / "checks.py"


@pytest.mark.long
@pytest.mark.parametrize(
    "which",
    [
        "zoo",
        "few or python or constants or criterion",
        pytest.param("family", marks=pytest.mark.slow),
    ],
)
def test_elsewhere(which: str) -> None:
    """Pruning works on a device written in Python, whose tensors cannot meet those of the CPU.

    See tests/support/elsewhere.py.
    """
    names = " or ".join(f"test_{name}" for name in which.split(" or "))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        "-k",
        names,
        str(CHECKS),
    ]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=CHECKS.parents[2]
    )
    assert ran.returncode == 0, ran.stdout[-5000:]
