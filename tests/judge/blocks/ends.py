"""What a network reads, what it returns, and how it is pruned."""

from __future__ import annotations

from typing import Any

import torch

from ..source import Example, Signal, Writer, random_tensor
from .registry import options, result, source
from .shapes import to_vector


def _forms(w: Writer, shape: Any) -> tuple[str, Any]:
    """The arguments of forward, and what makes them: one tensor, or with a scale or a mask that may be missing."""
    form = w.pick("tensor", "tensor", "tensor", "tuple", "named", "scale", "none")
    if form == "scale":
        w.line("x = x * (1 + scale[(...,) + (None,) * (x.dim() - 1)])")
        return "x, scale", lambda batch, more: (
            shape(batch, more),
            random_tensor(batch, seed=3).abs(),
        )
    if form == "none":
        w.line("if mask is not None:")
        w.line("    x = x * mask")
        return "x, mask=None", lambda batch, more: shape(batch, more)
    if form == "tuple":
        return "x", lambda batch, more: (shape(batch, more),)
    if form == "named":
        return "x", lambda batch, more: {"x": shape(batch, more)}
    return "x", shape


@source(gives="image", weight=4)
def image(w: Writer) -> tuple[Signal, Example]:
    height, width = w.pick((6, 6), (8, 8), (8, 6), (7, 9), (12, 12))
    arguments, make = _forms(
        w, lambda batch, more: random_tensor(batch, 3, height + 2 * more, width + 4 * more)
    )
    return Signal("x", "image", 3, (height, width)), Example(arguments, make)


@source(gives="tokens", weight=3)
def tokens(w: Writer) -> tuple[Signal, Example]:
    length, channels = w.between(4, 8), w.pick(4, 6, 8)
    arguments, make = _forms(
        w, lambda batch, more: random_tensor(batch, length + 3 * more, channels)
    )
    return Signal("x", "tokens", channels, (length,)), Example(arguments, make)


@source(gives="vector", weight=1.5)
def vector(w: Writer) -> tuple[Signal, Example]:
    channels = w.pick(5, 8, 10)
    arguments, make = _forms(w, lambda batch, more: random_tensor(batch, channels))
    return Signal("x", "vector", channels), Example(arguments, make)


@source(gives="tokens", weight=1.5)
def ids(w: Writer) -> tuple[Signal, Example]:
    length, channels, words = w.between(4, 8), w.some_width(), 11

    def make(batch: int, more: int) -> Any:
        return torch.randint(
            0,
            words,
            (batch, length + 3 * more),
            generator=torch.Generator().manual_seed(batch + more),
        )

    table = w.module(
        f"nn.Embedding({words}, {channels}{w.pick('', '', ', padding_idx=0')})", "words"
    )
    code = w.pick(
        "{t}(x)",
        "F.embedding(x, {t}.weight)",
        "{t}.weight[x]",
        "F.one_hot(x, {n}).to({t}.weight.dtype) @ {t}.weight",
    )
    y = Signal("x", "tokens", channels, (length,))
    return w.value(y, code.format(t=table, n=words)), Example("x", make)


# --- what comes out


@result(weight=2)
def plain(w: Writer, x: Signal) -> str:
    """The last value as it is."""
    return w.pick(x.name, x.name, f"{x}.contiguous()", f"({x}, {x} * 2)")


@result(weight=4)
def classify(w: Writer, x: Signal) -> str:
    """A vector of classes."""
    y = to_vector(w, x)
    layer = w.module(f"nn.Linear({y.width}, 5{w.pick('', ', bias=False')})", "head")
    logits = w.assign(f"{layer}({y})", "logits")
    return w.pick(
        logits,
        f"F.log_softmax({logits}, dim=-1)",
        f"{logits}.softmax(1)",
        f"torch.softmax({logits}, -1)",
    )


def _several(w: Writer, x: Signal) -> tuple[str, str, str]:
    """Names of a small value, of a wide one, and of another value seen on the way."""
    y = to_vector(w, x)
    small = w.assign(f"{w.module(f'nn.Linear({y.width}, 3)', 'head')}({y})", "small")
    earlier = w.pick(*[*w.pool[-3:], x])
    wide = w.assign(
        w.pick(
            f"{earlier}.clone()", f"{earlier}.mean(0)", f"{earlier} + 0", f"{earlier}.flatten(1)"
        ),
        "wide",
    )
    other = w.assign(f"{w.pick(*[*w.extra, x])}.sum()", "other")
    return small, wide, other


