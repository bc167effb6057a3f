"""The expert layers on compact gates: one autograd function an operation over the native kernels of ``csrc/``.

What is kept for backward is the input, the gates, the mask, and the pre-activations of the active (token,
half-expert) pairs; everything else is formed again. The kernels keep sums in fp32 (fp64 for fp64 tokens), also where
tokens and weights are bf16. A mask is a constant to them: it gets no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from monet_train.kernels.compact import CompactGates, Layout

LAYOUT_TENSORS = 4


def vertical_experts(x: Tensor, g1: CompactGates, g2: CompactGates, mask: Tensor | None, *weights: Tensor) -> Tensor:
    """See :func:`plain.vertical_experts`; ``weights`` in its order."""
    v1, v2 = _values(g1, x), _values(g2, x)
    return _Vertical.apply(x, v1, g1.layout, v2, g2.layout, _factors(mask, v1), *weights)


def horizontal_experts(x: Tensor, g1: CompactGates, g2: CompactGates, mask: Tensor | None, *weights: Tensor) -> Tensor:
    """See :func:`plain.horizontal_experts`; ``weights`` in its order."""
    v1, v2 = _values(g1, x), _values(g2, x)
    return _Horizontal.apply(x, v1, g1.layout, v2, g2.layout, _factors(mask, v1), *weights)


def expert_weights(g1: CompactGates, g2: CompactGates, mask: Tensor) -> tuple[CompactGates, CompactGates]:
    """See :func:`plain.expert_weights`; over the layouts of the gates."""
    r1, r2 = _Weights.apply(g1.values, g1.layout, g2.values, g2.layout, _factors(mask, g1.values))
    return CompactGates(r1.unsqueeze(1), g1.layout), CompactGates(r2.unsqueeze(1), g2.layout)


def expert_bias(g: CompactGates, b: Tensor) -> Tensor:
    """See :func:`plain.expert_bias`."""
    return _Bias.apply(_values(g, b), g.layout, b)


def _values(gates: CompactGates, like: Tensor) -> Tensor:
    """Gates in the precision in which the kernels sum over values like ``like``."""
    return gates.values.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def _factors(mask: Tensor | None, values: Tensor) -> Tensor | None:
    """A mask beside gates: a constant, in their precision."""
    return None if mask is None else mask.detach().to(values.dtype)


class _Vertical(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v1: Tensor, layout1: Layout, v2: Tensor, layout2: Layout, mask: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        first, second = layout1.tensors(), layout2.tensors()
        ctx.experts = layout1.experts
        out, s1, s2 = torch.ops.monet.vertical_experts(x, v1, first, v2, second, ctx.experts, mask, weights)
        ctx.save_for_backward(x, v1, v2, mask, s1, s2, *first, *second, *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, v1, v2, mask, s1, s2, *rest = ctx.saved_tensors
        first, second, weights = _split(rest)
        dx, dv1, dv2, *dweights = torch.ops.monet.vertical_experts_backward(
            dout, x, v1, first, v2, second, ctx.experts, mask, weights, s1, s2
        )
        return dx, dv1, None, dv2, None, None, *dweights


class _Horizontal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v1: Tensor, layout1: Layout, v2: Tensor, layout2: Layout, mask: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        first, second = layout1.tensors(), layout2.tensors()
        ctx.experts = layout1.experts
        out, s1 = torch.ops.monet.horizontal_experts(x, v1, first, v2, second, ctx.experts, mask, weights)
        ctx.save_for_backward(x, v1, v2, mask, s1, *first, *second, *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, v1, v2, mask, s1, *rest = ctx.saved_tensors
        first, second, weights = _split(rest)
        dx, dv1, dv2, *dweights = torch.ops.monet.horizontal_experts_backward(
            dout, x, v1, first, v2, second, ctx.experts, mask, weights, s1
        )
        return dx, dv1, None, dv2, None, None, *dweights


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, v1: Tensor, layout1: Layout, v2: Tensor, layout2: Layout, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        first, second = layout1.tensors(), layout2.tensors()
        ctx.experts = layout1.experts
        ctx.save_for_backward(v1, v2, mask, *first, *second)
        return torch.ops.monet.masked_totals(v1, first, v2, second, ctx.experts, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dr1: Tensor, dr2: Tensor) -> tuple[Tensor | None, ...]:
        v1, v2, mask, *rest = ctx.saved_tensors
        first, second, _ = _split(rest)
        dv1, dv2 = torch.ops.monet.masked_totals_backward(v1, first, v2, second, ctx.experts, mask, dr1, dr2)
        return dv1, None, dv2, None, None


class _Bias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, layout: Layout, b: Tensor) -> Tensor:
        ctx.save_for_backward(values, b, *layout.tensors())
        return torch.ops.monet.expert_bias(values, layout.tensors(), b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, Tensor]:
        values, b, *layout = ctx.saved_tensors
        dvalues, db = torch.ops.monet.expert_bias_backward(dout, values, layout, b)
        return dvalues, None, db


def _split(saved: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Two layouts and the weights that follow them."""
    return saved[:LAYOUT_TENSORS], saved[LAYOUT_TENSORS : 2 * LAYOUT_TENSORS], saved[2 * LAYOUT_TENSORS :]
