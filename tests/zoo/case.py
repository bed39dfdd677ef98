"""What a case of the zoo is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = Callable[[int], Any]
"""Example inputs of a given batch size."""


@dataclass(frozen=True)
class Case:
    """A small network around one construct.

    Attributes:
        name: the test's id.
        build: gives the network of a width; at half the width it is what a correct pruner leaves
            at `channels=0.5`.
        inputs: gives the example inputs of a batch size.
        at_most: the share of parameters that may be left, where half the width is not the answer.
            Says why.
        slack: added to the share that the half-width network has. Needed where unlike units
            compete in one group (a concatenation, a slice), because which of them survive depends
            on the scores.
        zeroable: see `tests.support.checking.check_exact`.
        width: the width to build.
    """

    name: str
    build: Callable[[int], nn.Module]
    inputs: Batch
    at_most: float | None = None
    slack: float = 0.02
    zeroable: bool = True
    width: int = 16

    def bound(self) -> float:
        """The share of parameters that may be left."""
        if self.at_most is not None:
            return self.at_most
        half, full = (
            sum(p.numel() for p in self.build(w).parameters())
            for w in (self.width // 2, self.width)
        )
        return half / full + self.slack


def floats(*shape: int) -> Batch:
    """One tensor of `shape` after the batch axis."""
    return lambda batch: torch.randn(batch, *shape)


def several(*shapes: tuple[int, ...]) -> Batch:
    """Positional arguments, one tensor per shape."""
    return lambda batch: tuple(torch.randn(batch, *shape) for shape in shapes)


def tokens(length: int, vocabulary: int) -> Batch:
    """Integer indices, (batch, length)."""
    return lambda batch: torch.randint(vocabulary, (batch, length))


def classify(x: Tensor) -> Tensor:
    """Mean over everything behind the channel axis: (B, C, ...) -> (B, C)."""
    return x.flatten(2).mean(2)
