"""Convolutions in all dimensions with every normalisation, computed weights, bare parameters."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.zoo.case import Case, classify, floats

Layer = Callable[[int], nn.Module]

CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[nn.Module]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
BATCH_NORM: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM: dict[int, type[nn.Module]] = {
    1: nn.InstanceNorm1d,
    2: nn.InstanceNorm2d,
    3: nn.InstanceNorm3d,
}
SIDE = {1: (8,), 2: (8, 8), 3: (4, 4, 4)}


class ConvNet(nn.Module):
    """Three convolutions, each followed by a normalisation and an activation, and a classifier."""

    def __init__(
        self,
        width: int,
        dims: int = 2,
        norm: Layer = nn.Identity,
        act: Layer = lambda _: nn.ReLU(),
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, fan_out, stride in (
            (3, width, 1),
            (width, 2 * width, 2),
            (2 * width, 2 * width, 1),
        ):
            layers += [CONV[dims](fan_in, fan_out, 3, stride, 1), norm(fan_out), act(fan_out)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(classify(self.features(x)))


class OverChannels(nn.Module):
    """A normalisation of the last axis, applied to the channel axis."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class HandwrittenRMSNorm(nn.Module):
    """RMSNorm made of plain operators, as in language models."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class FrozenBatchNorm(nn.Module):
    """Batch normalisation by arithmetic in forward on four vectors that are buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(width))
        self.register_buffer("bias", torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)


class Decoder(nn.Module):
    """A convolution, two transposed convolutions, and a convolution to an image."""

    def __init__(self, width: int, dims: int = 2, groups: int = 1) -> None:
        super().__init__()
        self.stem = CONV[dims](3, width, 3, padding=1)
        self.up1 = TRANSPOSED[dims](width, 2 * width, 2, 2, groups=groups)
        self.norm = BATCH_NORM[dims](2 * width)
        self.up2 = TRANSPOSED[dims](2 * width, width, 3, 1, 1)
        self.out = CONV[dims](width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.up1(F.relu(self.stem(x)))))
        return self.out(F.relu(self.up2(x)))


class GroupedNet(nn.Module):
    """A grouped convolution between full ones.

    It has `groups(width)` groups, `width` channels in and `factor * width` channels out.
    """

    def __init__(self, width: int, groups: Callable[[int], int], factor: int) -> None:
        super().__init__()
        inner = factor * width
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.grouped = nn.Conv2d(width, inner, 3, padding=1, groups=groups(width))
        self.norm = nn.BatchNorm2d(inner)
        self.mix = nn.Conv2d(inner, width, 1)
        self.last = nn.Conv2d(width, inner, 3, padding=1)
        self.head = nn.Linear(inner, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.grouped(F.relu(self.stem(x)))))
        return self.head(classify(F.relu(self.last(F.relu(self.mix(x))))))


class BareParameters(nn.Module):
    """A network without layers: parameters, buffers and functions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(width, 3, 3, 3))
        self.b1 = nn.Parameter(torch.randn(width))
        self.gamma = nn.Parameter(torch.randn(width))
        self.beta = nn.Parameter(torch.randn(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))
        self.slope = nn.Parameter(torch.rand(width))
        self.w2 = nn.Parameter(torch.randn(2 * width, width, 3, 3))
        self.w3 = nn.Parameter(torch.randn(2 * width, width, 2, 2))  # transposed: (in, out, k, k)
        self.w4 = nn.Parameter(torch.randn(10, width))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.w1, self.b1, padding=1)
        x = F.prelu(F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, False), self.slope)
        x = F.relu(F.conv2d(x, self.w2, stride=2, padding=1))
        x = F.relu(F.conv_transpose2d(x, self.w3, stride=2))
        return F.linear(classify(x), self.w4)


class StandardisedConv(nn.Conv2d):
    """Weight standardisation by mean and standard deviation."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True, correction=0)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias, padding=self.padding)


