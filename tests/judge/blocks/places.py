"""Tables of positions, and tensors made of sizes."""

from __future__ import annotations

from ..source import Signal, Writer
from .registry import block


@block("tokens", weight=1.5)
def positions(w: Writer, x: Signal) -> Signal:
    """Positions added to tokens: learned, cut to length, or computed from sizes."""
    c, n = x.width, x.size[0] + 8
    form = w.pick("learned", "words", "waves", "rotary", "linear")
    if form == "learned":
        table = w.parameter(1, n, c)
        return w.value(
            x,
            w.pick(
                f"{{x}} + {table}[:, :{{x}}.size(1)]",
                f"{{x}} + {table}[:, :{{x}}.shape[1], :]",
                f"{{x}} + {table}.narrow(1, 0, {{x}}.size(1))",
                f"{{x}}.add({table}[:, torch.arange({{x}}.size(1))])",
            ),
        )
    if form == "words":
        table = w.module(f"nn.Embedding({n}, {c})", "places")
        return w.value(
            x,
            w.pick(
                f"{{x}} + {table}(torch.arange({{x}}.size(1)))",
                f"{{x}} + {table}(torch.arange({{x}}.shape[1], device={{x}}.device))[None]",
                f"{{x}} + {table}(torch.arange({{x}}.size(1)).expand({{x}}.size(0), -1))",
                f"{{x}} + {table}.weight[:{{x}}.size(1)]",
            ),
        )
    if form == "waves":
        angles = w.assign(
            f"torch.arange({x}.size(1), dtype={x}.dtype)[:, None] * torch.exp(-torch.arange({w.width(x)}, dtype={x}.dtype) / {w.width(x)})",
            "angles",
        )
        return w.value(
            x,
            w.pick(
                f"{{x}} + {angles}.sin()",
                f"{{x}} * {angles}.cos()",
                f"{{x}} + torch.sin({angles}).unsqueeze(0)",
            ),
        )
    if form == "rotary" and c % 2 == 0:
        half = c // 2
        angles = w.assign(
            f"torch.arange({x}.size(1), dtype={x}.dtype)[:, None] * {w.buffer(f'1.0 / 10 ** (torch.arange({half}).double() / {half})', saved=False)}",
            "angles",
        )
        a, b = w.fresh("a"), w.fresh("b")
        w.line(
            f"{a}, {b} = {w.pick(f'{x}.chunk(2, -1)', f'{x}[..., :{half}], {x}[..., {half}:]', f'{x}[..., ::2], {x}[..., 1::2]')}"
        )
        return w.value(
            x,
            f"torch.cat([{a} * {angles}.cos() - {b} * {angles}.sin(), {a} * {angles}.sin() + {b} * {angles}.cos()], {w.pick('-1', 'dim=2')})",
        )
    weights = w.assign(f"torch.linspace(0, 1, {x}.shape[1], dtype={x}.dtype)")
    return w.value(
        x,
        w.pick(
            f"{{x}} * {weights}[:, None]",
            f"{{x}} + {weights}.view(1, -1, 1)",
            f"torch.einsum('btc,t->btc', {{x}}, {weights})",
        ),
    )


@block(weight=1)
def made(w: Writer, x: Signal) -> Signal:
    """Tensors made in forward, of the sizes of another."""
    c = w.width(x)
    ones = ", 1" * (x.rank - 1 - x.axis)
    forms = [
        "{x} + torch.zeros_like({x})",
        "{x} * torch.ones_like({x}, dtype={x}.dtype)",
        "{x} + torch.full_like({x}, 0.5)",
        "{x} + {x}.new_full((1,), 0.5)",
        f"{{x}} * torch.arange({c}, dtype={{x}}.dtype).view(-1{ones})",
        f"{{x}} + torch.linspace(0, 1, {c}, dtype={{x}}.dtype).reshape(-1{ones})",
        f"{{x}} * torch.ones({c}{ones}, dtype={{x}}.dtype)",
        f"{{x}} + torch.zeros({w.batch(x)}, dtype={{x}}.dtype).view(-1{', 1' * (x.rank - 1)})",
        "{x} * torch.ones({x}.shape, dtype={x}.dtype)",
        "{x} + torch.empty({x}.size(), dtype={x}.dtype).fill_(0.25)",
        "torch.zeros_like({x}).add_({x})",
        "{x} + torch.tensor(0.5, dtype={x}.dtype)",
        "{x} * torch.as_tensor(2.0)",
        f"{{x}} * {w.buffer('torch.tensor(0.7)')}",
        "{x} + torch.arange({x}.size(0), dtype={x}.dtype).view(-1" + ", 1" * (x.rank - 1) + ")",
        f"{{x}} * (torch.arange({c}) % 2).view(-1{ones})",
        f"{{x}} * (torch.arange({c}) < {x.width // 2}).to({{x}}.dtype).reshape(-1{ones})",
        "{x}.new_zeros({x}.shape) + {x}",
    ]
    if x.axis == x.rank - 1:
        forms += [
            f"{{x}} @ torch.eye({c}, dtype={{x}}.dtype)",
            f"{{x}} + {{x}} @ torch.diag(torch.ones({c}, dtype={{x}}.dtype))",
            f"{{x}} @ torch.ones({c}, {c}, dtype={{x}}.dtype).tril() / {c}",
        ]
    return w.value(x, w.pick(*forms))
