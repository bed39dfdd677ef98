"""Noise inputs: what a criterion without data shows a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fxprune.inputs import Call
from fxprune.resized import other_batch

__all__ = ["noise_like"]


_ELEMENTS = 2**20
"""About how many numbers the noise of one model has: a few images, or many short signals."""

_LEAST, _MOST = 8, 64  # samples


def noise_like(call: Call, seed: int) -> list[Call]:
    """Return calls to try: noise with many samples, then noise with as many as the example.

    Floating-point tensors become normal noise. Integers and flags keep their values, so that
    indices stay valid. Images have a spectrum that falls with frequency, as that of photographs
    does: neighbouring pixels are alike, which white noise lacks.

    Parameters
    ----------
    call:
        The example inputs. Floating-point tensors may be meta tensors.
    seed:
        Seed of the noise.
    """
    floats: list[int] = []
    tree_map(lambda leaf: floats.append(leaf.numel()) if _is_float(leaf) else None, call)
    samples = min(_MOST, max(_LEAST, _ELEMENTS // max(sum(floats), 1)))
    wide = other_batch(call, samples)
    calls = []
    for each in (call,) if wide is None else (wide, call):
        generator = torch.Generator().manual_seed(seed)
        calls.append(Call(*tree_map(lambda leaf, g=generator: _noise(leaf, g), tuple(each))))
    return calls


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _noise(leaf: Any, generator: torch.Generator) -> Any:
    """Return noise of a tensor's shape and dtype; other values as they are."""
    if not _is_float(leaf):
        return leaf
    noise = torch.randn(leaf.shape, generator=generator)
    if leaf.dim() > 3:
        noise = _with_falling_spectrum(noise)
    return noise.to(leaf.dtype)


def _with_falling_spectrum(noise: Tensor) -> Tensor:
    """Return noise whose amplitudes fall as 1 / f along all axes from the third on.

    Its mean is 0 and its variance 1.

    Notes
    -----
    Field, "Relations between the statistics of natural images and the response properties of
    cortical cells", JOSA A 1987.
    """
    dims = [*range(2, noise.dim())]
    squares = torch.zeros([1] * noise.dim())
    for dim in dims:
        size = noise.shape[dim]
        form = [size if d == dim else 1 for d in range(noise.dim())]
        squares = squares + (torch.fft.fftfreq(size) * size).reshape(form) ** 2
    frequency = squares.sqrt().clamp_min(1.0)  # the mean has no frequency
    fallen = torch.fft.ifftn(torch.fft.fftn(noise, dim=dims) / frequency, dim=dims).real
    return (fallen - fallen.mean()) / fallen.std().clamp_min(torch.finfo(fallen.dtype).tiny)
