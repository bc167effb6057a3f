"""The configuration: what the model sizes compose to, what the command prints, and the numbers that follow from it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from monet_train.config.compose import compose, config_folder
from monet_train.config.schema import TrainConfig
from monet_train.model.transformer import MonetForCausalLM
from monet_train.parallel.launch import Launch
from monet_train.training.checks import check_config, total_steps
from tests.support import REPOSITORY

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


def test_steps_follow_from_tokens() -> None:
    assert total_steps(composed("train.max_steps=null", "train.max_tokens=20480")) == 20480 // (8 * 256)
    assert total_steps(composed("train.max_steps=3", "train.max_tokens=20480")) == 3
    assert total_steps(composed("train.max_steps=300", "train.max_tokens=20480")) == 10


@pytest.mark.slow
def test_the_command_shows_its_configuration() -> None:
    done = command("--cfg", "job", "model=1.4b", "train.seed=7")
    shown = OmegaConf.create(done.stdout)
    assert shown.model.hidden_size == 2048
    assert shown.train.seed == 7
    assert OmegaConf.is_missing(shown.data, "path")


@pytest.mark.slow
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


def test_each_default_stands_in_one_place() -> None:
    """In the schema, or in ``conf/`` if an option chooses it. A model size names all that it needs."""
    schema = OmegaConf.structured(TrainConfig)
    primary = OmegaConf.load(config_folder() / "train.yaml")
    options = {group: name for default in primary.defaults if default != "schema" for group, name in parse(default)}
    sections = {
        group: OmegaConf.load(config_folder() / group / f"{name}.yaml")
        for group, name in options.items()
        if group not in ("model", "experiment")
    }
    assert {"data", "optimizer", "schedule", "parallel", "zero", "logging"} <= sections.keys()
    sections |= {name: primary[name] for name in primary if name in schema}
    for name, values in sections.items():
        for key in values or {}:
            assert OmegaConf.is_missing(schema[name], key), f"{name}.{key} has a default in the schema too"


def parse(default: Any) -> list[tuple[str, str]]:
    """The (group, option) of an entry of the defaults list."""
    if isinstance(default, str):
        return []
    return [(str(group), option) for group, option in default.items() if not str(group).startswith("override")]
