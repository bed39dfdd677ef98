"""What one process of a process group does in the tests of distributed training.

Spawned processes import this module by name.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

import fxprune
from tests.support.ranks import Batch, process_group
from tests.zoo.attention import PackedAttention, Transformer
from tests.zoo.blocks import Residual

NETWORKS = ("residual", "transformer")
KINDS = ("ddp", "fsdp")
STEPS = 3


def fsdp_is_there() -> bool:
    """Tell whether this PyTorch has FSDP2, and gloo to run it on CPUs."""
    if not distributed.is_available() or not distributed.is_gloo_available():
        return False
    from torch.distributed import fsdp

    return hasattr(fsdp, "fully_shard")


def pruned_network(name: str) -> nn.Module:
    """Return a network with half of its units pruned, the same in every process.

    It is in eval mode, so that no statistics depend on which process has which images.
    """
    torch.manual_seed(3)
    dense = (
        (Residual(16) if name == "residual" else Transformer(16, PackedAttention)).double().eval()
    )
    for buffer in dense.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return fxprune.prune(dense, torch.zeros(2, 3, 8, 8, dtype=torch.float64), channels=0.5).model


def batches() -> Iterator[Batch]:
    """Yield one batch for each step."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(STEPS):
        images = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
        yield images, torch.randint(10, (8,), generator=generator)


def fit(called: nn.Module, own: slice) -> None:
    """Train on this part of each batch."""
    optimizer = torch.optim.SGD(
        called.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3
    )
    for images, labels in batches():
        optimizer.zero_grad()
        F.cross_entropy(called(images[own]), labels[own]).backward()
        optimizer.step()


def arrays(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in state.items()}


def alone(name: str, own: slice = slice(None)) -> dict[str, np.ndarray]:
    """Return the weights after training in one process."""
    model = pruned_network(name)
    fit(model, own)
    return arrays(model.state_dict())


def together(name: str, kind: str, own: slice) -> dict[str, np.ndarray]:
    """Return the whole weights after training with the other processes."""
    model = pruned_network(name)
    if kind == "ddp":
        fit(nn.parallel.DistributedDataParallel(model), own)
        return arrays(model.state_dict())
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    fit(
        fully_shard(
            model, mesh=distributed.init_device_mesh("cpu", (distributed.get_world_size(),))
        ),
        own,
    )
    return arrays(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))


def work(rank: int, size: int, folder: str) -> None:
    """Train each network in each way on every ``size``-th image."""
    torch.set_num_threads(1)
    with process_group(rank, size, f"{folder}/meeting"):
        for kind in KINDS if fsdp_is_there() else KINDS[:1]:
            for name in NETWORKS:
                np.savez(
                    Path(folder) / f"{kind}_{name}_{rank}.npz",
                    **together(name, kind, slice(rank, None, size)),
                )
