"""Statistics by hand: means, deviations and norms over channels, groups or positions, and numbers computed from sizes."""

from __future__ import annotations

from math import gcd

from ..source import Signal, Writer
from .layers import linear
from .registry import block
from .shapes import to_vector


@block(weight=2)
def over_channels(w: Writer, x: Signal) -> Signal:
    """A norm over the channels, written out."""
    at, keep = w.dim(x), w.pick("keepdim=True", "keepdim=True", "True")
    named = "keepdim=True"
    c = w.width(x)
    forms = (
        f"{{x}} - {{x}}.mean({at}, {keep})",
        f"{{x}} / ({{x}}.norm(dim={at}, {named}) + 1e-4)",
        f"{{x}} / {{x}}.norm(2, {at}, {keep}).clamp(min=1e-3)",
        f"({{x}} - {{x}}.mean(dim={at}, {named})) / ({{x}}.std({at}, {named}) + 1e-3)",
        f"({{x}} - {{x}}.mean({at}, {keep})) * torch.rsqrt({{x}}.var({at}, unbiased=False, {named}) + 1e-4)",
        f"({{x}} - torch.mean({{x}}, dim={at}, {named})) / torch.sqrt(torch.var({{x}}, dim={at}, correction=0, {named}) + 1e-4)",
        f"{{x}} * torch.rsqrt({{x}}.pow(2).mean({at}, {keep}) + 1e-4)",
        f"{{x}} / torch.sqrt(({{x}} ** 2).mean(dim={at}, {named}) + 1e-4)",
        f"{{x}} / torch.linalg.vector_norm({{x}}, dim={at}, {named}).add(1e-3)",
        f"{{x}} / ({{x}}.abs().sum({at}, {keep}) + 1.0)",
        f"{{x}} / ({{x}}.abs().mean({at}, {named}) + 0.1)",
        f"{{x}} * ({{x}}.sum({at}, {named}) / {c})",
        f"{{x}} / {c} ** 0.5",
        f"{{x}} * ({c}) ** -0.5",
        f"{{x}} / math.sqrt({c})",
        f"{{x}} - {{x}}.amax({at}, {keep})",
        f"{{x}} - torch.logsumexp({{x}}, dim={at}, {named})",
        f"{{x}}.softmax({at})",
        f"F.softmax({{x}}, dim={at})",
        f"torch.softmax({{x}}, {at}) * {{x}}",
        f"{{x}}.log_softmax(dim={at})",
        f"{{x}} / (1e-3 + {{x}}.max(dim={at}, {named})[0].abs() + {{x}}.min({at}, {named}).values.abs())",
        f"{{x}} * {{x}}.var({at}, {named})",
        f"{{x}} + {{x}}.std(dim={at}, unbiased=True, {named})",
        f"{{x}} * torch.std_mean({{x}}, dim={at}, {named})[0] + torch.std_mean({{x}}, {at}, {named})[1]",
        f"(lambda v, m: ({{x}} - m) / (v + 1e-3).sqrt())(*torch.var_mean({{x}}, dim={at}, {named}))",
        f"{{x}} * {{x}}.square().sum(dim=({at},), {named}).add(1e-4).rsqrt() * math.sqrt({c})",
        f"{{x}} - {{x}}.median({at}, {named}).values",
        f"{{x}} / {{x}}.norm(p=1, dim={at}, {named}).clamp_min(0.1)",
        f"({{x}} - {{x}}.mean({at}, {named})).tanh() + {{x}}.mean({at}, {named})",
        f"{{x}} / ({{x}}.prod({at}, {named}).abs() + 1)",
        f"{{x}} * {{x}}.mean({at}).unsqueeze({at})",
        f"{{x}} * {{x}}.cumsum({at})",
        f"{{x}} + {{x}}.argmax({at}, {named}) * 0.1",
        f"{{x}} * ({{x}} > {{x}}.mean({at}, {named})).to({{x}}.dtype)",
        f"{{x}}.sort({at})[0]",
        f"{{x}} * torch.count_nonzero({{x}}, {at}).unsqueeze({at})",
        "{x} / {x}.flatten(1).shape[1]",
        "{x} / {x}[0].numel() * 10",
        f"{{x}} * max({c}, 7) / 10",
        f"{{x}} + math.log({c})",
        f"{{x}} * float({c})",
        f"{{x}} / (1 + {{x}}.size({at}) // 2)",
    )
    return w.value(x, w.pick(*forms))


