"""Attention in the spellings that are in use."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, floats, several, tokens

HEADS = 4


class PackedAttention(nn.Module):
    """One linear layer for queries, keys and values, split by reshape, permute and unbind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = (width // HEADS) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        attention = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(b, n, c))


class ChunkedAttention(nn.Module):
    """One linear layer split by chunk, heads by view, the fused kernel with its default scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (
            t.view(b, n, HEADS, c // HEADS).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1)
        )
        return self.proj(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous().view(b, n, c)
        )


class SeparateAttention(nn.Module):
    """A linear layer each for queries, keys and values; heads by view with a literal -1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, HEADS, -1).transpose(1, 2)
        k = self.k(x).view(b, n, HEADS, -1).permute(0, 2, 3, 1)
        v = self.v(x).view(b, n, HEADS, -1).transpose(1, 2)
        attention = torch.softmax(torch.matmul(q, k) / q.shape[-1] ** 0.5, dim=-1)
        return self.out(torch.matmul(attention, v).transpose(1, 2).flatten(2))


class EinsumAttention(nn.Module):
    """Weights of shape (c, h, d), and every product by einsum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        d = width // HEADS
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(width, HEADS, d)) for _ in range(3))
        self.wo = nn.Parameter(torch.randn(HEADS, d, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bnc,chd->bhnd", x, w) for w in (self.wq, self.wk, self.wv))
        attention = torch.einsum("bhnd,bhmd->bhnm", q * 0.25, k).softmax(-1)
        return torch.einsum(
            "bhnd,hdc->bnc", torch.einsum("bhnm,bhmd->bhnd", attention, v), self.wo
        )


class ModuleAttention(nn.Module):
    """nn.MultiheadAttention, batch first or sequence first."""

    def __init__(self, width: int, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.attention = nn.MultiheadAttention(width, HEADS, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        if self.batch_first:
            return self.attention(x, x, x, need_weights=False)[0]
        x = x.transpose(0, 1)
        return self.attention(x, x, x)[0].transpose(0, 1)


class GroupedAttention(nn.Module):
    """Attention with two query heads for each head of keys and values.

    Keys and values are copied by one of two spellings, or by the fused kernel itself.
    """

    def __init__(self, width: int, copied: str, rotary: bool = False) -> None:
        super().__init__()
        self.head_dim, self.copied = width // HEADS, copied
        self.q, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, width // 2, bias=False) for _ in range(2))
        self.rotary = Rotary(self.head_dim) if rotary else None

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        q, k, v = (
            t(x).view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)
            for t in (self.q, self.k, self.v)
        )
        if self.rotary is not None:
            cos, sin = self.rotary(x)
            q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        if self.copied == "repeat_interleave":
            k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        elif self.copied == "expand":
            k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for t in (k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=self.copied == "kernel"
        )
        return self.out(out.transpose(1, 2).flatten(2))


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


class Rotary(nn.Module):
    """Cosines and sines of rotary positions, equal in both halves of a head."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer(
            "frequencies", 10.0 ** -(torch.arange(0, head_dim, 2).float() / head_dim)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(x.shape[1], device=x.device, dtype=self.frequencies.dtype)
        angles = positions[:, None] * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


