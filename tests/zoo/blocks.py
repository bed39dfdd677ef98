"""Blocks that networks are made of: gates, shuffles, splits, pyramids, fusions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, classify, floats


def conv(
    fan_in: int, fan_out: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution, batch normalisation, SiLU."""
    return nn.Sequential(
        nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(fan_out),
        nn.SiLU(),
    )


class Residual(nn.Module):
    """Two residual blocks, the second with a projected shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = conv(3, width)
        self.a1, self.a2 = conv(width, width), conv(width, width)
        self.b1, self.b2 = conv(width, 2 * width, stride=2), conv(2 * width, 2 * width)
        self.shortcut = nn.Conv2d(width, 2 * width, 1, 2)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.a2(self.a1(x)))
        x = F.relu(self.shortcut(x) + self.b2(self.b1(x)))
        return self.head(classify(x))


class SqueezeExcite(nn.Module):
    """A gate per channel, made of 1x1 convolutions, or of linear layers and a view."""

    def __init__(self, width: int, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.stem = conv(3, width)
        self.body = conv(width, 2 * width)
        inner = width // 2
        self.down = nn.Linear(2 * width, inner) if linear else nn.Conv2d(2 * width, inner, 1)
        self.up = nn.Linear(inner, 2 * width) if linear else nn.Conv2d(inner, 2 * width, 1)
        self.last = conv(2 * width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        b, c, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1)
        if self.linear:
            y = y.view(b, c)
        y = torch.sigmoid(self.up(F.relu(self.down(y))))
        x = x * (y.view(b, c, 1, 1).expand_as(x) if self.linear else y)
        return self.head(classify(self.last(x)))


class LayerScaled(nn.Module):
    """ConvNeXt's block, with two learned scales.

    It has a depthwise convolution, channels last, LayerNorm, and an inverted bottleneck.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 2, 2)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.ones(width))
        self.scale = nn.Parameter(torch.ones(width, 1, 1))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return self.head(classify(x + self.scale * y.permute(0, 3, 1, 2)))


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Shuffle channels between groups, as ShuffleNet is usually written."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, -1, height, width)


class GroupShuffle(nn.Module):
    """ShuffleNet v1: grouped convolutions with a shuffle between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = conv(3, 2 * width)
        self.g1 = conv(2 * width, 2 * width, 1, groups=2)
        self.depthwise = conv(2 * width, 2 * width, groups=2 * width)
        self.g2 = conv(2 * width, 2 * width, 1, groups=2)
        self.last = conv(2 * width, 2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.g2(self.depthwise(shuffle(self.g1(x), 2)))
        return self.head(classify(self.last(x)))


class SplitShuffle(nn.Module):
    """Two blocks of ShuffleNet v2.

    Half of the channels pass by, the other half is computed on, and then both are shuffled.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = conv(3, 2 * width)
        self.work = nn.ModuleList(
            nn.Sequential(
                conv(width, width, 1), conv(width, width, groups=width), conv(width, width, 1)
            )
            for _ in range(2)
        )
        self.last = conv(2 * width, 2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for work in self.work:
            left, right = x.chunk(2, dim=1)
            x = shuffle(torch.cat((left, work(right)), dim=1), 2)
        return self.head(classify(self.last(x)))


class C2f(nn.Module):
    """YOLOv8's block: chunk, a chain of bottlenecks, and a concatenation of all through a list."""

    def __init__(self, width: int, add: bool = True) -> None:
        super().__init__()
        self.add = add
        self.stem = conv(3, width)
        self.cv1 = conv(width, 2 * width, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(width, width), conv(width, width)) for _ in range(2)
        )
        self.cv2 = conv(4 * width, 2 * width, 1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(self.stem(x)).chunk(2, 1))
        for block in self.blocks:
            y.append(block(y[-1]) + y[-1] if self.add else block(y[-1]))
        return self.head(classify(self.cv2(torch.cat(y, 1))))


