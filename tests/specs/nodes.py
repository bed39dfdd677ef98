"""The kinds of nodes of a random network.

Each kind is a frozen dataclass that defines its output shape, its module and its forward function.

A *signal* describes a value that passes between nodes, without the batch axis. Its layout says
what the axes mean:

========  ============  ==============
layout    axes          channel axis
========  ============  ==============
chw       (C, H, W)     first
hwc       (H, W, C)     last
tokens    (T, C)        last
vector    (C,)          last
========  ============  ==============

A node refers to the values that it reads by index: value 0 is the network's input, and value ``i``
is the output of the i-th node. The index fields come first and defaults are not printed, so that a
node prints as a person would write it: ``Conv(3, out=8, kernel=1)``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYOUTS = ("chw", "hwc", "tokens", "vector")
CHANNELS_LAST = ("hwc", "tokens", "vector")


class SpecError(ValueError):
    """An error: a node cannot take one of its input signals."""


@dataclass(frozen=True)
class Signal:
    """The layout and per-sample shape of one value."""

    layout: str
    shape: tuple[int, ...]

    @classmethod
    def of_input(cls, shape: tuple[int, ...]) -> Signal:
        """Return the signal of a network input.

        Three axes are an image, two are tokens, one is a vector.
        """
        return cls({3: "chw", 2: "tokens", 1: "vector"}[len(shape)], shape)

    @property
    def axis(self) -> int:
        """The channel axis in the per-sample shape."""
        return 0 if self.layout == "chw" else len(self.shape) - 1

    @property
    def channels(self) -> int:
        return self.shape[self.axis]

    @property
    def dim(self) -> int:
        """The channel axis of the batched tensor."""
        return self.axis + 1

    @property
    def places(self) -> int:
        """The number of positions of each channel: pixels or tokens."""
        return math.prod(self.shape) // self.channels

    def with_channels(self, channels: int) -> Signal:
        shape = list(self.shape)
        shape[self.axis] = channels
        return Signal(self.layout, tuple(shape))

    def with_space(self, height: int, width: int) -> Signal:
        return Signal("chw", (self.shape[0], height, width))

    def __str__(self) -> str:
        return f"{self.layout} {self.shape}"


@dataclass(frozen=True, repr=False)
class Node:
    """One operation.

    Subclasses define ``infer``, ``module`` if they own parameters, and ``forward`` if it does more
    than call the module.
    """

    layouts: ClassVar[tuple[str, ...]] = LAYOUTS
    references: ClassVar[tuple[str, ...]] = ("x",)

    @property
    def inputs(self) -> tuple[int, ...]:
        """Indices of the values that this node reads, in the order of ``forward``'s tensors."""
        found: list[int] = []
        for name in self.references:
            value = getattr(self, name)
            found.extend(value if isinstance(value, tuple) else (value,))
        return tuple(found)

    def renumbered(self, mapping: Mapping[int, int]) -> Node:
        """Return the same node reading from other indices."""
        changes: dict[str, object] = {}
        for name in self.references:
            value = getattr(self, name)
            changes[name] = (
                tuple(mapping[v] for v in value) if isinstance(value, tuple) else mapping[value]
            )
        return dataclasses.replace(self, **changes)

    def infer(self, *signals: Signal) -> Signal:
        """Return the output signal; raise SpecError if the inputs do not fit."""
        raise NotImplementedError

    def module(self, *signals: Signal) -> nn.Module | None:
        """Return a new module with this node's parameters, or None if it has none."""
        return None

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        """Compute the value.

        ``signals`` are the inputs' shapes when the network was built, for nodes that contain sizes
        as literals.
        """
        assert module is not None
        return module(*tensors)

    def _need(self, fits: bool, why: str) -> None:
        if not fits:
            raise SpecError(f"{self!r}: {why}")

    def _need_layout(self, *signals: Signal) -> None:
        for signal in signals:
            self._need(signal.layout in self.layouts, f"cannot take {signal}")

    def __repr__(self) -> str:
        parts = [repr(getattr(self, name)) for name in self.references]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in self.references and value != field.default:
                parts.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"


# --- layers


