"""Noise inputs: what a criterion without data shows a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fxprune.common.contents import tensors_of
from fxprune.common.dispatch import DispatchMode
from fxprune.coupling import Coupling
from fxprune.inputs import Call, batch_size
from fxprune.resized import other_batch, replace_sizes

__all__ = ["EndlessRun", "ending", "noise_like"]


_ELEMENTS = 2**17
"""About how many numbers the noise of one model has: a few images, or many short signals."""

_LEAST, _MOST = 2, 64  # samples

_SMALL = 64
"""Images from twice this size on are tried at about a quarter of their size, at least this."""

_ALIKE = 0.9
"""Correlation of the channels of an image."""

_COLOURS = 4
"""Inputs with two dimensions of space and at most so many channels are images."""


def noise_like(call: Call, seed: int) -> Iterator[Call]:
    """Yield calls to try, the cheapest first: smaller images, the example's size, its batch size.

    Floating-point tensors become normal noise. Integers and flags keep their values, so that
    indices stay valid. Images look like photographs in two respects: their spectrum falls with
    frequency, so that neighbouring pixels are alike, and so are their channels.

    Parameters
    ----------
    call:
        The example inputs. Floating-point tensors may be meta tensors.
    seed:
        Seed of the noise.
    """
    small = _smaller_images(call)
    for each in (call,) if small is None else (small, call):
        numbers = sum(leaf.numel() for leaf in tensors_of(tuple(each)) if _is_float(leaf))
        samples = _ELEMENTS * batch_size(each) // max(numbers, 1)
        wide = other_batch(each, min(_MOST, max(_LEAST, samples)))
        if wide is not None:
            yield _filled(wide, seed)
    yield _filled(call, seed)


def _smaller_images(call: Call) -> Call | None:
    """Return the example with smaller images; None if it has none that are large.

    The statistics of a channel hardly depend on the size, but the time does.
    """
    images = [leaf for leaf in tensors_of(tuple(call)) if _is_float(leaf) and leaf.dim() > 3]
    sizes = {size for image in images for size in image.shape[2:] if size >= 2 * _SMALL}
    # networks that halve their images want sizes that they can halve repeatedly
    new = {size: max(_SMALL, 32 * round(size / 128)) for size in sizes}
    return replace_sizes(call, new) if new else None


def _filled(call: Call, seed: int) -> Call:
    """Return a call with noise in the place of its floating-point tensors."""
    generator = torch.Generator().manual_seed(seed)
    return Call(*tree_map_only(Tensor, lambda leaf: _noise(leaf, generator), tuple(call)))


class EndlessRun(BaseException):
    """Signal that a run has made far more operations than the analysis saw.

    It is no ``Exception``, so the model does not handle it as an error.
    """


@contextmanager
def ending(coupling: Coupling) -> Iterator[None]:
    """End a run of a model's Python code that may never end on noise.

    A loop that continues until a value is small, for instance, may continue for ever.

    Raises
    ------
    EndlessRun
        If the run makes a hundred times as many operations as the traced graphs have, and some.
    """
    nodes = sum(len(trace.graph.nodes) for trace in coupling.traces)
    with _OperationLimit(1000 + 100 * nodes):
        yield


class _OperationLimit(DispatchMode):
    """A mode that ends a run after a number of operations."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._left = most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if self._left < 0:
            raise EndlessRun
        return func(*args, **(kwargs or {}))


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _noise(leaf: Tensor, generator: torch.Generator) -> Tensor:
    """Return noise of a tensor's shape and dtype; a tensor of integers as it is."""
    if not _is_float(leaf):
        return leaf
    noise = torch.randn(leaf.shape, generator=generator)
    if leaf.dim() > 3:
        noise = _with_falling_spectrum(noise)
        if leaf.shape[1] <= _COLOURS:
            grey = torch.randn((leaf.shape[0], 1, *leaf.shape[2:]), generator=generator)
            noise = (1 - _ALIKE) ** 0.5 * noise + _ALIKE**0.5 * _with_falling_spectrum(grey)
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