class StandardisedConvByBatchNorm(nn.Conv2d):
    """Weight standardisation by a batch norm over the filters, as in code of BiT and NFNet."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(
            self.weight
        )
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class Standardised(nn.Module):
    """Plain and standardised convolutions in turn.

    The input channels of a standardised filter share a statistic. A pruner may keep them all,
    which is exact. Then every second axis is still free: half of the parameters must go either
    way.
    """

    def __init__(self, width: int, conv: type[nn.Conv2d]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.std1 = conv(width, 2 * width, 3, padding=1)
        self.mid = nn.Conv2d(2 * width, width, 3, padding=1)
        self.std2 = conv(width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.std1(F.relu(self.stem(x))))
        return self.head(classify(F.relu(self.std2(F.relu(self.mid(x))))))


class WeightNormed(nn.Module):
    """Convolutions and a linear layer under weight_norm.

    `wrap` is the parametrisation or the old hook.
    """

    def __init__(self, width: int, wrap: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.stem = wrap(nn.Conv1d(3, width, 3, padding=1))
        self.down = wrap(nn.Conv1d(width, 2 * width, 3, padding=1))
        self.up = wrap(nn.ConvTranspose1d(2 * width, width, 4, 2, 1), dim=1)
        self.fc = wrap(nn.Linear(width, width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.up(F.leaky_relu(self.down(F.leaky_relu(self.stem(x))))))
        return self.head(torch.tanh(self.fc(x.mean(2))))


def _old_weight_norm(module: nn.Module, dim: int = 0) -> nn.Module:
    import warnings

    with warnings.catch_warnings():  # deprecated, but still in every vocoder
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(module, dim=dim)


class MaskedConv(nn.Conv2d):
    """A weight multiplied by a constant mask (PixelCNN)."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out, 3, padding=1)
        mask = torch.ones(3, 3)
        mask[1, 2] = mask[2] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class MaskedNet(nn.Module):
    """Two masked convolutions, one after the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c1, self.c2 = MaskedConv(3, width), MaskedConv(width, 2 * width)
        self.out = nn.Conv2d(2 * width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.c2(F.relu(self.c1(x)))))


def _dims(dims: int) -> list[Case]:
    image = floats(3, *SIDE[dims])
    batch, instance = BATCH_NORM[dims], INSTANCE_NORM[dims]

    def tracked(width: int) -> nn.Module:
        return instance(width, affine=True, track_running_stats=True)

    def case(name: str, norm: Layer = nn.Identity, zeroable: bool = True) -> Case:
        return Case(f"{name}_{dims}d", lambda w: ConvNet(w, dims, norm), image, zeroable=zeroable)

    return [
        case("conv"),
        case("conv_batch_norm", batch),
        case("conv_batch_norm_plain", lambda w: batch(w, affine=False)),
        case("conv_group_norm", lambda w: nn.GroupNorm(4, w), zeroable=False),
        case("conv_group_norm_one", lambda w: nn.GroupNorm(1, w), zeroable=False),
        case("conv_instance_norm", lambda w: instance(w, affine=True)),
        case("conv_instance_norm_tracked", tracked),
        case("conv_layer_norm", lambda w: OverChannels(nn.LayerNorm(w)), zeroable=False),
        case("conv_rms_norm", lambda w: OverChannels(nn.RMSNorm(w)), zeroable=False),
        case(
            "conv_rms_norm_by_hand", lambda w: OverChannels(HandwrittenRMSNorm(w)), zeroable=False
        ),
        Case(f"prelu_{dims}d", lambda w: ConvNet(w, dims, act=nn.PReLU), image),
        Case(f"transposed_{dims}d", lambda w: Decoder(w, dims), image),
        Case(f"transposed_grouped_{dims}d", lambda w: Decoder(w, dims, groups=4), image),
    ]


IMAGE = floats(3, 8, 8)
CASES = [
    *_dims(1),
    *_dims(2),
    *_dims(3),
    Case("layer_norm_over_image", lambda w: ImageNorm(w), IMAGE, zeroable=False),
    Case("prelu_one_slope", lambda w: ConvNet(w, act=lambda _: nn.PReLU()), IMAGE),
    Case("frozen_batch_norm", lambda w: ConvNet(w, norm=FrozenBatchNorm), IMAGE),
    Case("grouped", lambda w: GroupedNet(w, lambda _: 4, 2), IMAGE),
    Case("grouped_uneven_widths", lambda w: GroupedNet(w, lambda _: 2, 3), IMAGE),
    Case("depthwise", lambda w: GroupedNet(w, lambda w: w, 1), IMAGE),
    Case("depth_multiplier", lambda w: GroupedNet(w, lambda w: w, 2), IMAGE),
    Case("depth_multiplier_3", lambda w: GroupedNet(w, lambda w: w, 3), IMAGE),
    Case("functional_convs_on_bare_parameters", BareParameters, IMAGE),
    # only every second axis has to be free; see Standardised
    Case(
        "weight_standardisation",
        lambda w: Standardised(w, StandardisedConv),
        IMAGE,
        at_most=0.53,
        zeroable=False,
    ),
    Case(
        "weight_standardisation_by_batch_norm",
        lambda w: Standardised(w, StandardisedConvByBatchNorm),
        IMAGE,
        at_most=0.53,
        zeroable=False,
    ),
    Case(
        "weight_norm",
        lambda w: WeightNormed(w, parametrizations.weight_norm),
        floats(3, 8),
        zeroable=False,
    ),
    Case(
        "weight_norm_old_hook",
        lambda w: WeightNormed(w, _old_weight_norm),
        floats(3, 8),
        zeroable=False,
    ),
    Case("masked_conv", MaskedNet, IMAGE),
]


class ImageNorm(nn.Module):
    """LayerNorm over channels, height and width together."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.LayerNorm([width, 8, 8])
        self.c2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(classify(F.relu(self.c2(F.relu(self.norm(self.c1(x)))))))