@dataclass(frozen=True, repr=False)
class Conv(Node):
    """A convolution that keeps the image's size (divided by ``stride``)."""

    x: int
    out: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    dilation: int = 1
    bias: bool = True
    layouts: ClassVar = ("chw",)

    def infer(self, *signals: Signal) -> Signal:
        self._need_layout(*signals)
        (signal,) = signals
        self._need(
            signal.channels % self.groups == 0 and self.out % self.groups == 0,
            f"groups do not divide {signal}",
        )
        height, width = (-(-side // self.stride) for side in signal.shape[1:])
        return Signal("chw", (self.out, height, width))

    def module(self, *signals: Signal) -> nn.Module:
        padding = self.dilation * (self.kernel - 1) // 2
        return nn.Conv2d(
            signals[0].channels,
            self.out,
            self.kernel,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            bias=self.bias,
        )


@dataclass(frozen=True, repr=False)
class Depthwise(Node):
    """A depthwise convolution with ``multiplier`` filters per channel."""

    x: int
    multiplier: int = 1
    kernel: int = 3
    stride: int = 1
    bias: bool = True
    layouts: ClassVar = ("chw",)

    def infer(self, *signals: Signal) -> Signal:
        self._need_layout(*signals)
        channels, height, width = signals[0].shape
        return Signal(
            "chw",
            (channels * self.multiplier, -(-height // self.stride), -(-width // self.stride)),
        )

    def module(self, *signals: Signal) -> nn.Module:
        width = signals[0].channels
        padding = (self.kernel - 1) // 2
        return nn.Conv2d(
            width,
            width * self.multiplier,
            self.kernel,
            self.stride,
            padding,
            groups=width,
            bias=self.bias,
        )


@dataclass(frozen=True, repr=False)
class TransposedConv(Node):
    """A transposed convolution that multiplies the image's size by ``stride``."""

    x: int
    out: int
    stride: int = 2
    groups: int = 1
    bias: bool = True
    layouts: ClassVar = ("chw",)

    def infer(self, *signals: Signal) -> Signal:
        self._need_layout(*signals)
        (signal,) = signals
        self._need(
            signal.channels % self.groups == 0 and self.out % self.groups == 0,
            f"groups do not divide {signal}",
        )
        return Signal(
            "chw", (self.out, signal.shape[1] * self.stride, signal.shape[2] * self.stride)
        )

    def module(self, *signals: Signal) -> nn.Module:
        return nn.ConvTranspose2d(
            signals[0].channels,
            self.out,
            self.stride,
            self.stride,
            groups=self.groups,
            bias=self.bias,
        )


@dataclass(frozen=True, repr=False)
class Linear(Node):
    """A linear layer over the channels of a channels-last value."""

    x: int
    out: int
    bias: bool = True
    layouts: ClassVar = CHANNELS_LAST

    def infer(self, *signals: Signal) -> Signal:
        self._need_layout(*signals)
        return signals[0].with_channels(self.out)

    def module(self, *signals: Signal) -> nn.Module:
        return nn.Linear(signals[0].channels, self.out, bias=self.bias)


@dataclass(frozen=True, repr=False)
class TokenMix(Node):
    """A linear layer over the tokens, as in MLP-Mixer."""

    x: int
    out: int
    layouts: ClassVar = ("tokens",)

    def infer(self, *signals: Signal) -> Signal:
        self._need_layout(*signals)
        return Signal("tokens", (self.out, signals[0].channels))

    def module(self, *signals: Signal) -> nn.Module:
        return nn.Linear(signals[0].shape[0], self.out)

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        assert module is not None
        return module(tensors[0].transpose(1, 2)).transpose(1, 2)


class _Shaped(Node):
    """A node that keeps its input's shape."""

    def infer(self, *signals: Signal) -> Signal:
        self._need_layout(*signals)
        return signals[0]


@dataclass(frozen=True, repr=False)
class BatchNorm(_Shaped):
    x: int
    layouts: ClassVar = ("chw", "vector")

    def module(self, *signals: Signal) -> nn.Module:
        kind = nn.BatchNorm2d if signals[0].layout == "chw" else nn.BatchNorm1d
        return kind(signals[0].channels)


@dataclass(frozen=True, repr=False)
class GroupNorm(_Shaped):
    x: int
    groups: int = 1
    layouts: ClassVar = ("chw",)

    def infer(self, *signals: Signal) -> Signal:
        self._need(signals[0].channels % self.groups == 0, f"groups do not divide {signals[0]}")
        # Pruning may leave a group with one channel, and torch refuses statistics over one number.
        self._need(signals[0].places > 1, f"no statistics over {signals[0]}")
        return super().infer(*signals)

    def module(self, *signals: Signal) -> nn.Module:
        return nn.GroupNorm(self.groups, signals[0].channels)


@dataclass(frozen=True, repr=False)
class InstanceNorm(_Shaped):
    x: int
    layouts: ClassVar = ("chw",)

    def infer(self, *signals: Signal) -> Signal:
        self._need(signals[0].places > 1, f"no statistics over {signals[0]}")
        return super().infer(*signals)

    def module(self, *signals: Signal) -> nn.Module:
        return nn.InstanceNorm2d(signals[0].channels, affine=True)


@dataclass(frozen=True, repr=False)
class LayerNorm(_Shaped):
    x: int
    layouts: ClassVar = CHANNELS_LAST

    def module(self, *signals: Signal) -> nn.Module:
        return nn.LayerNorm(signals[0].channels)


@dataclass(frozen=True, repr=False)
class RMSNorm(_Shaped):
    x: int
    layouts: ClassVar = CHANNELS_LAST

    def module(self, *signals: Signal) -> nn.Module:
        return nn.RMSNorm(signals[0].channels, eps=1e-5)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
}


@dataclass(frozen=True, repr=False)
class Activation(_Shaped):
    x: int
    fn: str = "relu"

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        return ACTIVATIONS[self.fn](tensors[0])


@dataclass(frozen=True, repr=False)
class PReLU(_Shaped):
    """A PReLU with a learned slope for each channel."""

    x: int
    layouts: ClassVar = ("chw", "vector")

    def module(self, *signals: Signal) -> nn.Module:
        return nn.PReLU(signals[0].channels)


@dataclass(frozen=True, repr=False)
class Dropout(_Shaped):
    x: int
    p: float = 0.5

    def module(self, *signals: Signal) -> nn.Module:
        return nn.Dropout(self.p)


class _Scale(nn.Module):
    def __init__(self, signal: Signal) -> None:
        super().__init__()
        self.gamma = nn.Parameter(
            torch.ones(signal.channels, 1, 1)
            if signal.layout == "chw"
            else torch.ones(signal.channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


@dataclass(frozen=True, repr=False)
class Scale(_Shaped):
    """A learned factor for each channel (layer scale)."""

    x: int

    def module(self, *signals: Signal) -> nn.Module:
        return _Scale(signals[0])


class _ClassToken(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1)


@dataclass(frozen=True, repr=False)
class ClassToken(Node):
    """One learned token, put before the others."""

    x: int
    layouts: ClassVar = ("tokens",)

    def infer(self, *signals: Signal) -> Signal:
        self._need_layout(*signals)
        return Signal("tokens", (signals[0].shape[0] + 1, signals[0].channels))

    def module(self, *signals: Signal) -> nn.Module:
        return _ClassToken(signals[0].channels)


class _SqueezeExcite(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, hidden, 1)
        self.expand = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


@dataclass(frozen=True, repr=False)
class SqueezeExcite(_Shaped):
    x: int
    hidden: int = 4
    layouts: ClassVar = ("chw",)

    def module(self, *signals: Signal) -> nn.Module:
        return _SqueezeExcite(signals[0].channels, self.hidden)


class _PackedAttention(nn.Module):
    """Attention with one projection to q, k and v, as (3, batch, heads, tokens, head_dim)."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv = nn.Linear(width, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = (
            self.qkv(x).reshape(batch, tokens, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        )
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_dim))


class _SeparateAttention(nn.Module):
    """Attention with three projections, written out as matrix products and a softmax."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.scale = heads, head_dim, head_dim**-0.5
        self.q = nn.Linear(width, heads * head_dim)
        self.k = nn.Linear(width, heads * head_dim, bias=False)
        self.v = nn.Linear(width, heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            layer(x).view(batch, tokens, self.heads, self.head_dim).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class _GroupedAttention(nn.Module):
    """Attention in which two query heads share one head of the keys and values.

    If the number of query heads is odd, all of them share one. With ``rotary``, positions rotate
    queries and keys, and PyTorch repeats the shared heads.
    """

    def __init__(self, width: int, heads: int, head_dim: int, rotary: bool) -> None:
        super().__init__()
        self.head_dim, self.times = head_dim, 2 if heads % 2 == 0 else heads
        self.q, self.proj = nn.Linear(width, heads * head_dim), nn.Linear(heads * head_dim, width)
        self.k, self.v = (
            nn.Linear(width, heads // self.times * head_dim, bias=False) for _ in range(2)
        )
        self.register_buffer("frequencies", torch.rand(head_dim // 2) if rotary else None)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        if self.frequencies is not None:
            q, k = self._turned(q), self._turned(k)
        if self.frequencies is None:
            k, v = k.repeat_interleave(self.times, dim=1), v.repeat_interleave(self.times, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.frequencies is not None)
        return self.proj(y.transpose(1, 2).flatten(2))

    def _turned(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[2], device=x.device, dtype=x.dtype)
        angles = torch.outer(positions, self.frequencies).repeat(1, 2)
        one, other = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-other, one], dim=-1) * angles.sin()


class _ModuleAttention(nn.Module):
    """Attention by ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@dataclass(frozen=True, repr=False)
class Attention(_Shaped):
    """Self-attention in one of several styles.

    ``packed`` has one qkv projection, ``separate`` has three, and ``module`` is
    ``nn.MultiheadAttention``. In ``grouped``, query heads share a head of the keys and values;
    ``rotary`` is ``grouped`` with rotary positions.
    """

    x: int
    heads: int = 2
    head_dim: int = 4
    style: str = "packed"
    layouts: ClassVar = ("tokens",)

    def infer(self, *signals: Signal) -> Signal:
        if self.style == "module":
            self._need(
                signals[0].channels == self.heads * self.head_dim,
                f"heads x head_dim is not the width of {signals[0]}",
            )
        return super().infer(*signals)

    def module(self, *signals: Signal) -> nn.Module:
        width = signals[0].channels
        if self.style == "module":
            return _ModuleAttention(width, self.heads)
        if self.style in ("grouped", "rotary"):
            return _GroupedAttention(width, self.heads, self.head_dim, self.style == "rotary")
        kind = _PackedAttention if self.style == "packed" else _SeparateAttention
        return kind(width, self.heads, self.head_dim)


@dataclass(frozen=True, repr=False)
class Recurrent(Node):
    """A recurrent layer over the tokens, ``lstm`` or ``gru``.

    With ``both``, it runs in both directions, and the results are concatenated.
    """

    x: int
    out: int = 4
    kind: str = "lstm"
    both: bool = False
    layouts: ClassVar = ("tokens",)

    def infer(self, *signals: Signal) -> Signal:
        self._need_layout(*signals)
        return signals[0].with_channels(self.out * (1 + self.both))

    def module(self, *signals: Signal) -> nn.Module:
        kind = nn.LSTM if self.kind == "lstm" else nn.GRU
        return kind(signals[0].channels, self.out, batch_first=True, bidirectional=self.both)

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        assert module is not None
        return module(tensors[0])[0]


# --- several values in


def meets(wide: Signal, other: Signal) -> bool:
    """Tell whether ``other`` has the same shape, or is a vector with as many channels."""
    return wide == other or (other.layout == "vector" and other.channels == wide.channels)


def _spread(tensor: Tensor, own: Signal, wide: Signal) -> Tensor:
    """Return a vector in a shape that broadcasts to ``wide``; anything else is unchanged."""
    if own.layout == wide.layout:
        return tensor
    return {
        "chw": tensor[:, :, None, None],
        "tokens": tensor[:, None],
        "hwc": tensor[:, None, None],
    }[wide.layout]


@dataclass(frozen=True, repr=False)
class Add(Node):
    """a + b; ``b`` may be a vector, which is then added at every position."""

    a: int
    b: int
    references: ClassVar = ("a", "b")

    def infer(self, *signals: Signal) -> Signal:
        self._need(meets(*signals), f"{signals[0]} does not meet {signals[1]}")
        return signals[0]

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        return tensors[0] + _spread(tensors[1], signals[1], signals[0])


@dataclass(frozen=True, repr=False)
class Mul(Node):
    """a * gate(b); ``b`` may be a vector, which then gates every position."""

    a: int
    b: int
    gate: str = "sigmoid"
    references: ClassVar = ("a", "b")

    def infer(self, *signals: Signal) -> Signal:
        self._need(meets(*signals), f"{signals[0]} does not meet {signals[1]}")
        return signals[0]

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        gate = tensors[1] if self.gate == "none" else ACTIVATIONS[self.gate](tensors[1])
        return tensors[0] * _spread(gate, signals[1], signals[0])


@dataclass(frozen=True, repr=False)
class Concat(Node):
    """Values of one layout and size, concatenated along the channels."""

    xs: tuple[int, ...]
    references: ClassVar = ("xs",)

    def infer(self, *signals: Signal) -> Signal:
        first = signals[0]
        self._need(
            all(s.with_channels(1) == first.with_channels(1) for s in signals),
            f"{signals} do not line up",
        )
        return first.with_channels(sum(s.channels for s in signals))

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        return torch.cat(tensors, dim=signals[0].dim)


# --- movement


@dataclass(frozen=True, repr=False)
class Split(Node):
    """One part of ``x.split(sizes)``; parts of the same split share one call."""

    x: int
    sizes: tuple[int, ...]
    part: int = 0

    def infer(self, *signals: Signal) -> Signal:
        self._need(sum(self.sizes) == signals[0].channels, f"sizes do not add up to {signals[0]}")
        return signals[0].with_channels(self.sizes[self.part])

    def cut(self, signal: Signal, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, list(self.sizes), dim=signal.dim)

    @property
    def call(self) -> tuple[object, ...]:
        """A key that all parts of the same split share."""
        return (Split, self.x, self.sizes)


@dataclass(frozen=True, repr=False)
class Chunk(Node):
    """One of ``x.chunk(chunks)``, all of equal size; the chunks of ``x`` share one call."""

    x: int
    chunks: int = 2
    part: int = 0

    def infer(self, *signals: Signal) -> Signal:
        self._need(signals[0].channels % self.chunks == 0, f"chunks do not divide {signals[0]}")
        return signals[0].with_channels(signals[0].channels // self.chunks)

    def cut(self, signal: Signal, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(self.chunks, dim=signal.dim)

    @property
    def call(self) -> tuple[object, ...]:
        return (Chunk, self.x, self.chunks)


@dataclass(frozen=True, repr=False)
class Slice(Node):
    """Channels ``start:stop``."""

    x: int
    start: int
    stop: int

    def infer(self, *signals: Signal) -> Signal:
        self._need(
            0 <= self.start < self.stop <= signals[0].channels, f"no such channels in {signals[0]}"
        )
        return signals[0].with_channels(self.stop - self.start)

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        (x,) = tensors
        return (
            x[:, self.start : self.stop] if signals[0].dim == 1 else x[..., self.start : self.stop]
        )


@dataclass(frozen=True, repr=False)
class Glu(Node):
    """The first half of the channels, gated by the second half."""

    x: int

    def infer(self, *signals: Signal) -> Signal:
        self._need(signals[0].channels % 2 == 0, f"no two halves in {signals[0]}")
        return signals[0].with_channels(signals[0].channels // 2)

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        return F.glu(tensors[0], dim=signals[0].dim)


@dataclass(frozen=True, repr=False)
class Shuffle(_Shaped):
    """A channel shuffle, written with sizes from ``x.shape`` or by torch's own function."""

    x: int
    groups: int = 2
    style: str = "shape"
    layouts: ClassVar = ("chw",)

    def infer(self, *signals: Signal) -> Signal:
        self._need(signals[0].channels % self.groups == 0, f"groups do not divide {signals[0]}")
        return super().infer(*signals)

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        (x,) = tensors
        if self.style == "function":
            return F.channel_shuffle(x, self.groups)
        batch, channels, height, width = x.shape
        x = x.view(batch, self.groups, channels // self.groups, height, width)
        return x.transpose(1, 2).reshape(batch, channels, height, width)


@dataclass(frozen=True, repr=False)
class Flip(_Shaped):
    """The channels in reverse order."""

    x: int

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        return tensors[0].flip(signals[0].dim)


@dataclass(frozen=True, repr=False)
class Roll(_Shaped):
    """The channels, rotated by ``shift``."""

    x: int
    shift: int = 1

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        return torch.roll(tensors[0], self.shift, signals[0].dim)


@dataclass(frozen=True, repr=False)
class PadChannels(Node):
    """Zero channels before and after the others."""

    x: int
    before: int
    after: int

    def infer(self, *signals: Signal) -> Signal:
        return signals[0].with_channels(signals[0].channels + self.before + self.after)

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        behind = len(signals[0].shape) - signals[0].dim
        return F.pad(tensors[0], (0, 0) * behind + (self.before, self.after))


@dataclass(frozen=True, repr=False)
class Flatten(Node):
    """All axes in one, by ``flatten``, ``reshape(batch, -1)`` or ``reshape(-1, literal)``."""

    x: int
    style: str = "flatten"
    layouts: ClassVar = ("chw", "hwc", "tokens")

    def infer(self, *signals: Signal) -> Signal:
        self._need_layout(*signals)
        return Signal("vector", (math.prod(signals[0].shape),))

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        (x,) = tensors
        if self.style == "flatten":
            return x.flatten(1)
        if self.style == "view":
            return x.reshape(x.size(0), -1)
        return x.reshape(-1, math.prod(signals[0].shape))


@dataclass(frozen=True, repr=False)
class Permute(Node):
    """(C, H, W) to (H, W, C), or back."""

    x: int
    layouts: ClassVar = ("chw", "hwc")

    def infer(self, *signals: Signal) -> Signal:
        self._need_layout(*signals)
        a, b, c = signals[0].shape
        return Signal("hwc", (b, c, a)) if signals[0].layout == "chw" else Signal("chw", (c, a, b))

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        return tensors[0].permute((0, 2, 3, 1) if signals[0].layout == "chw" else (0, 3, 1, 2))


@dataclass(frozen=True, repr=False)
class Tokens(Node):
    """(C, H, W) to (H * W, C)."""

    x: int
    layouts: ClassVar = ("chw",)

    def infer(self, *signals: Signal) -> Signal:
        self._need_layout(*signals)
        channels, height, width = signals[0].shape
        return Signal("tokens", (height * width, channels))

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        return tensors[0].flatten(2).transpose(1, 2)


@dataclass(frozen=True, repr=False)
class Image(Node):
    """(T, C) to (C, height, T / height)."""

    x: int
    height: int
    layouts: ClassVar = ("tokens",)

    def infer(self, *signals: Signal) -> Signal:
        self._need_layout(*signals)
        tokens, channels = signals[0].shape
        self._need(tokens % self.height == 0, f"height does not divide {signals[0]}")
        return Signal("chw", (channels, self.height, tokens // self.height))

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        return (
            tensors[0]
            .transpose(1, 2)
            .unflatten(2, (self.height, signals[0].shape[0] // self.height))
        )


@dataclass(frozen=True, repr=False)
class PixelShuffle(Node):
    """(4C, H, W) to (C, 2H, 2W)."""

    x: int
    layouts: ClassVar = ("chw",)

    def infer(self, *signals: Signal) -> Signal:
        self._need_layout(*signals)
        channels, height, width = signals[0].shape
        self._need(channels % 4 == 0, f"four does not divide the channels of {signals[0]}")
        return Signal("chw", (channels // 4, 2 * height, 2 * width))

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        return F.pixel_shuffle(tensors[0], 2)


@dataclass(frozen=True, repr=False)
class PixelUnshuffle(Node):
    """(C, 2H, 2W) to (4C, H, W)."""

    x: int
    layouts: ClassVar = ("chw",)

    def infer(self, *signals: Signal) -> Signal:
        self._need_layout(*signals)
        channels, height, width = signals[0].shape
        self._need(height % 2 == 0 and width % 2 == 0, f"odd sides in {signals[0]}")
        return Signal("chw", (4 * channels, height // 2, width // 2))

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        return F.pixel_unshuffle(tensors[0], 2)


@dataclass(frozen=True, repr=False)
class Pad(Node):
    """Zeros around the image."""

    x: int
    amount: int = 1
    layouts: ClassVar = ("chw",)

    def infer(self, *signals: Signal) -> Signal:
        self._need_layout(*signals)
        return signals[0].with_space(*(side + 2 * self.amount for side in signals[0].shape[1:]))

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        return F.pad(tensors[0], (self.amount,) * 4)


# --- pooling, sizes, statistics


@dataclass(frozen=True, repr=False)
class Pool(Node):
    """Pooling to half the size, by ``max``, ``avg`` or ``adaptive``."""

    x: int
    mode: str = "max"
    layouts: ClassVar = ("chw",)

    def infer(self, *signals: Signal) -> Signal:
        self._need_layout(*signals)
        self._need(min(signals[0].shape[1:]) >= 2, f"nothing to halve in {signals[0]}")
        return signals[0].with_space(*(side // 2 for side in signals[0].shape[1:]))

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        if self.mode == "adaptive":
            return F.adaptive_avg_pool2d(tensors[0], [side // 2 for side in signals[0].shape[1:]])
        return (F.max_pool2d if self.mode == "max" else F.avg_pool2d)(tensors[0], 2)


@dataclass(frozen=True, repr=False)
class GlobalPool(Node):
    """One number per channel, by a mean or, for images only, adaptive pooling and flatten."""

    x: int
    style: str = "mean"
    layouts: ClassVar = ("chw", "hwc", "tokens")

    def infer(self, *signals: Signal) -> Signal:
        self._need_layout(*signals)
        self._need(self.style == "mean" or signals[0].layout == "chw", f"cannot pool {signals[0]}")
        return Signal("vector", (signals[0].channels,))

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        (x,) = tensors
        if self.style == "adaptive":
            return F.adaptive_avg_pool2d(x, 1).flatten(1)
        return x.mean({"chw": (2, 3), "hwc": (1, 2), "tokens": (1,)}[signals[0].layout])


@dataclass(frozen=True, repr=False)
class Upsample(Node):
    """Upsampling to twice the size."""

    x: int
    mode: str = "nearest"
    layouts: ClassVar = ("chw",)

    def infer(self, *signals: Signal) -> Signal:
        self._need_layout(*signals)
        return signals[0].with_space(*(2 * side for side in signals[0].shape[1:]))

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        if self.mode == "bilinear":
            return F.interpolate(tensors[0], scale_factor=2, mode="bilinear", align_corners=False)
        return F.interpolate(tensors[0], scale_factor=2)


@dataclass(frozen=True, repr=False)
class Fit(Node):
    """An image, padded until both sides are multiples of ``multiple``.

    This is control flow on sizes: an image that fits already is returned as it is.
    """

    x: int
    multiple: int = 4
    layouts: ClassVar = ("chw",)

    def infer(self, *signals: Signal) -> Signal:
        self._need_layout(*signals)
        return signals[0].with_space(
            *(-(-side // self.multiple) * self.multiple for side in signals[0].shape[1:])
        )

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        height, width = tensors[0].shape[-2:]
        down, right = (self.multiple - side % self.multiple for side in (height, width))
        if down < self.multiple or right < self.multiple:
            return F.pad(tensors[0], (0, right % self.multiple, 0, down % self.multiple))
        return tensors[0]


@dataclass(frozen=True, repr=False)
class Softmax(_Shaped):
    """A softmax over the channels, before which no channel may be removed."""

    x: int

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        return tensors[0].softmax(signals[0].dim)


@dataclass(frozen=True, repr=False)
class Centre(_Shaped):
    """x minus its mean over the channels; the mean divides by a size that pruning changes."""

    x: int

    def forward(
        self, module: nn.Module | None, signals: tuple[Signal, ...], *tensors: Tensor
    ) -> Tensor:
        return tensors[0] - tensors[0].mean(signals[0].dim, keepdim=True)


# --- sharing


@dataclass(frozen=True, repr=False)
class Again(Node):
    """The layer of value ``of``, applied to another value of the same layout and width."""

    x: int
    of: int
    references: ClassVar = ("x", "of")

    def infer(self, *signals: Signal) -> Signal:
        raise SpecError(f"{self!r}: a shared layer needs the network around it")


KINDS: tuple[type[Node], ...] = (
    Conv,
    Linear,
    Activation,
    BatchNorm,
    Add,
    Concat,
    Depthwise,
    Slice,
    Split,
    Chunk,
    Mul,
    Flatten,
    GlobalPool,
    Pool,
    LayerNorm,
    GroupNorm,
    Tokens,
    Image,
    Permute,
    Shuffle,
    SqueezeExcite,
    Attention,
    Recurrent,
    Again,
    TransposedConv,
    Fit,
    Upsample,
    InstanceNorm,
    RMSNorm,
    PReLU,
    Scale,
    Glu,
    ClassToken,
    TokenMix,
    PixelShuffle,
    PixelUnshuffle,
    Flip,
    Roll,
    Pad,
    PadChannels,
    Dropout,
    Centre,
    Softmax,
)
"""All kinds, the simplest first, because a failing example shrinks towards the first ones."""
