"""Compare the latency of pruned graphs with networks of the same widths written by hand.

    # on the GPU if there is one, otherwise on the CPU
    python benchmarks/latency_plain.py
    # two models with small images
    python benchmarks/latency_plain.py --quick

Each model is pruned to half of its multiply-accumulates. Then four forms of the same network, with
the same weights, take turns:

* ``plain``: torchvision's own class at the pruned widths, normalisations folded by
  ``torch.nn.utils.fusion``, which is what one would write by hand;
* ``deployed``: ``fxprune.deploy`` of the pruned graph;
* ``class``: torchvision's own class at the pruned widths, in its form for training;
* ``graph``: the pruned graph that ``fxprune.prune`` returns.

The project's aim is that ``deployed`` takes at most 1.02 of the time of ``plain``, and ``graph``
at most 1.02 of ``class``. Two copies of the same network differ by more than that, because of
where in memory they lie. Therefore all four are copied and measured again ``--repeats`` times, in
another order each time, and the medians of the ratios count.

The figures go to ``benchmarks/results/latency_plain_<device>.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import operator
import random
import statistics
from collections.abc import Mapping
from typing import Any

import _common as common
import _latency as shared
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fxprune

MODELS = ("resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "densenet121", "regnet_y_8gf")
AIM = 1.02


def at_widths_of(dense: nn.Module, pruned: nn.Module) -> nn.Module:
    """Return a copy of the dense model with the layers of the pruned model, matched by name."""
    plain = copy.deepcopy(dense)
    for name, module in list(plain.named_modules()):
        if (
            name
            and not list(module.children())
            and any(True for _ in module.parameters(recurse=False))
        ):
            parent, _, own = name.rpartition(".")
            setattr(plain.get_submodule(parent), own, copy.deepcopy(pruned.get_submodule(name)))
    return plain.eval()


def folded(model: nn.Module) -> nn.Module:
    """Return a copy in which batch normalisations are fused into the convolutions before them.

    Two modules are fused if they are registered one after the other. An identity takes the place
    of the normalisation.
    """
    model = copy.deepcopy(model)
    for parent in model.modules():
        children = list(parent.named_children())
        for (first, conv), (second, norm) in itertools.pairwise(children):
            if (
                isinstance(conv, nn.Conv2d)
                and isinstance(norm, nn.BatchNorm2d)
                and conv.out_channels == norm.num_features
            ):
                setattr(parent, first, fuse_conv_bn_eval(conv, norm))
                setattr(parent, second, nn.Identity())
    return model.eval()


def measure(name: str, found: argparse.Namespace) -> common.Record:
    """Build the four forms, check that they compute the same, and time them."""
    dense, inputs = shared.built(name, found.size)
    pruned = fxprune.prune(dense, inputs, macs=0.5, round_to=8).model
    by_hand = at_widths_of(dense, pruned)
    models = {
        "plain": folded(by_hand),
        "deployed": fxprune.deploy(pruned),
        "class": by_hand,
        "graph": pruned,
    }
    with torch.no_grad():
        x = torch.randn(inputs.shape)
        outputs: dict[str, Tensor] = {form: model(x) for form, model in models.items()}
    differences = {
        form: float((out - outputs["class"]).norm() / outputs["class"].norm())
        for form, out in outputs.items()
    }
    if max(differences.values()) > 1e-3:
        raise RuntimeError(f"the forms differ: {differences}")
    return {"differences": differences, "rows": repeated(models, inputs, found)}


def repeated(
    models: Mapping[str, nn.Module], inputs: Any, found: argparse.Namespace
) -> list[common.Record]:
    """Return one row per setting with the times of all repetitions, or with the first error."""
    runs = []
    for seed in range(found.repeats):
        # the order in which the copies are made
        order = random.Random(seed).sample(list(models), len(models))
        runs.append(shared.time_all({form: models[form] for form in order}, inputs, found))
    rows = []
    for same in zip(*runs, strict=True):
        failed = next((row for row in same if "error" in row), None)
        rows.append(
            failed
            or same[0]
            | {"latency": {form: [row["latency"][form] for row in same] for form in models}}
        )
    return rows


def milliseconds(row: common.Record, form: str) -> list[float]:
    """Return the times of one form, one per repetition."""
    return [latency["ms"] for latency in row["latency"][form]]


def ratio(row: common.Record, form: str, to: str) -> float:
    """Return the median over the repetitions of the time of ``form`` divided by that of ``to``."""
    return statistics.median(map(operator.truediv, milliseconds(row, form), milliseconds(row, to)))


def report(results: common.Record) -> str:
    """Return the Markdown page of one device."""
    rows = []
    for line, row in shared.lines(results):
        if row is not None:
            line += [
                f"{statistics.median(milliseconds(row, form)):.3f}"
                for form in ("plain", "deployed", "class", "graph")
            ]
            line += [
                f"**{ratio(row, 'deployed', 'plain'):.3f}**",
                f"**{ratio(row, 'graph', 'class'):.3f}**",
            ]
        rows.append(line)
    header = [
        "model",
        "precision",
        "mode",
        "batch",
        "plain",
        "deployed",
        "class",
        "graph",
        "deployed / plain",
        "graph / class",
    ]
    text = [
        "Milliseconds per batch: medians over rounds in which the forms take turns. *Plain* is "
        "torchvision's class at the pruned",
        "widths with folded normalisations, *class* the same class in its form for training. The "
        f"aim is a ratio of at most {AIM}.",
        f"The figures are medians of {results['settings']['repeats']} repetitions on new copies, "
        "because the place of a copy in memory changes its",
        "time by several percent.",
    ]
    title = "Pruned graphs compared with the same networks written by hand"
    return shared.page(results, title, text, common.markdown_table(header, rows))


def main() -> None:
    """Read the command line, measure each model, and write the results after each one."""
    made = shared.parser(__doc__, MODELS)
    made.add_argument(
        "--repeats", type=int, default=5, help="how often new copies are measured; default: 5"
    )
    shared.run(
        shared.options(made, MODELS), "latency_plain", measure, report, alike=("quick", "repeats")
    )


if __name__ == "__main__":
    main()
