"""What one process of a process group does in the tests of distributed scores.

Spawned processes import this module by name.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.criteria import (
    OBDC,
    Activation,
    ActivationVariance,
    Fisher,
    HessianDiagonal,
    Taylor,
    Wanda,
)
from fxprune.errors import ArgumentError

Batch = tuple[Tensor, Tensor]
KINDS = ("taylor", "fisher", "hessian", "obdc", "activation", "variance", "wanda")


def network() -> nn.Module:
    """Return a network that is the same in every process."""
    torch.manual_seed(3)
    layers = [
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 5),
    ]
    return nn.Sequential(*layers).double()


def batches() -> list[Batch]:
    """Return an odd number of batches of different sizes."""
    generator = torch.Generator().manual_seed(4)
    sizes = (1, 4, 2, 3, 5)
    return [
        (
            torch.randn(n, 3, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(5, (n,), generator=generator),
        )
        for n in sizes
    ]


def scores(own: list[Batch]) -> dict[str, np.ndarray]:
    """Return this process's scores from its batches, for each criterion that reads data."""
    model = network()
    coupling = fxprune.analyze(model, torch.zeros(2, 3, 6, 6, dtype=torch.float64))
    of_loss = (kind(own, F.cross_entropy) for kind in (Taylor, Fisher, HessianDiagonal, OBDC))
    criteria = *of_loss, Activation(own), ActivationVariance(own), Wanda(own)
    return {
        kind: criterion.scores(coupling, model)
        for kind, criterion in zip(KINDS, criteria, strict=True)
    }


@contextlib.contextmanager
def process_group(rank: int, size: int, meeting: str) -> Iterator[None]:
    """Join a process group for the duration of the block."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def threads() -> list[str]:
    """Return the names of this process's threads; empty if the system does not tell."""
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


def visit(rank: int, size: int, folder: str) -> None:
    """Prune, and record the threads that run in the process group and after it."""
    with process_group(rank, size, f"{folder}/meeting"):
        fxprune.prune(network(), torch.zeros(2, 3, 6, 6, dtype=torch.float64), channels=0.5)
        during = threads()
    (Path(folder) / "threads.json").write_text(json.dumps({"during": during, "after": threads()}))


def work(rank: int, size: int, folder: str) -> None:
    """Score with a part of the batches, then with all of them in one process, then with none."""
    torch.set_num_threads(1)
    with process_group(rank, size, f"{folder}/meeting"):
        found = scores(batches()[rank::size])
        lopsided = scores(batches() if rank == 0 else [])
        try:
            scores([])
        except ArgumentError as error:
            refusal = str(error)
        else:
            refusal = ""
        whole = {f"lopsided_{kind}": value for kind, value in lopsided.items()}
        np.savez(Path(folder) / f"{rank}.npz", refusal=np.array(refusal), **found, **whole)
