"""Shares of the device's peak, from the work that was done."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from monet_train.config.compose import compose
from monet_train.planning.flops import ForwardFlops, WorkDone, training_flops_per_token
from monet_train.training.callbacks.utilisation import Utilisation


def test_utilisation() -> None:
    """Five layers in groups of two: three routers."""
    config = replace(compose(["data.path=shards", "model=nano"]).model, num_hidden_layers=5, moe_groups=2)
    work = WorkDone(rows_skipped=True, mixing_skipped=True, causal=False, recompute=False, copies=1)
    dense, everything = training_flops_per_token(config, 64), float(config.moe_experts)
    record: dict[str, Any] = {f"router/{layer}/active": [everything] * 2 for layer in (0, 2, 4)}
    record["tokens_per_second"] = 10.0
    Utilisation(config, 64, work, peak_flops=40 * dense).on_step(None, record)
    share = 2 * 2 * 3 * (1 - 1 / config.moe_heads) * config.hidden_size * 2 * config.moe_heads * config.moe_experts
    assert record["mfu"] == pytest.approx(0.25)
    assert record["flops_per_token"] == pytest.approx(dense - share)  # one logit of each half-expert has a gradient
    assert record["hfu"] == pytest.approx(0.25 * record["flops_per_token"] / dense)
    Utilisation(config, 64, work, peak_flops=None).on_step(None, record)
    assert record["mfu"] is record["hfu"] is None
    record["router/2/active"] = [0.0, 0.0]
    Utilisation(config, 64, work, peak_flops=None).on_step(None, record)
    experts = ForwardFlops.of(config, 64).experts
    fewer = 2 * 3 * sum(experts.up + experts.down + experts.mixing)
    assert dense - share - record["flops_per_token"] > fewer  # both layers of that router do less
