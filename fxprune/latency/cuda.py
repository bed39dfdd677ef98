"""What is particular to a GPU: which one is meant, recorded calls, memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

__all__ = ["cache_bytes", "captured", "current", "peak_bytes"]


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU the current one: streams, events and synchronisation that name none are of the
    current one.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """What replays a CUDA graph of one call, recorded on the current GPU.

    Raises
    ------
    RuntimeError
        If the call waits for the GPU, which cannot be recorded. It is found before recording
        begins: a recording that fails leaves random numbers unusable in this process.
    """
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):  # algorithms are chosen, workspaces allocated
            run()
        with _refusing_to_wait():
            run()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay(kept: object = kept) -> None:  # what the graph writes to lives as long as this does
        graph.replay()

    return replay


@contextlib.contextmanager
def _refusing_to_wait() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that a call takes of the current GPU beside what is in use already."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cache_bytes(device: torch.device) -> int:
    """The size of a GPU's L2 cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)
