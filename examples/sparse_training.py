"""Train before and after pruning: penalties that empty channels, then a dense teacher.

    python -m examples.sparse_training --macs 0.3

A small ResNet learns handwritten digits while a group lasso grows along a cubic curve. Growing
regularisation then empties the units that a plan removes. The pruned network learns from the dense
one: from its logits, and from what survives of the outputs of two layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from examples.digits import DigitNet, accuracy, load_data
from fxprune import training

# a part of the loss: a function of the output of a network and its inputs
Term = Callable[[Tensor, Tensor], Tensor]


def fit(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, term: Term) -> None:
    """Train a model with AdamW on batches of 64."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            output = model(images[batch])
            optimizer.zero_grad()
            (F.cross_entropy(output, labels[batch]) + term(output, images[batch])).backward()
            optimizer.step()
    model.eval()


def stepping(penalty: training.Penalty) -> Term:
    """Return a penalty that goes on by one step of its schedule after each call."""

    def term(output: Tensor, inputs: Tensor) -> Tensor:
        value = penalty()
        penalty.step()
        return value

    return term


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, prune and distil; print and return the accuracies on held-out digits."""
    parser = argparse.ArgumentParser(description="Sparse training, pruning and distillation.")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each of three trainings")
    parser.add_argument("--macs", type=float, default=0.3, help="share of the MACs to keep")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    images, test_images, labels, test_labels = load_data()
    model, example = DigitNet(width=16), torch.zeros(1, 1, 8, 8)
    coupling = fxprune.analyze(model, example)
    steps = options.epochs * -(-len(images) // 64)
    lasso = training.GroupSparsity(model, coupling, strength=training.Cubic(0, 1e-3, steps))
    fit(model, images, labels, options.epochs, stepping(lasso))
    plan = fxprune.prune(model, example, macs=options.macs).plan
    going = training.GrowingRegularisation(model, coupling, plan, delta=1 / steps, every=1)
    fit(model, images, labels, options.epochs, stepping(going))
    pruned = fxprune.apply(plan, model).model
    found = {"dense": accuracy(model, test_images, test_labels)}
    found["pruned"] = accuracy(pruned, test_images, test_labels)
    layers = ["blocks.1.bn2", "blocks.3.bn2"]
    with training.Distillation(model, pruned, features=layers) as distillation:
        fit(pruned, images, labels, options.epochs, distillation.loss)
    found["distilled"] = accuracy(pruned, test_images, test_labels)
    print(", ".join(f"{name}: {percent:.2f} %" for name, percent in found.items()))
    return found


if __name__ == "__main__":
    main()
