"""The networks of the accuracy benchmark: VGG, ResNet and DenseNet for small images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.digits import Block

__all__ = ["NETWORKS", "DenseNet", "ResNet", "vgg"]


def vgg(widths: Sequence[Sequence[int]], channels: int, classes: int) -> nn.Sequential:
    """Return a VGG that maps images to logits.

    It has stages of 3 x 3 convolutions with batch normalisation, pooling by 2 between stages, and
    one linear layer. Liu et al. (Network Slimming, 2017) train VGG-16 for CIFAR in this form,
    without the two wide linear layers.
    """
    layers: list[nn.Module] = []
    for number, stage in enumerate(widths):
        if number:
            layers.append(nn.MaxPool2d(2))
        for width in stage:
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            channels = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )


class ResNet(nn.Module):
    """The ResNet of He et al. (CVPR 2016), section 4.2.

    ``depth`` = 6 n + 2 layers in three stages of n blocks, with 16, 32 and 64 channels.
    """

    def __init__(self, depth: int, channels: int, classes: int, width: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        blocks, inputs = [], width
        for stage in range(3):
            for number in range((depth - 2) // 6):
                blocks.append(
                    Block(inputs, width << stage, stride=2 if stage and not number else 1)
                )
                inputs = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.fc(x.mean(dim=(2, 3)))


class _Dense(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.bn(x)))], dim=1)


class DenseNet(nn.Module):
    """The basic DenseNet of Huang et al. (CVPR 2017) for CIFAR, without compression.

    ``depth`` = 3 n + 4 layers in three blocks of n layers.
    """

    def __init__(self, depth: int, channels: int, classes: int, growth: int = 12) -> None:
        super().__init__()
        width = 2 * growth
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
        for block in range(3):
            if block:
                layers += [
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                    nn.Conv2d(width, width, 1, bias=False),
                    nn.AvgPool2d(2),
                ]
            for _ in range((depth - 4) // 3):
                layers.append(_Dense(width, growth))
                width += growth
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU())
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean(dim=(2, 3)))


def _vgg16(channels: int, classes: int) -> nn.Module:
    return vgg(((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3), channels, classes)


def _vgg_narrow(channels: int, classes: int) -> nn.Module:
    return vgg(((16, 16), (32, 32), (64, 64), (128, 128)), channels, classes)


NETWORKS: Mapping[str, Callable[[int, int], nn.Module]] = {
    "vgg_narrow": _vgg_narrow,
    "resnet20": lambda channels, classes: ResNet(20, channels, classes),
    "densenet22": lambda channels, classes: DenseNet(22, channels, classes, growth=8),
    "vgg16": _vgg16,
    "resnet56": lambda channels, classes: ResNet(56, channels, classes),
    "densenet40": lambda channels, classes: DenseNet(40, channels, classes, growth=12),
}
"""For each name a function of the number of channels of an image and the number of classes.

The first three are the default, the others have the sizes of the papers.
"""
