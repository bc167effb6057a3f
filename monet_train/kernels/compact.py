"""Compact gates: only the (token, half-expert) pairs that are active in at least one head are held.

At E = 512, k = 8, H = 6 these are 9% of all pairs. The native kernels make and read these. Their operations know
their own gradients (``csrc/bindings/autograd.cpp``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from monet_train.kernels.gates import ActivePairs


@dataclass(frozen=True)
class Layout:
    """Which pairs are active, and their order: (block of tokens, half-expert, token). See ``csrc/pairs.h``.

    The same logits give the same layout on every rank and machine.
    """

    token: Tensor  # int32 [pairs]: token of a pair
    group_start: Tensor  # int32 [blocks * E + 1]: first pair of (block, half-expert)
    row_start: Tensor  # int32 [T + 1]: first entry of a token in row_pair
    row_pair: Tensor  # int32 [pairs]: pairs of a token, by ascending half-expert
    experts: int

    def half_expert(self) -> Tensor:
        """Half-expert of each pair, int64 [pairs]."""
        experts = torch.arange(self.experts, device=self.token.device)
        blocks = (len(self.group_start) - 1) // self.experts
        return experts.repeat(blocks).repeat_interleave(self.group_start.diff(), output_size=len(self.token))

    def tensors(self) -> list[Tensor]:
        """The index tensors, in the order that the native operations expect."""
        return [self.token, self.group_start, self.row_start, self.row_pair]


@dataclass(frozen=True)
class CompactGates:
    """Gates of one router side as [pairs, H] values over a :class:`Layout`; 0 where a head leaves a pair out.

    The gradient with respect to a gate that is 0 is never used (the softmax multiplies it by the gate): whether the
    expert operations leave it 0 is theirs to choose.
    """

    values: Tensor
    layout: Layout

    def dense(self) -> Tensor:
        return torch.ops.monet.dense_gates(self.values, self.layout.tensors(), self.layout.experts)

    def active_pairs(self) -> ActivePairs:
        return ActivePairs(self.layout.token.long(), self.layout.half_expert(), self.values)

    def total(self) -> Tensor:
        return torch.ops.monet.sum_over_tokens(self.values, self.layout.tensors(), self.layout.experts)

    def largest_total(self) -> Tensor:
        return torch.ops.monet.sum_of_largest(self.values, self.layout.tensors(), self.layout.experts)

    def active(self) -> Tensor:
        return (self.values != 0).any(1).sum()

    def map(self, function: Callable[[Tensor], Tensor]) -> CompactGates:
        return CompactGates(function(self.values), self.layout)


def router_logits(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """Logits [T, H, E]; the native counterpart of :func:`plain.router_logits`.

    Its backward pass on the CPU multiplies by the entries of the gradient that are not 0: under 2% where the logits
    went straight into :func:`route`.
    """
    return torch.ops.monet.router_logits(x, weight, heads)


def route(z: Tensor, threshold: Tensor) -> CompactGates:
    """Compact gates from logits [T, H, E] and thresholds [H]; the native counterpart of :func:`plain.gates`."""
    values, token, group_start, row_start, row_pair = torch.ops.monet.route(z, threshold.to(z.dtype))
    return CompactGates(values, Layout(token, group_start, row_start, row_pair, experts=z.shape[-1]))