@block("image", "tokens", weight=1.2)
def over_positions(w: Writer, x: Signal) -> Signal:
    """Statistics per channel, over the positions."""
    dims = w.space(x)
    dims_text = w.pick(str(dims), str(list(dims)))
    at = w.dim(x)
    forms = (
        f"{{x}} - {{x}}.mean({dims_text}, keepdim=True)",
        f"({{x}} - {{x}}.mean({dims_text}, True)) / ({{x}}.std({dims_text}, keepdim=True) + 1e-2)",
        f"{{x}} * {{x}}.norm(dim={dims_text}, keepdim=True)",
        f"{{x}} / ({{x}}.amax({dims_text}, keepdim=True) - {{x}}.amin({dims_text}, keepdim=True) + 0.1)",
        f"{{x}} * torch.sigmoid({{x}}.mean(dim={dims_text}, keepdim=True))",
        f"{{x}} + {{x}} * ((lambda g: g / (g.mean({at}, keepdim=True) + 1e-3))({{x}}.norm(p=2, dim={dims_text}, keepdim=True)))",
        f"{{x}} * torch.rsqrt({{x}}.var({dims_text}, unbiased=False, keepdim=True) + 1e-2)",
        f"{{x}} * {{x}}.sum({dims_text}, keepdim=True) / ({' * '.join(w.side(x, n) for n in range(len(x.size)))})",
        f"{{x}} - {{x}}.mean({dims[0]}, keepdim=True)",
        f"{{x}} * {{x}}.softmax({dims[-1]})",
        f"{{x}} / ({w.width(x)} * {w.side(x, 0)}) ** 0.5",
        f"{{x}} + math.log({w.width(x)} * {w.side(x, 0)})",
        f"{{x}} / max({w.width(x)}, {w.side(x, -1)})",
        "{x} * {x}[0].numel() * 0.01",
        "{x} / math.sqrt({x}.flatten(1).size(-1))",
        f"{{x}} / ({w.width(x)} * {w.side(x, 0)} + 1)",
        "{x} - {x}.mean(tuple(range(1, {x}.dim())), keepdim=True)",
        f"({{x}} - {{x}}.flatten(1).mean(1).view(-1, {', '.join('1' for _ in range(x.rank - 1))}))",
        f"{{x}} / ({{x}}.flatten(1).norm(dim=1).reshape(-1, {', '.join('1' for _ in range(x.rank - 1))}) + 0.1)",
        f"{{x}} * {{x}}.var(dim=list(range(1, {x.rank})), keepdim=True)",
        "{x} * {x}.mean(0, keepdim=True)",
        f"{{x}} / (1 + {{x}}.std(dim=(1, {', '.join(str(a) for a in range(2, x.rank))},), keepdim=True))",
    )
    code = w.pick(*forms)
    w.file.branches |= "max(" in code  # Python compares two sizes
    return w.value(x, code)


