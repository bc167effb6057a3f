"""Checks of a configuration against itself and the world it runs in, before anything is built."""

from __future__ import annotations

import math
from typing import Any

from monet_train.config.schema import TrainConfig
from monet_train.data.batches import micro_steps
from monet_train.errors import UserError
from monet_train.model.sharding import check_tensor_size
from monet_train.parallel.launch import Launch

CHOICES = {
    "train.precision": ("fp32", "bf16"),
    "train.device": ("auto", "cpu", "cuda"),
    "zero.stage": (0, 1, 2, 3),
    "logging.wandb.mode": ("offline", "online", "disabled"),
}
AT_LEAST = {
    "train.seed": 0,
    "train.seq_length": 1,
    "train.micro_batch_size": 1,
    "train.global_batch_size": 1,
    "train.max_steps": 1,
    "train.max_tokens": 1,
    "train.uniformity_weight": 0,
    "train.ambiguity_weight": 0,
    "parallel.tensor": 1,
    "optimizer.lr": 0,
    "optimizer.weight_decay": 0,
    "schedule.warmup_steps": 0,
    "schedule.final": 0,
    "eval.every": 0,
    "eval.sequences": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "logging.every": 1,
}


def check_config(config: TrainConfig, launch: Launch) -> None:
    """Refuse what cannot train. Raises :class:`UserError` naming the key, the same on every rank."""
    for key, choices in CHOICES.items():
        value = _get(config, key)
        if value not in choices:
            raise UserError(f"{key}={value} is unknown; use one of {', '.join(map(str, choices))}")
    for key, least in AT_LEAST.items():
        value = _get(config, key)
        if value is not None and not least <= value < math.inf:
            raise UserError(f"{key}={value} must be a number of at least {least}")
    if not 0 < config.optimizer.clip < math.inf:
        raise UserError(f"optimizer.clip={config.optimizer.clip} must be above 0; use a large number not to clip")
    if not 0 < config.optimizer.eps < math.inf:
        raise UserError(f"optimizer.eps={config.optimizer.eps} must be above 0, as 1e-8")
    betas = config.optimizer.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"optimizer.betas={list(betas)} must be two numbers from 0 to below 1, as [0.9,0.95]")
    if config.schedule.final > 1:
        raise UserError(f"schedule.final={config.schedule.final} must be at most 1: it is a share of optimizer.lr")
    if config.train.max_steps is None and config.train.max_tokens is None:
        raise UserError("train.max_steps or train.max_tokens must be given")
    config.model.validate()
    if config.train.seq_length > config.model.max_position_embeddings:
        raise UserError(
            f"train.seq_length={config.train.seq_length} exceeds "
            f"model.max_position_embeddings={config.model.max_position_embeddings}; raise that or shorten it"
        )
    if config.parallel.sequence:
        raise UserError(
            "parallel.sequence=true is not available: Megatron's sequence parallelism needs CUDA buffers and has "
            "not been verified here on GPUs; use parallel.sequence=false"
        )
    check_tensor_size(config.model, config.parallel.tensor)
    check_batch(config, launch.world_size)


def check_batch(config: TrainConfig, world_size: int) -> None:
    """Refuse a world that does not divide and a global batch that the ranks cannot make."""
    tensor = config.parallel.tensor
    if world_size % tensor:
        raise UserError(
            f"parallel.tensor={tensor} does not divide the {world_size} processes that were started: start a multiple "
            f"of {tensor}, or use one of {', '.join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)}"
        )
    micro_steps(config.train.global_batch_size, config.train.micro_batch_size, world_size // tensor)


def total_steps(config: TrainConfig) -> int:
    """Optimizer steps of the run: whichever of train.max_steps and train.max_tokens ends first."""
    limits = []
    if config.train.max_steps is not None:
        limits.append(config.train.max_steps)
    if config.train.max_tokens is not None:
        step_tokens = config.train.global_batch_size * config.train.seq_length
        limits.append(max(1, config.train.max_tokens // step_tokens))
    return min(limits)


def _get(config: TrainConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
