"""The Hypothesis strategy that draws networks.

Hypothesis draws a list of *steps*. A step is a kind, how far back to look for a value that it
fits, and one number that encodes the kind's choices. The steps are then laid out as nodes without
further draws, and a step that fits nowhere is skipped. So every step can be dropped or made
smaller without changing what the others mean, and there are few things to try. This lets a failure
shrink to a network that a person can read. Widths come from a palette of two per network, so that
residual sums and gates find partners.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from . import nodes as n
from .network import Network, infer, owner
from .nodes import KINDS, Node, Signal, SpecError

WIDTHS = (4, 8, 6, 2, 3, 12, 16, 24)
MAX_WIDTH = 48
MAX_VECTOR = 640
MAX_SIDE = 12
MAX_TOKENS = 150
MAX_PRODUCTS = 2  # products without a bounded gate square the magnitudes; a few are enough

#: How often each kind occurs in the list that is sampled from; 2 for kinds that are not listed.
#: Kinds that turn an image into something else, or that rightly pin the channels before them, are
#: rare, because most of a network should be prunable.
WEIGHTS: dict[type[Node], int] = {
    n.Conv: 16,
    n.Linear: 8,
    n.Activation: 5,
    n.BatchNorm: 6,
    n.Add: 10,
    n.Concat: 5,
    n.Depthwise: 4,
    n.Mul: 4,
    n.Shuffle: 3,
    n.Tokens: 4,
    n.ClassToken: 4,
    n.Attention: 8,
    n.Recurrent: 3,
    n.Again: 4,
    n.TransposedConv: 3,
    n.PadChannels: 1,
    n.Pad: 1,
    n.PixelUnshuffle: 3,
    n.Centre: 1,
    n.Softmax: 1,
    n.Flip: 1,
    n.Roll: 1,
    n.Dropout: 1,
}


class Step(NamedTuple):
    """A drawn node, before it is fitted into a network."""

    kind: type[Node]
    reads: int
    choices: int


@dataclass
class Draft:
    """A network that is being laid out."""

    signals: list[Signal]
    widths: tuple[int, ...]
    oldest: int = 0  # no node reads a value before this one
    nodes: list[Node] = field(default_factory=list)
    used: set[int] = field(default_factory=set)

    def add(self, node: Node) -> int:
        """Append a node and return the index of its value."""
        self.signals.append(infer(node, self.nodes, self.signals))
        self.nodes.append(node)
        self.used.update(node.inputs)
        return len(self.nodes)

    def loose_first(self, keep: Callable[[int], bool]) -> list[int]:
        """Return the values that pass ``keep``.

        Values that nothing reads yet come first; among equals, the newest comes first.
        """
        return sorted(
            (i for i in range(self.oldest, len(self.signals)) if keep(i)),
            key=lambda i: (i in self.used, -i),
        )

    def partners(self, x: int) -> list[int]:
        """Return the values that can be combined with ``x`` elementwise."""
        return self.loose_first(lambda i: i != x and n.meets(self.signals[x], self.signals[i]))

    def neighbours(self, x: int) -> list[int]:
        """Return the values that can be concatenated with ``x``."""
        here = self.signals[x]
        most = MAX_VECTOR if here.layout == "vector" else MAX_WIDTH

        def fits(i: int) -> bool:
            there = self.signals[i]
            return (
                there.with_channels(1) == here.with_channels(1)
                and here.channels + there.channels <= most
            )

        return self.loose_first(fits)

    def layers(self, x: int) -> list[int]:
        """Return the values whose layer can be applied to ``x``, too."""
        found = []
        for i in range(len(self.nodes), 0, -1):
            source = self.nodes[owner(self.nodes, i) - 1]
            if len(source.inputs) == 1 and type(source).module is not Node.module:
                try:
                    infer(n.Again(x, of=i), self.nodes, self.signals)
                except SpecError:
                    continue
                found.append(i)
        return found


class Picker:
    """Decodes a step's number into choices.

    Each choice takes one digit of the number, in the base of the number of options.

    >>> pick = Picker(5)
    >>> pick("a", "b"), pick("a", "b", "c"), pick("a", "b")
    ('b', 'c', 'a')
    """

    def __init__(self, choices: int) -> None:
        self._left = choices

    def __call__(self, *options: Any) -> Any:
        self._left, digit = divmod(self._left, len(options))
        return options[digit]


def _divisors(*numbers: int) -> list[int]:
    """Return the common divisors of the numbers, in ascending order."""
    common = math.gcd(*numbers)
    return [d for d in range(1, common + 1) if common % d == 0]


def _chunks(here: Signal) -> list[int]:
    """Return the possible numbers of equal chunks with more than one channel each.

    In a chunk of width 1 there is nothing to prune.
    """
    return [d for d in (2, 3, 4) if here.channels % d == 0 and here.channels > d]


def _heights(here: Signal) -> list[int]:
    """Return the heights with which tokens form an image, the most square one first."""
    tokens = here.shape[0]
    sides = [d for d in range(1, MAX_SIDE + 1) if tokens % d == 0 and tokens // d <= MAX_SIDE]
    return sorted(sides, key=lambda d: abs(d - tokens // d))


def _strides(here: Signal) -> tuple[int, ...]:
    return (1, 1, 1, 2) if min(here.shape[1:]) >= 4 else (1,)


def _grows(here: Signal) -> bool:
    """Tell whether an image may be doubled in size."""
    return max(here.shape[1:]) * 2 <= MAX_SIDE


# Each of these functions makes a node of one kind from the drawn choices. FITS below says whether
# the kind fits a value at all.


def _conv(pick: Picker, draft: Draft, x: int) -> Node:
    here, out = draft.signals[x], pick(*draft.widths)
    groups = pick(1, 1, 1, *_divisors(here.channels, out)[1:])
    return n.Conv(
        x,
        out=out,
        groups=groups,
        kernel=pick(3, 1),
        stride=pick(*_strides(here)),
        dilation=pick(1, 1, 1, 2),
        bias=pick(True, False),
    )


def _transposed(pick: Picker, draft: Draft, x: int) -> Node:
    here, out = draft.signals[x], pick(*draft.widths)
    groups = pick(1, *_divisors(here.channels, out))
    return n.TransposedConv(x, out=out, groups=groups, stride=pick(2, 1) if _grows(here) else 1)


def _depthwise(pick: Picker, draft: Draft, x: int) -> Node:
    here = draft.signals[x]
    multiplier = pick(*[m for m in (1, 2, 3) if here.channels * m <= MAX_WIDTH])
    return n.Depthwise(
        x, multiplier=multiplier, stride=pick(*_strides(here)), bias=pick(True, False)
    )


def _split(pick: Picker, draft: Draft, x: int) -> Node:
    """Make a part of an earlier split of the same value, or of a new one in two or three parts."""
    fresh, earlier = (
        pick(True, False),
        [node for node in draft.nodes if isinstance(node, n.Split) and node.x == x],
    )
    if earlier and not fresh:
        return n.Split(x, sizes=earlier[-1].sizes, part=pick(*range(len(earlier[-1].sizes))))
    total = draft.signals[x].channels
    part, first = pick(0, 1), pick(*range(1, total))
    sizes: tuple[int, ...] = (first, total - first)
    if sizes[1] > 1 and pick(False, True):
        second = pick(*range(1, sizes[1]))
        sizes = (first, second, sizes[1] - second)
    return n.Split(x, sizes=sizes, part=part)


def _chunk(pick: Picker, draft: Draft, x: int) -> Node:
    chunks = pick(*_chunks(draft.signals[x]))
    return n.Chunk(x, chunks=chunks, part=pick(*range(chunks)))


def _slice(pick: Picker, draft: Draft, x: int) -> Node:
    total = draft.signals[x].channels
    start = pick(*range(total - 1))
    return n.Slice(x, start=start, stop=pick(*range(start + 2, total + 1)))


def _concat(pick: Picker, draft: Draft, x: int) -> Node:
    others = draft.neighbours(x)
    xs = (x, pick(*others))
    if pick(False, True):
        longer = (*xs, pick(*others))
        if sum(draft.signals[i].channels for i in longer) <= MAX_WIDTH:
            xs = longer
    return n.Concat(xs)


def _mul(pick: Picker, draft: Draft, x: int) -> Node:
    products = sum(isinstance(node, n.Mul) and node.gate == "none" for node in draft.nodes)
    other = pick(*draft.partners(x))
    return n.Mul(
        x, other, gate=pick(*("sigmoid", "tanh", "none")[: 3 if products < MAX_PRODUCTS else 2])
    )


def _attention(pick: Picker, draft: Draft, x: int) -> Node:
    width, style = (
        draft.signals[x].channels,
        pick("packed", "separate", "module", "grouped", "rotary"),
    )
    heads = pick(*(reversed(_divisors(width)) if style == "module" else (2, 1, 3, 4)))
    head_dim = (
        width // heads if style == "module" else pick(4, 2) if style == "rotary" else pick(4, 2, 3)
    )
    return n.Attention(x, heads=heads, head_dim=head_dim, style=style)


def _global_pool(pick: Picker, draft: Draft, x: int) -> Node:
    return n.GlobalPool(
        x, style=pick("mean", "adaptive") if draft.signals[x].layout == "chw" else "mean"
    )


def _shuffle(pick: Picker, draft: Draft, x: int) -> Node:
    return n.Shuffle(
        x, groups=pick(*_divisors(draft.signals[x].channels)[1:]), style=pick("shape", "function")
    )


MAKE: dict[type[Node], Callable[[Picker, Draft, int], Node]] = {
    n.Conv: _conv,
    n.TransposedConv: _transposed,
    n.Depthwise: _depthwise,
    n.Split: _split,
    n.Chunk: _chunk,
    n.Slice: _slice,
    n.Concat: _concat,
    n.Mul: _mul,
    n.Attention: _attention,
    n.GlobalPool: _global_pool,
    n.Shuffle: _shuffle,
    n.Linear: lambda pick, draft, x: n.Linear(x, out=pick(*draft.widths), bias=pick(True, False)),
    n.TokenMix: lambda pick, draft, x: n.TokenMix(x, out=pick(*draft.widths)),
    n.Recurrent: lambda pick, draft, x: n.Recurrent(
        x, out=pick(4, 6), kind=pick("lstm", "gru"), both=pick(False, True)
    ),
    n.Fit: lambda pick, draft, x: n.Fit(x, multiple=pick(4, 3)),
    n.Activation: lambda pick, draft, x: n.Activation(x, fn=pick(*n.ACTIVATIONS)),
    n.Add: lambda pick, draft, x: n.Add(x, pick(*draft.partners(x))),
    n.Again: lambda pick, draft, x: n.Again(x, of=pick(*draft.layers(x))),
    n.GroupNorm: lambda pick, draft, x: n.GroupNorm(
        x, groups=pick(*_divisors(draft.signals[x].channels))
    ),
    n.SqueezeExcite: lambda pick, draft, x: n.SqueezeExcite(x, hidden=pick(4, 2)),
    n.Roll: lambda pick, draft, x: n.Roll(x, shift=pick(1, 2)),
    n.PadChannels: lambda pick, draft, x: n.PadChannels(
        x, before=pick(0, 1, 2), after=pick(1, 0, 2)
    ),
    n.Flatten: lambda pick, draft, x: n.Flatten(x, style=pick("flatten", "view", "literal")),
    n.Image: lambda pick, draft, x: n.Image(x, height=pick(*_heights(draft.signals[x]))),
    n.Pool: lambda pick, draft, x: n.Pool(x, mode=pick("max", "avg", "adaptive")),
    n.Upsample: lambda pick, draft, x: n.Upsample(x, mode=pick("nearest", "bilinear")),
}
"""For each kind the function that makes a node.

