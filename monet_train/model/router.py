"""The router: which half-experts are active for a token, and how strongly (paper section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from monet_train.kernels import Gates, Kernels
from monet_train.kernels.plain import activation_threshold
from monet_train.model.config import MonetConfig
from monet_train.model.mask import ExpertMask
from monet_train.model.statistics import NORM_EPS, BatchStatistics, LogitStatistics
from monet_train.parallel.collectives import Collectives


class LogitProjection(nn.Linear):
    """w_s: routing logits [T, H, E], fp32 at least, of tokens [T, d]. Its backward pass visits active logits only."""

    def __init__(self, config: MonetConfig, kernels: Kernels) -> None:
        super().__init__(config.hidden_size, config.moe_heads * config.moe_experts, bias=False)
        self.heads = config.moe_heads
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.router_logits(x, self.weight, self.heads)


class Router(nn.Module):
    """Gates of both half-expert sets for each token.

    z_s = w_s(x); half-expert i of head h is active when z_hi reaches min(max_i z_hi, threshold_h), the threshold
    being the 1 - k/E quantile of a normal distribution with the head's statistics; g_s = softmax over the active.
    """

    def __init__(self, config: MonetConfig, collectives: Collectives, kernels: Kernels) -> None:
        super().__init__()
        self.heads, self.experts, self.topk = config.moe_heads, config.moe_experts, config.moe_topk
        self.collectives, self.kernels = collectives, kernels
        self.w1 = LogitProjection(config, kernels)
        self.w2 = LogitProjection(config, kernels)
        self.norm1 = LogitStatistics(self.heads)
        self.norm2 = LogitStatistics(self.heads)
        self.mask = ExpertMask(self.heads, self.experts, config.moe_groups)

    def route(
        self, x: Tensor, statistics: BatchStatistics | None = None
    ) -> tuple[Gates, Gates, BatchStatistics | None]:
        """Route tokens.

        Not ``forward``: gates are not plain tensors, and module hooks (ZeRO-3's) only see those. The module has no
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
        return self.kernels.route(z1, threshold[0]), self.kernels.route(z2, threshold[1]), statistics

    def update_statistics(self, batch: BatchStatistics) -> None:
        """Take a batch into the running statistics: once per micro-step, however often its gates are recomputed."""
        self.norm1.follow(batch.mean[0], batch.var[0], batch.count)
        self.norm2.follow(batch.mean[1], batch.var[1], batch.count)

    @torch.no_grad()
    def _batch_statistics(self, z1: Tensor, z2: Tensor) -> BatchStatistics:
        count = z1.new_full((1,), z1.shape[0] * self.experts, dtype=torch.float64)
        moments = (self.kernels.head_moments(z) for z in (z1, z2))
        local = torch.cat([*map(torch.flatten, moments), count])
        total = self.collectives.sum_over_batch(local)
        return BatchStatistics.from_moments(total[:-1].view(2, 2, self.heads), count=total[-1])

    def extra_repr(self) -> str:
        return f"heads={self.heads}, experts={self.experts}, topk={self.topk}"
