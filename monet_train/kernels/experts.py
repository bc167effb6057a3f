"""The expert layers on compact gates: the native kernels of ``csrc/``.

What is kept for backward is the input, the gates, the mask, and the pre-activations of the active (token,
half-expert) pairs; everything else is formed again. The kernels keep sums in fp32 (fp64 for fp64 tokens), also where
tokens and weights are bf16. A mask is a constant to them: it gets no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monet_train.kernels.compact import CompactGates


def vertical_experts(x: Tensor, g1: CompactGates, g2: CompactGates, mask: Tensor | None, *weights: Tensor) -> Tensor:
    """See :func:`plain.vertical_experts`; ``weights`` in its order."""
    v1, v2 = _values(g1, x), _values(g2, x)
    out, *_ = torch.ops.monet.vertical_experts(
        x, v1, g1.layout.tensors(), v2, g2.layout.tensors(), g1.layout.experts, _factors(mask, v1), weights
    )
    return out


def horizontal_experts(x: Tensor, g1: CompactGates, g2: CompactGates, mask: Tensor | None, *weights: Tensor) -> Tensor:
    """See :func:`plain.horizontal_experts`; ``weights`` in its order."""
    v1, v2 = _values(g1, x), _values(g2, x)
    out, *_ = torch.ops.monet.horizontal_experts(
        x, v1, g1.layout.tensors(), v2, g2.layout.tensors(), g1.layout.experts, _factors(mask, v1), weights
    )
    return out


def expert_weights(g1: CompactGates, g2: CompactGates, mask: Tensor) -> tuple[CompactGates, CompactGates]:
    """See :func:`plain.expert_weights`; over the layouts of the gates."""
    r1, r2 = torch.ops.monet.expert_weights(
        g1.values, g1.layout.tensors(), g2.values, g2.layout.tensors(), g1.layout.experts, _factors(mask, g1.values)
    )
    return CompactGates(r1.unsqueeze(1), g1.layout), CompactGates(r2.unsqueeze(1), g2.layout)


def expert_bias(g: CompactGates, b: Tensor) -> Tensor:
    """See :func:`plain.expert_bias`."""
    return torch.ops.monet.expert_bias(_values(g, b), g.layout.tensors(), b)


def _values(gates: CompactGates, like: Tensor) -> Tensor:
    """Gates in the precision in which the kernels sum over values like ``like``."""
    return gates.values.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def _factors(mask: Tensor | None, values: Tensor) -> Tensor | None:
    """A mask beside gates: a constant, in their precision."""
    return None if mask is None else mask.detach().to(values.dtype)
