"""Attention by hand and by torch's own functions."""

from __future__ import annotations

from dataclasses import replace

from ..source import Signal, Writer
from .layers import linear
from .registry import block


def _heads(w: Writer, x: Signal, heads: int, size: int) -> str:
    """(B, T, heads x size) as (B, heads, T, size)."""
    forms = (
        f"{x}.view({x}.shape[0], {x}.shape[1], {heads}, {size}).transpose(1, 2)",
        f"{x}.view({w.batch(x)}, -1, {heads}, {size}).permute(0, 2, 1, 3)",
        f"{x}.reshape({x}.size(0), {x}.size(1), {heads}, -1).transpose(1, 2)",
        f"{x}.unflatten(-1, ({heads}, {size})).transpose(1, 2)",
        f"{x}.unflatten(2, ({heads}, -1)).permute(0, 2, 1, 3)",
        f"torch.stack({x}.chunk({heads}, -1), 1)",
        f"{x}.view(*{x}.shape[:-1], {heads}, {size}).swapaxes(1, 2)",
        f"torch.stack({x}.split({size}, dim=-1), dim=1)",
        f"{x}.reshape(-1, {x}.size(1), {heads}, {x}.size(2) // {heads}).movedim(2, 1)",
    )
    return w.assign(w.pick(*forms), "h")


@block("tokens", weight=3)
def attention(w: Writer, x: Signal) -> Signal:
    """Queries, keys and values of several heads."""
    heads, size = w.pick(1, 2, 2, 3), w.pick(2, 4, 4)
    inner = heads * size
    packed = w.chance(0.4)
    if packed:
        y = linear(w, x, 3 * inner)
        form = w.pick("chunk", "split", "view", "unbind", "slices")
        q, k, v = (w.fresh(n) for n in "qkv")
        if form == "chunk":
            w.line(f"{q}, {k}, {v} = {w.pick(f'{y}.chunk(3, dim=-1)', f'torch.chunk({y}, 3, 2)')}")
        elif form == "split":
            w.line(
                f"{q}, {k}, {v} = {w.pick(f'{y}.split({inner}, -1)', f'torch.split({y}, [{inner}] * 3, dim=2)')}"
            )
        elif form == "slices":
            w.line(
                f"{q}, {k}, {v} = {y}[..., :{inner}], {y}[..., {inner}:-{inner}], {y}[..., -{inner}:]"
            )
        else:
            z = w.assign(
                w.pick(
                    f"{y}.view({y}.size(0), {y}.size(1), 3, {heads}, {size}).permute(2, 0, 3, 1, 4)",
                    f"{y}.reshape({y}.shape[0], -1, 3, {heads}, {size}).permute(2, 0, 3, 1, 4)",
                    f"{y}.unflatten(-1, (3, {heads}, {size})).movedim(2, 0).transpose(2, 3)",
                )
            )
            w.line(f"{q}, {k}, {v} = {w.pick(z, f'{z}.unbind(0)', f'{z}[0], {z}[1], {z}[2]')}")
        if form in ("chunk", "split", "slices"):
            q, k, v = (_heads(w, replace(x, name=n, width=inner), heads, size) for n in (q, k, v))
    else:
        q, k, v = (_heads(w, linear(w, x, inner), heads, size) for _ in range(3))
    if w.chance(0.2):
        table = w.parameter(size)
        w.line(
            w.pick(
                f"{q}, {k} = {q} * {table}, {k} * {table}",
                f"{q} = F.normalize({q}, dim=-1)",
                f"{k} = {k} + {w.parameter(heads, 1, 1)}",
                f"{q} = F.rms_norm({q}, ({size},), {table}, 1e-5)",
            )
        )
    if w.chance(0.35):
        forms = (
            f"F.scaled_dot_product_attention({q}, {k}, {v})",
            f"F.scaled_dot_product_attention({q}, {k}, {v}, is_causal=True)",
            f"F.scaled_dot_product_attention(query={q}, key={k}, value={v}, scale={w.pick('0.3', f'{size} ** -0.5')})",
            f"torch.nn.functional.scaled_dot_product_attention({q}, {k}, {v}, attn_mask=torch.ones({q}.size(2), {q}.size(2), dtype=torch.bool).tril())",
        )
        y = w.assign(w.pick(*forms), "y")
    else:
        factor = w.pick(
            f"/ math.sqrt({size})",
            f"* {size} ** -0.5",
            f"/ {q}.size(-1) ** 0.5",
            f"* {q}.shape[-1] ** -0.5",
            "* 0.5",
            f"/ math.sqrt({k}.size(-1))",
        )
        a = w.assign(
            w.pick(
                f"{q} @ {k}.transpose(-2, -1) {factor}",
                f"torch.matmul({q}, {k}.mT) {factor}",
                f"torch.einsum('bhqd,bhkd->bhqk', {q}, {k}) {factor}",
                f"({q} {factor}) @ {k}.transpose(2, 3)",
                f"torch.einsum('bhqd,bhkd->bhqk', {q} {factor}, {k})",
            ),
            "a",
        )
        if w.chance(0.4):
            forms = (
                f"{a} = {a}.masked_fill(torch.ones({a}.shape[-2:], dtype=torch.bool).triu(1), float('-inf'))",
                f"{a} = {a} + torch.full({a}.shape[-2:], -1e4, dtype={a}.dtype).triu(1)",
                f"{a} = {a}.masked_fill(~torch.tril(torch.ones({a}.size(-1), {a}.size(-1), dtype=torch.bool)), -1e9)",
                f"{a} = {a} + {w.parameter(heads, 1, 1)}",
                f"{a} = {a}.where(torch.arange({a}.size(-1)) <= torch.arange({a}.size(-2))[:, None], -1e9)",
                f"{a} = {a} - torch.arange({a}.size(-1), dtype={a}.dtype) * {w.buffer(f'torch.rand({heads}, 1, 1)')}",
            )
            w.line(w.pick(*forms))
        a = w.assign(
            w.pick(
                f"{a}.softmax(-1)",
                f"F.softmax({a}, dim=-1)",
                f"torch.softmax({a}, dim=3)",
                f"F.dropout({a}.softmax(dim=-1), 0.1, self.training)",
                f"({a} - {a}.amax(-1, keepdim=True)).softmax(-1)",
                f"{a}.sigmoid() / {a}.size(-1)",
            ),
            "a",
        )
        y = w.assign(
            w.pick(
                f"{a} @ {v}",
                f"torch.matmul({a}, {v})",
                f"torch.einsum('bhqk,bhkd->bhqd', {a}, {v})",
            ),
            "y",
        )
    merged = w.pick(
        f"{y}.transpose(1, 2).reshape({x}.shape[0], {x}.shape[1], {inner})",
        f"{y}.transpose(1, 2).flatten(2)",
        f"{y}.permute(0, 2, 1, 3).contiguous().view({x}.size(0), {x}.size(1), -1)",
        f"torch.cat({y}.unbind(1), dim=-1)",
        f"{y}.transpose(1, 2).flatten(-2)",
        f"torch.cat([t.squeeze(1) for t in {y}.split(1, 1)], -1)",
        f"{y}.swapaxes(1, 2).reshape(*{x}.shape[:-1], {y}.size(1) * {y}.size(3))",
    )
    y = linear(w, w.value(x, merged, width=inner), x.width)
    return w.value(x, w.pick(f"{{x}} + {y}", f"{y} + {{x}}", f"{y}.clone()"))


