"""Peak rates of a device, measured, and the time that the work of a model takes at these rates.

A model is rarely faster than that. It can be if an algorithm multiplies less than the model
counts. Winograd's algorithm does. So does one that skips the padding, which is half of the work if
a convolution has a large dilation.

Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model for Multicore
Architectures", CACM 2009.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from fxprune.common.numbers import as_device, check_bool
from fxprune.common.public import public, short_repr
from fxprune.errors import ArgumentError
from fxprune.latency.clock import time_in_turns

__all__ = ["Roofline", "roofline"]


@public
@dataclass(frozen=True)
class Roofline:
    """Peak rates of a device.

    Attributes
    ----------
    macs_per_second:
        Multiply-accumulates per second of large matrix products and convolutions.
    bytes_per_second:
        Bytes per second, read and written, of large copies.
    """

    macs_per_second: float
    bytes_per_second: float

    def floor_ms(self, macs: int, nbytes: int) -> float:
        """Return the least time for some work at these rates, in milliseconds.

        Computation and memory traffic can overlap, so the longer of the two counts.

        Parameters
        ----------
        macs:
            Number of multiply-accumulates.
        nbytes:
            Bytes of memory traffic.

        Examples
        --------
        >>> Roofline(1e9, 1e9).floor_ms(macs=2_000_000, nbytes=500_000)
        2.0
        """
        return 1e3 * max(macs / self.macs_per_second, nbytes / self.bytes_per_second)


@public
def roofline(device: torch.device, dtype: torch.dtype, tf32: bool = False) -> Roofline:
    """Measure the peak rates of a device, once per process for the same arguments.

    The rate of multiply-accumulates is that of the fastest of several large matrix products and a
    convolution. The memory bandwidth is that of a copy too large for the caches. The first call
    can take a few seconds.

    Parameters
    ----------
    device:
        Where to measure.
    dtype:
        Floating-point type of the products.
    tf32:
        Whether float32 products use TF32. This only tells stored results apart: the caller must
        have switched TF32 on.

    Returns
    -------
    The rates, per second.

    Raises
    ------
    ArgumentError
        If there is no such device, or if ``dtype`` is not a floating-point type.

    Examples
    --------
    >>> limits = roofline(torch.device("cpu"), torch.float32)
    >>> limits.floor_ms(macs=10**9, nbytes=0) > limits.floor_ms(macs=10**8, nbytes=0) > 0
    True
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ArgumentError(
            f"dtype={short_repr(dtype)} is no floating-point type of torch, e.g. torch.float32."
        )
    return _measured(as_device("device", device), dtype, check_bool("tf32", tf32))


@functools.lru_cache(maxsize=32)
def _measured(device: torch.device, dtype: torch.dtype, tf32: bool) -> Roofline:
    """Measure a device; ``tf32`` is part of the key of the cache."""
    on_gpu = device.type == "cuda"
    products = [_square(size, device, dtype) for size in ((4096, 8192) if on_gpu else (512, 1024))]
    products.append(_convolution(64 if on_gpu else 1, device, dtype))
    runs = {str(index): run for index, (run, _) in enumerate(products)}
    timings = time_in_turns(runs, device, rounds=5, seconds=0.05)
    rates = []
    for (_, macs), timing in zip(products, timings.values(), strict=True):
        rates.append(macs / (1e-3 * timing.low))
    megabytes = 1024 if on_gpu else 128
    source = torch.zeros(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = {"copy": lambda: target.copy_(source)}
    copy = time_in_turns(copying, device, rounds=5, seconds=0.05)["copy"]
    return Roofline(max(rates), 2 * source.nbytes / (1e-3 * copy.low))


def _square(
    size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], object], int]:
    """Return a product of square matrices, and the number of its multiply-accumulates."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, size**3


def _convolution(
    batch: int, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], object], int]:
    """Return a 3x3 convolution, and the number of its multiply-accumulates.

    It can reach a higher rate than matrix products if another library computes it.
    """
    channels, size, layout = 256, 56, torch.channels_last
    x = torch.randn(batch, channels, size, size, device=device).to(dtype, memory_format=layout)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype, memory_format=layout)
    return lambda: F.conv2d(x, weight, padding=1), batch * (size * channels * 3) ** 2
