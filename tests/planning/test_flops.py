"""The work that a model asks for, and what is really done of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from monet_train.config.compose import compose
from monet_train.kernels import Kernels
from monet_train.model.config import MonetConfig
from monet_train.model.transformer import MonetForCausalLM
from monet_train.planning.flops import WorkDone, forward_flops_per_token, training_flops_per_token

PAPER_TOKENS = 2**21


def model_of(*overrides: str) -> MonetConfig:
    return compose(["data.path=shards", *overrides]).model


@pytest.mark.parametrize(("groups", "teraflop"), [(4, 6745.30), (1, 8017.81)])
def test_work_is_the_papers(groups: int, teraflop: float) -> None:
    config = model_of("model=1.4b", f"model.moe_groups={groups}")
    forward = forward_flops_per_token(config, 2048)
    assert forward * PAPER_TOKENS / 1e12 == pytest.approx(teraflop, rel=0.02)
    assert training_flops_per_token(config, 2048) == 3 * forward
    horizontal = replace(config, moe_decompose="horizontal")
    assert forward_flops_per_token(horizontal, 2048) == pytest.approx(forward, rel=0.02)


@pytest.mark.parametrize("decomposition", ["vertical", "horizontal"])
def test_dense_work_is_what_the_plain_definition_does(decomposition: str) -> None:
    config = replace(model_of("model=nano", f"model.moe_decompose={decomposition}"), num_hidden_layers=4, moe_groups=2)
    tokens = torch.zeros(2, 64, dtype=torch.long)
    model = MonetForCausalLM(config, kernels=Kernels("plain"))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, targets=tokens, keep_logits=False)
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(forward_flops_per_token(config, 64), rel=1e-3)


@pytest.mark.parametrize("decomposition", ["vertical", "horizontal"])
def test_work_done(decomposition: str) -> None:
    config = model_of("model=1.4b", f"model.moe_decompose={decomposition}")
    dense = training_flops_per_token(config, 2048)
    everything, nothing = ([[share * config.moe_experts] * 2 for _ in config.router_layers] for share in (1.0, 0.0))

    def done(active: list[list[float]], copies: int = 1, **skipped: bool) -> float:
        flags = dict.fromkeys(("rows_skipped", "mixing_skipped", "causal", "recompute"), False) | skipped
        return WorkDone(**flags, copies=copies).flops_per_token(config, 2048, active)

    assert done(nothing) == pytest.approx(dense)  # the plain definition
    assert done(everything, mixing_skipped=True) == pytest.approx(dense)
    assert done(nothing, recompute=True) == pytest.approx(4 / 3 * dense - 2 * config.hidden_size * config.vocab_size)
    assert done(nothing, causal=True) == pytest.approx(dense - 3 * 24 * 2 * 2048 * config.hidden_size)
    rows = 24 * 2 * 2 * config.hidden_size * config.moe_experts * config.moe_dim  # up and down
    bias = 24 * 2 * config.hidden_size * config.moe_experts
    mixing = 24 * 4 * config.moe_heads * config.moe_experts * config.moe_dim
    routers = 6 * 2 * config.hidden_size * 2 * config.moe_heads * config.moe_experts
    assert done(nothing, mixing_skipped=True) == pytest.approx(dense - 3 * mixing)
    assert done(nothing, copies=3) == pytest.approx(dense + 2 * 3 * (routers + bias))
    sparse = done(nothing, mixing_skipped=True, rows_skipped=True)
    assert sparse == pytest.approx(dense - 3 * (rows + mixing + bias) - 2 * routers)
    # the input weights of horizontal experts are of side 1, the output weights and biases of side 2
    one = [[config.moe_experts, 0.0] for _ in config.router_layers]
    other = [[0.0, config.moe_experts] for _ in config.router_layers]
    skipped = {"mixing_skipped": True, "rows_skipped": True}
    difference = done(other, **skipped) - done(one, **skipped)
    assert difference == pytest.approx(3 * bias if decomposition == "horizontal" else 0.0)
