"""The auxiliary losses against their definition."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from monet_train.kernels import DenseGates
from monet_train.model.auxiliary import MEAN_GATE_FLOOR, GateSums, router_metrics
from monet_train.model.config import MonetConfig
from monet_train.model.transformer import MonetForCausalLM
from tests.model.conftest import tokens

TOKENS, HEADS, EXPERTS = 10, 3, 8


def gates(seed: int, unused: int = 0) -> Tensor:
    """Random gates [T, H, E] in fp64; no token uses the first ``unused`` half-experts."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(TOKENS, HEADS, EXPERTS, generator=generator, dtype=torch.float64)
    logits[..., :unused] = -math.inf
    return logits.softmax(-1)


def uniformity(g1: Tensor, g2: Tensor) -> Tensor:
    """-1/(2HE) sum_h,i (log mean g1_hi + log mean g2_hi), the mean gates not below the floor."""
    logs = [g.mean(0).clamp_min(MEAN_GATE_FLOOR).log().sum() for g in (g1, g2)]
    return -(logs[0] + logs[1]) / (2 * g1.shape[1] * g1.shape[2])


def ambiguity(g1: Tensor, g2: Tensor) -> Tensor:
    """1/(2H) sum_h ((1 - max_i g1_hi) + (1 - max_j g2_hj)), averaged over the tokens."""
    doubt = (1 - g1.amax(-1)) + (1 - g2.amax(-1))
    return doubt.sum(-1).mean() / (2 * g1.shape[1])


def reported(g1: Tensor, g2: Tensor, ranks: int = 1) -> tuple[Tensor, Tensor]:
    sums = GateSums.from_gates(DenseGates(g1), DenseGates(g2))
    out = router_metrics(sums, TOKENS, lambda tensor: tensor * ranks)  # as if every rank had these tokens
    return out.uniformity, out.ambiguity


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("unused", [0, 2])
def test_values_and_gradients_are_those_of_the_definition(unused: int, ranks: int) -> None:
    g1, g2 = gates(1, unused).requires_grad_(), gates(2).requires_grad_()
    for ours, definition in zip(reported(g1, g2, ranks), (uniformity(g1, g2), ambiguity(g1, g2)), strict=True):
        torch.testing.assert_close(ours, definition)
        gradients = torch.autograd.grad(ours, (g1, g2))
        torch.testing.assert_close(gradients, torch.autograd.grad(definition, (g1, g2)))


def test_an_unused_half_expert_costs_the_floor() -> None:
    g1, g2 = gates(1, unused=1), gates(2)
    others = -g1.mean(0)[:, 1:].log().sum() - g2.mean(0).log().sum()
    expected = (others - HEADS * math.log(1e-8)) / (2 * HEADS * EXPERTS)
    torch.testing.assert_close(reported(g1, g2)[0], expected)
    assert math.isfinite(expected)


def test_extremes() -> None:
    even = torch.full((TOKENS, HEADS, EXPERTS), 1 / EXPERTS, dtype=torch.float64)
    value, sharpness = reported(even, even)
    assert value.item() == pytest.approx(math.log(EXPERTS))  # the least possible
    assert sharpness.item() == pytest.approx(1 - 1 / EXPERTS)  # the most possible
    certain = torch.zeros(TOKENS, HEADS, EXPERTS, dtype=torch.float64)
    certain[..., 0] = 1
    assert reported(certain, certain)[1].item() == 0


def test_the_model_averages_over_its_routers(
    config: MonetConfig, build: Callable[[MonetConfig], MonetForCausalLM]
) -> None:
    model = build(config).train()
    out = model(tokens(2, 8), output_router_probs=True)
    pairs = [tuple(g.flatten(0, 1) for g in pair) for pair in out.router_probs if pair is not None]
    assert len(pairs) == len(out.routers) == 2
    torch.testing.assert_close(out.uniformity, torch.stack([uniformity(*pair) for pair in pairs]).mean())
    torch.testing.assert_close(out.ambiguity, torch.stack([ambiguity(*pair) for pair in pairs]).mean())
    for router, (g1, g2) in zip(out.routers, pairs, strict=True):
        torch.testing.assert_close(router.mean_gates, torch.stack([g1.mean(0), g2.mean(0)]))
        active = torch.stack([(g > 0).any(1).sum(-1).float().mean() for g in (g1, g2)])
        torch.testing.assert_close(router.active.float(), active)
