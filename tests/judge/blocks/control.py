"""Python's own control: branches by shape, by mode and by None; loops over containers; blocks within blocks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from ..source import Inside, Signal, Writer
from .layers import layer_of
from .registry import block


def fitted(w: Writer, y: Signal, x: Signal) -> Signal:
    """``y`` with as many channels as ``x``."""
    return y if y.width == x.width else layer_of(w, y, x.width)


@block(holds=True, weight=1.5)
def residual(w: Writer, x: Signal, inside: Inside) -> Signal:
    """A sum around blocks, in the same forward or in a class of its own."""
    if w.chance(0.5):
        y = fitted(w, inside(w, x), x)
        return w.value(
            x, w.pick(f"{{x}} + {y}", f"{y} + {{x}}", f"{{x}}.add({y})", f"{{x}} + 0.5 * {y}")
        )
    c = w.child()
    start = replace(x, name="x")
    c.pool.append(start)
    y = fitted(c, inside(c, start), start)
    name = c.finish(
        c.pick(
            f"x + {y}",
            f"{y} + x",
            f"torch.add(x, {y})",
            f"{y}.add_(x)" if y.name != "x" else "x + x",
        )
    )
    layer = w.module(f"{name}()", "part")
    return w.value(x, w.pick(f"{layer}({{x}})", f"{layer}(x={{x}})", f"{layer}.forward({{x}})"))


@block(holds=True, weight=1)
def early_return(w: Writer, x: Signal, inside: Inside) -> Signal:
    """A part that returns early by the shape of what it reads."""
    c = w.child()
    start = replace(x, name="x")
    c.pool.append(start)
    last, at = x.rank - 1, x.axis
    yes = [
        f"x.shape[{at}] > {x.width // 2}",
        "x.size(0) >= 1",
        f"x.dim() == {x.rank}",
        f"len(x.shape) == {x.rank}",
        f"x.shape[{at - x.rank}] == {x.width}",
    ]
    no = [
        f"x.shape[{last}] > 60",
        "x.size(1) < 2 and x.size(0) > 100",
        f"x.ndim != {x.rank}",
        "x.numel() == 0",
        f"x.shape[{at}] % {x.width + 1} == 0 and x.size(0) > 99",
        "x.size(0) == 1",
    ]
    if x.size:
        side = w.pick(*range(1, x.rank))
        if side != at:
            size = x.size[[a for a in range(1, x.rank) if a != at].index(side)]
            yes += [f"x.shape[{side}] <= {size + 1}", f"x.size({side}) < {size + 2}"]
            no += [f"x.shape[{side}] > {size + 1}", f"x.shape[{side}] * x.size(0) > {size * 40}"]
            w.file.branches = True
    if w.chance(0.5):  # the example goes past the return
        test, other = c.pick(*no), fitted(c, layer_of(c, start, x.width), start)
        with c.under(f"if {test}:"):
            c.line(f"return {c.pick(other, 'x', 'x * 2', f'{other}.relu()')}")
        y = fitted(c, inside(c, start), start)
        result = y.name
    else:
        test = c.pick(*yes)
        with c.under(f"if {test}:"):
            y = fitted(c, inside(c, start), start)
            c.line(f"return {y}")
        result = c.pick("x", "x * 2", layer_of(c, start, x.width).name)
    w.file.branches |= "size(0)" in test or "numel" in test
    return w.value(x, f"{w.module(f'{c.finish(result)}()', 'part')}({{x}})")


@block(holds=True, weight=0.8)
def training_only(w: Writer, x: Signal, inside: Inside) -> Signal:
    """Something that only training, or only evaluation, computes."""
    y = w.value(x, "{x} * 1.0")
    with w.under(
        w.pick(
            "if self.training:",
            "if not self.training:",
            "if self.training and self.training is not None:",
        )
    ):
        z = fitted(w, inside(w, x), x)
        w.line(w.pick(f"{y} = {z}", f"{y} = {y} + {z}", f"{y} = {y} + 0.1 * {z}"))
    return y


@block(holds=True, weight=0.8)
def optional(w: Writer, x: Signal, inside: Inside) -> Signal:
    """Branches on None, on attributes, and asserts."""
    name = w.fresh("maybe")
    form = w.pick("none", "set", "flag", "assert", "getattr", "isinstance", "scripting", "try")
    w.setup.append(
        f"self.{name} = {'None' if form == 'none' else 'True' if form != 'set' else 'nn.Identity()'}"
    )
    tests = {
        "none": f"if self.{name} is None:",
        "set": f"if self.{name} is not None:",
        "flag": f"if self.{name}:",
        "assert": "if True:",
        "getattr": f"if getattr(self, '{name}', False):",
        "isinstance": f"if isinstance({x}, torch.Tensor):",
        "scripting": "if not torch.jit.is_scripting():",
        "try": "try:",
    }
    y = w.value(x, "{x} * 1.0")
    if form == "assert":
        w.line(
            w.pick(
                f"assert {x}.shape[{x.axis}] == {x.width}, 'width'",
                f"assert {x}.dim() == {x.rank}",
                f"assert {x}.size(0) > 0, f'{{{x}.shape}}'",
                f"torch._assert({x}.shape[{x.axis}] == {x.width}, 'width')",
                f"torch._assert({x}.ndim == {x.rank}, f'{{{x}.shape}}')",
            )
        )
    with w.under(tests[form]):
        w.line(f"{y} = {fitted(w, inside(w, x), x)}")
    if form == "try":
        w.line("except ZeroDivisionError:")
        w.line("    pass")
    elif w.chance(0.3) and form != "assert":
        w.line("else:")
        w.line(f"    {y} = {layer_of_silent(w, x)}")
    return y


def layer_of_silent(w: Writer, x: Signal) -> str:
    """A layer that is called in one expression."""
    code = (
        f"nn.Conv2d({x.width}, {x.width}, 1)"
        if x.kind == "image"
        else f"nn.Linear({x.width}, {x.width})"
    )
    return f"{w.module(code, 'other')}({x})"


@block(weight=1.5)
def container(w: Writer, x: Signal) -> Signal:
    """Layers in lists, dicts and sequences, called in loops."""
    name, count = w.fresh("layers"), w.between(2, 3)
    widths = [x.width, *(w.some_width() for _ in range(count))]
    if w.chance(0.4):
        widths = [x.width] * (count + 1)
    same = len(set(widths)) == 1
    make = (
        (lambda a, b: f"nn.Conv2d({a}, {b}, 1)")
        if x.kind == "image"
        else (lambda a, b: f"nn.Linear({a}, {b})")
    )
    layers = [make(a, b) for a, b in pairwise(widths)]
    y = w.fresh()
    form = w.pick(
        "list",
        "dict",
        "sequence",
        "attributes",
        "slices",
        "index",
        "plain",
        "while",
        "dense",
        "call",
    )
    if form == "dict":
        w.setup.append(
            f"self.{name} = nn.ModuleDict({{{', '.join(f'{chr(97 + n)!r}: {code}' for n, code in enumerate(layers))}}})"
        )
        w.line(f"{y} = {x}")
        if w.chance(0.5):
            w.line(f"for key, layer in self.{name}.items():")
            w.line(f"    {y} = layer({y})" + w.pick("", ".relu()", " * (1 if key == 'a' else 2)"))
        else:
            w.line(f"for key in {[chr(97 + n) for n in range(count)]}:")
            w.line(f"    {y} = F.relu(self.{name}[key]({y}))")
    elif form == "sequence":
        w.setup.append(
            f"self.{name} = nn.Sequential({', '.join(c for layer in layers for c in (layer, w.pick('nn.ReLU()', 'nn.ReLU(inplace=True)', 'nn.Tanh()')))})"
        )
        w.line(f"{y} = self.{name}({x})")
    elif form == "attributes":
        for n, code in enumerate(layers):
            w.setup.append(f"self.{name}_{n} = {code}")
        w.line(f"{y} = {x}")
        w.line(f"for n in range({count}):")
        w.line(f"    {y} = getattr(self, f'{name}_{{n}}')({y}).tanh()")
    elif form == "dense" and same:
        w.setup.append(f"self.{name} = nn.ModuleList([{', '.join(layers)}])")
        w.line(f"{y} = [{x}]")
        w.line(f"for layer in self.{name}:")
        w.line(
            f"    {y}.append(layer({w.pick(f'{y}[-1]', f'sum({y})', f'torch.stack({y}).mean(0)')}).relu())"
        )
        total = w.fresh()
        w.line(
            f"{total} = {w.pick(f'sum({y})', f'torch.stack({y}, 0).amax(0)', f'{y}[-1] + {y}[0]', f'torch.stack({y}, -1).sum(-1)')}"
        )
        y = total
    elif (
        form == "plain"
    ):  # a list that torch does not know, of layers that it knows by another name
        for n, code in enumerate(layers):
            w.setup.append(f"self.{name}_{n} = {code}")
        w.setup.append(
            f"self.{name} = [{', '.join(f'self.{name}_{n}' for n in range(count))}]"
            if w.chance(0.3)
            else f"self.{name} = tuple('{name}_%d' % n for n in range({count}))"
        )
        listed = "[" in w.setup[-1].split("= ", 1)[1][:1]
        w.line(f"{y} = {x}")
        w.line(f"for layer in self.{name}:")
        w.line(f"    {y} = {'layer' if listed else 'getattr(self, layer)'}({y}).relu()")
    elif form == "while":
        w.setup.append(f"self.{name} = nn.ModuleList([{', '.join(layers)}])")
        w.line(f"{y}, n = {x}, 0")
        w.line(f"while n < len(self.{name}):")
        w.line(f"    {y} = self.{name}[n]({y}).relu()")
        w.line("    n += 1")
    elif form == "call":
        w.setup.append(f"self.{name} = nn.ModuleList([{', '.join(layers)}])")
        w.line(
            f"{y} = functools.reduce(lambda value, layer: F.gelu(layer(value)), self.{name}, {x})"
        )
    else:
        w.setup.append(f"self.{name} = nn.ModuleList([{', '.join(layers)}])")
        w.line(f"{y} = {x}")
        loops = {
            "slices": f"for layer in self.{name}[:]:",
            "index": f"for layer in (self.{name}[n] for n in range(len(self.{name}))):",
        }
        w.line(
            loops.get(
                form,
                w.pick(
                    f"for layer in self.{name}:",
                    f"for n, layer in enumerate(self.{name}):",
                    f"for layer, _ in zip(self.{name}, range(9)):",
                ),
            )
        )
        w.line(
            f"    {y} = {w.pick('F.relu(layer({y}))', 'layer({y}).tanh()', 'F.silu(layer({y}), inplace=True)').replace('{y}', y)}"
        )
    return Signal(y, x.kind, widths[-1], x.size)


@block(holds=True, weight=0.8)
def method(w: Writer, x: Signal, inside: Inside) -> Signal:
    """Blocks in a part whose forward has more arguments than it is given, or gives several values."""
    c = w.child()
    start = replace(x, name="x")
    c.pool.append(start)
    y = inside(c, start)
    form = w.pick("several", "keywords", "default", "dict", "list")
    if form == "several":
        name = c.finish(f"{y}, x")
        a, b = w.fresh(), w.fresh()
        w.line(f"{a}, {b} = {w.module(f'{name}()', 'part')}({x})")
        w.pool.append(replace(x, name=b))
        return replace(y, name=a)
    if form == "dict":
        name = c.finish(f"{{'out': {y}, 'in': x}}")
        return replace(y, name=w.assign(f"{w.module(f'{name}()', 'part')}({x})['out']"))
    if form == "list":
        name = c.finish(f"[x, [{y}, None]]")
        return replace(y, name=w.assign(f"{w.module(f'{name}()', 'part')}({x})[1][0]"))
    if form == "keywords":
        name = c.finish(f"{y} * scale", "x, *, scale=1.0, **unused")
        return replace(
            y,
            name=w.assign(
                f"{w.module(f'{name}()', 'part')}({x}{w.pick('', ', scale=0.5', ', other=3')})"
            ),
        )
    name = c.finish(f"{y} if skip is None else {y} + skip", "x, skip=None, *rest")
    return replace(
        y,
        name=w.assign(
            f"{w.module(f'{name}()', 'part')}({x}{w.pick('', ', None', ', 1.5', f', skip={x}.mean()')})"
        ),
    )
