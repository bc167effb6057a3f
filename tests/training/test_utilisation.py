"""Shares of the device's peak, from the work that was done."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from monet_train.config.compose import compose
from monet_train.planning.flops import ForwardFlops, WorkDone, training_flops_per_token
from monet_train.training.callbacks.routers import RouterUsage
from monet_train.training.callbacks.utilisation import Utilisation, Work
from monet_train.training.records import Record, Timing


def test_utilisation() -> None:
    """Five layers in groups of two: three routers."""
    config = replace(compose(["data.path=shards", "model=nano"]).model, num_hidden_layers=5, moe_groups=2)
    work = WorkDone(rows_skipped=True, mixing_skipped=True, causal=False, recompute=False, copies=1)
    dense, everything = training_flops_per_token(config, 64), float(config.moe_experts)

    def measured(peak: float | None, second: float = everything) -> Work:
        active = [[everything] * 2, [second] * 2, [everything] * 2]
        record = Record(step=1, tokens=64)
        record.add(RouterUsage([0, 2, 4], active, active, active))
        record.add(Timing(lr=0.0, grad_norm=0.0, step_seconds=6.4, data_seconds=0.0, tokens_per_second=10.0))
        Utilisation(config, 64, work, peak).on_step(None, record)
        assert record.figures().items() >= asdict(record.get(Work)).items()
        return record.get(Work)

    known = measured(peak=40 * dense)
    share = 2 * 2 * 3 * (1 - 1 / config.moe_heads) * config.hidden_size * 2 * config.moe_heads * config.moe_experts
    assert known.mfu == pytest.approx(0.25)
    assert known.flops_per_token == pytest.approx(dense - share)  # one logit of each half-expert has a gradient
    assert known.hfu == pytest.approx(0.25 * known.flops_per_token / dense)
    unknown = measured(peak=None)
    assert unknown.mfu is unknown.hfu is None
    less = measured(peak=None, second=0.0)
    experts = ForwardFlops.per_token(config, 64).experts
    fewer = 2 * 3 * sum(experts.up + experts.down + experts.mixing)
    assert dense - share - less.flops_per_token > fewer  # both layers of that router do less
