"""Modules called twice, weights under two names, and hooks."""

from __future__ import annotations

from dataclasses import replace

from ..source import Inside, Signal, Writer
from .control import fitted
from .layers import layer_of, linear
from .registry import block


@block(holds=True, weight=1.2)
def called_twice(w: Writer, x: Signal, inside: Inside) -> Signal:
    """One part called several times, under one name or two."""
    c = w.child()
    start = replace(x, name="x")
    c.pool.append(start)
    y = fitted(c, inside(c, start), start)
    name = c.finish(str(y))
    form = w.pick("twice", "loop", "two names", "list", "sum", "siamese")
    layer = w.module(f"{name}()", "part")
    if form == "two names":
        other = w.module(layer, "same")
        return w.value(x, f"{other}({layer}({{x}}))")
    if form == "loop":
        z = w.assign(f"{x} * 1")
        w.line(f"for _ in range({w.between(2, 3)}):")
        w.line(
            f"    {z} = {w.pick(f'{layer}({z})', f'{z} + {layer}({z})', f'{layer}({z}).relu()')}"
        )
        return replace(x, name=z)
    if form == "list":
        layers = w.module(f"nn.ModuleList([{layer}] * 2)", "parts")
        z = w.assign(f"{x} * 1")
        w.line(f"for layer in {layers}:")
        w.line(f"    {z} = layer({z})")
        return replace(x, name=z)
    if form == "sum":
        return w.value(
            x,
            w.pick(
                f"{layer}({{x}}) + {layer}(-{{x}})",
                f"{layer}({{x}}) * {layer}({{x}}.tanh())",
                f"torch.maximum({layer}({{x}}), {layer}({{x}} * 0.5))",
            ),
        )
    if form == "siamese":
        return w.value(x, f"(lambda a, b: (a - b).abs())({layer}({{x}}), {layer}({{x}}.flip(0)))")
    return w.value(
        x,
        w.pick(
            f"{layer}({layer}({{x}}))",
            f"{layer}({{x}} + {layer}({{x}}))",
            f"{layer}(F.relu({layer}({{x}})))",
        ),
    )


@block(weight=1.5)
def tied(w: Writer, x: Signal) -> Signal:
    """Two layers of one weight."""
    out = w.some_width()
    if x.kind == "image":
        form = w.pick("transposed", "same", "one")
        if form == "transposed":
            layer = w.module(f"nn.Conv2d({x.width}, {out}, 3, padding=1)", "conv")
            y = w.value(x, f"{layer}({{x}}).relu()", width=out)
            return w.value(
                y,
                w.pick(
                    f"F.conv_transpose2d({{x}}, {layer}.weight, padding=1)",
                    f"F.conv2d({{x}}, {layer}.weight.transpose(0, 1), padding=1)",
                    f"F.conv2d({{x}}, {layer}.weight.permute(1, 0, 2, 3).flip(2, 3), padding=1)",
                ),
                width=x.width,
            )
        layer = w.module(f"nn.Conv2d({x.width}, {x.width}, 1)", "conv")
        other = w.module(f"nn.Conv2d({x.width}, {x.width}, 1{w.pick('', ', bias=False')})", "conv")
        w.setup.append(f"{other}.weight = {layer}.weight")
        return w.value(
            x,
            w.pick(
                f"{other}({layer}({{x}}).relu())",
                f"{other}({{x}}) + {layer}({{x}}.tanh())",
                f"{{x}} + {other}(F.gelu({layer}({{x}})))",
            ),
        )
    form = w.pick("transposed", "same", "symmetric", "norm", "three", "slice")
    if form == "transposed":
        layer = w.module(f"nn.Linear({x.width}, {out})")
        y = w.value(x, f"{layer}({{x}}).relu()", width=out)
        return w.value(
            y,
            w.pick(
                f"F.linear({{x}}, {layer}.weight.t())",
                f"{{x}} @ {layer}.weight",
                f"F.linear({{x}}, {layer}.weight.T, {w.parameter(x.width)})",
                f"torch.matmul({{x}}, {layer}.weight) + {w.parameter(x.width)}",
            ),
            width=x.width,
        )
    if form == "symmetric":
        weight = w.parameter(x.width, x.width)
        return w.value(
            x,
            w.pick(
                f"{{x}} @ ({weight} + {weight}.T)",
                f"F.linear({{x}}, {weight} @ {weight}.t())",
                f"F.linear({{x}}, {weight}.triu() + {weight}.triu(1).transpose(-1, -2))",
                f"{{x}} @ ({weight} - {weight}.mT)",
            ),
        )
    if form == "norm":
        norm = w.module(f"nn.LayerNorm({x.width})", "norm")
        y = linear(w, w.value(x, f"{norm}({{x}})"), x.width)
        return w.value(y, f"{norm}({{x}}{w.pick('', f' + {x}')})")
    if form == "slice":
        weight = w.parameter(out + x.width, x.width)
        y = w.value(x, f"F.linear({{x}}, {weight}[:{out}]).relu()", width=out)
        return w.value(
            y,
            w.pick(
                f"{{x}} @ {weight}[:{out}]", f"{{x}}.matmul({weight}.split([{out}, {x.width}])[0])"
            ),
            width=x.width,
        )
    layer, other = (
        w.module(f"nn.Linear({x.width}, {x.width})"),
        w.module(f"nn.Linear({x.width}, {x.width})"),
    )
    w.setup.append(
        w.pick(
            f"{other}.weight = {layer}.weight",
            f"{other}.bias = {layer}.bias",
            f"{other}.weight, {other}.bias = {layer}.weight, {layer}.bias",
        )
    )
    if form == "three":
        third = w.module(f"nn.Linear({x.width}, {x.width}, bias=False)")
        w.setup.append(f"{third}.weight = {other}.weight")
        return w.value(x, f"{third}({other}({layer}({{x}}).relu()).relu())")
    return w.value(
        x,
        w.pick(
            f"{other}({layer}({{x}}).relu())",
            f"{other}({{x}}) * {layer}({{x}}).sigmoid()",
            f"{{x}} + {other}(F.gelu({layer}({{x}})))",
        ),
    )


