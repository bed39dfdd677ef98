"""Measure the latency of single layers against their width, to show the steps of the hardware.

    # on the GPU if there is one, otherwise on the CPU
    python benchmarks/latency_staircase.py
    python benchmarks/latency_staircase.py --quick
    # add to the results file of the device
    python benchmarks/latency_staircase.py --models linear --batches 1

The layers are a 3x3 and a 1x1 convolution of ResNet-50 and a linear layer of a ViT. Their outputs
are narrowed step by step.

The figures go to ``benchmarks/results/latency_staircase_<device>.json``, ``.md`` and ``.png``.
"""

from __future__ import annotations

import argparse

import _common as common
import _latency as shared
import torch
from torch import nn

from fxprune.latency import measure as time_models

LAYERS = {
    "conv3x3": (
        "256 -> w, 14 x 14",
        lambda w: nn.Conv2d(256, w, 3, padding=1),
        256,
        (256, 14, 14),
    ),
    "conv1x1": ("1024 -> w, 14 x 14", lambda w: nn.Conv2d(1024, w, 1), 256, (1024, 14, 14)),
    "linear": ("768 -> w, 197 tokens", lambda w: nn.Linear(768, w), 768, (197, 768)),
}
"""For each name: a description, a function from a width to the layer, the largest width, and the
shape of one input.
"""


def measure(name: str, found: argparse.Namespace) -> common.Record:
    """Time one layer at every width."""
    _, make, widest, shape = LAYERS[name]
    widths = range(
        widest // 8 if found.quick else found.step,
        widest + 1,
        widest // 8 if found.quick else found.step,
    )
    rows = []
    for setting in shared.settings(found):
        layers = {str(width): make(width) for width in widths}
        timed = time_models(
            layers, torch.zeros(1, *shape), setting, rounds=found.rounds, seconds=found.seconds
        )
        ms = {width: latency.timing.ms for width, latency in timed.items()}
        rows.append(
            {
                "precision": setting.precision,
                "mode": setting.mode,
                "batch": setting.batch,
                "ms": ms,
            }
        )
        print(
            f"  {name}, {setting.precision} {setting.mode} batch {setting.batch}: {len(ms)} "
            "widths",
            flush=True,
        )
    return {"rows": rows}


def report(results: common.Record) -> str:
    """Return the Markdown page of one device, with the largest step of each layer."""
    rows = []
    for name, record in results["models"].items():
        for row in record.get("rows", ()):
            widths = sorted(map(int, row["ms"]))
            ms = [row["ms"][str(width)] for width in widths]
            line = sum(ms) / len(ms)
            worst = max(range(1, len(ms)), key=lambda i: ms[i - 1] - ms[i])
            rows.append(
                [
                    f"{name}, {LAYERS[name][0]}",
                    row["precision"],
                    row["mode"],
                    row["batch"],
                    f"{ms[0]:.4f}",
                    f"{ms[-1]:.4f}",
                    f"{line:.4f}",
                    f"{widths[worst - 1]} -> {widths[worst]}: {ms[worst] / ms[worst - 1]:.2f}",
                ]
            )
    header = [
        "layer",
        "precision",
        "mode",
        "batch",
        "narrowest, ms",
        "widest, ms",
        "mean, ms",
        "largest drop for a wider layer",
    ]
    picture = f"![latency by width]({results['stem']}.png)"
    return shared.page(
        results,
        "Latency of layers by width",
        [],
        common.markdown_table(header, rows),
        picture,
    )


def plot(results: common.Record) -> None:
    """Draw one panel per layer with one line per setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(results["models"]), figsize=(5.5 * len(results["models"]), 4), squeeze=False
    )
    for axis, (name, record) in zip(axes[0], results["models"].items(), strict=True):
        for row in record.get("rows", ()):
            widths = sorted(map(int, row["ms"]))
            label = f"{row['precision']}, {row['mode']}, batch {row['batch']}"
            axis.plot(
                widths,
                [row["ms"][str(width)] / row["ms"][str(widths[-1])] for width in widths],
                label=label,
            )
        axis.set_title(f"{name}, {LAYERS[name][0]}")
        axis.set_xlabel("width")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("latency / latency of the widest")
    axes[0][0].legend(fontsize=7)
    figure.savefig(
        common.RESULTS / f"{results['stem']}.png",
        dpi=110,
        bbox_inches="tight",
        metadata={"Software": None},
    )
    plt.close(figure)


def main() -> None:
    """Read the command line, measure each layer, and write the results after each one."""
    made = shared.parser(__doc__, tuple(LAYERS))
    made.add_argument("--step", type=int, default=4, help="difference between neighbouring widths")
    found = shared.options(made, tuple(LAYERS), LAYERS)
    shared.run(found, "latency_staircase", measure, report, alike=("quick", "step"), plot=plot)


if __name__ == "__main__":
    main()
