#!/usr/bin/env python
"""Write digests of the plans of a fixed list of models, to see whether a change affects them.

PYTHONPATH=. python .ci/plans.py before.json    # in a checkout of one commit
PYTHONPATH=. python .ci/plans.py after.json     # in a checkout of the other
diff before.json after.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxprune
from tests import torchvision_models, zoo

TORCHVISION = (
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "lraspp_mobilenet_v3_large",
    "mc3_18",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "swin_t",
    "vit_b_16",
)


def digest(model: nn.Module, inputs: Any, **budget: Any) -> str:
    """Return the digest of the plan for this model, or the name of the error."""
    try:
        text = fxprune.prune(model, inputs, **budget).plan.to_json()
    except fxprune.FxpruneError as error:
        return type(error).__name__
    return hashlib.sha256(text.encode()).hexdigest()


def digests() -> Iterator[tuple[str, str]]:
    """Yield a name and a digest for each model and budget."""
    for case in zoo.CASES:
        for budget in ({"channels": 0.5}, {"macs": 0.6}):
            torch.manual_seed(0)
            model = case.build(case.width).eval()
            yield f"{case.name} {budget}", digest(model, case.inputs(2), **budget)
    for name in TORCHVISION:
        case = torchvision_models.CASES[name]
        for budget in ({"macs": 0.5}, {"channels": 0.5, "round_to": 8}):
            yield f"{name} {budget}", digest(case.build(), case.inputs(), **budget)


def main() -> None:
    """Write the digests to the file on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="where the digests go, as JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    arguments.file.write_text(json.dumps(dict(digests()), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
