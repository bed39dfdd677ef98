"""Scans along tokens, rows or channels."""

from __future__ import annotations

from ..source import Signal, Writer
from .registry import block


@block("tokens", "image", weight=1.2)
def scan(w: Writer, x: Signal) -> Signal:
    """Running sums, products and maxima."""
    at = w.pick(*w.space(x))
    forms = (
        f"{{x}}.cumsum({at})",
        f"torch.cumsum({{x}}, dim={at})",
        f"torch.cumsum(input={{x}}, dim={at}) / 2",
        f"(1 + {{x}} * 0.1).cumprod({at})",
        f"torch.cumprod({{x}}.sigmoid(), {at})",
        f"{{x}}.cummax({at})[0]",
        f"torch.cummax({{x}}, dim={at}).values",
        f"{{x}}.cummin(dim={at}).values",
        f"{{x}}.logcumsumexp({at})",
        f"{{x}}.flip({at}).cumsum({at}).flip({at})",
        f"{{x}} - {{x}}.cumsum({at}) / {{x}}.shape[{at}]",
        f"{{x}}.cumsum({at}) / torch.arange(1, {{x}}.size({at}) + 1, dtype={{x}}.dtype).view({', '.join(str(-1 if a == at % x.rank else 1) for a in range(x.rank))})",
        f"torch.cat([{{x}}.narrow({at}, 0, 1), {{x}}.diff(dim={at})], {at})",
        "torch.cumulative_trapezoid(F.pad({x}, (0, 0, 1, 0)), dim=1)"
        if x.kind == "tokens"
        else f"{{x}}.cumsum({at}) * 0.3",
        f"torch.diff({{x}}, dim={at}, prepend=torch.zeros_like({{x}}.narrow({at}, 0, 1)))",
        f"{{x}}.softmax({at}).cumsum({at})",
        f"{{x}}.clone().cumsum_({at})",
    )
    return w.value(x, w.pick(*forms))


@block("tokens", weight=1.2)
def state_space(w: Writer, x: Signal) -> Signal:
    """A linear recurrence over the tokens, a decay per channel."""
    decay = w.parameter(x.width)
    state, steps = w.fresh("state"), w.fresh("steps")
    start = w.pick(
        f"torch.zeros_like({x}[:, 0])",
        "0",
        f"{x}.new_zeros({x}.size(0), {w.width(x)})",
        f"{x}.mean(1)",
    )
    w.line(f"{state}, {steps} = {start}, []")
    w.line(
        w.pick(
            f"for step in {x}.unbind(1):",
            f"for step in torch.unbind({x}, dim=-2):",
            f"for step in {x}.transpose(0, 1).unbind():",
        )
    )
    w.line(
        f"    {state} = "
        + w.pick(
            f"{decay}.sigmoid() * {state} + step",
            f"torch.exp(-{decay}.abs()) * {state} + (1 - torch.exp(-{decay}.abs())) * step",
            f"{state} * 0.5 + step * {decay}",
        )
    )
    w.line(f"    {steps}.append({w.pick(state, f'{state} * step', f'{state}.tanh()')})")
    return w.value(x, w.pick(f"torch.stack({steps}, 1)", f"torch.stack({steps}, dim=-2)"))


@block("tokens", weight=0.8)
def token_shift(w: Writer, x: Signal) -> Signal:
    """Each token mixed with the one before it, a share per channel."""
    before = w.assign(
        w.pick(
            f"F.pad({x}, (0, 0, 1, -1))",
            f"torch.cat([torch.zeros_like({x}[:, :1]), {x}[:, :-1]], 1)",
            f"F.pad({x}[:, :-1], [0, 0, 1, 0], value=0.0)",
            f"{w.module('nn.ZeroPad2d((0, 0, 1, -1))', 'shift')}({x})",
        )
    )
    share = w.parameter(x.width)
    return w.value(
        x,
        w.pick(
            f"{{x}} * {share} + {before} * (1 - {share})",
            f"torch.lerp({{x}}, {before}, {share})",
            f"{{x}} + ({before} - {{x}}) * {share}.sigmoid()",
            f"{before} + {share} * ({{x}} - {before})",
        ),
    )
