"""The torchvision models that tests and benchmarks use: their names, builders and inputs.

The list is made from ``torchvision.models.list_models()`` and the module of each builder, not from
a list of names. So a new torchvision release is covered at once.

Every model has two sizes of input:

* ``small``: as few pixels as the architecture accepts. Tests use it, because no analysis depends
  on the size.
* ``native``: 224 pixels (112 for the small video networks) and 16 frames. Benchmarks use it.

Examples
--------
>>> case = CASES["resnet18"]
>>> model, inputs = case.build(), case.inputs()
>>> tuple(model(inputs).shape)
(1, 1000)
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
import unittest.mock
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.video import mvit

#: Families with another interface (lists of images, targets, pairs of images). They are in
#: :data:`COMPOSITE`.
EXCLUDED_MODULES = ("detection", "optical_flow")

#: A model with more parameters is marked slow, because drawing and masking them in float64 takes
#: many seconds. The smallest model of a family is slow only above :data:`HUGE` parameters.
SLOW_PARAMETERS = 30_000_000
HUGE = 100_000_000


@dataclass(frozen=True)
class Case:
    """One torchvision model with the inputs it takes.

    Attributes
    ----------
    name:
        The model's name for ``torchvision.models.get_model``.
    module:
        The module of the builder below ``torchvision.models``, such as
        ``"video.swin_transformer"``.
    parameters:
        Number of parameters as the library documents it, without auxiliary heads that only
        training uses.
    small:
        Shape of the smallest example input, including a batch axis of size one.
    native:
        Shape of the example input at the model's usual resolution.
    small_options:
        Keyword arguments of the builder that allow the ``small`` input, such as ``image_size`` of
        a ViT.
    slow:
        Whether the model is too large for the tests that run on every change.
    """

    name: str
    module: str
    parameters: int
    small: tuple[int, ...]
    native: tuple[int, ...]
    small_options: Mapping[str, Any] = field(default_factory=dict)
    slow: bool = False

    def build(self, *, size: str = "small", seed: int = 0) -> nn.Module:
        """Build the model for inputs of ``size``, in evaluation mode.

        Its random weights are cheap to draw, distinct and finite.
        """
        options = dict(self.small_options) if size == "small" else {}
        with contextlib.ExitStack() as stack:
            stack.enter_context(cheap_weights(seed))
            stack.enter_context(warnings.catch_warnings())
            # torchvision's own deprecations do not matter here
            warnings.simplefilter("ignore")
            # the builders fix the input sizes, but the class accepts them
            if self.module == "video.mvit" and options:
                sized = functools.partial(_mvit, mvit.MViT, options)
                stack.enter_context(unittest.mock.patch.object(mvit, "MViT", sized))
                options = {}
            elif self.module.startswith("segmentation."):
                options["weights_backbone"] = None  # otherwise the backbone is downloaded
            elif self.module.rpartition(".")[2] in ("googlenet", "inception"):
                options["init_weights"] = False  # the default causes a FutureWarning
            return models.get_model(self.name, weights=None, **options).eval()

    def inputs(self, *, size: str = "small", batch: int = 1, seed: int = 0) -> Tensor:
        """Return a float32 batch of normal noise, shaped like ``small`` or ``native``."""
        shape = self.small if size == "small" else self.native
        return torch.randn(batch, *shape[1:], generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Composite(Case):
    """A detector or an optical flow model, which cannot be traced whole."""

    def build(self, *, size: str = "small", seed: int = 0) -> nn.Module:
        """Build the model with random weights; a small detector accepts small images."""
        options: dict[str, Any] = (
            {"weights_backbone": None} if self.module.startswith("detection") else {}
        )
        if size == "small":
            options |= self.small_options
        with cheap_weights(seed):
            return models.get_model(self.name, weights=None, **options).eval()

    def inputs(self, *, size: str = "small", batch: int = 1, seed: int = 0) -> Any:
        """Return a list of images of different sizes, or a pair of batches for optical flow."""
        generator = torch.Generator().manual_seed(seed)
        shape = self.small if size == "small" else self.native
        if self.module.startswith("optical_flow"):
            return tuple(torch.rand(batch, *shape[1:], generator=generator) for _ in range(2))
        _, colours, height, width = shape
        return (
            [
                torch.rand(colours, height + 16 * i, width - 16 * i, generator=generator)
                for i in range(batch)
            ],
        )


def small_detector(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """Return torchvision's RetinaNet with a backbone of a few layers, for images of any size."""
    widths = (3, 8, 16, 16)
    blocks = [
        (nn.Conv2d(before, after, 3, 2, 1, bias=False), norm(after), nn.ReLU())
        for before, after in itertools.pairwise(widths)
    ]
    backbone: Any = nn.Sequential(*itertools.chain.from_iterable(blocks))
    backbone.out_channels = widths[-1]
    anchors = AnchorGenerator(((8, 16),), ((0.5, 1.0),))
    return RetinaNet(backbone, 5, anchor_generator=anchors, min_size=64, max_size=96).eval()


