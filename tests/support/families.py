"""One small member of each family of torchvision models, built by the family's own classes.

Depth and width are reduced so that a test takes about a second. Every kind of layer of the family
is still there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torchvision
from torch import nn
from torchvision import models
from torchvision.models import (
    convnext,
    densenet,
    efficientnet,
    inception,
    maxvit,
    mnasnet,
    mobilenetv2,
    mobilenetv3,
    regnet,
    resnet,
    shufflenetv2,
    swin_transformer,
    vision_transformer,
)
from torchvision.models.segmentation import deeplabv3, fcn, lraspp
from torchvision.models.video import S3D, mvit
from torchvision.models.video import resnet as video_resnet


@dataclass(frozen=True)
class Family:
    """A small model.

    Attributes
    ----------
    name:
        The id of the test.
    build:
        A function that returns the model with fresh weights.
    shape:
        The shape of the example input without the batch axis.
    other:
        Another shape that the model accepts; None if the architecture fixes the resolution. Swin
        branches on whether a feature map is as small as a window; its other shape takes the same
        branch.
    composite:
        Whether a composite leaf (nn.MultiheadAttention) is decomposed, so that sums may be
        reordered.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    other: tuple[int, ...] | None = None
    composite: bool = False


def _small_classifier(model: nn.Module, width: int, dropout: float = 0.5) -> nn.Module:
    """Replace the classifier, whose two hidden layers of 4096 take a hundred megabytes."""
    model.classifier = nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(width, 64),
        nn.ReLU(True),
        nn.Dropout(dropout),
        nn.Linear(64, 10),
    )
    return model


def _alexnet() -> nn.Module:
    model = models.AlexNet(10)
    return _small_classifier(model, 256 * 36)


def _vgg() -> nn.Module:
    features = models.vgg.make_layers([16, "M", 32, "M"], True)
    return _small_classifier(models.VGG(features, 10, init_weights=False), 32 * 49)


def _s3d() -> nn.Module:
    model = S3D(10)
    model.avgpool = nn.AdaptiveAvgPool3d(1)  # the original's window of 7x7 needs 224 pixels
    return model


def _backbone() -> nn.Module:
    """Return a ResNet that gives the features of its last two stages.

    Segmentation models take their backbone in this form.
    """
    body = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], width_per_group=64)
    layers = {"layer3": "aux", "layer4": "out"}
    return torchvision.models._utils.IntermediateLayerGetter(body, return_layers=layers)


def _convnext() -> nn.Module:
    setting = [convnext.CNBlockConfig(16, 32, 1), convnext.CNBlockConfig(32, None, 2)]
    return convnext.ConvNeXt(setting, stochastic_depth_prob=0.3, num_classes=10)


def _efficientnet() -> nn.Module:
    setting = [
        efficientnet.MBConvConfig(1, 3, 1, 16, 16, 1),
        efficientnet.MBConvConfig(4, 3, 2, 16, 24, 2),
        efficientnet.MBConvConfig(4, 5, 1, 24, 24, 2),
    ]
    return efficientnet.EfficientNet(
        setting, dropout=0.2, stochastic_depth_prob=0.3, num_classes=10
    )


def _mobilenetv3() -> nn.Module:
    block = partial(mobilenetv3.InvertedResidualConfig, width_mult=1.0, dilation=1)
    setting = [
        block(16, 3, 16, 16, True, "RE", 2),
        block(16, 3, 48, 24, False, "RE", 2),
        block(24, 5, 72, 24, True, "HS", 1),
    ]
    return mobilenetv3.MobileNetV3(setting, last_channel=64, num_classes=10)


def _regnet() -> nn.Module:
    setting = regnet.BlockParams([1, 2], [32, 64], [8, 8], [1.0, 1.0], [2, 2], se_ratio=0.25)
    return regnet.RegNet(setting, num_classes=10, stem_width=16)


def _swin(block: Callable[..., nn.Module], **options: Any) -> nn.Module:
    return swin_transformer.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        stochastic_depth_prob=0.3,
        num_classes=10,
        block=block,
        **options,
    )


def _swin3d() -> nn.Module:
    from torchvision.models.video import swin_transformer as swin3d

    return swin3d.SwinTransformer3d(
        [2, 4, 4], 24, [2, 2], [2, 4], [2, 4, 4], stochastic_depth_prob=0.3, num_classes=10
    )


def _maxvit() -> nn.Module:
    return maxvit.MaxVit(
        input_size=(32, 32),
        stem_channels=16,
        partition_size=4,
        block_channels=[16, 32],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.3,
        num_classes=10,
    )


def _mvit() -> nn.Module:
    block = partial(mvit.MSBlockConfig, kernel_q=[3, 3, 3], kernel_kv=[3, 3, 3])
    setting = [
        block(
            num_heads=1,
            input_channels=16,
            output_channels=32,
            stride_q=[1, 1, 1],
            stride_kv=[1, 2, 2],
        ),
        block(
            num_heads=2,
            input_channels=32,
            output_channels=32,
            stride_q=[1, 2, 2],
            stride_kv=[1, 1, 1],
        ),
    ]
    return mvit.MViT(
        (16, 16),
        4,
        setting,
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        stochastic_depth_prob=0.3,
        num_classes=10,
    )


