"""What the device can do at best, measured, and how long a model's work takes at these rates.

A model is hardly ever below: an algorithm has to multiply less than the model says, as Winograd's
does, or one that leaves out what falls on the padding, which is half of a convolution that is
dilated far enough.

Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model for Multicore
Architectures", CACM 2009.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from fxprune.common.numbers import device_of, switch
from fxprune.common.public import public, shown
from fxprune.errors import ArgumentError
from fxprune.latency.clock import time_in_turns

__all__ = ["Roofline", "roofline"]


@public
@dataclass(frozen=True)
class Roofline:
    """Multiply-accumulates per second of large matrix products and convolutions, and bytes per
    second of large copies.
    """

    macs_per_second: float
    bytes_per_second: float

    def floor_ms(self, macs: int, nbytes: int) -> float:
        """Milliseconds that so many multiply-accumulates and bytes of traffic take at these rates,
        whichever takes longer.

        >>> Roofline(1e9, 1e9).floor_ms(macs=2_000_000, nbytes=500_000)
        2.0
        """
        return 1e3 * max(macs / self.macs_per_second, nbytes / self.bytes_per_second)


@public
def roofline(device: torch.device, dtype: torch.dtype, tf32: bool = False) -> Roofline:
    """Measure a device: the best of large products in ``dtype``, and a copy that no cache holds.

    ``tf32`` is part of the name under which the result is remembered; the caller has switched it
    on.

    Raises
    ------
    ArgumentError
        If there is no such device, or the type is no floating-point one.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ArgumentError(
            f"dtype={shown(dtype)} is no floating-point type of torch, e.g. torch.float32."
        )
    return _measured(device_of("device", device), dtype, switch("tf32", tf32))


@functools.lru_cache(maxsize=32)
def _measured(device: torch.device, dtype: torch.dtype, tf32: bool) -> Roofline:
    on_gpu = device.type == "cuda"
    made = [_square(size, device, dtype) for size in ((4096, 8192) if on_gpu else (512, 1024))]
    made.append(_convolution(64 if on_gpu else 1, device, dtype))
    timings = time_in_turns(
        {str(number): run for number, (run, _) in enumerate(made)}, device, rounds=5, seconds=0.05
    )
    rate = max(
        macs / (1e-3 * timing.low)
        for (_, macs), timing in zip(made, timings.values(), strict=True)
    )
    megabytes = 1024 if on_gpu else 128
    source = torch.zeros(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = time_in_turns({"copy": lambda: target.copy_(source)}, device, rounds=5, seconds=0.05)[
        "copy"
    ]
    return Roofline(rate, 2 * source.nbytes / (1e-3 * timing.low))


def _square(
    size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], object], int]:
    """A product of square matrices, and its multiply-accumulates."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, size**3


def _convolution(
    batch: int, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], object], int]:
    """A convolution of 3x3: where other libraries compute it than matrix products, it can be the
    faster of the two.
    """
    channels, size, layout = 256, 56, torch.channels_last
    x = torch.randn(batch, channels, size, size, device=device).to(dtype, memory_format=layout)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype, memory_format=layout)
    return lambda: F.conv2d(x, weight, padding=1), batch * (size * channels * 3) ** 2
