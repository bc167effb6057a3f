"""The plain PyTorch definition of Monet's routing and expert layers: the specification.

Every fast path in ``csrc/`` is held against these functions. The file imports nothing but torch, so that an
exported Hugging Face folder carries it unchanged. What needs no weights is in functions of its own
(:func:`gates`, :func:`vertical_inputs`, :func:`horizontal_input`, :func:`expert_bias`): they serve a model that calls
its projections as modules as well as the functions below that take the weights.

Shapes: T tokens, d model width, H routing heads, E half-experts per side, m inner units of an expert.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def router_logits(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """Logits [T, H, E] of one router side, in fp32 at least, from tokens [T, d] and its weight [H*E, d]."""
    return split_heads(F.linear(x, weight), heads)


def split_heads(z: Tensor, heads: int) -> Tensor:
    """Routing logits [T, H*E] by head: [T, H, E], in fp32 at least, as published.

    Thresholds and softmax do not tolerate bf16.
    """
    z = z.unflatten(-1, (heads, -1))
    return z if z.dtype == torch.float64 else z.float()


def head_moments(z: Tensor) -> Tensor:
    """Sums that the batch normalisation of a router needs.

    Args:
        z: routing logits [T, H, E].

    Returns:
        fp64 [2, H]: the sum and the sum of squares over the T*E logits of each head. They add up over ranks.
    """
    wide = z.detach().double()
    return torch.stack([wide.sum((0, 2)), wide.square().sum((0, 2))])


def activation_threshold(mean: Tensor, var: Tensor, k: int, experts: int, eps: float) -> Tensor:
    """The logit above which a half-expert is active, one per head.

    The paper asks for ẑ >= tau with ẑ = (z - mean) / sqrt(var + eps) and tau = Phi^-1(1 - k/E): of E normally
    distributed logits about k pass (section 3.4, adaptive threshold instead of top-k). Undoing the normalisation
    gives the same condition on z itself: z >= mean + tau * sqrt(var + eps).

    Args:
        mean, var: statistics of each head, [H].

    Returns:
        thresholds [H], in the dtype of ``mean``.
    """
    tau = math.sqrt(2.0) * torch.erfinv(torch.tensor(1.0 - 2.0 * k / experts, dtype=torch.float64))
    return mean + tau * torch.sqrt(var + eps)  # tau stays a tensor: its value would end the graph of a compiler


def gates(z: Tensor, threshold: Tensor) -> Tensor:
    """Softmax over the active half-experts; exactly 0 elsewhere.

    Half-expert i is active in head h when z_hi >= min(max_i z_hi, threshold_h): never fewer than one is.
    Gradients pass only through z in the softmax.

    Args:
        z: routing logits [T, H, E] in fp32 (or fp64).
        threshold: [H], from :func:`activation_threshold`.

    Returns:
        gates [T, H, E], each row summing to 1. A logit of NaN or +inf, or a threshold of NaN, makes its
        rows NaN.
    """
    with torch.no_grad():
        largest = z.amax(-1, keepdim=True)
        active = z >= torch.minimum(largest, threshold.to(z.dtype)[:, None])
    return torch.softmax(z.masked_fill(~active, -math.inf), -1)


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2, the activation of the published models."""
    return F.relu(x).square()


def expert_factors(mask: Tensor, heads: int, experts: int, dtype: torch.dtype) -> Tensor:
    """A copy of a mask in the form that the functions below take, [1 or H, E, E].

    Args:
        mask: bool (False = off) or real factors of the experts; whatever broadcasts to [H, E, E].
        dtype: of the factors.

    Raises:
        ValueError: the mask is not such a tensor, or has values that are not finite.
    """
    if not isinstance(mask, Tensor) or mask.is_complex():
        kind = f"{mask.dtype} values" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must be a tensor of bool (False = off) or real factors, not {kind}")
    shape = (heads, experts, experts)
    try:
        mask.expand(shape)
    except RuntimeError:
        raise ValueError(f"mask of shape {list(mask.shape)} does not broadcast to [H, E, E] = {list(shape)}") from None
    factors = mask.detach().to(dtype)
    if not factors.isfinite().all():
        raise ValueError("mask has values that are not finite; use 0 for an expert that is off")
    kept = len(mask) if mask.dim() == 3 else 1  # heads are kept apart only where they may differ
    return factors.expand(kept, experts, experts).clone(memory_format=torch.contiguous_format)


