"""Composite leaves written in plain operations.

``nn.MultiheadAttention`` computes four projections and an attention in one C++ function. The
widths of its heads and the weights that depend on them cannot be seen from outside. In the copy
that is traced, it is replaced by the same computation in plain operations. The names of parameters
stay, and so do the keys of the state dict.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.common.identity import IdentityMap

__all__ = ["PlainAttention", "lower"]

_Masks = tuple[Tensor | None, Tensor | None]
"""The attention mask and the mask of padded keys."""


def lower(root: nn.Module) -> nn.Module:
    """Replace every composite leaf below ``root`` in place.

    Returns
    -------
    The root; another object if the root itself was replaced.

    Examples
    --------
    >>> lower(nn.Sequential(nn.MultiheadAttention(8, 2)))[0].__class__.__name__
    'PlainAttention'
    """
    # a module with two names stays one module
    done: IdentityMap[nn.Module, nn.Module] = IdentityMap()

    def visit(module: nn.Module) -> nn.Module:
        """Replace the composite leaves below a module, and the module itself if it is one."""
        if module not in done:
            done[module] = module
            for name, child in module._modules.items():
                if child is not None:
                    module._modules[name] = visit(child)
            if type(module) is nn.MultiheadAttention:
                done[module] = PlainAttention(module)
        return done[module]

    return visit(root)


class PlainAttention(nn.Module):
    """``nn.MultiheadAttention`` in plain operations, so that a graph shows every width.

    It has the same parameters and gives the same results. It follows
    :func:`torch.nn.functional.multi_head_attention_forward`, so that its dropout draws the same
    numbers under one seed.

    Parameters
    ----------
    source:
        The module to replace. Parameters, buffers, children and settings are shared with it.
    """

    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    _qkv_same_embed_dim: bool
    in_proj_weight: Tensor  # None if the three below exist
    q_proj_weight: Tensor
    k_proj_weight: Tensor
    v_proj_weight: Tensor
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor  # None if bias_k is None
    out_proj: nn.Linear

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        # shares parameters, buffers, children and settings (num_heads, dropout, ...)
        self.__dict__.update(source.__dict__)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute what :meth:`torch.nn.MultiheadAttention.forward` computes."""
        batched = bool(query.dim() == 3)  # asked once: each question becomes a guard
        q, k, v = self._batch_first(*self._project(query, key, value), batched)
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        masks = attn_mask, key_padding_mask
        out, weights = self._attend(q, k, v, masks, need_weights, is_causal)
        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        if not batched:
            out = out.squeeze(1)
        elif self.batch_first:
            out = out.transpose(0, 1)
        return out, weights

    def _batch_first(
        self, q: Tensor, k: Tensor, v: Tensor, batched: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value in the shape (batch, tokens, embed)."""
        if not batched:
            return q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        if not self.batch_first:
            return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        return q, k, v

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, masks: _Masks, need_weights: bool, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the projected attention as (tokens, batch, embed), and its weights per head.

        Query, key and value are (batch, tokens, embed). The weights are None if not needed.
        """
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], dim=1)
        batch, length, source = q.shape[0], q.shape[1], k.shape[1]
        # (batch, tokens, embed) -> (batch, heads, tokens, head_dim)
        q = q.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        k = k.view(batch, source, self.num_heads, self.head_dim).transpose(1, 2)
        v = v.view(batch, source, self.num_heads, self.head_dim).transpose(1, 2)
        added = 1 if self.bias_k is not None else 0
        if self.add_zero_attn:
            k, v, added = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), added + 1
        mask = self._mask(*masks, q, added, batch)
        weights = self._weights(q, k, mask) if need_weights else None
        out = self._fused(q, k, v, mask, is_causal) if weights is None else weights @ v
        # (tokens, batch, embed) first, as in torch.nn: a dropout that follows draws in memory
        # order, so the layout is part of the result.
        out = out.permute(2, 0, 1, 3).reshape(length, batch, self.num_heads * self.head_dim)
        return self.out_proj(out), weights

    def _weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """Return the attention weights after dropout."""
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        return F.dropout(weights, p=self.dropout, training=self.training)

    def _fused(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """Return the attention without its weights."""
        dropout = self.dropout if self.dropout > 0 and self.training else 0.0
        causal = is_causal and mask is None
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal
        )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value after their projections."""
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim:
            if query is key and key is value:
                q, k, v = F.linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
                return q, k, v
            w_q, w_k, w_v = self.in_proj_weight.chunk(3)
        else:
            w_q, w_k, w_v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        b_q, b_k, b_v = (None, None, None) if bias is None else bias.chunk(3)
        return F.linear(query, w_q, b_q), F.linear(key, w_k, b_k), F.linear(value, w_v, b_v)

    def _mask(
        self, attn: Tensor | None, padding: Tensor | None, q: Tensor, added: int, batch: Any
    ) -> Tensor | None:
        """Return both masks as one float tensor that broadcasts to (batch, heads, tokens, source).

        ``added`` is the number of columns by which the source is longer than the masks.
        """
        masks = []
        if attn is not None:
            attn = _as_float(attn, q)
            attn = F.pad(attn, (0, added)) if added else attn
            if attn.dim() == 3:
                attn = attn.view(batch, self.num_heads, attn.shape[1], attn.shape[2])
            masks.append(attn)
        if padding is not None:
            padding = _as_float(padding, q)
            padding = F.pad(padding, (0, added)) if added else padding
            masks.append(padding.unsqueeze(1).unsqueeze(2))
        return None if not masks else masks[0] if len(masks) == 1 else masks[0] + masks[1]


def _as_float(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as a float tensor that is added to the scores."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
    return mask
