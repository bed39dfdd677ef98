"""Layers with weights: linear and convolution, as modules and by every function that computes them."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from ..source import Signal, Writer
from .registry import block

PARAMETRISED = (
    "nn.utils.parametrizations.weight_norm({})",
    "nn.utils.parametrizations.weight_norm({}, dim=0)",
)


def linear(w: Writer, x: Signal, out: int) -> Signal:
    """Tokens or vectors through a matrix."""
    bias = w.chance(0.7)
    if w.chance(0.45):
        code = f"nn.Linear({x.width}, {out}{'' if bias else ', bias=False'})"
        if w.chance(0.05):
            code = w.pick(*PARAMETRISED).format(code)
        layer = w.module(code)
        form = w.pick(
            "{l}({x})",
            "{l}({x})",
            "{l}(input={x})",
            "{l}.forward({x})",
            "{l}({x}).clone()",
            "F.linear({x}, {l}.weight, {l}.bias)",
            "F.linear({x}, weight={l}.weight)",
        )
        return w.value(x, form.replace("{l}", layer), width=out)
    plus = f" + {w.parameter(out)}" if bias else ""
    if w.chance(0.5):
        weight = w.parameter(out, x.width)
        forms = [
            f"F.linear({{x}}, {weight}){plus}",
            f"{{x}} @ {weight}.t(){plus}",
            f"{{x}} @ {weight}.T{plus}",
            f"torch.matmul({{x}}, {weight}.transpose(0, 1)){plus}",
            f"torch.einsum('...i,oi->...o', {{x}}, {weight}){plus}",
            f"{{x}}.matmul({weight}.mT){plus}",
            f"torch.tensordot({{x}}, {weight}, dims=([-1], [1])){plus}",
            f"F.linear(input={{x}}, weight={weight}, bias={w.parameter(out)})",
            f"({{x}}.unsqueeze(-2) * {weight}).sum(-1){plus}",
            f"torch._C._nn.linear({{x}}, {weight}){plus}",
        ]
    else:
        weight = w.parameter(x.width, out)
        forms = [
            f"{{x}} @ {weight}{plus}",
            f"torch.matmul({{x}}, other={weight}){plus}",
            f"{{x}}.matmul({weight}){plus}",
            f"torch.tensordot({{x}}, {weight}, dims=1){plus}",
            f"torch.einsum('...c,cd->...d', {{x}}, {weight}){plus}",
            f"({weight}.t() @ {{x}}.unsqueeze(-1)).squeeze(-1){plus}"
            if x.rank == 2
            else f"{{x}} @ {weight}[None]{plus}",
            f"torch.inner({{x}}, {weight}.T){plus}",
        ]
        if x.rank == 2:
            forms += [
                f"torch.addmm({w.parameter(out)}, {{x}}, {weight})",
                f"torch.mm({{x}}, {weight}){plus}",
                f"torch.addmm(input={w.parameter(out)}, mat1={{x}}, mat2={weight}, beta=0.5)",
            ]
        else:
            forms += [
                f"torch.bmm({{x}}, {weight}.expand({{x}}.size(0), -1, -1)){plus}",
                f"torch.baddbmm({w.parameter(out)}.view(1, 1, -1), {{x}}, {weight}.unsqueeze(0).repeat({{x}}.size(0), 1, 1))",
                f"({{x}}.reshape(-1, {x.width}) @ {weight}).view(*{{x}}.shape[:-1], {out}){plus}",
                f"({{x}}.flatten(0, 1) @ {weight}).unflatten(0, {{x}}.shape[:2]){plus}",
                f"torch.stack([t @ {weight} for t in {{x}}.unbind(1)], dim=1){plus}",
                f"torch.einsum('bti,io->bto', {{x}}, {weight}){plus}",
            ]
    return w.value(x, w.pick(*forms), width=out)


def convolution(w: Writer, x: Signal, out: int) -> Signal:
    """A convolution that keeps the picture's size."""
    form = w.pick(
        "module",
        "module",
        "module",
        "function",
        "one",
        "depthwise",
        "groups",
        "unfold",
        "linear",
        "transposed",
        "standard",
        "rows",
        "gated",
    )
    bias = w.chance(0.7)
    tail = "" if bias else ", bias=False"
    if form == "module":
        code = w.pick(
            f"nn.Conv2d({x.width}, {out}, 3, padding=1{tail})",
            f"nn.Conv2d({x.width}, {out}, kernel_size=3, padding='same'{tail})",
            f"nn.Conv2d({x.width}, {out}, (1, 3), padding=(0, 1){tail})",
            f"nn.Conv2d({x.width}, {out}, 3, 1, 2, dilation=2{tail})",
            f"nn.Conv2d({x.width}, {out}, 3, padding=1, padding_mode='{w.pick('reflect' if min(x.size) > 1 else 'replicate', 'circular', 'replicate')}'{tail})",
            f"nn.Conv2d(in_channels={x.width}, out_channels={out}, kernel_size=1{tail})",
            f"nn.utils.parametrizations.weight_norm(nn.Conv2d({x.width}, {out}, 3, padding=1{tail}))",
        )
        return w.value(x, f"{w.module(code, 'conv')}({{x}})", width=out)
    if form == "function":
        weight = w.parameter(out, x.width, 3, 3)
        beside = w.parameter(out) if bias else "None"
        forms = (
            f"F.conv2d({{x}}, {weight}, {beside}, padding=1)",
            f"torch.conv2d(input={{x}}, weight={weight}, bias={beside}, padding=(1, 1))",
            f"F.conv2d({{x}}, weight={weight}, stride=(1, 1), padding='same')",
            f"F.conv2d(F.pad({{x}}, (1, 1, 1, 1)), {weight}, {beside})",
            f"F.conv2d(F.pad(input={{x}}, pad=[1, 1, 1, 1], mode='replicate'), {weight})",
            f"F.conv2d(nn.ZeroPad2d(1)({{x}}), {weight}, {beside})",
            f"torch.conv2d({{x}}, {weight}, {beside}, 1, 1)",
            f"F.conv2d({{x}}, {weight}.flip(-1), {beside}, 1, 1, 1, 1)",
            f"F.conv2d({{x}}, {weight} * 0.5, {beside}, padding=1)",
            f"F.conv2d({{x}}, {weight}.tanh(), bias={beside}, padding=1)",
            f"torch.convolution({{x}}, {weight}, {beside}, (1, 1), (1, 1), (1, 1), False, (0, 0), 1)",
            f"F.conv2d(torch.nn.functional.pad({{x}}, (1, 1, 1, 1), value=0.5), {weight}, {beside})",
            f"torch.constant_pad_nd(F.conv2d({{x}}, {weight}, {beside}), (1, 1, 1, 1), 0.0)"
            if min(x.size) > 2
            else f"F.conv2d({{x}}, {weight}, padding=1)",
        )
        return w.value(x, w.pick(*forms), width=out)
    if form == "one":
        weight = w.parameter(out, x.width)
        forms = (
            f"torch.einsum('bchw,oc->bohw', {{x}}, {weight})",
            f"F.conv2d({{x}}, {weight}[:, :, None, None])",
            f"({weight} @ {{x}}.flatten(2)).view({{x}}.size(0), {out}, *{{x}}.shape[2:])",
            f"({{x}}.movedim(1, -1) @ {weight}.T).movedim(-1, 1)",
            f"F.linear({{x}}.permute(0, 2, 3, 1), {weight}).permute(0, 3, 1, 2)",
            f"torch.matmul({weight}, {{x}}.flatten(2)).unflatten(-1, {{x}}.shape[-2:])",
            f"torch.tensordot({{x}}, {weight}, dims=([1], [1])).permute(0, 3, 1, 2)",
            f"F.conv2d({{x}}, {weight}.unsqueeze(-1).unsqueeze(-1), padding=0)",
            f"F.conv1d({{x}}.flatten(2), {weight}.unsqueeze(-1)).unflatten(2, {{x}}.shape[2:])",
        )
        return w.value(x, w.pick(*forms), width=out)
    if form == "depthwise":
        more = w.pick(1, 1, 2)
        if w.chance(0.7):
            code = f"{w.module(f'nn.Conv2d({x.width}, {x.width * more}, 3, padding=1, groups={x.width}{tail})', 'conv')}({{x}})"
        else:
            weight = w.parameter(x.width * more, 1, 3, 3)
            code = w.pick(
                f"F.conv2d({{x}}, {weight}, padding=1, groups={w.width(x)})",
                f"F.conv2d(input={{x}}, weight={weight}, padding=1, groups={{x}}.shape[1])",
            )
        y = w.value(x, code, width=x.width * more)
        return w.value(
            y, f"{w.module(f'nn.Conv2d({y.width}, {out}, 1)', 'point')}({{x}})", width=out
        )
    if form == "groups":
        groups = gcd(gcd(x.width, out), w.pick(2, 4))
        return w.value(
            x,
            f"{w.module(f'nn.Conv2d({x.width}, {out}, 3, padding=1, groups={groups}{tail})', 'conv')}({{x}})",
            width=out,
        )
    if form == "unfold":
        weight = w.parameter(out, x.width * 9)
        columns = w.pick(
            "F.unfold({x}, 3, padding=1)",
            "F.unfold({x}, kernel_size=(3, 3), padding=1)",
            "nn.Unfold(3, padding=1)({x})",
        )
        return w.value(
            x,
            f"({weight} @ {columns}).view({{x}}.size(0), {out}, {{x}}.size(2), {{x}}.size(3))",
            width=out,
        )
    if form == "linear":
        y = replace(
            x,
            name=w.assign(
                w.pick(
                    f"{x}.permute(0, 2, 3, 1)",
                    f"{x}.movedim(1, -1)",
                    f"torch.movedim({x}, 1, 3)",
                    f"{x}.transpose(1, 2).transpose(2, 3)",
                )
            ),
        )
        layer = w.module(f"nn.Linear({x.width}, {out}{tail})")
        y = w.value(y, f"{layer}({{x}})", width=out)
        return w.value(
            y,
            w.pick(
                "{x}.permute(0, 3, 1, 2)",
                "{x}.movedim(-1, 1)",
                "{x}.permute(0, -1, 1, 2).contiguous()",
                "torch.permute({x}, (0, 3, 1, 2))",
            ),
        )
    if form == "transposed":
        groups = w.pick(1, 1, gcd(gcd(x.width, out), 2))
        if w.chance(0.6):
            return w.value(
                x,
                f"{w.module(f'nn.ConvTranspose2d({x.width}, {out}, 3, padding=1, groups={groups}{tail})', 'conv')}({{x}})",
                width=out,
            )
        weight = w.parameter(x.width, out, 3, 3)
        return w.value(
            x,
            w.pick(
                f"F.conv_transpose2d({{x}}, {weight}, padding=1)",
                f"torch.conv_transpose2d(input={{x}}, weight={weight}, stride=1, padding=1)",
            ),
            width=out,
        )
    if form == "standard":
        weight = w.parameter(out, x.width, 3, 3)
        forms = (
            f"({weight} - {weight}.mean((1, 2, 3), keepdim=True)) / ({weight}.std((1, 2, 3), keepdim=True) + 1e-3)",
            f"{weight} / (torch.linalg.vector_norm({weight}, dim=(1, 2, 3), keepdim=True) + 1e-4)",
            f"F.normalize({weight}.flatten(1), dim=1).view_as({weight})",
            f"{weight} * torch.rsqrt({weight}.pow(2).sum((1, 2, 3), keepdim=True) + 1e-4)",
            f"({weight} - {weight}.flatten(1).mean(1).view(-1, 1, 1, 1)) / {weight}.flatten(1).var(1, unbiased=False).add(1e-3).sqrt().view(-1, 1, 1, 1)",
        )
        kernel = w.assign(w.pick(*forms), "kernel")
        return w.value(x, f"F.conv2d({{x}}, {kernel}, padding=1)", width=out)
    if form == "rows":  # one axis at a time
        first, second = (
            w.module(f"nn.Conv2d({x.width}, {out}, (3, 1), padding=(1, 0){tail})", "conv"),
            w.module(f"nn.Conv2d({out}, {out}, (1, 3), padding=(0, 1))", "conv"),
        )
        return w.value(x, f"{second}({first}({{x}}))", width=out)
    value, gate = (
        w.module(f"nn.Conv2d({x.width}, {out}, 3, padding=1{tail})", "conv"),
        w.module(f"nn.Conv2d({x.width}, {w.pick(out, 1)}, 1)", "gate"),
    )
    return w.value(
        x,
        w.pick(
            f"{value}({{x}}) * {gate}({{x}}).sigmoid()",
            f"{value}({{x}}).mul(torch.sigmoid({gate}({{x}})))",
        ),
        width=out,
    )


