"""Compare prune time and memory of this checkout with another checkout, as ratios.

    git worktree add ../before COMMIT
    python benchmarks/commits.py ../before

The two checkouts take turns, each turn in a new process. A turn measures the CPU seconds that one
thread needs to prune each model (the fastest of several runs) and the peak memory of the process.
The table shows the smallest figures of all turns.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
MODELS = ("resnet50", "densenet121", "swin_t", "mobilenet_v3_small", "vit_b_16")
REPEATS = 5


def measure() -> None:
    """Print the figures of the fxprune that can be imported, as JSON."""
    import torch
    from torchvision import models

    import fxprune

    torch.set_num_threads(1)
    found: dict[str, float] = {}
    for name in MODELS:
        model, x = models.get_model(name, weights=None).eval(), torch.zeros(1, 3, 224, 224)
        seconds = []
        for _ in range(REPEATS + 1):
            start = time.process_time()
            fxprune.prune(model, x, channels=0.5)
            seconds.append(time.process_time() - start)
        found[name] = min(seconds[1:])
    found["memory, MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


def run(checkout: Path) -> dict[str, float]:
    """Measure a checkout in a new process and return its figures."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure"]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(out.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Read the command line, let the two checkouts take turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", nargs="?", type=Path, help="the other checkout")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure()
    if arguments.other is None:
        parser.error("name the other checkout")
    least: list[dict[str, float]] = [{}, {}]
    for _ in range(arguments.turns):
        for best, checkout in zip(least, (arguments.other.resolve(), HERE), strict=True):
            for name, figure in run(checkout).items():
                best[name] = min(best.get(name, figure), figure)
    print("| | other | this | ratio |\n| --- | ---: | ---: | ---: |")
    for name, figure in least[0].items():
        print(f"| {name} | {figure:.3f} | {least[1][name]:.3f} | {least[1][name] / figure:.3f} |")
    return None


if __name__ == "__main__":
    main()
