"""Small trainings and what they leave behind."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from monet_train.checkpoints.layout import resolve_checkpoint
from tests.support.commands import command, free_port, torchrun

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


def train_in_turn(trainings: list[Training] | list[list[str]], processes: int, folder: Path) -> None:
    """Several trainings one after another in the same processes; a list of overrides is a training of its own."""
    plan = [asdict(t if isinstance(t, Training) else Training(t)) | {"port": free_port()} for t in trainings]
    path = folder / f"plan_{processes}.json"
    path.write_text(json.dumps(plan))
    module = "tests.support.worker"
    launcher = [sys.executable, "-m", module] if processes == 1 else torchrun(processes, module)
    killed = plan[-1]["killed_at"] is not None
    done = command([*launcher, str(path)], check=not killed)
    assert (done.returncode != 0) == killed, done.stderr


def records(run: Path, key: str = "loss") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have ``key``, without their timings."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timings = ("step_seconds", "data_seconds", "tokens_per_second", "mfu", "hfu")
    return [{k: v for k, v in line.items() if k not in timings} for line in lines if key in line]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the newest checkpoint."""
    return load_file(resolve_checkpoint(run) / "model.safetensors")