class RMSNorm(nn.Module):
    """RMSNorm as decoders write it: with a scale and nothing else."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Decoder(nn.Module):
    """A causal decoder of two blocks: grouped queries, rotary positions, RMSNorm, a gated MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.attentions = nn.ModuleList(
            GroupedAttention(width, "expand", rotary=True) for _ in range(2)
        )
        self.gates, self.ups = (
            nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2)) for _ in range(2)
        )
        self.downs = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(5))
        self.head = nn.Linear(width, 20, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for i in range(2):
            x = x + self.attentions[i](self.norms[2 * i](x), causal=True)
            y = self.norms[2 * i + 1](x)
            x = x + self.downs[i](F.silu(self.gates[i](y)) * self.ups[i](y))
        return self.head(self.norms[4](x))


class WindowAttention(nn.Module):
    """Swin's attention: roll, windows, a table of relative biases, and all the way back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn(9, HEADS))
        y, x = torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")
        y, x = y.flatten(), x.flatten()
        index = (y[:, None] - y[None] + 1) * 3 + x[:, None] - x[None] + 1
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = torch.roll(x, shifts=(-1, -1), dims=(1, 2))
        x = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        qkv = self.qkv(x).reshape(x.shape[0], 4, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1).contiguous()
        attention = F.softmax(
            q @ k.transpose(-2, -1) * (c // HEADS) ** -0.5 + bias.unsqueeze(0), dim=-1
        )
        x = self.proj((attention @ v).transpose(1, 2).reshape(-1, 4, c))
        x = x.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return torch.roll(x, shifts=(1, 1), dims=(1, 2))


class Transformer(nn.Module):
    """A ViT of two blocks around some attention.

    It has patches, a class token, positions, LayerNorm first, and layer scale.
    """

    def __init__(self, width: int, attention: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 5, width))
        self.norms1 = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.norms2 = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attentions = nn.ModuleList(attention(width) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, 2 * width),
                nn.GELU(),
                nn.Dropout(0.1),
                nn.Linear(2 * width, width),
            )
            for _ in range(2)
        )
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(width)) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        for i in range(2):
            x = x + self.attentions[i](self.norms1[i](x)) * self.scales[i]
            x = x + self.mlps[i](self.norms2[i](x))
        return self.head(self.norm(x)[:, 0])


class BareAttention(nn.Module):
    """The same attentions without normalisation around them.

    Therefore the original with zeros is a valid reference.
    """

    def __init__(self, width: int, attention: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem, self.attention = nn.Linear(6, width), attention(width)
        self.up, self.head = nn.Linear(width, 2 * width), nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.gelu(self.up(x + self.attention(x))))


class Windows(nn.Module):
    """Shifted window attention on a channels-last image, then patch merging by strided slices."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 2, 2), nn.LayerNorm(width)
        self.attention = WindowAttention(width)
        self.merge, self.head = nn.Linear(4 * width, 2 * width), nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        x = x + self.attention(self.norm(x))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.merge(x).mean((1, 2)))


class CrossAttention(nn.Module):
    """nn.MultiheadAttention with kdim and vdim.

    Queries come from one input, keys and values from another.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(6, width), nn.Linear(5, 2 * width)
        self.attention = nn.MultiheadAttention(
            width, HEADS, kdim=2 * width, vdim=2 * width, batch_first=True
        )
        self.up, self.head = nn.Linear(width, 2 * width), nn.Linear(2 * width, 10)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, memory = self.q(x), F.relu(self.kv(memory))
        q = q + self.attention(q, memory, memory)[0]
        return self.head(F.relu(self.up(q)))


class EncoderLayer(nn.Module):
    """nn.TransformerEncoderLayer between two linear layers."""

    def __init__(self, width: int, norm_first: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.layer = nn.TransformerEncoderLayer(
            width, HEADS, 2 * width, 0.1, batch_first=True, norm_first=norm_first
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.stem(x)).mean(1))


ATTENTIONS: dict[str, Callable[[int], nn.Module]] = {
    "packed": PackedAttention,
    "chunked": ChunkedAttention,
    "separate": SeparateAttention,
    "einsum": EinsumAttention,
    "module": ModuleAttention,
    "module_sequence_first": lambda width: ModuleAttention(width, batch_first=False),
    **{
        f"grouped_{how}": lambda w, how=how: GroupedAttention(w, how)
        for how in ("repeat_interleave", "expand", "kernel")
    },
    "grouped_rotary": lambda width: GroupedAttention(width, "kernel", rotary=True),
}

CASES = [
    *(
        Case(f"attention_{name}", lambda w, a=a: BareAttention(w, a), floats(5, 6))
        for name, a in ATTENTIONS.items()
    ),
    *(
        Case(f"vit_{name}", lambda w, a=a: Transformer(w, a), floats(3, 8, 8), zeroable=False)
        for name, a in ATTENTIONS.items()
    ),
    Case("window_attention", Windows, floats(3, 8, 8), zeroable=False),
    Case("decoder", Decoder, tokens(6, 20), zeroable=False),
    Case("cross_attention", CrossAttention, several((5, 6), (7, 5))),
    Case(
        "encoder_layer", lambda w: EncoderLayer(w, norm_first=False), floats(5, 6), zeroable=False
    ),
    Case(
        "encoder_layer_norm_first",
        lambda w: EncoderLayer(w, norm_first=True),
        floats(5, 6),
        zeroable=False,
    ),
]
