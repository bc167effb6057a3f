"""The configuration: what the model sizes compose to, what the command prints, and the numbers that follow from it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from monet_train.config.compose import compose
from monet_train.config.schema import ScheduleSection, TrainConfig
from monet_train.model.transformer import MonetForCausalLM
from monet_train.parallel.launch import Launch
from monet_train.planning.flops import ForwardFlops, WorkDone, forward_flops_per_token, training_flops_per_token
from monet_train.training.callbacks.utilisation import Utilisation
from monet_train.training.checks import check_config, total_steps
from monet_train.training.optimizer import learning_rate
from tests.conftest import REPOSITORY

PAPER_TOKENS = 2**21
SIZES = {  # layers, d, heads, m, H, parameters: the design's table
    "850m": (24, 1536, 12, 12, 6, 0.855e9),
    "1.4b": (24, 2048, 16, 16, 8, 1.47e9),
    "4.1b": (32, 3072, 24, 24, 12, 4.17e9),
}


def composed(*overrides: str) -> TrainConfig:
    return compose(["data.path=shards", *overrides])


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size: str) -> None:
    config = composed(f"model={size}")
    layers, d, heads, m, routing_heads, parameters = SIZES[size]
    model = config.model
    assert (model.num_hidden_layers, model.hidden_size, model.num_attention_heads) == (layers, d, heads)
    assert (model.moe_dim, model.moe_heads) == (m, routing_heads)
    assert (model.moe_experts, model.moe_topk, model.moe_groups, model.vocab_size) == (512, 8, 4, 32000)
    assert model.moe_decompose == "vertical"
    with torch.device("meta"):
        built = MonetForCausalLM(model)
    assert sum(p.numel() for p in built.parameters()) == pytest.approx(parameters, rel=0.01)

    assert (config.train.precision, config.train.seq_length, config.optimizer.lr) == ("bf16", 2048, 5e-4)
    assert config.train.global_batch_size * config.train.seq_length == PAPER_TOKENS
    assert total_steps(config) == 100_000_000_000 // PAPER_TOKENS
    assert config.run.dir == f"runs/monet-{size}"
    check_config(config, Launch(rank=0, world_size=16, local_rank=0))


def test_nano_is_the_default_and_small() -> None:
    config = composed()
    assert config == composed("model=nano")
    assert (config.model.moe_experts, config.train.precision, config.run.dir) == (256, "fp32", "runs/nano")
    with torch.device("meta"):
        assert sum(p.numel() for p in MonetForCausalLM(config.model).parameters()) < 10e6
    check_config(config, Launch(rank=0, world_size=1, local_rank=0))


def test_defaults_of_every_run() -> None:
    config = composed("model=850m")
    assert tuple(config.optimizer.betas) == (0.9, 0.95)
    assert (config.optimizer.weight_decay, config.optimizer.clip, config.schedule.final) == (0.1, 1.0, 0.1)
    assert (config.train.uniformity_weight, config.train.ambiguity_weight) == (1e-3, 1e-3)
    assert (config.zero.stage, config.parallel.tensor, config.parallel.sequence) == (2, 1, False)
    assert (config.logging.wandb.mode, config.checkpoint.resume, config.train.device) == ("offline", "auto", "auto")


def test_the_command_line_has_the_last_word() -> None:
    config = composed("experiment=quickstart", "train.max_steps=7")
    assert (config.run.name, config.train.max_steps, config.eval.every) == ("quickstart", 7, 100)
    for choice in ("zero=stage3", "zero.stage=3"):  # the model size chooses another
        assert composed("model=1.4b", choice).zero.stage == 3


@pytest.mark.parametrize(("groups", "teraflop"), [(4, 6745.30), (1, 8017.81)])
def test_work_is_the_papers(groups: int, teraflop: float) -> None:
    config = composed("model=1.4b", f"model.moe_groups={groups}")
    forward = forward_flops_per_token(config.model, 2048)
    assert forward * PAPER_TOKENS / 1e12 == pytest.approx(teraflop, rel=0.02)
    assert training_flops_per_token(config.model, 2048) == 3 * forward
    horizontal = replace(config.model, moe_decompose="horizontal")
    assert forward_flops_per_token(horizontal, 2048) == pytest.approx(forward, rel=0.02)


@pytest.mark.parametrize("form", ["vertical", "horizontal"])
def test_dense_work_is_what_the_plain_definition_does(form: str) -> None:
    config = replace(composed("model=nano", f"model.moe_decompose={form}").model, num_hidden_layers=4, moe_groups=2)
    tokens = torch.zeros(2, 64, dtype=torch.long)
    model = MonetForCausalLM(config)
    for router in model.model.routers():
        router.implementation = "plain"
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, targets=tokens, keep_logits=False)
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(forward_flops_per_token(config, 64), rel=1e-3)


@pytest.mark.parametrize("form", ["vertical", "horizontal"])
def test_work_done(form: str) -> None:
    config = composed("model=1.4b", f"model.moe_decompose={form}").model
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
    # the input weights of the horizontal form are of side 1, the output weights and biases of side 2
    one = [[config.moe_experts, 0.0] for _ in config.router_layers]
    other = [[0.0, config.moe_experts] for _ in config.router_layers]
    skipped = {"mixing_skipped": True, "rows_skipped": True}
    difference = done(other, **skipped) - done(one, **skipped)
    assert difference == pytest.approx(3 * bias if form == "horizontal" else 0.0)


def test_utilisation() -> None:
    """Five layers in groups of two: three routers."""
    config = replace(composed("model=nano").model, num_hidden_layers=5, moe_groups=2)
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
    fewer = 2 * 3 * (ForwardFlops.of(config, 64).up * 2 + ForwardFlops.of(config, 64).mixing)
    assert dense - share - record["flops_per_token"] > fewer  # both layers of that router do less


def test_learning_rate() -> None:
    schedule = ScheduleSection(warmup_steps=10, final=0.1)

    def rate(step: int) -> float:
        return learning_rate(step, peak=2.0, total=110, schedule=schedule)

    assert [rate(step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])  # the first step is not wasted at 0
    assert rate(10) == pytest.approx(2.0)
    assert rate(60) == pytest.approx(1.1)  # half-way between peak and a tenth of it
    assert rate(35) == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert rate(110) == rate(1000) == pytest.approx(0.2)
    assert all(rate(step) > rate(step + 1) for step in range(10, 110))
    assert learning_rate(0, peak=2.0, total=5, schedule=ScheduleSection(warmup_steps=0)) == 2.0


def test_steps_follow_from_tokens() -> None:
    assert total_steps(composed("train.max_steps=null", "train.max_tokens=20480")) == 20480 // (8 * 256)
    assert total_steps(composed("train.max_steps=3", "train.max_tokens=20480")) == 3
    assert total_steps(composed("train.max_steps=300", "train.max_tokens=20480")) == 10


def test_the_command_shows_its_configuration() -> None:
    done = command("--cfg", "job", "model=1.4b", "train.seed=7")
    shown = OmegaConf.create(done.stdout)
    assert shown.model.hidden_size == 2048
    assert shown.train.seed == 7
    assert OmegaConf.is_missing(shown.data, "path")


def test_the_command_helps() -> None:
    text = command("--help").stdout
    for useful in ("monet-train [key=value ...]", "torchrun", "sbatch slurm/train_850m.sh", "model: 1.4b, 4.1b, 850m"):
        assert useful in text
    for key in ("global_batch_size: 8", "stage: 1", "mode: offline", "resume: auto"):
        assert key in text


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``monet-train`` with these arguments; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "monet_train.train", *arguments],
        cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done
