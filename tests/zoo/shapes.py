"""Data movement between two layers: reshaping, splitting, padding, rolling and repeating."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Batch, Case, classify, floats

Move = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """Two convolutions, a movement of data, a convolution and a classifier.

    Parameters
    ----------
    width:
        The movement gets `2 * width` channels.
    move:
        A function from (B, 2 * width, 8, 8) to (B, `factor * width`, H, W).
    factor:
        See `move`.
    """

    def __init__(self, width: int, move: Move, factor: float = 2) -> None:
        super().__init__()
        after = int(factor * width)
        self.c1, self.c2 = (
            nn.Conv2d(3, width, 3, padding=1),
            nn.Conv2d(width, 2 * width, 3, padding=1),
        )
        self.move = move
        self.norm = nn.BatchNorm2d(after)
        self.c3 = nn.Conv2d(after, width, 3, padding=1)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.move(F.relu(self.c2(F.relu(self.c1(x)))))
        return self.head(classify(F.relu(self.c3(self.norm(x)))))


class Flat(nn.Module):
    """Two convolutions, a movement to vectors of `factor * width`, and two linear layers."""

    def __init__(self, width: int, move: Move, factor: int) -> None:
        super().__init__()
        self.c1, self.c2 = (
            nn.Conv2d(3, width, 3, padding=1),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        )
        self.move = move
        self.fc1, self.fc2 = nn.Linear(factor * width, 2 * width), nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.move(F.relu(self.c2(F.relu(self.c1(x)))))
        return self.fc2(F.relu(self.fc1(x)))


class Uneven(nn.Module):
    """A tensor of `4 * width` channels that `cut` splits into two parts of different size.

    Each part goes to a layer of its own.
    """

    def __init__(self, width: int, cut: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.width, self.cut = width, cut
        self.c1, self.c2 = (
            nn.Conv2d(3, width, 3, padding=1),
            nn.Conv2d(width, 4 * width, 3, padding=1),
        )
        self.small, self.large = (
            nn.Conv2d(width, width, 3, padding=1),
            nn.Conv2d(3 * width, width, 3, padding=1),
        )
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        small, large = self.cut(F.relu(self.c2(F.relu(self.c1(x)))), self.width)
        return self.head(
            classify(F.relu(torch.cat([self.small(small), self.large(large)], dim=1)))
        )


class Unfolded(nn.Module):
    """A convolution written as F.unfold and a product.

    The way back is F.fold or a pixel shuffle.
    """

    def __init__(self, width: int, fold: bool) -> None:
        super().__init__()
        self.fold = fold
        self.c1 = nn.Conv2d(3, width, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(2 * width, width * 9))
        self.spread = nn.Linear(2 * width, 4 * 2 * width)
        self.c2 = nn.Conv2d(2 * width, width, 3, padding=1)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        columns = F.unfold(F.relu(self.c1(x)), kernel_size=3, padding=1)
        x = F.relu(self.weight @ columns)
        columns = self.spread(x.transpose(1, 2)).transpose(1, 2)
        if self.fold:
            x = F.fold(columns, output_size=(2 * h, 2 * w), kernel_size=2, stride=2)
        else:
            x = F.pixel_shuffle(columns.reshape(b, -1, h, w), 2)
        return self.head(classify(F.relu(self.c2(x))))


class SuperResolution(nn.Module):
    """Sub-pixel convolution to an image, whose three channels must not be removed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c1, self.c2 = (
            nn.Conv2d(3, 2 * width, 3, padding=1),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1),
        )
        self.c3 = nn.Conv2d(width, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.pixel_shuffle(self.c2(F.relu(self.c1(x))), 2))
        return F.pixel_shuffle(self.c3(x), 2)


class PadShortcut(nn.Module):
    """ResNet's shortcut without parameters: every second pixel, and zeros for missing channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pad = width // 2
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.a, self.b = (
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        )
        self.c, self.d = (
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        )
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        x = F.relu(shortcut + self.b(F.relu(self.a(x))))
        return self.head(classify(self.d(F.relu(self.c(x)))))


class LiteralSizes(nn.Module):
    """Sizes that are all numbers in the code: channels and pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.c1, self.c2 = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.fc1, self.fc2 = nn.Linear(32 * width, 4 * width), nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c1(x)).view(-1, self.width, 64).view(-1, self.width, 8, 8)
        x = F.relu(self.c2(x)).view(-1, 32 * self.width)
        return self.fc2(F.relu(self.fc1(x)))


