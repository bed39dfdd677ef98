"""What the device can do at best, measured: no model can be faster than its work at these rates.

Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model for Multicore Architectures", CACM 2009.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fxprune.latency.clock import time_in_turns

__all__ = ["Roofline", "roofline"]


@dataclass(frozen=True)
class Roofline:
    """Multiply-accumulates per second of large matrix products, and bytes per second of large copies."""

    macs_per_second: float
    bytes_per_second: float

    def floor_ms(self, macs: int, nbytes: int) -> float:
        """Milliseconds that so many multiply-accumulates and bytes of traffic take at least.

        >>> Roofline(1e9, 1e9).floor_ms(macs=2_000_000, nbytes=500_000)
        2.0
        """
        return 1e3 * max(macs / self.macs_per_second, nbytes / self.bytes_per_second)


@functools.lru_cache(maxsize=32)
def roofline(device: torch.device, dtype: torch.dtype, tf32: bool = False) -> Roofline:
    """Measure a device: the best of square matrix products in ``dtype``, and a copy that no cache holds.

    ``tf32`` is part of the name under which the result is remembered; the caller has switched it on.
    """
    on_gpu = device.type == "cuda"
    rate = 0.0
    for size in (4096, 8192) if on_gpu else (512, 1024):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        timing = time_in_turns({"product": lambda a=a, b=b: a @ b}, device, rounds=5, seconds=0.05)["product"]  # type: ignore[misc]
        rate = max(rate, size**3 / (1e-3 * timing.low))
    megabytes = 1024 if on_gpu else 128
    source = torch.zeros(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = time_in_turns({"copy": lambda: target.copy_(source)}, device, rounds=5, seconds=0.05)["copy"]
    return Roofline(rate, 2 * source.nbytes / (1e-3 * timing.low))