def expert_weights(g1: Tensor, g2: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a mask leaves of each half-expert: r1_i = Σ_hj M_hij g1_hi g2_hj, r2_j = Σ_hi M_hij g1_hi g2_hj.

    Args:
        g1, g2: gates [T, H, E]. mask: factors M of the experts, [1 or H, E, E], or None.

    Returns:
        r1, r2 as gates of one head, [T, 1, E]. Without a mask the gates themselves, which sum over their heads to
        the same: those of the other side sum to 1.
    """
    if mask is None:
        return g1, g2
    mask = mask.to(g1.dtype)
    r1 = (g1 * torch.einsum("hij,thj->thi", mask, g2)).sum(1, keepdim=True)
    r2 = (g2 * torch.einsum("hij,thi->thj", mask, g1)).sum(1, keepdim=True)
    return r1, r2


def mix(g: Tensor, g_other: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Σ_h g_hi Σ_j M_hij g_other_hj values_j, [T, E, m].

    Args:
        g, g_other: gates [T, H, E]. values: [T, E, m], by half-expert of the other side. mask: [1 or H, E, E] or None.
    """
    if mask is None:
        return torch.einsum("thi,thm->tim", g, torch.einsum("thj,tjm->thm", g_other, values))
    mixed = torch.zeros_like(values)
    for h, factors in enumerate(mask.to(values.dtype).expand(g.shape[1], -1, -1)):
        left = torch.einsum("ij,tjm->tim", factors, g_other[:, h, :, None] * values)
        mixed = mixed + g[:, h, :, None] * left
    return mixed


def vertical_inputs(
    h1: Tensor, h2: Tensor, g1: Tensor, g2: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the output projections v11, v12, v21 and v22 of the vertical decomposition read.

    a = relu²(h1), c = relu²(h2), both [T, E, m/2]; the inputs are, in this order,
    a_i Σ_h g1_hi;  Σ_h g1_hi Σ_j g2_hj c_j;  Σ_h g2_hj Σ_i g1_hi a_i;  c_j Σ_h g2_hj

    A mask multiplies every g1_hi g2_hj by M_hij; without one Σ_j g2_hj = Σ_i g1_hi = 1 has been used.

    Args:
        h1, h2: u1(x) and u2(x), [T, E*m/2]. g1, g2: gates [T, H, E]. mask: factors M of the experts,
            [1 or H, E, E], or None.

    Returns:
        four tensors [T, E*m/2].
    """
    experts = g1.shape[-1]
    g1, g2 = g1.to(h1.dtype), g2.to(h1.dtype)
    a = relu_squared(h1).unflatten(-1, (experts, -1))
    c = relu_squared(h2).unflatten(-1, (experts, -1))
    transposed = None if mask is None else mask.mT
    r1, r2 = expert_weights(g1, g2, mask)
    return (
        (a * r1.sum(1).unsqueeze(-1)).flatten(1),
        mix(g1, g2, c, mask).flatten(1),
        mix(g2, g1, a, transposed).flatten(1),
        (c * r2.sum(1).unsqueeze(-1)).flatten(1),
    )


def vertical_experts(
    x: Tensor, g1: Tensor, g2: Tensor, mask: Tensor | None,
    u1: Tensor, u1_bias: Tensor, u2: Tensor, u2_bias: Tensor,
    v11: Tensor, v12: Tensor, v21: Tensor, v22: Tensor,
) -> Tensor:  # fmt: skip
    """Vertical decomposition without the output bias (paper section 3.3, product key composition of V).

    left = v11[...] + v12[...], right = v21[...] + v22[...] of :func:`vertical_inputs`.

    Args:
        x: [T, d]. g1, g2: gates [T, H, E]. mask: factors M of the experts, [1 or H, E, E], or None.
        u1, u2: [E*m/2, d] with biases [E*m/2]. v11, v12, v21, v22: [d/2, E*m/2].

    Returns:
        [left, right], [T, d]. With weights that hold a slice of m, the partial sums of that slice.
    """
    to11, to12, to21, to22 = vertical_inputs(F.linear(x, u1, u1_bias), F.linear(x, u2, u2_bias), g1, g2, mask)
    left = F.linear(to11, v11) + F.linear(to12, v12)
    right = F.linear(to21, v21) + F.linear(to22, v22)
    return torch.cat([left, right], -1)


def horizontal_input(h: Tensor, g1: Tensor, g2: Tensor, mask: Tensor | None) -> Tensor:
    """What the output projection v of the horizontal decomposition reads: y_j = Σ_h g2_hj Σ_i g1_hi a_i.

    a = relu²(h), [T, E, m]. A mask multiplies every g1_hi g2_hj by M_hij.

    Args:
        h: u(x), [T, E*m]. g1, g2: gates [T, H, E]. mask: factors M of the experts, [1 or H, E, E], or None.

    Returns:
        [T, E*m].
    """
    g1, g2 = g1.to(h.dtype), g2.to(h.dtype)
    a = relu_squared(h).unflatten(-1, (g1.shape[-1], -1))
    transposed = None if mask is None else mask.mT
    return mix(g2, g1, a, transposed).flatten(1)


def horizontal_experts(
    x: Tensor, g1: Tensor, g2: Tensor, mask: Tensor | None, u: Tensor, u_bias: Tensor, v: Tensor
) -> Tensor:
    """Horizontal decomposition without the output bias (paper section 3.3): v[y], y of :func:`horizontal_input`.

    Args:
        x: [T, d]. g1, g2: gates [T, H, E]. mask: factors M of the experts, [1 or H, E, E], or None.
        u: [E*m, d] with bias [E*m]. v: [d, E*m].

    Returns:
        [T, d]. With weights that hold a slice of m, the partial sums of that slice.
    """
    return F.linear(horizontal_input(F.linear(x, u, u_bias), g1, g2, mask), v)


def expert_bias(g: Tensor, b: Tensor) -> Tensor:
    """Output bias of one side: Σ_h Σ_i g_hi b_i.

    Args:
        g: gates [T, H, E], or what a mask leaves of them (:func:`expert_weights`). b: [E, width].

    Returns:
        [T, width] in the dtype of ``b``.
    """
    return g.sum(1).to(b.dtype) @ b