def layer_of(w: Writer, x: Signal, out: int) -> Signal:
    return convolution(w, x, out) if x.kind == "image" else linear(w, x, out)


@block(weight=5)
def layer(w: Writer, x: Signal) -> Signal:
    """A layer of another width."""
    return layer_of(w, x, w.some_width())


@block(weight=1)
def bottleneck(w: Writer, x: Signal) -> Signal:
    """Wide inside, with a sum around it."""
    y = layer_of(w, x, 2 * w.some_width())
    y = w.value(y, w.pick("F.gelu({x})", "{x}.relu()", "F.silu({x}, inplace=True)"))
    y = layer_of(w, y, x.width)
    return w.value(
        x,
        w.pick(
            f"{{x}} + {y}",
            f"{y} + {{x}}",
            f"torch.add({{x}}, {y}, alpha=0.5)",
            f"{{x}}.add({y})",
            f"{{x}} + 0.1 * {y}",
        ),
    )


@block("tokens", weight=1)
def tokens_convolved(w: Writer, x: Signal) -> Signal:
    """A convolution along the tokens."""
    out = w.some_width()
    form = w.pick("plain", "depthwise", "function", "causal", "groups")
    if form == "plain":
        layer = w.module(f"nn.Conv1d({x.width}, {out}, 3, padding=1)", "conv")
        return w.value(
            x,
            w.pick(
                f"{layer}({{x}}.transpose(1, 2)).transpose(1, 2)",
                f"{layer}({{x}}.mT).mT",
                f"{layer}({{x}}.permute(0, 2, 1)).permute(0, 2, 1)",
                f"{layer}(torch.swapaxes({{x}}, 1, 2)).swapaxes(-2, -1)",
            ),
            width=out,
        )
    if form == "depthwise":
        layer = w.module(
            f"nn.Conv1d({x.width}, {x.width}, 3, padding=1, groups={x.width})", "conv"
        )
        return w.value(x, f"{layer}({{x}}.transpose(-1, -2)).transpose(-1, -2)")
    if form == "causal":
        layer = w.module(f"nn.Conv1d({x.width}, {out}, 3, padding=2)", "conv")
        return w.value(
            x,
            w.pick(
                f"{layer}({{x}}.transpose(1, 2))[..., :-2].transpose(1, 2)",
                f"{layer}({{x}}.transpose(1, 2))[:, :, :{{x}}.size(1)].mT",
            ),
            width=out,
        )
    if form == "groups":
        groups = gcd(gcd(x.width, out), 2)
        layer = w.module(f"nn.Conv1d({x.width}, {out}, 1, groups={groups})", "conv")
        return w.value(x, f"{layer}({{x}}.transpose(1, 2)).transpose(1, 2)", width=out)
    weight = w.parameter(out, x.width, 3)
    return w.value(x, f"F.conv1d(F.pad({{x}}.mT, (2, 0)), {weight}).mT", width=out)


