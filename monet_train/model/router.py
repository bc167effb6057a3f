"""The router: which half-experts are active for a token, and how strongly (paper section 3.4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from monet_train import kernels
from monet_train.errors import UserError
from monet_train.kernels import Gates
from monet_train.kernels.plain import activation_threshold
from monet_train.model.config import MonetConfig

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
    def update(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Move the running statistics towards those of a batch of ``count`` logits a head (var is biased)."""
        unbiased = var * count / (count - 1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), NORM_MOMENTUM)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), NORM_MOMENTUM)
        self.num_batches_tracked += 1


class ExpertMask(FullPrecision):
    """Factors M of the experts of a routing group, [1 or H, E, E]; None where every expert is as it is.

    No part of the state dict.
    """

    factors: Tensor | None

    def __init__(self, heads: int, experts: int) -> None:
        super().__init__()
        self.shape = (heads, experts, experts)
        self.register_buffer("factors", None, persistent=False)

    def set(self, mask: Tensor, like: Tensor) -> None:
        """Take a mask that broadcasts to [H, E, E], to the device of ``like``; fp64 where that is fp64, else fp32."""
        if not isinstance(mask, Tensor) or mask.is_complex():
            raise UserError(f"mask must be a tensor of bool (False = off) or real factors, not {_kind(mask)}")
        try:
            mask.expand(self.shape)
        except RuntimeError:
            given, wanted = list(mask.shape), list(self.shape)
            raise UserError(f"mask of shape {given} does not broadcast to [H, E, E] = {wanted}") from None
        factors = mask.detach().to(like.device, torch.float64 if like.dtype == torch.float64 else torch.float32)
        if not factors.isfinite().all():
            raise UserError("mask has values that are not finite; use 0 for an expert that is off")
        heads = len(mask) if mask.dim() == 3 else 1  # heads are kept apart only where they may differ
        self.factors = factors.expand(heads, *self.shape[1:]).clone(memory_format=torch.contiguous_format)

    def clear(self) -> None:
        """Every expert as it is."""
        self.factors = None


def _kind(value: object) -> str:
    return f"{value.dtype} values" if isinstance(value, Tensor) else type(value).__name__


@dataclass
class BatchStatistics:
    """Statistics of one batch: fp64 means and variances [2 sides, H], and the number of logits behind each."""

    mean: Tensor
    var: Tensor
    count: Tensor


class LogitProjection(nn.Linear):
    """w_s: routing logits [T, H, E], fp32 at least, of tokens [T, d]. Its backward pass visits active logits only."""

    def __init__(self, config: MonetConfig) -> None:
        super().__init__(config.hidden_size, config.moe_heads * config.moe_experts, bias=False)
        self.heads = config.moe_heads
        self.implementation = "auto"  # of the kernels

    def forward(self, x: Tensor) -> Tensor:
        return kernels.router_logits(x, self.weight, self.heads, self.implementation)


class Router(nn.Module):
    """Gates of both half-expert sets for each token.

    z_s = w_s(x); half-expert i of head h is active when z_hi reaches min(max_i z_hi, threshold_h), the threshold
    being the 1 - k/E quantile of a normal distribution with the head's statistics; g_s = softmax over the active.
    """

    def __init__(self, config: MonetConfig) -> None:
        super().__init__()
        self.heads, self.experts, self.topk = config.moe_heads, config.moe_experts, config.moe_topk
        self.w1 = LogitProjection(config)
        self.w2 = LogitProjection(config)
        self.norm1 = LogitStatistics(self.heads)
        self.norm2 = LogitStatistics(self.heads)
        self.mask = ExpertMask(self.heads, self.experts)
        # Sums a tensor over the ranks that share a micro-step; the identity in one process. Training replaces it.
        self.sum_over_batch: Callable[[Tensor], Tensor] = lambda tensor: tensor

    @property
    def implementation(self) -> str:
        """Of the kernels: ``auto``, ``native`` or ``plain`` (see :func:`monet_train.kernels.is_native`)."""
        return self.w1.implementation

    @implementation.setter
    def implementation(self, value: str) -> None:
        self.w1.implementation = self.w2.implementation = value

    def route(
        self, x: Tensor, statistics: BatchStatistics | None = None
    ) -> tuple[Gates, Gates, BatchStatistics | None]:
        """Route tokens.

        Not ``forward``: gates are no plain tensors, and module hooks (ZeRO-3's) only see those. The module has no
        parameters of its own; its projections are called as modules.

        Args:
            x: [T, d].
            statistics: of this batch, when they are known already (recomputation).

        Returns:
            gates of side 1 and 2, and in training the batch statistics, for :meth:`update_statistics`.
        """
        z1, z2 = self.w1(x), self.w2(x)
        if self.training:
            statistics = statistics or self._batch_statistics(z1, z2)
            mean, var = statistics.mean.to(z1.dtype), statistics.var.to(z1.dtype)
        else:
            mean = torch.stack([self.norm1.running_mean, self.norm2.running_mean])
            var = torch.stack([self.norm1.running_var, self.norm2.running_var])
        threshold = activation_threshold(mean, var, self.topk, self.experts, NORM_EPS)
        g1 = kernels.route(z1, threshold[0], self.implementation)
        g2 = kernels.route(z2, threshold[1], self.implementation)
        return g1, g2, statistics

    def update_statistics(self, batch: BatchStatistics) -> None:
        """Take a batch into the running statistics: once a micro-step, however often its gates are recomputed."""
        self.norm1.update(batch.mean[0], batch.var[0], batch.count)
        self.norm2.update(batch.mean[1], batch.var[1], batch.count)

    @torch.no_grad()
    def _batch_statistics(self, z1: Tensor, z2: Tensor) -> BatchStatistics:
        count = z1.new_full((1,), z1.shape[0] * self.experts, dtype=torch.float64)
        moments = (kernels.head_moments(z, self.implementation) for z in (z1, z2))
        local = torch.cat([*map(torch.flatten, moments), count])
        total = self.sum_over_batch(local)
        count = total[-1]
        first, second = (total[:-1] / count).view(2, 2, self.heads).unbind(1)
        return BatchStatistics(mean=first, var=(second - first.square()).clamp_min(0), count=count)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, experts={self.experts}, topk={self.topk}"