@block("tokens", weight=1, fits=lambda x: x.width % 2 == 0)
def torch_attention(w: Writer, x: Signal) -> Signal:
    """nn.MultiheadAttention and the layers that hold one."""
    form = w.pick("first", "second", "cross", "mask", "encoder")
    if form == "encoder":
        layer = w.module(
            f"nn.TransformerEncoderLayer({x.width}, 2, {w.pick(8, 12)}, dropout=0.0, batch_first=True{w.pick('', ', norm_first=True', ', activation=F.gelu')})",
            "encoder",
        )
        return w.value(x, f"{layer}({{x}})")
    if form == "second":
        layer = w.module(f"nn.MultiheadAttention({x.width}, 2)", "attention")
        return w.value(
            x,
            f"{layer}({{x}}.transpose(0, 1), {{x}}.transpose(0, 1), {{x}}.transpose(0, 1), need_weights=False)[0].transpose(0, 1)",
        )
    layer = w.module(
        f"nn.MultiheadAttention({x.width}, 2, batch_first=True{w.pick('', ', bias=False')})",
        "attention",
    )
    if form == "cross":
        memory = w.parameter(1, 3, x.width)
        return w.value(
            x,
            f"{layer}({{x}}, {memory}.expand({{x}}.size(0), -1, -1), {memory}.expand({{x}}.size(0), -1, -1))[0]",
        )
    if form == "mask":
        return w.value(
            x,
            f"{layer}({{x}}, {{x}}, {{x}}, attn_mask=torch.ones({{x}}.size(1), {{x}}.size(1), dtype=torch.bool).triu(1), need_weights=False)[0]",
        )
    y = w.fresh()
    w.line(f"{y}, _ = {layer}(query={x}, key={x}, value={x}{w.pick('', ', need_weights=False')})")
    return replace(x, name=y)


@block("tokens", "image", weight=1)
def channel_attention(w: Writer, x: Signal) -> Signal:
    """Attention without heads, of pixels or tokens, or across channels; linear attention."""
    y = x
    if x.kind == "image":
        y = w.value(
            x,
            w.pick("{x}.flatten(2).transpose(1, 2)", "{x}.flatten(2).mT"),
            kind="tokens",
            size=(x.size[0] * x.size[1],),
        )
    size = w.some_width()
    q, k, v = linear(w, y, size), linear(w, y, size), linear(w, y, x.width)
    forms = (
        f"({q} @ {k}.mT).softmax(-1) @ {v}",
        f"F.elu({q}) @ ({k}.softmax(1).transpose(1, 2) @ {v})",
        f"torch.einsum('btc,bsc->bts', {q}, {k}).softmax(dim=-1).matmul({v})",
        f"torch.bmm(torch.bmm({q}, {k}.transpose(1, 2)).tanh(), {v})",
        f"torch.bmm({q}.sigmoid(), torch.bmm({k}.permute(0, 2, 1), {v}))",
        f"{v} @ torch.softmax({v}.mT @ {y}, dim=-1)",
        f"({v}.transpose(1, 2) @ {v} / {v}.size(1)).softmax(-1).matmul({y}.transpose(1, 2)).transpose(1, 2)",
        f"torch.einsum('btc,btd,bsd->bsc', {v}, {k}, {q}) / {k}.shape[1]",
        f"F.scaled_dot_product_attention({q}, {k}, {v})",
        f"torch.baddbmm({v}, torch.bmm({q}, {k}.mT).softmax(2), {v}, beta=0.5)",
    )
    z = w.value(v, w.pick(*forms))
    if x.kind == "image":
        z = replace(
            x,
            name=w.assign(
                w.pick(
                    f"{z}.transpose(1, 2).unflatten(2, {x}.shape[2:])",
                    f"{z}.mT.reshape({x}.shape)",
                    f"{z}.permute(0, 2, 1).reshape({x}.size(0), {x.width}, *{x}.shape[-2:])",
                )
            ),
        )
    return w.value(x, f"{{x}} + {z}")
