"""Statistics of the routing logits, which set the thresholds of a router (paper section 3.4).

The file imports nothing but torch, so that an exported Hugging Face folder carries it unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

NORM_EPS = 1e-5
NORM_MOMENTUM = 0.1


class FullPrecision(nn.Module):
    """Buffers that stay in fp32 (or fp64) when the model is cast to a lower precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

        return super()._apply(keep_precision, recurse)


class LogitStatistics(FullPrecision):
    """Mean and variance of the routing logits of each head, over all tokens and half-experts.

    The buffers and their update are those of ``BatchNorm1d(H, affine=False, eps=1e-5, momentum=0.1)``.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.empty(heads))
        self.register_buffer("running_var", torch.empty(heads))
        self.register_buffer("num_batches_tracked", torch.empty((), dtype=torch.long))
        self.reset()

    def reset(self) -> None:
        """Forget every batch seen."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    @torch.no_grad()
    def follow(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Move the running statistics towards those of a batch.

        Args:
            mean, var: of the logits of each head, [H]; ``var`` is the biased one.
            count: logits of the batch behind each value.
        """
        unbiased = var * count / (count - 1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), NORM_MOMENTUM)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), NORM_MOMENTUM)
        self.num_batches_tracked += 1


@dataclass
class BatchStatistics:
    """Statistics of one batch: fp64 means and biased variances [2 sides, H], and the number of logits behind each."""

    mean: Tensor
    var: Tensor
    count: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor, count: Tensor) -> BatchStatistics:
        """From the sums and sums of squares, [2 sides, 2, H], of ``count`` logits per head."""
        mean, square = (moments / count).unbind(1)
        return cls(mean, (square - mean.square()).clamp_min(0), count)