Kinds that are not listed read one value and have no choices.
"""

FITS: dict[type[Node], Callable[[Draft, int, Signal], bool]] = {
    n.Add: lambda draft, x, here: bool(draft.partners(x)),
    n.Mul: lambda draft, x, here: bool(draft.partners(x)),
    n.Concat: lambda draft, x, here: bool(draft.neighbours(x)),
    n.Again: lambda draft, x, here: bool(draft.layers(x)),
    n.Split: lambda draft, x, here: here.channels > 3,
    n.Slice: lambda draft, x, here: here.channels > 2,
    n.Roll: lambda draft, x, here: here.channels > 1,
    n.Flip: lambda draft, x, here: here.channels > 1,
    n.Shuffle: lambda draft, x, here: here.channels > 1,
    n.Glu: lambda draft, x, here: here.channels % 2 == 0 and here.channels > 2,
    n.Chunk: lambda draft, x, here: bool(_chunks(here)),
    n.GroupNorm: lambda draft, x, here: here.places > 1,
    n.InstanceNorm: lambda draft, x, here: here.places > 1,
    n.LayerNorm: lambda draft, x, here: here.channels > 1,
    n.Flatten: lambda draft, x, here: math.prod(here.shape) <= MAX_VECTOR,
    n.PadChannels: lambda draft, x, here: here.channels < MAX_WIDTH,
    n.Image: lambda draft, x, here: bool(_heights(here)),
    n.ClassToken: lambda draft, x, here: here.shape[0] < MAX_TOKENS,
    n.Pool: lambda draft, x, here: min(here.shape[1:]) >= 2,
    n.Fit: lambda draft, x, here: max(here.shape[1:]) + 2 <= MAX_SIDE,
    n.Pad: lambda draft, x, here: max(here.shape[1:]) + 2 <= MAX_SIDE,
    n.Upsample: lambda draft, x, here: _grows(here),
    n.PixelShuffle: lambda draft, x, here: (
        here.channels % 4 == 0 and here.channels > 4 and _grows(here)
    ),
    n.PixelUnshuffle: lambda draft, x, here: (
        here.channels * 4 <= MAX_WIDTH and all(side % 2 == 0 for side in here.shape[1:])
    ),
}
"""For each kind a function that tells whether it fits a value.