@block(weight=0.7)
def functions_of_two(w: Writer, x: Signal) -> Signal:
    """Bilinear layers, products of two layers, distances to learned points."""
    out = w.some_width()
    if x.kind == "image":
        a, b = layer_of(w, x, out), layer_of(w, x, out)
        return w.value(
            a,
            w.pick(
                f"{{x}} * {b}",
                f"torch.maximum({{x}}, {b})",
                f"{{x}} - {b}.relu()",
                f"torch.max({{x}}, other={b})",
                f"torch.minimum({{x}}, {b})",
                f"torch.logaddexp({{x}}, {b})",
            ),
        )
    if w.chance(0.3):
        layer = w.module(f"nn.Bilinear({x.width}, {x.width}, {out})")
        return w.value(
            x,
            w.pick(
                f"{layer}({{x}}, {{x}})",
                f"F.bilinear({{x}}, {{x}}.tanh(), {layer}.weight, {layer}.bias)",
            ),
            width=out,
        )
    if w.chance(0.5):
        points = w.parameter(out, x.width)
        forms = (
            f"torch.cdist({{x}}, {points})"
            if x.kind == "vector"
            else f"torch.cdist({{x}}, {points}.expand({{x}}.size(0), -1, -1))",
            f"(({{x}}.unsqueeze(-2) - {points}) ** 2).sum(-1)",
            f"F.cosine_similarity({{x}}.unsqueeze(-2), {points}, dim=-1)",
            f"F.normalize({{x}}, dim=-1) @ F.normalize({points}, dim=-1).T",
            f"({{x}}.unsqueeze(-2) - {points}).norm(dim=-1)",
        )
        return w.value(x, w.pick(*forms), width=out)
    a, b = linear(w, x, out), linear(w, x, out)
    return w.value(
        a,
        w.pick(
            f"{{x}} * {b}",
            f"{{x}} * {b}.sigmoid()",
            f"F.glu(torch.cat(({{x}}, {b}), -1), -1)",
            f"torch.addcmul({{x}}, {{x}}, {b})",
        ),
    )
