"""A case of the zoo, and functions that make example inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = Callable[[int], Any]
"""A function from a batch size to example inputs."""


@dataclass(frozen=True)
class Case:
    """A small network around one construct.

    Attributes
    ----------
    name:
        The id of the test.
    build:
        A function from a width to the network. At half the width, the network is what a correct
        pruner leaves at `channels=0.5`.
    inputs:
        A function from a batch size to example inputs.
    at_most:
        The share of parameters that may be left, where it is not that of half the width. A comment
        says why.
    slack:
        Added to the share that the network of half the width has. It is needed where unlike units
        compete in one group (a concatenation, a slice), because the scores decide which of them
        survive.
    zeroable:
        See `tests.support.checking.check_exact`.
    width:
        The width to build.
    """

    name: str
    build: Callable[[int], nn.Module]
    inputs: Batch
    at_most: float | None = None
    slack: float = 0.02
    zeroable: bool = True
    width: int = 16

    def bound(self) -> float:
        """Return the share of parameters that may be left."""
        if self.at_most is not None:
            return self.at_most
        half, full = (
            sum(p.numel() for p in self.build(w).parameters())
            for w in (self.width // 2, self.width)
        )
        return half / full + self.slack


def floats(*shape: int) -> Batch:
    """Return inputs of one tensor, with `shape` after the batch axis."""
    return lambda batch: torch.randn(batch, *shape)


def several(*shapes: tuple[int, ...]) -> Batch:
    """Return inputs of several positional arguments, one tensor for each shape."""
    return lambda batch: tuple(torch.randn(batch, *shape) for shape in shapes)


def tokens(length: int, vocabulary: int) -> Batch:
    """Return inputs of integer indices, of shape (batch, length)."""
    return lambda batch: torch.randint(vocabulary, (batch, length))


def classify(x: Tensor) -> Tensor:
    """Return the mean over all axes behind the channel axis: (B, C, ...) -> (B, C)."""
    return x.flatten(2).mean(2)
