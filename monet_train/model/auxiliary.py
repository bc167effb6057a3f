"""The auxiliary losses that spread tokens over the experts (uniformity) and sharpen each choice (ambiguity).

Paper section 3.4, "Load Balancing Loss". Both read the gates of a whole micro-step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from monet_train.kernels import Gates

# A half-expert that no token of the micro-step uses has a mean gate of 0, whose logarithm is infinite. The floor
# bounds its share of the loss at -log(1e-8) = 18.4; it gets no gradient either way, as inactive logits have none.
# The smallest mean gate above 0 is about 1e-2 (a weak gate) over 2**20 (tokens), so used half-experts are above it.
MEAN_GATE_FLOOR = 1e-8


@dataclass(frozen=True)
class GateSums:
    """Sums over the tokens of this process, as a routing group returns them (all tensors, for recomputation)."""

    total1: Tensor  # [H, E], differentiable
    total2: Tensor
    largest1: Tensor  # [H], differentiable
    largest2: Tensor
    active: Tensor  # [2], active (token, half-expert) pairs of each side

    @classmethod
    def from_gates(cls, g1: Gates, g2: Gates) -> GateSums:
        """Sum both sides of a router."""
        active = torch.stack([g1.active(), g2.active()])
        return cls(g1.total(), g2.total(), g1.largest_total(), g2.largest_total(), active)


@dataclass(frozen=True)
class RouterMetrics:
    """What one router did in one micro-step, over all ranks that share it."""

    uniformity: Tensor  # scalar, differentiable
    ambiguity: Tensor  # scalar, differentiable
    mean_gates: Tensor  # [2, H, E], detached
    active: Tensor  # [2], active half-experts per token, detached


def router_metrics(sums: GateSums, tokens: int, sum_over_batch: Callable[[Tensor], Tensor]) -> RouterMetrics:
    """Auxiliary losses and statistics of a router.

    Args:
        sums: of the ``tokens`` tokens of this process.
        sum_over_batch: adds a tensor over the processes that share the micro-step.

    The values are those of the whole micro-step; the gradient is that of this process' tokens, scaled so that
    averaging the gradients over the processes (as data parallelism does) gives the gradient of the whole.
    """
    heads, experts = sums.total1.shape
    local = torch.stack([sums.total1, sums.total2]) / tokens
    local_largest = torch.stack([sums.largest1, sums.largest2]) / tokens
    with torch.no_grad():
        shared = sum_over_batch(
            torch.cat([local.flatten(), local_largest.flatten(), sums.active / tokens, local.new_ones(1)])
        )
        shared = shared[:-1] / shared[-1]
        everyone, everyones_largest, active = shared.split([local.numel(), local_largest.numel(), 2])
    mean = local + (everyone.view_as(local) - local).detach()
    mean_largest = local_largest + (everyones_largest.view_as(local_largest) - local_largest).detach()
    return RouterMetrics(
        uniformity=-mean.clamp_min(MEAN_GATE_FLOOR).log().sum() / (2 * heads * experts),
        ambiguity=(1 - mean_largest).sum() / (2 * heads),
        mean_gates=mean.detach(),
        active=active,
    )
