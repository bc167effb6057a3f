"""Monet's expert layers: E x E experts composed from two sets of E half-experts (paper section 3.3).

Expert (i, j) is a two-layer perceptron whose halves are half-expert i of the first set and j of the second. The
output of a layer is Σ_h Σ_ij M_hij g1_hi g2_hj E_ij(x), M = 1 unless experts are masked. It is rearranged so that no
tensor has E x E entries a token: the rearranged sums are the functions of :mod:`monet_train.kernels.plain`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from monet_train import kernels
from monet_train.kernels import Gates
from monet_train.model.config import MonetConfig
from monet_train.parallel.collectives import Collectives


@dataclass(frozen=True)
class Routing:
    """What the layers of a routing group share: which experts take part for each token, and with which weight."""

    g1: Gates  # gates where they meet the inner dimension
    g2: Gates
    mask: Tensor | None  # factors M of the experts, [1 or H, E, E]
    r1: Gates  # weights of the output biases, r1_i = Σ_hj M_hij g1_hi g2_hj
    r2: Gates


class Experts(nn.Module):
    """What both decompositions share: where tokens enter and leave the inner dimension m.

    Gates mix over half-experts at a fixed inner unit, so a slice of m gives an exact partial sum. Each tensor-parallel
    rank has a slice; ``leave`` adds the partial sums. The output bias does not pass through m and is added once,
    outside.
    """

    def __init__(self, collectives: Collectives) -> None:
        super().__init__()
        self.enter, self.leave = collectives.enter, collectives.leave

    def routing(self, g1: Gates, g2: Gates, mask: Tensor | None) -> Routing:
        """Gates and mask as the layers of a routing group take them. Made once: the group's layers enter alike."""
        r1, r2 = kernels.expert_weights(g1, g2, mask)
        return Routing(g1.map(self.enter), g2.map(self.enter), mask, r1, r2)

    def store_for_decoding(self) -> None:
        """Lay the output weights out by half-expert: same shapes and values, much faster for a token at a time."""
        for name, projection in self.named_children():
            if name.startswith("v"):
                assert isinstance(projection, nn.Linear)
                projection.weight.data = kernels.store_by_columns(projection.weight.data)


class VerticalExperts(Experts):
    """Vertical decomposition: a half-expert owns half of an expert's inner units and half of its output.

    E_ij(x) = [v11_i a_i + v12_i c_j + b1_i,  v21_j a_i + v22_j c_j + b2_j],  a_i = relu²(u1_i x), c_j = relu²(u2_j x).
    """

    def __init__(self, config: MonetConfig, collectives: Collectives) -> None:
        super().__init__(collectives)
        d, inner = config.hidden_size, config.moe_experts * collectives.share(config.moe_dim // 2)
        self.u1 = nn.Linear(d, inner)
        self.u2 = nn.Linear(d, inner)
        self.v11 = nn.Linear(inner, d // 2, bias=False)
        self.v12 = nn.Linear(inner, d // 2, bias=False)
        self.v21 = nn.Linear(inner, d // 2, bias=False)
        self.v22 = nn.Linear(inner, d // 2, bias=False)
        self.b1 = nn.Parameter(torch.zeros(config.moe_experts, d // 2))
        self.b2 = nn.Parameter(torch.zeros(config.moe_experts, d // 2))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """[T, d] -> [T, d]."""
        mixed = kernels.vertical_experts(
            self.enter(x), routing.g1, routing.g2, routing.mask,
            self.u1.weight, self.u1.bias, self.u2.weight, self.u2.bias,
            self.v11.weight, self.v12.weight, self.v21.weight, self.v22.weight,
        )  # fmt: skip
        bias = torch.cat([kernels.expert_bias(routing.r1, self.b1), kernels.expert_bias(routing.r2, self.b2)], -1)
        return self.leave(mixed) + bias


class HorizontalExperts(Experts):
    """Horizontal decomposition: the first set holds the input layers, the second the output layers.

    E_ij(x) = v_j a_i + b_j,  a_i = relu²(u_i x).
    """

    def __init__(self, config: MonetConfig, collectives: Collectives) -> None:
        super().__init__(collectives)
        d, inner = config.hidden_size, config.moe_experts * collectives.share(config.moe_dim)
        self.u = nn.Linear(d, inner)
        self.v = nn.Linear(inner, d, bias=False)
        self.b = nn.Parameter(torch.zeros(config.moe_experts, d))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """[T, d] -> [T, d]."""
        mixed = kernels.horizontal_experts(
            self.enter(x), routing.g1, routing.g2, routing.mask, self.u.weight, self.u.bias, self.v.weight
        )
        return self.leave(mixed) + kernels.expert_bias(routing.r2, self.b)


EXPERTS: dict[str, type[VerticalExperts] | type[HorizontalExperts]] = {
    "vertical": VerticalExperts,
    "horizontal": HorizontalExperts,
}