HOOKS = (
    ("register_forward_hook", "lambda module, args, output: output * 0.5"),
    ("register_forward_hook", "lambda module, args, output: output + args[0].mean()"),
    ("register_forward_hook", "lambda module, args, output: torch.relu(output)"),
    ("register_forward_hook", "lambda module, args, output: None"),
    ("register_forward_pre_hook", "lambda module, args: (args[0] * 2,)"),
    ("register_forward_pre_hook", "lambda module, args: args[0].tanh()"),
    ("register_forward_pre_hook", "lambda module, args: None"),
    ("register_forward_hook", "lambda module, args, kwargs, output: output - 1, with_kwargs=True"),
    (
        "register_forward_pre_hook",
        "lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True",
    ),
    ("register_forward_hook", "lambda module, args, output: output * (1 + output.softmax(-1))"),
    (
        "register_forward_hook",
        "functools.partial(lambda factor, module, args, output: output * factor, 3.0)",
    ),
    ("register_forward_hook", "lambda module, args, output: output.mul_(0.5), prepend=True"),
    ("register_forward_hook", "lambda module, args, output: output / output.shape[1]"),
)


@block(weight=1.5)
def hooked(w: Writer, x: Signal) -> Signal:
    """Hooks that change what a layer reads or gives."""
    out = w.some_width()
    layer = w.module(
        f"nn.Conv2d({x.width}, {out}, 1)" if x.kind == "image" else f"nn.Linear({x.width}, {out})",
        "hooked",
    )
    register, hook = w.pick(*HOOKS)
    w.setup.append(f"{layer}.{register}({hook})")
    return w.value(x, f"{layer}({{x}})", width=out)


@block(weight=1)
def captured(w: Writer, x: Signal) -> Signal:
    """A hook that keeps what a layer gives; forward reads it later."""
    out = w.some_width()
    layer = w.module(
        f"nn.Conv2d({x.width}, {out}, 1)" if x.kind == "image" else f"nn.Linear({x.width}, {out})",
        "watched",
    )
    kept = w.fresh("kept")
    w.setup.append(f"self.{kept} = {{}}")
    w.setup.append(
        w.pick(
            f"{layer}.register_forward_hook(lambda module, args, output: self.{kept}.update(out=output))",
            f"{layer}.register_forward_hook(lambda module, args, output: self.{kept}.__setitem__('out', output.{w.pick('detach', 'clone')}()))",
            f"{layer}.register_forward_pre_hook(lambda module, args: self.{kept}.update(out=args[0]))",
        )
    )
    given = w.setup[-1].endswith("args[0]))")
    y = w.value(x, f"{layer}({{x}}).tanh()", width=out)
    z = replace(
        x,
        name=w.assign(f"self.{kept}.pop('out')" if w.chance(0.5) else f"self.{kept}['out']"),
        width=x.width if given else out,
    )
    w.extra.append(z)
    if given or w.chance(0.5):
        return y
    return w.value(y, w.pick(f"{{x}} + {z}", f"{{x}} * {z}.mean()"))


@block(holds=True, weight=0.5)
def hooked_part(w: Writer, x: Signal, inside: Inside) -> Signal:
    """Hooks of a part that holds other blocks."""
    c = w.child()
    start = replace(x, name="x")
    c.pool.append(start)
    y = inside(c, start)
    layer = w.module(f"{c.finish(str(y))}()", "part")
    register, hook = w.pick(*HOOKS[:8])
    w.setup.append(f"{layer}.{register}({hook})")
    return replace(y, name=w.assign(f"{layer}({x})"))


@block(weight=0.3)
def hooked_root(w: Writer, x: Signal) -> Signal:
    """A hook of the module that is pruned."""
    y = layer_of(w, x, x.width)
    w.setup.append(
        w.pick(
            "self.register_forward_pre_hook(lambda module, args: None)",
            "self.register_forward_hook(lambda module, args, output: None)",
            "self.register_forward_hook(lambda module, args, output: output * 2 if isinstance(output, Tensor) else None)",
        )
    )
    return y
