"""Real text, real shards, real processes: what the training tests share."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from monet_train.checkpoints.layout import resolve_checkpoint
from tests.conftest import REPOSITORY

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


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the Python installation's own text, made by the commands a user would give."""
    folder = tmp_path_factory.mktemp("text")
    for arguments in (
        ["tokenizer", "python", "--max-bytes", "1M", "--vocab-size", "512", "--out", folder / "tokenizer"],
        ["shards", "python", "--max-bytes", "2M", "--tokenizer", folder / "tokenizer", "--out", folder / "shards"],
    ):
        command([sys.executable, "-m", "data_prep", *map(str, arguments)])
    return folder / "shards"


def command(arguments: list[str], check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository, one thread a process, and show what it printed if it fails."""
    done = subprocess.run(
        arguments,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert not check or done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done


def train(overrides: Iterable[str], processes: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
    """``monet-train`` as a user starts it: alone, or under torchrun."""
    launcher = [sys.executable, "-m", "monet_train.train"] if processes == 1 else torchrun(processes)
    return command([*launcher, *overrides], check)


def train_in_turn(
    runs: list[list[str]],
    processes: int,
    folder: Path,
    killed_at: int | None = None,
    module: str = "tests.training.worker",
) -> None:
    """Several trainings in the same processes. ``killed_at``: the last one is killed as it saves after that step."""
    plan = folder / f"plan_{processes}.json"
    kills = [None] * (len(runs) - 1) + [killed_at]
    plan.write_text(json.dumps([(free_port(), run, kill) for run, kill in zip(runs, kills, strict=True)]))
    launcher = [sys.executable, "-m", module] if processes == 1 else torchrun(processes, module)
    done = command([*launcher, str(plan)], check=killed_at is None)
    assert (done.returncode == 0) == (killed_at is None), done.stderr


def torchrun(processes: int, module: str = "monet_train.train") -> list[str]:
    """The torchrun command for so many processes on a free port."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
        "--master_addr", "127.0.0.1", "--master_port", str(free_port()), "-m", module,
    ]  # fmt: skip


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def records(run: Path, key: str = "loss") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have ``key``, without their timings."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timings = ("step_seconds", "data_seconds", "tokens_per_second", "mfu", "hfu")
    return [{k: v for k, v in line.items() if k not in timings} for line in lines if key in line]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the newest checkpoint."""
    return load_file(resolve_checkpoint(run) / "model.safetensors")
