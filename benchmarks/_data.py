"""The data of the accuracy benchmark.

CIFAR is read from a folder, the digits come with scikit-learn, and the textures are generated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["DATA", "SIZES", "Data", "Part", "augmented", "load"]

DATA = ("digits", "textures", "cifar10", "cifar100")
SIZES = {"digits": 16, "textures": 16, "cifar10": 32, "cifar100": 32}
"""The default height and width of an image."""


@dataclass(frozen=True, eq=False)
class Part:
    """Images of shape (n, channels, size, size) and labels of shape (n,).

    :func:`load` scales the images to mean 0 and variance 1 over the training part.
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Data:
    """Three disjoint parts of a data set, and its augmentation.

    Attributes
    ----------
    train, validation, test:
        Weights are fitted on ``train`` alone. ``validation`` is for choices, ``test`` for reports.
    shift:
        The largest number of pixels by which images are moved.
    flip:
        Whether images are mirrored.
    """

    name: str
    classes: int
    train: Part
    validation: Part
    test: Part
    shift: int
    flip: bool

    @property
    def channels(self) -> int:
        """The number of channels of an image."""
        return self.train.images.shape[1]

    @property
    def example(self) -> Tensor:
        """One image of zeros."""
        return torch.zeros_like(self.train.images[:1])


def load(
    name: str, size: int | None = None, folder: Path | None = None, device: str = "cpu"
) -> Data:
    """Read or generate the data called ``name``.

    ``folder`` is torchvision's root folder for CIFAR, which is not downloaded.
    """
    size = size or SIZES[name]
    if name == "digits":
        data = _digits(size)
    elif name == "textures":
        data = _textures(size)
    else:
        data = _cifar(name, size, folder)
    mean = data.train.images.mean(dim=(0, 2, 3), keepdim=True)
    scale = data.train.images.std(dim=(0, 2, 3), keepdim=True)
    parts = {
        part: Part(
            ((getattr(data, part).images - mean) / scale).to(device),
            getattr(data, part).labels.to(device),
        )
        for part in ("train", "validation", "test")
    }
    return replace(data, **parts)


