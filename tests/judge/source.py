"""Write a random network as Python source, as a person would, and build the module from it."""

from __future__ import annotations

import linecache
import re
import sys
import types
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from .spec import Item, Spec

HEADER = """import collections, dataclasses, functools, math, types
from typing import Any, NamedTuple, Optional
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
"""


# Code after which another size of the inputs may be refused. It reads a size as a Python number (a
# loop over the parts of a tensor, len, a function of math); or drops every axis of size 1, even a
# batch of one; or counts positions of channels and places laid out as one axis, which are not the
# same without the removed channels if the number of places differs.
_COUNTS = re.compile(
    r"unbind\(|\blen\((?!self)|for (t|step) in|split\(1, 1\)|range\(x|list\(range|math\.|"
    r"kernel_size=x|"
    r"flatten\(1\)\[:, ::|torch\.squeeze\("
)


@dataclass(frozen=True)
class Signal:
    """A variable of forward: an image (B, C, H, W), tokens (B, T, C) or a vector (B, C).

    ``width`` is C. ``size`` holds the other sizes in the example: (H, W), (T,) or ().
    """

    name: str
    kind: str
    width: int
    size: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.size) + 2

    @property
    def axis(self) -> int:
        """The axis of the channels."""
        return 2 if self.kind == "tokens" else 1


@dataclass
class File:
    """The source file that is being written, and the random choices of the current block."""

    rng: Random = field(default_factory=Random)
    parts: list[str] = field(default_factory=list)
    count: int = 0
    branches: bool = False  # forward asks for sizes: another size may be refused

    def number(self) -> int:
        """Return a number that was not used before in this file."""
        self.count += 1
        return self.count


class Writer:
    """The class that is being written: the lines of ``__init__`` and of ``forward``."""

    def __init__(self, file: File, name: str) -> None:
        self.file, self.name = file, name
        self.setup: list[str] = []
        self.body: list[str] = []
        self.indent = ""
        self.pool: list[Signal] = []  # variables that later lines may read
        self.extra: list[Signal] = []  # variables that are returned beside the last one

    # --- draws

    def pick(self, *options: Any) -> Any:
        """Return one of the options at random."""
        return self.file.rng.choice(options)

    def chance(self, share: float) -> bool:
        """Return True with probability ``share``."""
        return self.file.rng.random() < share

    def between(self, low: int, high: int) -> int:
        """Return a random whole number from ``low`` to ``high``."""
        return self.file.rng.randint(low, high)

    def some_width(self) -> int:
        """Return a random number of channels."""
        return self.pick(4, 6, 8, 8, 10, 12, 12, 16)

    # --- lines

    def fresh(self, stem: str = "x") -> str:
        """Return a new name."""
        return f"{stem}{self.file.number()}"

    def module(self, code: str, stem: str = "layer") -> str:
        """Add a submodule and return its expression."""
        name = self.fresh(stem)
        self.setup.append(f"self.{name} = {code}")
        return f"self.{name}"

    def parameter(self, *shape: int) -> str:
        """Add a parameter and return its expression."""
        name = self.fresh("weight")
        self.setup.append(f"self.{name} = nn.Parameter(torch.randn({', '.join(map(str, shape))}))")
        return f"self.{name}"

    def buffer(self, code: str, *, saved: bool = True) -> str:
        """Add a buffer and return its expression."""
        name = self.fresh("table")
        self.setup.append(
            f'self.register_buffer("{name}", {code}{"" if saved else ", persistent=False"})'
        )
        return f"self.{name}"

    def line(self, text: str) -> None:
        """Add a line to forward."""
        self.file.branches |= _COUNTS.search(text) is not None
        self.body.append(self.indent + text)

    def assign(self, code: str, stem: str = "x") -> str:
        """Add an assignment to a new variable and return its name."""
        name = self.fresh(stem)
        self.line(f"{name} = {code}")
        return name

    def value(self, x: Signal, code: str, **changes: Any) -> Signal:
        """Assign ``code`` to a new variable, with the name of ``x`` in place of ``{x}``."""
        return replace(x, name=self.assign(code.replace("{x}", x.name)), **changes)

    @contextmanager
    def under(self, text: str) -> Iterator[None]:
        """Indent the lines of the block below ``text``.

        Later lines do not read the variables of the block.
        """
        self.line(text)
        kept, self.indent = list(self.pool), self.indent + "    "
        yield
        self.pool, self.indent = kept, self.indent[4:]

    # --- sizes

    def dim(self, x: Signal, axis: int | None = None) -> int:
        """Return an axis, by default that of the channels, counted from the front or the back."""
        axis = x.axis if axis is None else axis
        return self.pick(axis, axis - x.rank)

    def space(self, x: Signal) -> tuple[int, ...]:
        """Return all axes except those of batch and channels."""
        return tuple(self.dim(x, axis) for axis in range(1, x.rank) if axis != x.axis)

    def width(self, x: Signal) -> str:
        """Return the number of channels as code: a literal, or read from the tensor."""
        axis = self.dim(x)
        return self.pick(str(x.width), str(x.width), f"{x}.shape[{axis}]", f"{x}.size({axis})")

    def batch(self, x: Signal) -> str:
        """Return code that reads the batch size."""
        return self.pick(f"{x}.shape[0]", f"{x}.size(0)", f"len({x})", f"{x}.size(dim=0)")

    def side(self, x: Signal, which: int) -> str:
        """Return one of the other sizes as code, which nearly always reads it from the tensor."""
        axis = [a for a in range(1, x.rank) if a != x.axis][which]
        if self.chance(0.1):
            return str(x.size[which])
        return self.pick(f"{x}.shape[{axis}]", f"{x}.size({axis})", f"{x}.shape[{axis - x.rank}]")

    def along(self, x: Signal, vector: str) -> str:
        """Return code that shapes a vector with one element per channel to broadcast to ``x``."""
        if x.axis == x.rank - 1:
            return vector
        after = x.rank - 1 - x.axis
        return self.pick(
            f"{vector}[:{', None' * after}]",
            f"{vector}.view(1, -1{', 1' * after})",
            f"{vector}.reshape(-1{', 1' * after})",
            f"{vector}.view(1, {self.width(x)}{', 1' * after})",
            f"{vector}[None, :{', None' * after}]",
            f"{vector}[(None, slice(None)) + (None,) * {after}]",
            vector + ".unsqueeze(-1)" * after,
            f"{vector}.reshape([1, {self.width(x)}] + [1] * {after})",
            f"{vector}[..., {', '.join(['None'] * after)}].expand_as({x})",
        )

    # --- classes

    def child(self) -> Writer:
        """Start another class in the same file; :meth:`finish` ends it."""
        return Writer(self.file, f"Part{self.file.number()}")

    def finish(self, result: str, arguments: str = "x", base: str = "nn.Module") -> str:
        """Write the class, whose forward returns ``result``, and return its name."""
        setup = "\n".join(f"        {line}" for line in ("super().__init__()", *self.setup))
        body = "\n".join(f"        {line}" for line in (*self.body, f"return {result}"))
        self.file.parts.append(
            f"class {self.name}({base}):\n    def __init__(self):\n{setup}\n\n    def "
            f"forward(self, {arguments}):\n{body}\n"
        )
        return self.name

    def function(self, text: str) -> None:
        """Add a function or class at the top of the file."""
        self.file.parts.append(text)


