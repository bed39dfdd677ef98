"""Call torch's functions inside a small model: ``python -m tests.support.callables``.

Every public callable of torch, torch.special, torch.linalg, torch.fft, torch.func and
torch.nn.functional is called on activations, in each of a few ways that work on plain tensors, one
of them under vmap. The model around it is pruned. It may be pruned exactly, pruned in parts, or
refused; but the process must survive, and only fxprune's own errors may be raised.

Each call runs in its own process. All processes are forked from one that has already loaded
everything, so that each takes a fraction of a second.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
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

# Prefixes of functions that act on the process (threads, files, devices, defaults) only.
_GLOBAL = (
    "set_",
    "seed",
    "manual_seed",
    "save",
    "load",
    "compile",
    "_",
    "use_deterministic",
    "init_",
    "fork",
    "wait",
    "export",
)


class Around(nn.Module):
    """Two layers with a call in between.

    The floating-point part of the call's result is added to the activations.
    """

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
    """Return the names of all callables as a user writes them."""
    found = []
    for place, space in SPACES.items():
        for name in sorted(dir(space)):
            value = getattr(space, name)
            if callable(value) and not isinstance(value, type) and not name.startswith(_GLOBAL):
                found.append(f"{place}.{name}")
    return found


def ways(name: str) -> Iterator[tuple[str, Callable[[Tensor], Any]]]:
    """Yield the calls of a function that work on plain tensors."""
    place, _, own = name.rpartition(".")
    function, h = getattr(SPACES[place], own), torch.rand(2, 16)
    for text, way in WAYS.items():
        with suppress(Exception), torch.no_grad():
            way(function, h.clone())
            yield text, functools.partial(way, function)


def outcomes(name: str) -> dict[str, str]:
    """Return the outcome of each call of a function.

    Each call runs in its own process, and so does the search for the calls.
    """
    loaded()
    texts = apart(lambda: json.dumps([text for text, _ in ways(name)]))
    if not texts.startswith("["):
        return {"": texts}
    place, _, own = name.rpartition(".")
    function = getattr(SPACES[place], own)
    return {
        text: apart(lambda text=text: outcome(functools.partial(WAYS[text], function)))
        for text in json.loads(texts)
    }


def outcome(call: Callable[[Tensor], Any]) -> str:
    """Prune a model with this call and return the outcome.

    It is a word, followed by a colon and details. The word is one of :data:`ALLOWED`, or else says
    what is wrong.
    """
    torch.manual_seed(0)
    # fills uninitialised memory with NaN, so that its values do not differ between runs
    torch.use_deterministic_algorithms(True, warn_only=True)
    model, x = Around(call).eval(), torch.randn(2, 4)
    try:
        pruned = fxprune.prune(model, x, channels=0.5)
    except fxprune.InternalError as error:
        return f"internal error: {error}"
    except fxprune.FxpruneError as error:
        with suppress(Exception), torch.no_grad():
            model(x)
            return f"refused: {error}"
        return f"original fails: {error}"
    try:
        measured = fxprune.verify(model, pruned, x)
    except fxprune.VerificationError as error:
        unproved = next((kind for kind, text in UNPROVED.items() if text in str(error)), "wrong")
        return f"{unproved}: {error}"
    if not measured.error <= measured.limit:
        return f"wrong: by {measured.error:.1e}"
    return "in parts" if pruned.report.parts else "pruned"


UNPROVED = {
    "random": "random",
    "not finite": "finite",
    # verify draws values that are no probabilities, or matrices that cannot be inverted
    "original fails": "the original itself fails",
}
"""Outcomes where nothing can be compared, and the words in ``verify``'s message that show it."""

ALLOWED = {"pruned", "in parts", "refused", *UNPROVED}
"""The outcomes that are not errors."""


def kind(said: str) -> str:
    """Return the word of an outcome."""
    return said.partition(":")[0]


def apart(call: Callable[[], str], seconds: float = 120.0) -> str:
    """Return what a function returns in a new process, or how that process ended."""
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


@functools.cache
def loaded() -> None:
    """Load all modules that pruning and verifying load, once for all forked processes.

    Only imports happen here: this process never prunes.
    """

    def modules() -> str:
        before = {*sys.modules}
        for call in (torch.tanh, torch.vmap(torch.tanh), lambda h: h * float(h.sum())):
            outcome(call)
        return json.dumps([name for name in sys.modules if name not in before])

    for name in json.loads(apart(modules)):
        with suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # keeps memory pages shared with the children


def main() -> None:
    """Print the outcomes of the chosen callables, one line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="take one name of so many")
    parser.add_argument("--start", type=int, default=0, help="the first name that is taken")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in names()[options.start :: options.every]:
        print(json.dumps([name, outcomes(name)]), flush=True)


if __name__ == "__main__":
    main()
