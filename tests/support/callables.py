"""Calls of torch's functions inside of a small model, each in a process of its own: ``python -m tests.support.callables``.

Every public callable of torch, torch.special, torch.linalg, torch.fft, torch.func and torch.nn.functional is called on activations,
in each of a few ways that work on plain tensors, one of them under vmap. The model around it is pruned. Whatever becomes of it
(pruned exactly, in parts, or refused), the process lives, and only errors of fxprune's own come out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import fxprune

SPACES = {
    "torch": torch,
    "torch.special": torch.special,
    "torch.linalg": torch.linalg,
    "torch.fft": torch.fft,
    "torch.func": torch.func,
    "torch.nn.functional": F,
}

WAYS: dict[str, Callable[[Any, Tensor], Any]] = {
    "f(h)": lambda f, h: f(h),
    "f(h, h)": lambda f, h: f(h, h),
    "f(h, 2)": lambda f, h: f(h, 2),
    "f(2.0, h)": lambda f, h: f(2.0, h),
    "f([h, h])": lambda f, h: f([h, h]),
    "f(h > 0, h, h)": lambda f, h: f(h > 0, h, h),
    "f(h > 0, h, 0.5)": lambda f, h: f(h > 0, h, 0.5),
    "f(h, 0, 1)": lambda f, h: f(h, 0, 1),
    "vmap(f)(h)": lambda f, h: torch.vmap(f)(h),
    "f(relu)(h)": lambda f, h: f(torch.relu)(h),
}

# What acts on the process (its threads, files, devices, defaults) and not on a tensor.
_GLOBAL = ("set_", "seed", "manual_seed", "save", "load", "compile", "_", "use_deterministic", "init_", "fork", "wait", "export")


class Around(nn.Module):
    """Two layers with a call in between, of whose result the floating-point part is added to what goes on."""

    def __init__(self, call: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.call = nn.Linear(4, 16), nn.Linear(16, 2), call

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for leaf in tree_leaves(self.call(h)):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                h = h + (leaf if leaf.shape == h.shape else leaf.mean())
        return self.second(h)


def names() -> list[str]:
    """All callables, by the name under which a user would call them."""
    found = []
    for place, space in SPACES.items():
        for name in sorted(dir(space)):
            value = getattr(space, name)
            if callable(value) and not isinstance(value, type) and not name.startswith(_GLOBAL):
                found.append(f"{place}.{name}")
    return found


def ways(name: str) -> Iterator[tuple[str, Callable[[Tensor], Any]]]:
    """The calls of a function that work on plain tensors."""
    place, _, own = name.rpartition(".")
    function, h = getattr(SPACES[place], own), torch.rand(2, 16)
    for text, way in WAYS.items():
        try:
            with torch.no_grad():
                way(function, h.clone())
        except Exception:
            continue
        yield text, lambda x, way=way: way(function, x)


def outcome(call: Callable[[Tensor], Any]) -> str:
    """``pruned``, ``refused``, or what should not have happened."""
    torch.manual_seed(0)
    model, x = Around(call).eval(), torch.randn(2, 4)
    try:
        pruned = fxprune.prune(model, x, channels=0.5)
    except fxprune.InternalError as error:
        return f"internal error: {error}"
    except fxprune.FxpruneError:
        return "refused"
    try:
        measured = fxprune.verify(model, pruned, x)
    except fxprune.VerificationError as error:
        unproved = ("random", "finite", "the original itself fails")  # probabilities are not of every size
        return "random" if any(text in str(error) for text in unproved) else f"wrong: {error}"
    if not measured.error <= measured.limit:
        return f"wrong by {measured.error:.1e}"
    return "in parts" if pruned.report.parts else "pruned"


def apart(call: Callable[[], str], seconds: float = 120.0) -> str:
    """What a function returns in a process of its own, or how that ended."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(False)

    def child() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            sender.send(call())
        except BaseException as error:
            sender.send(f"{type(error).__name__}: {error}")

    process = context.Process(target=child)
    process.start()
    sender.close()
    try:
        said = receiver.recv() if receiver.poll(seconds) else "took too long"
    except EOFError:
        process.join()
        code = process.exitcode or 0
        said = f"died: {signal.Signals(-code).name if code < 0 else code}"
    if process.is_alive():
        process.kill()
    process.join()
    return " ".join(str(said).split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="take one name of so many")
    parser.add_argument("--start", type=int, default=0, help="the first name that is taken")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in names()[options.start :: options.every]:
        said = apart(lambda name=name: json.dumps({text: outcome(call) for text, call in ways(name)}))
        print(json.dumps([name, json.loads(said) if said.startswith("{") else {"": said}]), flush=True)


if __name__ == "__main__":
    main()
