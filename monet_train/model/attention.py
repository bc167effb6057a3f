"""Causal self-attention with rotary positions and grouped key/value heads (the Llama block's attention)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monet_train.model.config import MonetConfig
from monet_train.model.rotary import rotate
from monet_train.parallel.collectives import Collectives


@dataclass
class KVCache:
    """Keys and values of the tokens already seen, one pair [B, kv heads, S, head dim] per layer."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Number of cached tokens."""
        return next(iter(self.layers.values()))[0].shape[2] if self.layers else 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new tokens of ``layer`` and return all keys and values so far."""
        if layer in self.layers:
            past_key, past_value = self.layers[layer]
            key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        self.layers[layer] = (key, value)
        return key, value


@dataclass(frozen=True)
class AttentionContext:
    """What all layers share in one forward pass."""

    cos: Tensor  # [B or 1, 1, S, head dim]
    sin: Tensor
    mask: Tensor | None  # bool [B, 1, S, keys], True = attend; None: plain causal
    cache: KVCache | None


def attention_mask(segments: Tensor | None, cached: int, length: int, device: torch.device) -> Tensor | None:
    """The mask for scaled_dot_product_attention, or None where its own causal mask is exact.

    Args:
        segments: document number of each token [B, S]; tokens attend only within their document.
        cached: tokens already in the key/value cache. length: new tokens.
    """
    if segments is None and (cached == 0 or length == 1):
        return None
    past = torch.arange(cached + length, device=device)
    causal = past[None, :] <= past[cached:, None]
    if segments is None:
        return causal[None, None]
    return (causal & (segments[:, :, None] == segments[:, None, :])).unsqueeze(1)


class Attention(nn.Module):
    """Multi-head causal attention. The head count is read off the projections: a rank may hold a share of the heads."""

    def __init__(self, config: MonetConfig, layer: int, collectives: Collectives) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        kv_width = config.kv_heads * config.head_dim
        self.q_proj = collectives.column(config.hidden_size, config.hidden_size)
        self.k_proj = collectives.column(config.hidden_size, kv_width)
        self.v_proj = collectives.column(config.hidden_size, kv_width)
        self.o_proj = collectives.row(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """[B, S, d] -> [B, S, d]."""
        query = self._heads(self.q_proj(x))
        key = self._heads(self.k_proj(x))
        value = self._heads(self.v_proj(x))
        query = rotate(query, context.cos, context.sin)
        key = rotate(key, context.cos, context.sin)
        if context.cache is not None:
            key, value = context.cache.append(self.layer, key, value)
        causal = context.mask is None
        if query.shape[2] == 1:  # branched on, so that it is a bool also while a symbolic length is traced
            causal = False
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=context.mask,
            is_causal=causal,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
