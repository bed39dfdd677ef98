"""Train, prune and fine-tune a small ResNet on handwritten digits, and measure the result.

Run it from a checkout with ``./run demo``. It takes about two minutes on two CPU cores. The data
are the 1,797 handwritten digits (8 x 8 pixels) that scikit-learn ships. A quarter of them is set
aside first and used only for the accuracies in the table. Training, the choice of what to prune,
and fine-tuning never see it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.cost import cost_of


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut.

    It maps (n, inputs, h, w) to (n, outputs, h / stride, w / stride).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitNet(nn.Module):
    """A ResNet of four blocks: images (n, 1, 8, 8) -> logits (n, 10)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            Block(width, width, stride=1),
            Block(width, 2 * width, stride=2),
            Block(2 * width, 2 * width, stride=1),
            Block(2 * width, 4 * width, stride=2),
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(x.mean(dim=(2, 3)))


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images, test images, training labels and test labels.

    Images have shape (n, 1, 8, 8) and values in [0, 1].
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    parts = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=0.25, stratify=digits.target, random_state=0
    )
    train, test = (torch.from_numpy(part) for part in parts)
    return images[train], images[test], labels[train], labels[test]


def shifted(images: Tensor) -> Tensor:
    """Return each image moved by up to one pixel, the only augmentation."""
    down, right = torch.randint(0, 3, (2,)).tolist()
    return F.pad(images, (1, 1, 1, 1))[:, :, down : down + 8, right : right + 8]


def train(
    model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float, seed: int
) -> None:
    """Train with AdamW, a one-cycle schedule and batches of 64.

    The weights of the last epoch are used; none is selected.
    """
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(
                model(shifted(images[batch])), labels[batch], label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of correct answers in percent."""
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


@torch.inference_mode()
def latencies(models: list[nn.Module], images: Tensor, repeats: int) -> list[float]:
    """Return the median milliseconds of a forward pass of each model.

    The models are measured in turns, so that a busy moment of the machine affects all alike.
    """
    times: list[list[float]] = [[] for _ in models]
    for repeat in range(repeats + 3):
        for model, seconds in zip(models, times, strict=True):
            start = time.perf_counter()
            model(images)
            if repeat >= 3:  # the first three rounds only warm up
                seconds.append(time.perf_counter() - start)
    return [1000 * statistics.median(seconds) for seconds in times]


def main() -> None:
    """Train, prune and fine-tune the network, and print the table."""
    parser = argparse.ArgumentParser(
        description="Train, prune and fine-tune a small ResNet on scikit-learn's digits."
    )
    parser.add_argument(
        "--epochs", type=int, default=50, help="epochs of the first training (default 50)"
    )
    parser.add_argument(
        "--finetune", type=int, default=20, help="epochs of fine-tuning after pruning (default 20)"
    )
    parser.add_argument(
        "--channels",
        type=float,
        default=0.5,
        help="share of every group's channels to keep (default 0.5)",
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()

    # with tensors this small, threads mostly wait for each other, even more on a busy machine
    torch.set_num_threads(1)
    log = Console(stderr=True, highlight=False)
    torch.manual_seed(0)
    train_images, test_images, train_labels, test_labels = load_data()
    example = torch.zeros(1, 1, 8, 8)

    start = time.perf_counter()
    model = DigitNet()
    train(model, train_images, train_labels, options.epochs, rate=3e-3, seed=1)
    log.print(
        f"trained {options.epochs} epochs on {len(train_images)} digits in "
        f"{time.perf_counter() - start:.0f} s"
    )

    plain = fxprune.prune(model, example, channels=options.channels)
    at_once = accuracy(plain.model, test_images, test_labels)
    # unlabelled images, on which the weights that stay are corrected for what was removed
    seen = [(train_images[:256],)]
    pruned = fxprune.prune(model, example, channels=options.channels, data=seen, verify=True)
    log.print(
        f"pruned and verified: {pruned.report.error:.1e} relative error against the masked "
        "original"
    )
    compensated = accuracy(pruned.model, test_images, test_labels)

    start = time.perf_counter()
    train(pruned.model, train_images, train_labels, options.finetune, rate=1e-3, seed=2)
    log.print(f"fine-tuned {options.finetune} epochs in {time.perf_counter() - start:.0f} s")

    dense, small = cost_of(model, example), cost_of(pruned.model, example)
    one = latencies([model, pruned.model], test_images[:1], repeats=200)
    many = latencies([model, pruned.model], test_images[:256], repeats=30)
    rows: list[tuple[str, float, float, str]] = [
        (
            "test accuracy, %",
            accuracy(model, test_images, test_labels),
            accuracy(pruned.model, test_images, test_labels),
            ".2f",
        ),
        ("MACs", dense.macs, small.macs, ",.0f"),
        ("parameters", dense.params, small.params, ",.0f"),
        ("latency of 1 image, ms", one[0], one[1], ".2f"),
        ("latency of 256 images, ms", many[0], many[1], ".2f"),
    ]
    table = Table(title=f"A small ResNet on {len(test_images)} held-out digits, on one CPU thread")
    table.add_column("")
    for column in ("before", "after", "after / before"):
        table.add_column(column, justify="right")
    for name, before, after, form in rows:
        table.add_row(name, format(before, form), format(after, form), f"{after / before:.2f}")
    Console().print(table)
    print(
        f"Right after pruning, before fine-tuning, the test accuracy is {at_once:.2f} %, and with "
        f"the weights corrected on {len(seen[0][0])} unlabelled images {compensated:.2f} %."
    )
    if options.json:
        figures = {name: {"before": before, "after": after} for name, before, after, _ in rows}
        options.json.write_text(
            json.dumps(
                {
                    **figures,
                    "test accuracy before fine-tuning, %": at_once,
                    "test accuracy after compensation, %": compensated,
                },
                indent=2,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
