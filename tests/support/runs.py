"""Small trainings and what they leave behind."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from monet_train.checkpoints.layout import resolve_checkpoint
from tests.support import worker
from tests.support.ports import free_port
from tests.support.processes import run_ranks

TINY = [
    "train.device=cpu",
    "model.vocab_size=512",
    "model.hidden_size=64",
    "model.moe_experts=64",
    "model.moe_groups=2",
    "train.seq_length=64",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.max_steps=20",
    "eval.every=null",
    "checkpoint.every=null",
    "logging.wandb.mode=disabled",
    "logging.progress=false",
]


@dataclass(frozen=True)
class Training:
    """One training of :func:`train_in_turn`."""

    overrides: list[str]
    killed_at: int | None = None  # killed while it saves the checkpoint of this step; only the last one can be
    masked: bool = False  # with experts switched off in both routing groups
    masked_targets: bool = False  # see worker.counted_targets
    port: int = field(default_factory=free_port)


def train_in_turn(trainings: Sequence[Training | list[str]], processes: int = 1) -> None:
    """Several trainings one after another, in the same processes; overrides alone are a training too."""
    trainings = [given if isinstance(given, Training) else Training(given) for given in trainings]
    killed = trainings[-1].killed_at is not None
    for done in run_ranks(worker.fit_in_turn, trainings, ranks=processes):
        assert (done.returncode != 0) == killed, done.stderr


def train(overrides: Iterable[str], processes: int = 1, **environment: str) -> list[subprocess.CompletedProcess[str]]:
    """``monet-train`` in processes that have its imports already; what became of every rank."""
    return run_ranks(worker.monet_train, list(overrides), ranks=processes, **environment)


def records(run: Path, key: str = "loss") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have ``key``, without their timings."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timings = ("step_seconds", "data_seconds", "tokens_per_second", "mfu", "hfu")
    return [{k: v for k, v in line.items() if k not in timings} for line in lines if key in line]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the newest checkpoint."""
    return load_file(resolve_checkpoint(run) / "model.safetensors")
