"""Regions without gradients, under autocast, checkpoints, functions of the user, compiled and mapped functions."""

from __future__ import annotations

from dataclasses import replace

from ..source import Inside, Signal, Writer
from .control import fitted
from .layers import layer_of
from .registry import block


@block(holds=True, weight=0.8)
def without_gradients(w: Writer, x: Signal, inside: Inside) -> Signal:
    """Blocks under no_grad and its kind."""
    y = w.value(x, "{x} * 1")
    with w.under(
        w.pick(
            "with torch.no_grad():",
            "with torch.enable_grad():",
            "with torch.set_grad_enabled(False):",
            "with torch.autocast('cpu', enabled=False):",
            "with torch.autocast(device_type='cpu', enabled=False), torch.no_grad():",
        )
    ):
        z = fitted(w, inside(w, x), x)
        w.line(f"{y} = {w.pick(str(z), f'{z}.sigmoid()')}")
    return w.value(x, w.pick(f"{{x}} + {y}", f"{{x}} * {y}", f"{y} * {{x}}.sigmoid()"))


@block(holds=True, weight=0.5)
def checkpointed(w: Writer, x: Signal, inside: Inside) -> Signal:
    """A part that is computed again in the backward pass."""
    c = w.child()
    start = replace(x, name="x")
    c.pool.append(start)
    y = inside(c, start)
    layer = w.module(f"{c.finish(str(y))}()", "part")
    return replace(
        y, name=w.assign(f"torch.utils.checkpoint.checkpoint({layer}, {x}, use_reentrant=False)")
    )


@block(weight=1)
def functions(w: Writer, x: Signal) -> Signal:
    """Functions of the user: plain, with gradients of their own, scripted, mapped over the batch."""
    name = w.fresh("function")
    form = w.pick(
        "plain", "autograd", "scripted", "vmap", "static", "closure", "partial", "decorated"
    )
    inner = w.pick(
        "value * value.sigmoid()",
        "value.relu() * 0.5",
        "torch.where(value > 0, value, value * 0.1)",
        "F.gelu(value) + 1",
        "value.clamp(min=0) ** 2",
        "torch.tanh(value) * value",
    )
    if form == "autograd":
        w.function(
            f"class {name}(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx, value):\n        ctx.save_for_backward(value)\n        return {inner}\n\n"
            "    @staticmethod\n    def backward(ctx, grad):\n        (value,) = ctx.saved_tensors\n        return grad * value.sigmoid()\n"
        )
        return w.value(x, f"{name}.apply({{x}})")
    if form == "static":
        w.setup.append(
            f"self.{name} = staticmethod(torch.{w.pick('tanh', 'sigmoid', 'relu')}).__func__"
        )
        return w.value(x, f"self.{name}({{x}})")
    before = {"scripted": "@torch.jit.script\n", "decorated": "@torch.no_grad()\n"}.get(form, "")
    w.function(
        f"{before}def {name}(value):\n    return {inner.replace('F.gelu', 'torch.nn.functional.gelu')}\n"
    )
    if form == "decorated":
        return w.value(x, f"{{x}} + {name}({{x}})")
    if form == "vmap":
        return w.value(
            x,
            w.pick(
                f"torch.vmap({name})({{x}})",
                f"torch.func.vmap({name}, in_dims=1, out_dims=1)({{x}})",
            ),
        )
    if form == "closure":
        return w.value(x, f"(lambda f: f(f({{x}})))(lambda value: {name}(value) * 0.5)")
    if form == "partial":
        return w.value(x, f"functools.partial({name}, value={{x}})()")
    return w.value(x, f"{name}({{x}})")


@block(weight=0.5)
def codebook(w: Writer, x: Signal) -> Signal:
    """The nearest of learned points, with straight-through gradients."""
    y = x if x.axis == x.rank - 1 else replace(x, name=w.assign(f"{x}.movedim(1, -1)"))
    points = w.parameter(5, x.width)
    near = w.assign(
        w.pick(
            f"({y}.unsqueeze(-2) - {points}).pow(2).sum(-1).argmin(-1)",
            f"({y} @ {points}.t()).argmax(dim=-1)",
            f"torch.max({y}.matmul({points}.T), -1)[1]",
        ),
        "near",
    )
    z = w.assign(
        w.pick(
            f"{points}[{near}]",
            f"F.embedding({near}, {points})",
            f"{points}.index_select(0, {near}.flatten()).view_as({y})",
            f"F.one_hot({near}, 5).to({y}.dtype) @ {points}",
        )
    )
    z = w.assign(w.pick(z, f"{y} + ({z} - {y}).detach()"))
    y = layer_of(w, x, x.width)
    return w.value(x, f"{y} + {z if x.axis == x.rank - 1 else f'{z}.movedim(-1, 1)'}")