@result(weight=1)
def nested(w: Writer, x: Signal) -> str:
    """Dicts of lists of tuples, numbers and None beside tensors."""
    a, b, c = _several(w, x)
    number = w.pick(
        "1", "None", f"{x}.shape[0]", f"{x}.shape[1]", "'text'", f"float({w.width(x)})"
    )
    forms = (
        f"{{'logits': {a}, 'features': [{b}, ({c}, {number})]}}",
        f"({a}, {{'aux': [({b}, {c}), {number}]}})",
        f"[{a}, [{b}, [{c}]]]",
        f"collections.OrderedDict(out={a}, aux=({b}, {c}))",
        f"dict(zip(('a', 'b', 'c'), ({a}, {b}, {c})))",
        f"{{'a': {a}, **{{'b': {b}}}, 'n': {number}}}",
        f"[*({a}, {b}), {c}]",
        f"{{0: {a}, ('k', 1): {b}, 'c': {c}}}",
    )
    return str(w.pick(*forms))


@result(weight=1)
def objects(w: Writer, x: Signal) -> str:
    """Objects that hold tensors: named tuples, dataclasses, classes of the user."""
    a, b, c = _several(w, x)
    name = f"Output{w.file.number()}"
    form = w.pick("tuple", "typed", "dataclass", "frozen", "class", "namespace", "subclass")
    if form == "tuple":
        w.function(f"{name} = collections.namedtuple('{name}', 'small wide other')\n")
    elif form == "typed":
        w.function(
            f"class {name}(NamedTuple):\n    small: Tensor\n    wide: Tensor\n    other: Any = None\n"
        )
    elif form in ("dataclass", "frozen"):
        frozen = "(frozen=True)" if form == "frozen" else ""
        w.function(
            f"@dataclasses.dataclass{frozen}\nclass {name}:\n    small: Tensor\n    wide: Tensor\n    other: Any = None\n"
        )
    elif form == "class":
        text = f"class {name}:\n    def __init__(self, small, wide, other):\n        self.small, self.wide, self.other = small, wide, other\n"
        w.function(text)
    elif form == "subclass":
        w.function(
            f"class {name}(collections.OrderedDict):\n    @property\n    def first(self):\n        return next(iter(self.values()))\n"
        )
    else:
        name = "types.SimpleNamespace"
    return str(
        w.pick(
            f"{name}(small={a}, wide={b}, other={c})",
            f"{name}(**{{'small': {a}, 'wide': {b}}}, other={c})",
        )
    )


@result("tokens", weight=1.5)
def tied_words(w: Writer, x: Signal) -> str:
    """Logits over words, by a layer that may share its weight with an embedding or with another layer."""
    table = w.module(f"nn.Embedding(7, {x.width})", "vocabulary")
    form = w.pick("tied", "functional", "product", "alone")
    if form == "tied":
        head = w.module(f"nn.Linear({x.width}, 7, bias=False)", "head")
        w.setup.append(
            w.pick(f"{head}.weight = {table}.weight", f"{table}.weight = {head}.weight")
        )
        y = w.assign(f"{head}({x})")
    elif form == "functional":
        y = w.assign(f"F.linear({x}, {table}.weight)")
    elif form == "product":
        y = w.assign(
            w.pick(
                f"{x} @ {table}.weight.t()",
                f"torch.matmul({x}, {table}.weight.T)",
                f"torch.einsum('btc,vc->btv', {x}, {table}.weight)",
            )
        )
    else:
        y = w.assign(f"{w.module(f'nn.Linear({x.width}, 7)', 'head')}({x})")
    if form != "alone" and w.chance(0.6):
        z = w.assign(f"{table}({y}.argmax(-1))")
        return w.pick(f"{y}, {z}.sum(-1)", f"({y}, {z}.mean())")
    return str(y)


@result("image", weight=1.5)
def dense(w: Writer, x: Signal) -> str:
    """A map of classes over the picture."""
    layer = w.module(
        f"nn.Conv2d({x.width}, 2, {w.pick('1', '1, bias=False', '3, padding=1')})", "head"
    )
    y = w.assign(f"{layer}({x})")
    return w.pick(
        y,
        f"{y}.argmax(1), {y}",
        f"F.interpolate({y}, scale_factor=2)",
        f"{y}.permute(0, 2, 3, 1)",
        f"{{'out': {y}, 'p': {y}.softmax(1)}}",
    )


# --- how it is pruned


@options
def half(w: Writer) -> dict[str, Any]:
    return {"channels": 0.5}


@options
def channels(w: Writer) -> dict[str, Any]:
    return {"channels": w.pick(0.3, 0.5, 0.7), "criterion": w.pick("cpmc", "l1", "random", "l2")}


@options
def budget(w: Writer) -> dict[str, Any]:
    return {w.pick("macs", "params"): w.pick(0.5, 0.7), "criterion": w.pick("cpmc", "l1")}


@options
def scope(w: Writer) -> dict[str, Any]:
    return {
        "channels": w.pick(0.5, 0.6),
        "scope": "global",
        "round_to": w.pick(1, 2),
        "units": w.pick("dims", "heads"),
    }