class CSP(nn.Module):
    """Two 1x1 convolutions, one of them followed by residual blocks; concatenated and fused."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = conv(3, 2 * width)
        self.left, self.right = conv(2 * width, width, 1), conv(2 * width, width, 1)
        self.block = nn.Sequential(conv(width, width), conv(width, width))
        self.fuse = conv(2 * width, 2 * width, 1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        left = self.left(x)
        left = left + self.block(left)
        return self.head(classify(self.fuse(torch.cat([left, self.right(x)], 1))))


class Pyramid(nn.Module):
    """FPN: three levels, lateral convolutions, top-down sums, and heads that all levels share.

    The output is a list.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c1, self.c2 = conv(3, width), conv(width, 2 * width, stride=2)
        self.c3 = conv(2 * width, 4 * width, stride=2)
        self.lateral = nn.ModuleList(nn.Conv2d(n * width, 2 * width, 1) for n in (1, 2, 4))
        self.smooth = nn.ModuleList(
            nn.Conv2d(2 * width, 2 * width, 3, padding=1) for _ in range(3)
        )
        self.tower = conv(2 * width, 2 * width)
        self.scores, self.boxes = (
            nn.Conv2d(2 * width, 5, 3, padding=1),
            nn.Conv2d(2 * width, 4, 3, padding=1),
        )

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        c1 = self.c1(x)
        c2 = self.c2(c1)
        levels = [
            lateral(c) for lateral, c in zip(self.lateral, (c1, c2, self.c3(c2)), strict=True)
        ]
        for i in (1, 0):
            levels[i] = levels[i] + F.interpolate(
                levels[i + 1], size=levels[i].shape[-2:], mode="nearest"
            )
        towers = [
            self.tower(smooth(level)) for smooth, level in zip(self.smooth, levels, strict=True)
        ]
        return [{"scores": self.scores(t), "boxes": self.boxes(t)} for t in towers]