@contextlib.contextmanager
def cheap_weights(seed: int = 0) -> Iterator[None]:
    """Let random initialisers repeat one pool of normal numbers instead of drawing each number.

    Drawing weights takes most of the time of building a large model, above all truncated normals.
    The pool's length is prime, so that no two channels of a weight are equal. Weights keep a
    standard deviation of ``1 / sqrt(fan_in)``, so that activations stay finite in deep models.
    """
    length = 65_537
    pool = torch.randn(length, generator=torch.Generator().manual_seed(seed))
    turns = 0

    @torch.no_grad()
    def fill(tensor: Tensor, *_: object, **__: object) -> Tensor:
        nonlocal turns
        turns += 1
        spread = 1 / math.sqrt(tensor.numel() / tensor.shape[0]) if tensor.dim() > 1 else 0.02
        numbers = (pool.roll(turns * 9_973) * spread).to(tensor.dtype)
        flat = tensor.view(-1)
        whole = flat.numel() // length * length
        flat[:whole].view(-1, length).copy_(numbers)
        flat[whole:].copy_(numbers[: flat.numel() - whole])
        return tensor

    names = (
        "kaiming_normal_",
        "kaiming_uniform_",
        "normal_",
        "trunc_normal_",
        "uniform_",
        "xavier_normal_",
        "xavier_uniform_",
    )
    with (
        unittest.mock.patch.multiple(nn.init, **dict.fromkeys(names, fill)),
        # this module imported the function by name
        unittest.mock.patch("torch.nn.modules.activation.xavier_uniform_", fill),
    ):
        yield


def parameter_count(model: nn.Module) -> int:
    """Return the number of elements of a model's parameters; shared ones count once."""
    return sum(p.numel() for p in model.parameters())


def _mvit(cls: type[nn.Module], options: Mapping[str, Any], **arguments: Any) -> nn.Module:
    return cls(**{**arguments, **options})


def _shapes(name: str, module: str) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """Return the shapes of the small and the native input, and the options for the small one."""
    native: tuple[int, ...] = (
        (1, 3, 16, 224, 224) if module.startswith("video.") else (1, 3, 224, 224)
    )
    match module.removeprefix("quantization."):
        case "inception":  # in training, its auxiliary head needs features of 17 x 17
            return (1, 3, 299, 299), (1, 3, 299, 299), {}
        case "maxvit":  # every stage must be divisible into windows of 7 x 7
            return native, native, {}
        case "vision_transformer":
            # the name ends with the patch size: use 4 x 4 patches
            image_size = 4 * int(name.rpartition("_")[2])
            return (1, 3, image_size, image_size), native, {"image_size": image_size}
        case "video.resnet":
            return (1, 3, 8, 32, 32), (1, 3, 16, 112, 112), {}
        case "video.s3d":  # ends with an average pool of 2 x 7 x 7
            return (1, 3, 14, 210, 210), native, {}
        case "video.mvit":
            return (1, 3, 8, 64, 64), native, {"spatial_size": (64, 64), "temporal_size": 8}
        case "video.swin_transformer":
            return (1, 3, 8, 64, 64), native, {}
        case _:
            return (1, 3, 64, 64), native, {}


def _cases() -> Iterator[Case]:
    found = []
    for name in models.list_models():
        module = models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
        if module.split(".")[0] not in EXCLUDED_MODULES:
            found.append((name, module, models.get_model_weights(name).DEFAULT.meta["num_params"]))
    for name, module, parameters in found:
        smallest = min(size for _, family, size in found if family == module)
        slow = parameters > min(HUGE, max(SLOW_PARAMETERS, smallest))
        yield Case(name, module, parameters, *_shapes(name, module), slow=slow)


def _built_of(case: Case) -> Hashable:
    """Return a key that is equal for models which differ only in widths and depths.

    It consists of the module of a model's builder and the names that the builder uses, without
    those of weights.
    """
    code = inspect.unwrap(models.get_model_builder(case.name)).__code__
    names = {name for name in code.co_names if not name.endswith("Weights")}
    keywords = {
        one
        for constant in code.co_consts
        if isinstance(constant, tuple)
        for one in constant
        if isinstance(one, str)
    }
    return case.module, frozenset(names), frozenset(keywords)


def _composites() -> Iterator[Composite]:
    for name in models.list_models():
        module = models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
        if module.split(".")[0] not in EXCLUDED_MODULES:
            continue
        parameters = models.get_model_weights(name).DEFAULT.meta["num_params"]
        if module.startswith("optical_flow"):
            yield Composite(name, module, parameters, (1, 3, 128, 128), (1, 3, 360, 520))
        else:  # SSD resizes images to the size it is built for
            options = {} if ".ssd" in module else {"min_size": 96, "max_size": 160}
            if "keypoint" in name:  # each box takes a GMAC: a tenth of those that are the default
                options |= {"box_detections_per_img": 10}
            # These take 10 to 30 seconds each. Smaller models cover their code; for RetinaNet,
            # small_detector does.
            slow = "rcnn_resnet50" in name or name in ("ssd300_vgg16", "retinanet_resnet50_fpn")
            yield Composite(
                name, module, parameters, (1, 3, 80, 128), (1, 3, 480, 640), options, slow
            )


Kind = TypeVar("Kind", bound=Case)


def _smallest(cases: Iterable[Kind], family: Callable[[Kind], Hashable]) -> dict[str, Kind]:
    """Return all cases by name; those with a smaller sibling in their family are marked slow.

    Siblings run the same code.
    """
    known: set[Hashable] = set()
    found = {}
    for case in sorted(cases, key=lambda case: (case.parameters, case.name)):
        found[case.name] = replace(case, slow=case.slow or family(case) in known)
        known.add(family(case))
    return dict(sorted(found.items()))


#: Models that map one batch of images to tensors, by name, in alphabetical order.
CASES: dict[str, Case] = _smallest(_cases(), _built_of)

#: All other models.
COMPOSITE: dict[str, Composite] = _smallest(_composites(), lambda case: case.module)
