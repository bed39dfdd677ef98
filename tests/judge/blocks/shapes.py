"""From one kind of signal to another."""

from __future__ import annotations

from math import prod

from ..source import Signal, Writer
from .registry import block


def to_vector(w: Writer, x: Signal) -> Signal:
    """One vector per sample."""
    if x.kind == "vector":
        return x
    if x.kind == "tokens":
        forms = (
            "{x}.mean(1)",
            "{x}.mean(dim=-2)",
            "{x}[:, 0]",
            "{x}[:, -1]",
            "{x}[:, -1, :]",
            "{x}.max(1).values",
            "{x}.max(dim=1)[0]",
            "torch.amax({x}, 1)",
            "{x}.sum(1)",
            "{x}.select(1, 0)",
            "{x}.transpose(1, 2).mean(-1)",
            "torch.mean({x}, dim=1, keepdim=True)[:, 0]",
            "torch.logsumexp({x}, 1)",
            "{x}.median(1)[0]",
            "F.adaptive_avg_pool1d({x}.transpose(1, 2), 1).squeeze(-1)",
            "{x}.unbind(1)[1]",
            "torch.einsum('btc->bc', {x})",
            "{x}.cumsum(1)[:, -1]",
            "(({x} * {x}.mean(-1, keepdim=True).softmax(1)).sum(1))",
        )
        return w.value(x, w.pick(*forms), kind="vector", size=())
    if prod(x.size) <= 36 and w.chance(0.25):
        forms = (
            "{x}.flatten(1)",
            "torch.flatten({x}, start_dim=1)",
            "{x}.reshape({x}.shape[0], -1)",
            "{x}.view({x}.size(0), -1)",
            "nn.Flatten()({x})",
        )
        return w.value(x, w.pick(*forms), kind="vector", size=(), width=x.width * prod(x.size))
    forms = (
        "{x}.mean((2, 3))",
        "{x}.mean([-1, -2])",
        "{x}.mean(dim=(-2, -1))",
        "F.adaptive_avg_pool2d({x}, 1).flatten(1)",
        "F.adaptive_avg_pool2d({x}, (1, 1)).squeeze(-1).squeeze(-1)",
        "{x}.amax(dim=(2, 3))",
        "{x}.flatten(2).mean(2)",
        "{x}.mean(3).mean(2)",
        "F.adaptive_max_pool2d({x}, 1)[:, :, 0, 0]",
        "torch.mean({x}, [2, 3])",
        "F.avg_pool2d({x}, kernel_size={x}.shape[2:]).flatten(1)",
        "{x}.flatten(-2).max(-1).values",
        "{x}.sum((-1, -2)) / ({x}.shape[2] * {x}.shape[3])",
        "{x}[..., 0, 0]",
        "{x}[:, :, -1, 1]",
        "{x}.view({x}.size(0), {x}.size(1), -1).mean(-1)",
        "{x}.permute(0, 2, 3, 1).flatten(1, 2).mean(1)",
        "torch.squeeze({x}.mean((2, 3), True))[:]",
        "{x}.pow(3).mean((2, 3), keepdim=False)",
        "{x}.clamp(min=1e-6).pow(3).mean((-2, -1)).pow(1 / 3)",
        "{x}.std((2, 3))",
    )
    code = w.pick(*forms)
    return w.value(x, code, kind="vector", size=())


@block("image", "tokens", gives="vector", keeps=False, weight=1.2)
def pooled(w: Writer, x: Signal) -> Signal:
    return to_vector(w, x)


@block("image", gives="tokens", keeps=False, weight=1.5)
def tokens_of_image(w: Writer, x: Signal) -> Signal:
    """Every pixel becomes a token."""
    forms = (
        "{x}.flatten(2).transpose(1, 2)",
        "{x}.flatten(2).permute(0, 2, 1)",
        "torch.flatten({x}, 2).mT",
        "{x}.permute(0, 2, 3, 1).flatten(1, 2)",
        "{x}.view({x}.shape[0], {x}.shape[1], -1).transpose(-1, -2)",
        "{x}.movedim(1, -1).flatten(1, 2)",
        "{x}.flatten(-2).swapaxes(-1, -2)",
        "torch.transpose({x}.reshape({x}.size(0), " + str(x.width) + ", -1), dim0=1, dim1=2)",
        "{x}.permute(0, 2, 3, 1).reshape({x}.size(0), -1, {x}.size(1))",
        "{x}.flatten(start_dim=2).transpose(2, 1).contiguous()",
        "torch.einsum('bchw->bhwc', {x}).flatten(1, 2)",
        "torch.permute({x}, dims=(0, 3, 2, 1)).flatten(1, 2)",
        "torch.stack({x}.flatten(2).unbind(-1), 1)",
    )
    return w.value(x, w.pick(*forms), kind="tokens", size=(prod(x.size),))


@block("tokens", gives="image", keeps=False, weight=0.8)
def image_of_tokens(w: Writer, x: Signal) -> Signal:
    """Tokens become a picture of one row, or of rows of equal length."""
    forms = [
        "{x}.transpose(1, 2).unsqueeze(2)",
        "{x}.mT[:, :, None]",
        "{x}.permute(0, 2, 1).unflatten(2, (1, -1))",
    ]
    size = (1, x.size[0])
    if w.chance(0.6):
        size = (x.size[0], 2)
        forms = [
            "torch.stack([{x}, {x} * 2], -1).transpose(1, 2)",
            "{x}.transpose(1, 2)[..., None].repeat(1, 1, 1, 2)",
            "{x}.mT.unsqueeze(-1).expand(-1, -1, -1, 2).clone()",
        ]
    return w.value(x, w.pick(*forms), kind="image", size=size)


@block(
    "vector",
    gives="tokens",
    keeps=False,
    weight=0.8,
    fits=lambda x: x.width % 2 == 0 and x.width >= 8,
)
def tokens_of_vector(w: Writer, x: Signal) -> Signal:
    """A vector is cut into tokens, or stands beside copies of itself."""
    if w.chance(0.4):
        forms = (
            "torch.stack(({x}, {x}.tanh(), {x} * 0.5), dim=1)",
            "{x}[:, None].repeat(1, 3, 1)",
            "{x}.unsqueeze(1).expand(-1, 3, -1) * 2",
        )
        return w.value(x, w.pick(*forms), kind="tokens", size=(3,))
    half = x.width // 2
    forms = (
        f"{{x}}.view(-1, 2, {half})",
        "{x}.unflatten(1, (2, -1))",
        "torch.stack({x}.chunk(2, dim=-1), 1)",
        f"{{x}}.reshape({{x}}.size(0), {half}, 2).transpose(1, 2)",
        f"torch.unflatten({{x}}, -1, (2, {half}))",
        f"{{x}}.unfold(1, {half}, {half})",
    )
    return w.value(x, w.pick(*forms), kind="tokens", size=(2,), width=half)


@block("vector", gives="image", keeps=False, weight=0.4)
def image_of_vector(w: Writer, x: Signal) -> Signal:
    layer = w.module(f"nn.Linear({x.width}, {4 * 9})")
    y = w.value(x, f"{layer}({{x}})", width=36)
    return w.value(
        y,
        w.pick(
            "{x}.view(-1, 4, 3, 3)",
            "{x}.unflatten(1, (4, 3, 3))",
            "{x}.reshape({x}.shape[0], 4, 3, 3)",
        ),
        kind="image",
        width=4,
        size=(3, 3),
    )