@block(weight=1, fits=lambda x: gcd(x.width, 4) > 1)
def over_groups(w: Writer, x: Signal) -> Signal:
    """Statistics over groups of channels."""
    groups = w.pick(2, gcd(x.width, 4))
    per = x.width // groups
    if x.kind == "image":
        split = w.pick(
            f"{{x}}.view({w.batch(x)}, {groups}, {per}, {{x}}.size(2), {{x}}.size(3))",
            f"{{x}}.unflatten(1, ({groups}, -1))",
            f"{{x}}.reshape(-1, {groups}, {w.width(x)} // {groups}, *{{x}}.shape[2:])",
            f"torch.unflatten({{x}}, 1, ({groups}, {per}))",
        )
        dims = w.pick("(2, 3, 4)", "[-1, -2, -3]", "2")
        back = w.pick(
            "{x}.flatten(1, 2)",
            f"{{x}}.reshape(-1, {x.width}, {{x}}.size(3), {{x}}.size(4))",
            "{x}.view({x}.shape[0], -1, *{x}.shape[3:])",
        )
    else:
        split = w.pick(
            f"{{x}}.unflatten(-1, ({groups}, -1))",
            f"{{x}}.view(*{{x}}.shape[:-1], {groups}, {per})",
            f"{{x}}.reshape({{x}}.shape[:-1] + ({groups}, {w.width(x)} // {groups}))",
        )
        dims = w.pick("-1", f"({x.rank},)", "[-1]")
        back = w.pick(
            "{x}.flatten(-2)",
            "{x}.flatten(-2, -1)",
            f"{{x}}.reshape(*{{x}}.shape[:-2], {x.width})",
        )
    y = w.assign(split.replace("{x}", x.name))
    forms = (
        f"{y} - {y}.mean({dims}, keepdim=True)",
        f"{y} / ({y}.std({dims}, keepdim=True) + 1e-2)",
        f"{y} / ({y}.var({dims}, unbiased=False, keepdim=True) + 1e-3).sqrt()",
        f"({y} - {y}.mean({dims}, True)) * ({y}.var({dims}, unbiased=False, keepdim=True) + 1e-3).rsqrt()",
        f"{y} * {y}.pow(2).mean({dims}, keepdim=True)",
        f"{y} * torch.sigmoid({y}) / ({y}.std(dim={dims}, keepdim=True) + 0.1)",
        f"{y} / ({y}.norm(dim={dims}, keepdim=True) + 0.1)"
        if "2, 3" not in dims and "-3" not in dims
        else f"{y} * 2",
    )
    z = w.assign(w.pick(*forms))
    return w.value(x, back.replace("{x}", z))


@block("image", weight=1.5)
def squeeze_excite(w: Writer, x: Signal) -> Signal:
    """A gate per channel, from the mean over the positions."""
    y = (
        to_vector(w, x)
        if w.chance(0.3)
        else w.value(
            x,
            w.pick(
                "{x}.mean((2, 3))",
                "F.adaptive_avg_pool2d({x}, 1).flatten(1)",
                "{x}.flatten(2).mean(-1)",
            ),
            kind="vector",
            size=(),
        )
    )
    if y.width != x.width:
        y = w.value(x, "{x}.mean((-1, -2))", kind="vector", size=())
    y = linear(w, y, w.pick(2, 4, 6))
    y = linear(w, w.value(y, w.pick("{x}.relu()", "F.silu({x})")), x.width)
    gate = w.value(
        y,
        w.pick(
            "{x}.sigmoid()",
            "torch.sigmoid({x})",
            "F.hardsigmoid({x})",
            "{x}.softmax(-1)",
            "{x}.tanh()",
        ),
    )
    return w.value(
        x,
        w.pick(
            f"{{x}} * {gate}[:, :, None, None]",
            f"{{x}} * {gate}.unsqueeze(-1).unsqueeze(-1)",
            f"{{x}}.mul({gate}.view(*{gate}.shape, 1, 1))",
            f"{{x}} * {gate}[..., None, None].expand_as({{x}})",
            f"torch.einsum('bchw,bc->bchw', {{x}}, {gate})",
        ),
    )


@block(weight=0.7)
def mixture(w: Writer, x: Signal) -> Signal:
    """A weighted sum of several layers, the weights from the input."""
    out = w.some_width()
    y = to_vector(w, x)
    gate = w.value(
        linear(w, y, 3), w.pick("{x}.softmax(-1)", "F.softmax({x}, dim=1)", "{x}.sigmoid()")
    )
    layers = w.fresh("experts")
    kind = (
        f"nn.Conv2d({x.width}, {out}, 1)" if x.kind == "image" else f"nn.Linear({x.width}, {out})"
    )
    w.setup.append(
        f"self.{layers} = nn.ModuleList({w.pick(f'[{kind} for _ in range(3)]', f'{kind} for _ in range(3)')})"
    )
    shape = ", ".join(["1"] * (x.rank - 1))
    forms = (
        f"sum({gate}[:, n].view(-1, {shape}) * layer({{x}}) for n, layer in enumerate(self.{layers}))",
        f"(torch.stack([layer({{x}}) for layer in self.{layers}], 1) * {gate}.reshape(-1, 3, {shape})).sum(1)",
        f"torch.einsum('be...,be->b...', torch.stack([e({{x}}) for e in self.{layers}], dim=1), {gate})",
        f"torch.stack([layer({{x}}) * g.view(-1, {shape}) for layer, g in zip(self.{layers}, {gate}.unbind(1))]).sum(0)",
    )
    return w.value(x, w.pick(*forms), width=out)