class UNet(nn.Module):
    """UNet: two levels down, two levels up, skips concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.d1, self.d2, self.mid = (
            conv(3, width),
            conv(width, 2 * width),
            conv(2 * width, 4 * width),
        )
        self.up2, self.u2 = (
            nn.ConvTranspose2d(4 * width, 2 * width, 2, 2),
            conv(4 * width, 2 * width),
        )
        self.up1, self.u1 = nn.Upsample(scale_factor=2, mode="bilinear"), conv(3 * width, width)
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        d1 = self.d1(x)
        d2 = self.d2(F.max_pool2d(d1, 2))
        x = self.mid(F.avg_pool2d(d2, 2))
        x = self.u2(torch.cat([self.up2(x), d2], dim=1))
        return self.out(self.u1(torch.cat([d1, self.up1(x)], dim=1)))


class HighResolution(nn.Module):
    """HRNet: two resolutions side by side, each added to the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = conv(3, width)
        self.to_low = conv(width, 2 * width, stride=2)
        self.high, self.low = conv(width, width), conv(2 * width, 2 * width)
        self.up = nn.Sequential(
            nn.Conv2d(2 * width, width, 1), nn.BatchNorm2d(width), nn.Upsample(scale_factor=2)
        )
        self.down = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width))
        self.out = nn.Conv2d(3 * width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.stem(x)
        branches = [self.high(high), self.low(self.to_low(high))]
        fused = []
        for i, from_other in enumerate((self.up, self.down)):
            fused.append(F.relu(branches[i] + from_other(branches[1 - i])))
        high, low = fused
        return self.out(torch.cat([high, F.interpolate(low, scale_factor=2.0)], 1))


class Dense(nn.Module):
    """DenseNet: every layer reads all features before it; then a transition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d((1 + i) * width) for i in range(4))
        self.convs = nn.ModuleList(
            nn.Conv2d((1 + i) * width, width, 3, padding=1) for i in range(3)
        )
        self.transition = nn.Conv2d(4 * width, 2 * width, 1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, layer in zip(self.norms, self.convs, strict=False):
            features.append(layer(F.relu(norm(torch.cat(features, 1)))))
        x = self.transition(F.relu(self.norms[3](torch.cat(features, 1))))
        return self.head(classify(F.avg_pool2d(x, 2)))


class Inception(nn.Module):
    """Branches of different widths and a pooled one, concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = conv(3, width)
        self.b1, self.b3 = (
            conv(width, width, 1),
            nn.Sequential(conv(width, width, 1), conv(width, 2 * width)),
        )
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(width, width // 2, 1))
        self.last = conv(7 * width // 2, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(classify(self.last(torch.cat([self.b1(x), self.b3(x), self.pool(x)], 1))))


class InvertedResidual(nn.Module):
    """MobileNetV2 block: expand, depthwise, project, add."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = conv(3, width)
        self.expand, self.depthwise = (
            conv(width, 4 * width, 1),
            conv(4 * width, 4 * width, groups=4 * width),
        )
        self.project = nn.Conv2d(4 * width, width, 1)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(classify(x + self.project(self.depthwise(self.expand(x)))))


class SelectiveKernel(nn.Module):
    """SKNet: two branches are stacked, and a softmax over the branch axis weighs them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = conv(3, width)
        self.b3, self.b5 = conv(width, 2 * width), conv(width, 2 * width, 5)
        self.squeeze, self.excite = nn.Conv2d(2 * width, width, 1), nn.Conv2d(width, 4 * width, 1)
        self.head = nn.Linear(2 * width, 10)
        self.width = 2 * width

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        branches = torch.stack([self.b3(x), self.b5(x)], dim=1)
        gate = self.excite(F.relu(self.squeeze(branches.sum(1).mean((2, 3), keepdim=True))))
        gate = gate.view(x.shape[0], 2, self.width, 1, 1).softmax(dim=1)
        return self.head(classify((branches * gate).sum(1)))


class SpatialGate(nn.Module):
    """CBAM's spatial gate: mean and maximum over the channels, a small convolution, a sigmoid.

    The maximum over an axis changes when channels are removed. The axis may be pinned, and the
    rest must still shrink.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = (
            conv(3, 2 * width),
            conv(2 * width, 2 * width),
            conv(2 * width, width),
        )
        self.gate = nn.Conv2d(2, 1, 3, padding=1)
        self.c4 = conv(width, 2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c3(self.c2(self.c1(x)))
        gate = self.gate(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1))
        return self.head(classify(self.c4(x * torch.sigmoid(gate))))


class Gated(nn.Module):
    """A convolutional gate, spelt as `how` says."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem = conv(3, width)
        self.gate = nn.Conv2d(width, 4 * width, 3, padding=1)
        self.last = conv(2 * width, 2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate(self.stem(x))
        if self.how == "glu":
            x = F.glu(x, dim=1)
        elif self.how == "chunk":
            a, b = x.chunk(2, dim=1)
            x = a * torch.sigmoid(b)
        elif self.how == "slice":
            half = x.shape[1] // 2
            x = x[:, :half] * torch.tanh(x[:, half:])
        else:  # maxout: the larger of two neighbours
            b, c, h, w = x.shape
            x = x.view(b, c // 2, 2, h, w).max(dim=2)[0]
        return self.head(classify(self.last(x)))


IMAGE = floats(3, 8, 8)
CASES = [
    Case("residual", Residual, IMAGE),
    Case("squeeze_excite_conv", lambda w: SqueezeExcite(w, linear=False), IMAGE),
    Case("squeeze_excite_linear", lambda w: SqueezeExcite(w, linear=True), IMAGE),
    Case("layer_scale", LayerScaled, IMAGE, zeroable=False),
    Case("channel_shuffle_grouped", GroupShuffle, IMAGE),
    Case("channel_shuffle_split", SplitShuffle, IMAGE, slack=0.1),
    Case("c2f", C2f, IMAGE, slack=0.1),
    Case("c2f_without_add", lambda w: C2f(w, add=False), IMAGE, slack=0.1),
    Case("csp", CSP, IMAGE, slack=0.1),
    Case("fpn_shared_heads", Pyramid, IMAGE, width=8),
    Case("unet", UNet, IMAGE, slack=0.1),
    Case("hrnet_fusion", HighResolution, IMAGE, slack=0.1),
    Case("dense_block", Dense, IMAGE, slack=0.1),
    Case("inception_branches", Inception, IMAGE, slack=0.1),
    Case("inverted_residual", InvertedResidual, IMAGE),
    Case("selective_kernel", SelectiveKernel, IMAGE),
    # c2 is free on both sides; c1, c3 and c4 on one side, where the maximum pins the channels of
    # c3. This gives 0.38.
    Case("spatial_gate", SpatialGate, IMAGE, at_most=0.4),
    *(
        Case(f"gate_by_{how}", lambda w, how=how: Gated(w, how), IMAGE)
        for how in ("glu", "chunk", "slice", "maxout")
    ),
]
