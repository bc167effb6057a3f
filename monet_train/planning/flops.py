"""Floating-point work of a Monet, for the utilisation figures.

A multiply-add counts 2. A backward pass counts twice its forward pass: a product for each of two gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from monet_train.model.config import MonetConfig
from monet_train.model.experts import ExpertFlops, decomposition


@dataclass(frozen=True)
class ForwardFlops:
    """Dense forward FLOPs of one token, by part; all but the last two are those of one layer.

    Dense is the architecture's work, whatever a sparse kernel skips; attention is counted full, not causal.
    """

    projections: float  # of attention
    attention: float
    experts: ExpertFlops
    router: float
    head: float

    @classmethod
    def per_token(cls, config: MonetConfig, seq_length: int) -> ForwardFlops:
        """The parts for sequences of ``seq_length`` tokens."""
        d = config.hidden_size
        return cls(
            projections=2 * d * (2 * d + 2 * config.kv_heads * config.head_dim),
            attention=4 * seq_length * d,
            experts=decomposition(config.moe_decompose).flops(config),
            router=2 * d * 2 * config.moe_heads * config.moe_experts,
            head=2 * d * config.vocab_size,
        )

    @property
    def layer(self) -> float:
        """One layer, without its router."""
        parts = (self.experts.up, self.experts.mixing, self.experts.down, self.experts.bias)
        return self.projections + self.attention + sum(map(sum, parts))


def forward_flops_per_token(config: MonetConfig, seq_length: int) -> float:
    """Dense forward FLOPs of one token: see :class:`ForwardFlops`.

    Within 0.5% of the paper's Table 8 for the 1.4B (6745.30 TFLOP for 2^21 tokens; 8017.81 with a router in every
    layer).
    """
    flops = ForwardFlops.per_token(config, seq_length)
    return config.num_hidden_layers * flops.layer + len(config.router_layers) * flops.router + flops.head


def training_flops_per_token(config: MonetConfig, seq_length: int) -> float:
    """Forward and backward: three times the forward work, recomputation not counted."""
    return 3 * forward_flops_per_token(config, seq_length)


@dataclass(frozen=True)
class WorkDone:
    """What a run leaves out of the dense work of a training step, and what it does more than once."""

    rows_skipped: bool  # up, down and output bias of active half-experts only (native kernels, CPU)
    mixing_skipped: bool  # mixing of active half-experts only (native kernels)
    causal: bool  # attention kernels skip what is masked (no resets at document borders)
    recompute: bool  # layers run forward once more
    copies: int  # tensor-parallel ranks: each does routers and output biases whole

    def flops_per_token(self, config: MonetConfig, seq_length: int, active: Sequence[Sequence[float]]) -> float:
        """FLOPs that a training step does for one token.

        Args:
            active: for every router, the half-experts of each side that a token uses in at least one head.
        """
        dense = ForwardFlops.per_token(config, seq_length)
        passes = 4 if self.recompute else 3
        total = 3 * dense.head
        for layer in range(config.num_hidden_layers):
            shares = [side / config.moe_experts for side in active[layer // config.moe_groups]]
            rows = shares if self.rows_skipped else [1.0, 1.0]
            mixed = shares if self.mixing_skipped else [1.0, 1.0]
            total += passes * (
                dense.projections
                + dense.attention / (2 if self.causal else 1)
                + _of_sides(dense.experts.up, rows)
                + _of_sides(dense.experts.mixing, mixed)
                + _of_sides(dense.experts.down, rows)
                + self.copies * _of_sides(dense.experts.bias, rows)
            )
            if config.has_router(layer):
                # Where rows are skipped, only active logits have a gradient: about one for each active half-expert.
                share = sum(shares) / 2 / config.moe_heads if self.rows_skipped else 1
                total += self.copies * dense.router * (passes - 2 + 2 * share)
        return total


def _of_sides(flops: tuple[float, float], shares: Sequence[float]) -> float:
    """The work on both sides, of which only these shares are done."""
    return flops[0] * shares[0] + flops[1] * shares[1]