Inside = Callable[[Writer, Signal], Signal]


@dataclass(frozen=True)
class Example:
    """The inputs of a network.

    ``make(batch, more)`` returns them, with ``more`` positions than the example has along each
    axis.
    """

    arguments: str
    make: Callable[[int, int], Any]


@dataclass(frozen=True)
class Drawn:
    """A network as source text, with its inputs and the options for prune."""

    spec: Spec
    text: str
    example: Example
    options: dict[str, Any]
    branches: bool

    @property
    def python(self) -> str:
        """The name of the Python module for this source."""
        return f"drawn_{zlib.crc32(self.text.encode()):08x}"

    def build(self) -> nn.Module:
        """Return a new instance of the network."""
        name = self.python
        if name not in sys.modules:
            module = types.ModuleType(name)
            module.__file__ = f"<{name}>"
            sys.modules[name] = module
            linecache.cache[module.__file__] = (
                len(self.text),
                None,
                self.text.splitlines(True),
                module.__file__,
            )
            exec(compile(self.text, module.__file__, "exec"), module.__dict__)
        return sys.modules[name].Network()

    def forget(self) -> None:
        """Remove the Python module that was made from the source."""
        module = sys.modules.pop(self.python, None)
        if module is not None:
            linecache.cache.pop(str(module.__file__), None)


def write(spec: Spec) -> Drawn:
    """Return the source of a network."""
    from .blocks import OPTIONS, RESULTS, SOURCES

    file = File()
    w = Writer(file, "Network")
    file.rng = Random(spec.source.seed)
    x, example = SOURCES[spec.source.kind].write(w)
    w.pool.append(x)
    x = emit(w, spec.blocks, x)
    file.rng = Random(spec.result.seed)
    fits = spec.result.kind if x.kind in RESULTS[spec.result.kind].takes else "plain"
    result = RESULTS[fits].write(w, x)
    w.finish(result, example.arguments)
    file.rng = Random(spec.options.seed)
    options = OPTIONS[spec.options.kind](w)
    return Drawn(spec, HEADER + "\n\n" + "\n\n".join(file.parts), example, options, file.branches)


def emit(w: Writer, items: tuple[Item, ...], x: Signal) -> Signal:
    """Write blocks one after another, and leave out those that cannot take their input."""
    from .blocks import BLOCKS

    for item in items:
        block = BLOCKS[item.kind]
        if x.kind not in block.takes or (block.fits is not None and not block.fits(x)):
            continue
        kept, w.file.rng = w.file.rng, Random(item.seed)

        def inside(c: Writer, y: Signal, children: tuple[Item, ...] = item.children) -> Signal:
            return emit(c, children, y)

        x = block.write(w, x, inside) if block.holds else block.write(w, x)
        w.pool.append(x)
        w.file.rng = kept
    return x


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    """Return normally distributed float64 values, the same ones each time."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)
