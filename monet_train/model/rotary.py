"""Rotary positions of queries and keys (RoPE, arXiv 2104.09864, in Llama's half-split layout).

The file imports nothing but torch, so that an exported Hugging Face folder can carry it unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles (RoPE, arXiv 2104.09864, in Llama's half-split layout).

    Args:
        positions: integer [B or 1, S]. head_dim: width of an attention head. theta: base of the angles.

    Returns:
        two fp32 tensors [B or 1, 1, S, head dim].
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions[..., None].float() * theta**-exponent
    angles = torch.cat([angles, angles], -1).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + head_dim/2}) of [B, heads, S, head dim] by their angles."""
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], -1) * sin.to(x.dtype)