Kinds that are not listed fit every value of their layouts.
"""


def lay(draft: Draft, step: Step) -> None:
    """Append the node that a step describes, or nothing if it fits no value.

    ``step.reads`` counts back from the newest value that the node fits.
    """
    fits = FITS.get(step.kind, lambda *_: True)
    found: list[int] = []
    for i in range(len(draft.signals) - 1, draft.oldest - 1, -1):
        here = draft.signals[i]
        if here.layout in step.kind.layouts and fits(draft, i, here):
            found.append(i)
        if len(found) > step.reads:
            break
    if found:
        x = found[step.reads % len(found)]
        make = MAKE.get(step.kind)
        draft.add(make(Picker(step.choices), draft, x) if make else step.kind(x))  # type: ignore[call-arg]


def join(draft: Draft, max_nodes: int, without: Sequence[int]) -> None:
    """Pool and concatenate the values that nothing reads, and add a linear layer.

    Otherwise these nodes would be dropped, or be outputs and therefore pinned.
    """
    vectors: list[int] = []
    total = 0
    for i in draft.loose_first(lambda i: i > 0 and i not in draft.used and i not in without):
        here = draft.signals[i]
        pooled = here.layout != "vector"
        if len(draft.nodes) + pooled + 2 <= max_nodes and total + here.channels <= MAX_VECTOR:
            vectors.append(draft.add(n.GlobalPool(i)) if pooled else i)
            total += here.channels
    if vectors:
        draft.add(
            n.Linear(
                draft.add(n.Concat(tuple(vectors))) if len(vectors) > 1 else vectors[0], out=4
            )
        )


def steps(kinds: Sequence[type[Node]], max_size: int) -> SearchStrategy[list[Step]]:
    """Return a strategy for lists of steps.

    It joins four lists end to end, because a single list is seldom long.
    """
    step = st.builds(
        Step,
        kind=st.sampled_from([kind for kind in kinds for _ in range(WEIGHTS.get(kind, 2))]),
        reads=st.sampled_from((0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 5)),
        choices=st.integers(0, 2**16 - 1),
    )
    stretch = st.lists(step, max_size=-(-max_size // 3))
    return st.tuples(*[stretch] * 4).map(
        lambda parts: [step for part in parts for step in part][:max_size]
    )


@st.composite
def networks(
    draw: DrawFn,
    *,
    max_nodes: int = 30,
    without: tuple[type[Node], ...] = (),
    only: tuple[type[Node], ...] = KINDS,
) -> Network:
    """Draw networks of one to ``max_nodes`` nodes with small sizes.

    Each network prints as Python source. Kinds in ``without`` are not drawn; ``only`` are the
    kinds that may be drawn.

    >>> networks(max_nodes=3).example()  # doctest: +SKIP
    Network(
        input=(3, 4, 4),
        nodes=(
            Conv(0, out=4),  # 1: chw (4, 4, 4)
        ),
        outputs=(1,),
    )
    """
    layout = draw(
        st.sampled_from(("chw", "chw", "chw", "tokens", "chw", "vector", "tokens")),
        label="input layout",
    )
    width = draw(st.sampled_from((3, 4, 8)), label="input channels")
    side = draw(st.sampled_from((4, 8, 6, 5)), label="input side")
    shape = {"chw": (width, side, side), "tokens": (side, width), "vector": (width,)}[layout]
    widths = draw(st.tuples(*[st.sampled_from(WIDTHS)] * 2), label="widths")
    stem = draw(
        st.sampled_from((False, True, True)), label="a first layer, the only one to read the input"
    )
    joined = draw(st.sampled_from((False, True, True)), label="a head over all loose ends")
    further = draw(st.sampled_from((0, 0, 0, 1, 2)), label="further outputs")

    draft = Draft([Signal.of_input(shape)], widths)
    kinds = [kind for kind in KINDS if kind in only and kind not in without]
    if stem and max_nodes > 1:
        draft.oldest = draft.add((n.Conv if layout == "chw" else n.Linear)(0, out=widths[0]))
    for step in draw(steps(kinds, max_nodes - stem - 4 * joined), label="steps"):
        lay(draft, step)
    if not draft.nodes:
        draft.add(n.Activation(0))
    last = len(draft.nodes)
    outputs = draft.loose_first(lambda i: 0 < i < last)[:further]
    if joined:
        join(draft, max_nodes, without=outputs)
        last = len(draft.nodes)
    return Network(
        input=shape, nodes=tuple(draft.nodes), outputs=(last, *outputs)
    ).with_live_nodes()