def _video(conv: Any, makers: int = 4) -> nn.Module:
    stem = (
        video_resnet.BasicStem if conv is video_resnet.Conv3DSimple else video_resnet.R2Plus1dStem
    )
    return video_resnet.VideoResNet(
        video_resnet.BasicBlock, [conv] * makers, [1, 1, 1, 1], stem, num_classes=10
    )


def _fcn() -> nn.Module:
    return fcn.FCN(_backbone(), fcn.FCNHead(512, 5), fcn.FCNHead(256, 5))


def _deeplab() -> nn.Module:
    return deeplabv3.DeepLabV3(_backbone(), deeplabv3.DeepLabHead(512, 5, [2, 3]), None)


def _lraspp() -> nn.Module:
    body = mobilenetv3.mobilenet_v3_small(weights=None).features
    layers = {"3": "low", "12": "high"}
    backbone = torchvision.models._utils.IntermediateLayerGetter(body, return_layers=layers)
    return lraspp.LRASPP(backbone, 24, 576, 5, inter_channels=32)


def _vit() -> nn.Module:
    return vision_transformer.VisionTransformer(
        32, 8, 2, 4, 32, 64, dropout=0.1, attention_dropout=0.1, num_classes=10
    )


FAMILIES = (
    Family("alexnet", _alexnet, (3, 96, 96), (3, 128, 112)),
    Family("convnext", _convnext, (3, 32, 32), (3, 48, 40)),
    Family("deeplabv3", _deeplab, (3, 33, 33), (3, 48, 40)),
    Family(
        "densenet",
        lambda: densenet.DenseNet(8, (2, 3), 16, drop_rate=0.1, num_classes=10),
        (3, 32, 32),
        (3, 64, 48),
    ),
    Family("efficientnet", _efficientnet, (3, 32, 32), (3, 40, 64)),
    Family("fcn", _fcn, (3, 33, 33), (3, 48, 40)),
    Family(
        "googlenet",
        lambda: models.GoogLeNet(10, aux_logits=False, init_weights=False),
        (3, 32, 32),
        (3, 64, 48),
    ),
    Family(
        "inception_v3",
        lambda: inception.Inception3(10, aux_logits=False, init_weights=False),
        (3, 75, 75),
        (3, 96, 80),
    ),
    Family("lraspp", _lraspp, (3, 32, 32), (3, 64, 48)),
    Family("maxvit", _maxvit, (3, 32, 32)),
    Family("mnasnet", lambda: mnasnet.MNASNet(0.35, 10), (3, 32, 32), (3, 64, 48)),
    Family("mobilenet_v2", lambda: mobilenetv2.MobileNetV2(10, 0.25), (3, 32, 32), (3, 64, 48)),
    Family("mobilenet_v3", _mobilenetv3, (3, 32, 32), (3, 64, 48)),
    Family("mvit", _mvit, (3, 4, 16, 16)),
    Family("regnet", _regnet, (3, 32, 32), (3, 64, 48)),
    Family(
        "resnet",
        lambda: resnet.ResNet(resnet.Bottleneck, [1, 2, 1, 1], 10),
        (3, 32, 32),
        (3, 64, 48),
    ),
    Family(
        "resnext",
        lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], 10, groups=8, width_per_group=4),
        (3, 32, 32),
        (3, 64, 48),
    ),
    Family("s3d", _s3d, (3, 8, 32, 32), (3, 8, 32, 48)),
    Family(
        "shufflenet_v2",
        lambda: shufflenetv2.ShuffleNetV2([1, 2, 1], [16, 32, 64, 96, 128], 10),
        (3, 32, 32),
        (3, 64, 48),
    ),
    Family("squeezenet", lambda: models.SqueezeNet("1_1", 10), (3, 48, 48), (3, 64, 80)),
    Family("swin", lambda: _swin(swin_transformer.SwinTransformerBlock), (3, 64, 64), (3, 72, 88)),
    Family(
        "swin_v2",
        lambda: _swin(
            swin_transformer.SwinTransformerBlockV2,
            downsample_layer=swin_transformer.PatchMergingV2,
        ),
        (3, 64, 64),
        (3, 72, 88),
    ),
    Family("swin_3d", _swin3d, (3, 4, 64, 64), (3, 4, 72, 64)),
    Family("vgg", _vgg, (3, 32, 32), (3, 48, 64)),
    Family(
        "video_resnet", lambda: _video(video_resnet.Conv3DSimple), (3, 4, 16, 16), (3, 6, 24, 16)
    ),
    Family(
        "video_r2plus1d", lambda: _video(video_resnet.Conv2Plus1D), (3, 4, 16, 16), (3, 6, 24, 16)
    ),
    Family("vit", _vit, (3, 32, 32), composite=True),
)