class ShapeArithmetic(nn.Module):
    """Sizes that are read from tensors, and arithmetic on them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.up, self.down = nn.Linear(2 * width, 4 * width), nn.Linear(4 * width, 2 * width)
        self.fc1, self.fc2 = nn.Linear(32 * width, 4 * width), nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c2(F.relu(self.c1(x))))
        b, c, h, w = x.shape
        y = x.permute(0, 2, 3, 1).reshape(b * h * w, c)
        # 2 * c does not follow `up`, whose width is pruned independently
        y = F.relu(self.up(y)).reshape(b, h * w, 2 * c)
        y = self.down(y).transpose(-1, -2).reshape(b, c, h, -1)
        x = (x + y).view(x.size(0), x.size(1) * h * w)
        return self.fc2(F.relu(self.fc1(x)))


def grouped_sum(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).sum(dim=1)


def stacked_sum(x: Tensor) -> Tensor:
    return torch.stack([x, x.flip(1)], dim=2).sum(2)


def focus(x: Tensor) -> Tensor:
    return torch.cat(
        [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1
    )


def windows(x: Tensor) -> Tensor:
    """Return the mean of each overlapping 2x2 patch, by Tensor.unfold."""
    return x.unfold(2, 2, 1).unfold(3, 2, 1).mean((-1, -2))


def roll_half(x: Tensor) -> Tensor:
    return x + x.roll(x.shape[1] // 2, dims=1)


def interleave(x: Tensor) -> Tensor:
    """Interleave two halves by stack and flatten."""
    a, b = x.chunk(2, 1)
    return torch.stack([a, b], dim=2).flatten(1, 2)


def expand(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.unsqueeze(2).expand(b, c, 2, h, w).reshape(b, 2 * c, h, w)


def cut_strided(x: Tensor) -> Tensor:
    """Put even channels before odd ones."""
    return torch.cat([x[:, ::2], x[:, 1::2]], dim=1)


MOVES: dict[str, tuple[Move, float]] = {
    "adaptive_pool": (lambda x: F.adaptive_avg_pool2d(x, (3, 3)), 2),
    "cat_with_itself": (lambda x: torch.cat([x, x], 1), 4),
    "channel_pad": (lambda x: F.pad(x, (0, 0, 0, 0, 2, 2)), 0),  # its width is in _padded below
    "crelu": (lambda x: F.relu(torch.cat([x, -x], 1)), 4),
    "expand": (expand, 4),
    "flip_channels": (lambda x: x.flip(1), 2),
    "flip_channels_added": (lambda x: x + x.flip(1), 2),
    "flip_space": (lambda x: x.flip((2, 3)), 2),
    "focus_slices": (focus, 8),
    "grouped_view_sum": (grouped_sum, 1),
    "interleave_by_stack": (interleave, 2),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), 2),
    "movedim": (lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1), 2),
    "pad_constant": (lambda x: F.pad(x, (1, 2, 1, 0)), 2),
    "pad_reflect": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), 2),
    "pad_replicate": (lambda x: F.pad(x, (1, 1, 0, 0), mode="replicate"), 2),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), 0.5),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), 8),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1), 4),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, dim=1), 4),
    "roll_channels": (lambda x: x.roll(3, dims=1), 2),
    "roll_channels_added": (roll_half, 2),
    "roll_space": (lambda x: torch.roll(x, (1, -2), (2, 3)), 2),
    "stack_sum": (stacked_sum, 2),
    "strided_channels": (cut_strided, 2),
    "sum_of_chunks": (lambda x: sum(x.chunk(2, 1)), 1),
    "tensor_unfold": (windows, 2),
    "transpose_twice": (lambda x: x.transpose(1, 3).transpose(3, 1), 2),
}

FLATTENS: dict[str, tuple[Move, int]] = {
    "flatten_nchw": (lambda x: x.flatten(1), 32),
    "flatten_nhwc": (lambda x: x.permute(0, 2, 3, 1).flatten(1), 32),
    "flatten_nhwc_reshape": (lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1), 32),
    "flatten_nwch": (lambda x: x.permute(0, 3, 1, 2).flatten(1), 32),
    "flatten_pooled": (lambda x: F.max_pool2d(x, 2).view(x.size(0), -1), 8),
    "flatten_pooled_pyramid": (
        lambda x: torch.cat([F.adaptive_max_pool2d(x, size).flatten(1) for size in (1, 2)], 1),
        10,
    ),
}

CUTS: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    "split_uneven": lambda x, n: tuple(x.split([n, 3 * n], dim=1)),
    "slice_uneven": lambda x, n: (x[:, :n], x[:, n:]),
    "slice_negative": lambda x, n: (x[:, -n:], x[:, :-n]),
    "narrow_uneven": lambda x, n: (x.narrow(1, 0, n), x.narrow(1, n, 3 * n)),
    "chunk_joined": lambda x, n: (x.chunk(4, 1)[0], torch.cat(x.chunk(4, 1)[1:], 1)),
    "slice_overlapping": lambda x, n: (x[:, :n], x[:, n // 2 : n // 2 + 3 * n]),
    "split_by_size": lambda x, n: (x.split(n, 1)[3], torch.cat(x.split(n, 1)[:3], 1)),
    "tensor_split": lambda x, n: tuple(x.tensor_split([n], dim=1)),
}

IMAGE: Batch = floats(3, 8, 8)


def _between(name: str, move: Move, factor: float) -> Case:
    # After the pad there are 2 * width + 4 channels, which is no multiple of the width, and four
    # of them cannot be removed.
    if name == "channel_pad":
        return Case(name, lambda w: _padded(w, move), IMAGE)
    return Case(name, lambda w: Between(w, move, factor), IMAGE)


def _padded(width: int, move: Move) -> nn.Module:
    return Between(width, move, (2 * width + 4) / width)


CASES = [
    *(_between(name, move, factor) for name, (move, factor) in MOVES.items()),
    *(Case(name, lambda w, m=m, f=f: Flat(w, m, f), IMAGE) for name, (m, f) in FLATTENS.items()),
    *(
        Case(name, lambda w, cut=cut: Uneven(w, cut), IMAGE, slack=0.1)
        for name, cut in CUTS.items()
    ),
    Case("unfold", lambda w: Unfolded(w, fold=False), IMAGE),
    Case("fold", lambda w: Unfolded(w, fold=True), IMAGE),
    Case("super_resolution", SuperResolution, IMAGE),
    # Half of the channels of the padded sum meet constants and may stay. Left are: stem 0.5, a and
    # b 0.38 each, c 0.38, d 0.5.
    Case("pad_shortcut", PadShortcut, IMAGE, at_most=0.45),
    Case("literal_view_sizes", LiteralSizes, IMAGE),
    Case("shape_arithmetic", ShapeArithmetic, IMAGE),
]
