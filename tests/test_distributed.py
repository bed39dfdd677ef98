"""Tests of training pruned models in several processes, with DDP and with FSDP2.

The processes end with the weights that one process would have.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from tests.support import ranks as scoring_ranks
from tests.support import training_ranks as ranks
from tests.zoo.blocks import Residual

Weights = dict[str, np.ndarray]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch was built without torch.distributed"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, int], Weights]:
    """Train in two processes, and return a function that reads the weights of one.

    Its arguments are kind, network and rank.
    """
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(ranks.work, (2, str(folder)), nprocs=2)
    return lambda kind, name, rank: dict(np.load(folder / f"{kind}_{name}_{rank}.npz"))


def moved(weights: Weights, others: Weights) -> list[str]:
    return [
        name for name, value in weights.items() if not np.allclose(value, others[name], rtol=1e-6)
    ]


@pytest.mark.long
@pytest.mark.parametrize("name", ranks.NETWORKS)
@pytest.mark.parametrize("kind", ranks.KINDS)
def test_two_processes_end_with_the_weights_of_one(
    kind: str, name: str, found: Callable[[str, str, int], Weights]
) -> None:
    if kind == "fsdp" and not ranks.fsdp_is_there():
        pytest.skip("this PyTorch has no FSDP2 for CPUs")
    alone, before = ranks.alone(name), ranks.arrays(ranks.pruned_network(name).state_dict())
    first, second = (found(kind, name, rank) for rank in range(2))
    assert list(first) == list(second) == list(alone)
    for key, expected in alone.items():
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)
        np.testing.assert_allclose(first[key], expected, rtol=1e-9, atol=1e-13, err_msg=key)
    parameters = {key for key, _ in ranks.pruned_network(name).named_parameters()}
    assert set(moved(alone, before)) == parameters, (
        "three steps must move every parameter, and nothing else"
    )
    assert moved(ranks.alone(name, slice(0, None, 2)), alone), (
        "a process's own images must not be enough"
    )


@pytest.mark.long
@pytest.mark.skipif(
    not scoring_ranks.threads(), reason="this system does not tell a process's threads"
)
def test_pruning_in_a_process_group_does_not_keep_it(tmp_path: Path) -> None:
    """Pruning does not keep a destroyed process group alive.

    Such a group leaves threads behind, which sometimes abort the process at its end.
    """
    torch.multiprocessing.spawn(scoring_ranks.visit, (1, str(tmp_path)), nprocs=1)
    threads = json.loads((tmp_path / "threads.json").read_text())
    assert any("gloo" in name for name in threads["during"])
    assert not any("gloo" in name for name in threads["after"])


def test_batch_normalisation_is_synchronised_by_the_usual_conversion() -> None:
    """The usual conversion to SyncBatchNorm converts every batch norm of a pruned model.

    SyncBatchNorm trains on GPUs only, but the converted graph can be checked anywhere.
    """
    pruned = fxprune.prune(
        Residual(16).eval(), torch.zeros(1, 3, 8, 8), channels=0.5
    ).model.train()
    image = torch.randn(2, 3, 8, 8)
    state, names = (
        {k: v.clone() for k, v in pruned.state_dict().items()},
        [name for name, _ in pruned.named_modules()],
    )
    plain = [name for name, module in pruned.named_modules() if isinstance(module, nn.BatchNorm2d)]
    expected = pruned.eval()(image)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(pruned.train())
    assert len(plain) == 5
    assert [
        name for name, module in converted.named_modules() if isinstance(module, nn.SyncBatchNorm)
    ] == plain
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
    assert [name for name, _ in converted.named_modules()] == names
    assert {k: v.shape for k, v in converted.state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }
    assert all(torch.equal(converted.state_dict()[key], value) for key, value in state.items())
    converted.graph.lint()
    torch.testing.assert_close(converted.eval()(image), expected)


@pytest.mark.long
def test_a_distributed_model_is_saved_and_read_like_any_other(
    tmp_path: Path, found: Callable[[str, str, int], Weights]
) -> None:
    """Weights gathered from processes have the plain model's names and can be loaded into it."""
    torch.manual_seed(0)
    dense = Residual(16).double().eval()
    pruned = fxprune.prune(dense, torch.zeros(2, 3, 8, 8, dtype=torch.float64), channels=0.5)
    trained = found("fsdp" if ranks.fsdp_is_there() else "ddp", "residual", 0)
    pruned.model.load_state_dict(
        {name: torch.from_numpy(value) for name, value in trained.items()}
    )
    pruned.save(tmp_path)
    loaded = fxprune.load(tmp_path, lambda: dense).model.state_dict()
    assert all(np.array_equal(loaded[name].numpy(), value) for name, value in trained.items())
