"""Recurrence: torch's layers, and cells in loops over time."""

from __future__ import annotations

from ..source import Signal, Writer
from .registry import block


@block("tokens", weight=1.2)
def recurrent_layer(w: Writer, x: Signal) -> Signal:
    """LSTM, GRU and RNN over the tokens."""
    kind, hidden = w.pick("LSTM", "GRU", "RNN"), w.pick(4, 6, 8)
    both, deep = w.chance(0.3), w.chance(0.2)
    first = w.chance(0.7)
    more = (
        (", batch_first=True" if first else "")
        + (", bidirectional=True" if both else "")
        + (", num_layers=2" if deep else "")
    )
    layer = w.module(f"nn.{kind}({x.width}, {hidden}{more})", "rnn")
    given = "{x}" if first else w.pick("{x}.transpose(0, 1)", "{x}.permute(1, 0, 2)")
    back = "" if first else ".transpose(0, 1)"
    if not both and not deep and w.chance(0.2):
        state = w.assign(f"{x}.new_zeros(1, {x}.size(0), {hidden})", "state")
        call = f"{layer}({given}, {f'({state}, {state})' if kind == 'LSTM' else state})"
    else:
        call = f"{layer}({given})"
    return w.value(x, f"{call}[0]{back}", width=hidden * (1 + both))


@block("tokens", weight=1.5)
def cell_loop(w: Writer, x: Signal) -> Signal:
    """A cell called once per token."""
    kind, hidden = w.pick("LSTMCell", "GRUCell", "RNNCell", "hand"), w.pick(4, 6, 8)
    state, steps = w.fresh("state"), w.fresh("steps")
    zeros = w.pick(
        f"{x}.new_zeros({x}.size(0), {hidden})",
        f"torch.zeros({x}.shape[0], {hidden}, dtype={x}.dtype, device={x}.device)",
        f"{w.parameter(1, hidden)}.expand({x}.size(0), -1)",
    )
    w.line(f"{state} = {zeros}")
    if kind == "LSTMCell":
        w.line(f"{state} = ({state}, {state})")
    w.line(f"{steps} = []")
    if kind == "hand":
        a, b = (
            w.module(f"nn.Linear({x.width}, {hidden})", "enter"),
            w.module(f"nn.Linear({hidden}, {hidden}, bias=False)", "again"),
        )
        new = w.pick(
            f"torch.tanh({a}(step) + {b}({state}))",
            f"({a}(step) + {b}({state})).sigmoid()",
            f"0.5 * {state} + {a}(step)",
            f"torch.lerp({state}, {a}(step), {b}({state}).sigmoid())",
        )
    else:
        cell = w.module(f"nn.{kind}({x.width}, {hidden})", "cell")
        new = w.pick(f"{cell}(step, {state})", f"{cell}(input=step, hx={state})")
    loop = w.pick(
        f"for step in {x}.unbind(1):",
        f"for step in {x}.transpose(0, 1):",
        f"for n in range({x}.size(1)):\n{w.indent}    step = {x}[:, n]",
        f"for n, step in enumerate({x}.unbind(dim=1)):",
        f"for n in reversed(range({x}.shape[1])):\n{w.indent}    step = {x}[:, n, :]",
        f"for step in (t.squeeze(1) for t in {x}.split(1, 1)):",
        f"for step in {x}.permute(1, 0, 2):",
    )
    for text in loop.split("\n"):
        w.line(text.removeprefix(w.indent))
    w.line(f"    {state} = {new}")
    w.line(f"    {steps}.append({f'{state}[0]' if kind == 'LSTMCell' else state})")
    return w.value(
        x,
        w.pick(
            f"torch.stack({steps}, 1)",
            f"torch.stack({steps}, dim=1)",
            f"torch.stack({steps}).transpose(0, 1)",
            f"torch.cat([s.unsqueeze(1) for s in {steps}], 1)",
            f"torch.cat([s[:, None] for s in {steps}], dim=-2)",
        ),
        width=hidden,
    )
