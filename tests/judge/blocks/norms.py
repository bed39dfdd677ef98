"""Norms that are one operation, and dropout."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from ..source import Signal, Writer
from .layers import layer_of
from .registry import block


def _moved(w: Writer, x: Signal, code: str) -> Signal:
    """``code`` on a tensor whose channels are last."""
    if x.axis == x.rank - 1:
        return w.value(x, code)
    last = replace(
        x,
        name=w.assign(
            w.pick(
                f"{x}.permute(0, 2, 3, 1)",
                f"{x}.movedim(1, -1)",
                f"torch.movedim({x}, source=1, destination=-1)",
            )
        ),
    )
    return w.value(
        w.value(last, code),
        w.pick(
            "{x}.permute(0, 3, 1, 2)", "{x}.movedim(-1, 1)", "{x}.permute(0, 3, 1, 2).contiguous()"
        ),
    )


@block(weight=3)
def norm(w: Writer, x: Signal) -> Signal:
    """A norm over channels, groups, positions or the batch."""
    c = x.width
    form = w.pick(
        "layer",
        "layer_f",
        "rms",
        "rms_f",
        "group",
        "group_f",
        "batch",
        "batch_f",
        "instance",
        "whole",
        "bare",
    )
    if form == "layer":
        return _moved(
            w,
            x,
            f"{w.module(w.pick(f'nn.LayerNorm({c})', f'nn.LayerNorm([{c}], eps=1e-6)', f'nn.LayerNorm(normalized_shape=({c},))', f'nn.LayerNorm({c}, bias=False)'), 'norm')}({{x}})",
        )
    if form == "layer_f":
        weight, bias = w.parameter(c), w.parameter(c)
        size = w.pick(f"({c},)", f"[{c}]", "{x}.shape[-1:]", "({x}.size(-1),)", f"{weight}.shape")
        return _moved(
            w,
            x,
            w.pick(
                f"F.layer_norm({{x}}, {size}, {weight}, {bias})",
                f"F.layer_norm(input={{x}}, normalized_shape={size}, weight={weight}, bias={bias}, eps=1e-4)",
                f"torch.layer_norm({{x}}, {size}, {weight}, {bias})",
                f"F.layer_norm({{x}}, {size}, weight={weight})",
            ),
        )
    if form == "rms":
        return _moved(w, x, f"{w.module(f'nn.RMSNorm({c}, eps=1e-5)', 'norm')}({{x}})")
    if form == "rms_f":
        return _moved(
            w,
            x,
            f"F.rms_norm({{x}}, {w.pick(f'({c},)', '{x}.shape[-1:]')}, {w.parameter(c)}, {w.pick('1e-5', 'eps=1e-6')})",
        )
    if form in ("group", "group_f"):
        groups = w.pick(1, gcd(c, 2), gcd(c, 4))
        y = (
            x
            if x.axis == 1
            else w.value(x, w.pick("{x}.transpose(1, 2)", "{x}.mT", "{x}.permute(0, 2, 1)"))
        )
        if form == "group":
            code = f"{w.module(w.pick(f'nn.GroupNorm({groups}, {c})', f'nn.GroupNorm(num_groups={groups}, num_channels={c}, eps=1e-3)'), 'norm')}({{x}})"
        else:
            code = w.pick(
                f"F.group_norm({{x}}, {groups}, {w.parameter(c)}, {w.parameter(c)})",
                f"F.group_norm(input={{x}}, num_groups={groups}, weight={w.parameter(c)}, bias=None)",
            )
        y = w.value(y, code)
        return (
            y
            if x.axis == 1
            else w.value(y, w.pick("{x}.transpose(1, 2)", "{x}.transpose(-1, -2)", "{x}.mT"))
        )
    if form in ("batch", "batch_f"):
        y = x if x.axis == 1 else w.value(x, "{x}.transpose(1, 2)")
        kind = "BatchNorm2d" if x.kind == "image" else "BatchNorm1d"
        if form == "batch":
            more = w.pick(
                "", "", ", eps=1e-3", ", momentum=None", ", affine=False", ", momentum=0.3"
            )
            code = f"{w.module(f'nn.{kind}({c}{more})', 'norm')}({{x}})"
        else:
            mean, var = w.buffer(f"torch.zeros({c})"), w.fresh("running_var")
            w.setup.append(f'self.register_buffer("{var}", torch.ones({c}))')
            code = w.pick(
                f"F.batch_norm({{x}}, {mean}, self.{var}, {w.parameter(c)}, {w.parameter(c)}, self.training)",
                f"F.batch_norm({{x}}, running_mean={mean}, running_var=self.{var}, training=False, weight={w.parameter(c)})",
                f"F.batch_norm(input={{x}}, running_mean={mean}, running_var=self.{var}, weight={w.parameter(c)}, bias={w.parameter(c)}, training=self.training, momentum=0.2)",
            )
        y = w.value(y, code)
        return y if x.axis == 1 else w.value(y, "{x}.transpose(1, 2)")
    if form == "instance" and x.kind == "image" and min(x.size) > 1:
        more = w.pick("", ", affine=True", ", affine=True, track_running_stats=True")
        return w.value(
            x,
            w.pick(
                f"{w.module(f'nn.InstanceNorm2d({c}{more})', 'norm')}({{x}})",
                "F.instance_norm({x})",
                f"F.instance_norm({{x}}, weight={w.parameter(c)}, bias={w.parameter(c)}, eps=1e-4)",
            ),
        )
    if form == "whole" and x.kind == "image" and w.chance(0.3):
        return w.value(
            x, f"{w.module(f'nn.LayerNorm([{c}, {x.size[0]}, {x.size[1]}])', 'norm')}({{x}})"
        )
    if form == "bare":  # statistics without weights, of what a layer gives
        y = layer_of(w, x, c)
        if x.kind == "image":
            return w.value(
                y,
                w.pick(
                    "F.instance_norm({x}, eps=1e-4)",
                    "F.normalize({x}, dim=1)",
                    "F.normalize({x}, p=2.0, dim=-3, eps=1e-6)",
                    "F.local_response_norm({x}, 3)",
                ),
            )
        return w.value(
            y,
            w.pick(
                "F.normalize({x}, dim=-1)",
                "F.normalize({x}, p=1, dim=-1)",
                "F.normalize({x}, 2, -1)",
            ),
        )
    return _moved(w, x, f"{w.module(f'nn.LayerNorm({c})', 'norm')}({{x}})")


@block(weight=1)
def dropout(w: Writer, x: Signal) -> Signal:
    """Dropout in its forms."""
    forms = [
        "F.dropout({x}, 0.1, self.training)",
        "F.dropout({x}, p=0.2, training=self.training)",
        f"{w.module('nn.Dropout(0.1)', 'drop')}({{x}})",
        f"{w.module('nn.Dropout(p=0.3, inplace=True)', 'drop')}({{x}} * 1)",
    ]
    if x.kind == "image":
        forms += [
            f"{w.module('nn.Dropout2d(0.2)', 'drop')}({{x}})",
            "F.dropout2d({x}, 0.1, training=self.training)",
        ]
    return w.value(x, w.pick(*forms))


@block(weight=0.7)
def drop_path(w: Writer, x: Signal) -> Signal:
    """Stochastic depth by hand: a draw per sample while training."""
    y = layer_of(w, x, x.width)
    ones = ", ".join(["1"] * (x.rank - 1))
    with w.under("if self.training:"):
        forms = (
            f"{y} = {y} * (torch.rand({y}.shape[0], {ones}, dtype={y}.dtype) > 0.3).to({y}.dtype) / 0.7",
            f"{y} = {y} / 0.8 * {y}.new_empty(({y}.size(0), {ones})).bernoulli_(0.8)",
            f"{y} = {y} * torch.floor(0.9 + torch.rand(({y}.shape[0],) + (1,) * ({y}.ndim - 1), dtype={y}.dtype))",
        )
        w.line(w.pick(*forms))
    return w.value(x, w.pick(f"{{x}} + {y}", f"{y} + {{x}}"))
