"""Tools for GPUs: the current device, CUDA graphs of calls, memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

__all__ = ["cache_bytes", "captured", "peak_bytes", "use_device"]


def use_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which a GPU is the current one; for other devices it does nothing.

    Streams, events and synchronisation belong to the current GPU unless they name another one.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """Record one call as a CUDA graph on the current GPU, and return a function that replays it.

    Raises
    ------
    RuntimeError
        If the call waits for the GPU, which a graph cannot record. This is checked before the
        recording begins, because a failed recording makes random numbers unusable in this process.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # chooses algorithms and allocates workspaces
            run()
        with _refusing_to_wait():
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    # the default argument keeps the tensors alive that the graph writes to
    def replay(kept: object = kept) -> None:
        """Replay the recorded call."""
        graph.replay()

    return replay


@contextlib.contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Raise an error if code inside waits for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak of the memory that a call allocates on the current GPU, in bytes.

    Memory that was in use before the call does not count.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cache_bytes(device: torch.device) -> int:
    """Return the size of the L2 cache of a GPU, in bytes."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)