def augmented(images: Tensor, data: Data, generator: torch.Generator) -> Tensor:
    """Return the images moved and mirrored at random, each by itself."""
    count, channels, height, width = images.shape
    padded = F.pad(images, (data.shift,) * 4)
    down, right = torch.randint(0, 2 * data.shift + 1, (2, count, 1), generator=generator)
    rows, columns = (down + torch.arange(height)), (right + torch.arange(width))
    if data.flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    each, channel = torch.arange(count), torch.arange(channels)
    index = (
        each[:, None, None, None],
        channel[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    )
    return padded[tuple(part.to(images.device) for part in index)]


def _cut(images: Tensor, labels: Tensor, *ends: int) -> tuple[Part, ...]:
    return tuple(
        Part(images[a:b], labels[a:b])
        for a, b in zip((0, *ends), (*ends, len(labels)), strict=True)
    )


def _digits(size: int) -> Data:
    """Return the 1,797 digits.

    The writers come one after another, so the parts have different writers, apart from those at
    the two cuts.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    train, validation, test = _cut(images, torch.tensor(digits.target), 1047, 1297)
    return Data("digits", 10, train, validation, test, shift=max(1, size // 8), flip=False)


def _cifar(name: str, size: int, folder: Path | None) -> Data:
    """Return CIFAR as torchvision reads it.

    The last 5,000 training images are the validation part.
    """
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    parts = []
    for fitted in (True, False):
        read = kind(str(folder), train=fitted, download=False)
        images = torch.from_numpy(read.data).permute(0, 3, 1, 2).float() / 255
        if size != images.shape[-1]:
            images = F.interpolate(
                images, size=(size, size), mode="bilinear", antialias=True, align_corners=False
            )
        parts.append((images, torch.tensor(read.targets)))
    train, validation = _cut(*parts[0], len(parts[0][1]) - 5000)
    return Data(
        name,
        10 if name == "cifar10" else 100,
        train,
        validation,
        Part(*parts[1]),
        shift=size // 8,
        flip=True,
    )


# ---------------------------------------------------------------------------------------- textures

_SHAPES = ("disc", "square", "triangle", "ring", "cross")
_TEXTURES = ("stripes down", "stripes up", "checks", "dots")
_FINER = 3  # images are drawn larger by this factor, then averaged


def _textures(size: int) -> Data:
    """Draw shapes filled with a texture in front of another texture.

    Position, scale, angle and colours are random, and noise is added. The class is the pair of
    shape and texture, 20 in all, so that neither the outline nor the filling alone determines it.
    The images are the same on every machine up to rounding, because one seeded generator draws
    everything.
    """
    counts = (2400, 3000, 3000)
    generator = torch.Generator().manual_seed(20)
    total = sum(counts)
    labels = torch.randint(len(_SHAPES) * len(_TEXTURES), (total,), generator=generator)
    fine = size * _FINER
    axis = (torch.arange(fine) + 0.5) / fine * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def between(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(total, *(shape or (1, 1)), generator=generator) * (high - low) + low

    centre_y, centre_x, scale, turn = (
        between(-0.2, 0.2),
        between(-0.2, 0.2),
        between(0.6, 0.85),
        between(-0.3, 0.3),
    )
    shifted_y, shifted_x = (y - centre_y) / scale, (x - centre_x) / scale
    u, v = (
        shifted_x * turn.cos() + shifted_y * turn.sin(),
        shifted_y * turn.cos() - shifted_x * turn.sin(),
    )
    inside = _inside(labels % len(_SHAPES), u, v).float()[:, None]
    filling = _filled(
        labels // len(_SHAPES),
        x,
        y,
        between(3.0, 5.0),
        between(0, 2 * math.pi),
        between(0, 2 * math.pi),
    )[:, None]
    other = torch.randint(len(_TEXTURES), (total,), generator=generator)
    ground = _filled(
        other, x, y, between(3.0, 5.0), between(0, 2 * math.pi), between(0, 2 * math.pi)
    )[:, None]
    tone = between(0.2, 0.8, 3, 1, 1)
    contrast = between(0.5, 1.0, 1, 1, 1) * torch.where(between(0, 1, 1, 1, 1) < 0.5, -1.0, 1.0)
    image = inside * (tone + 0.8 * contrast * (filling - 0.5)) + (1 - inside) * (
        1 - tone + 0.2 * contrast * (ground - 0.5)
    )
    image = F.avg_pool2d(image, _FINER)
    image = image + 0.06 * torch.randn(image.shape, generator=generator)
    train, validation, test = _cut(image, labels, counts[0], counts[0] + counts[1])
    return Data(
        "textures",
        len(_SHAPES) * len(_TEXTURES),
        train,
        validation,
        test,
        shift=max(1, size // 8),
        flip=False,
    )


def _inside(shape: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return which pixels lie inside the shape, whose coordinates (u, v) range from -1 to 1."""
    radius = (u.square() + v.square()).sqrt()
    largest = torch.maximum(u.abs(), v.abs())
    drawn = (
        radius < 0.9,
        largest < 0.8,
        (v < 0.75) & (v > 1.8 * u.abs() - 0.95),
        (radius < 0.95) & (radius > 0.5),
        (largest < 0.95) & (torch.minimum(u.abs(), v.abs()) < 0.33),
    )
    return torch.stack(drawn)[shape, torch.arange(len(shape))]


def _filled(
    texture: Tensor, x: Tensor, y: Tensor, frequency: Tensor, phase: Tensor, other: Tensor
) -> Tensor:
    """Return the brightness of the texture, between 0 and 1."""
    across, along = math.pi * frequency * x + phase, math.pi * frequency * y + other
    drawn = (
        (across + along).sin(),
        (across - along).sin(),
        (across.sin() * along.sin()).sign(),
        2 * ((across.sin() + along.sin()) > 0.9).float() - 1,
    )
    return (torch.stack(drawn)[texture, torch.arange(len(texture))] + 1) / 2
