"""The run folder: whose it is, what it was started with, and that one process group at a time writes it."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from omegaconf import OmegaConf

from monet_train.checkpoints.layout import checkpoints_folder, completed
from monet_train.config.schema import TrainConfig
from monet_train.durable import write_atomically
from monet_train.errors import UserError

LOCK = ".lock"
DATA_CACHE = "data_cache"  # index cache of the shards, where their own folder cannot be written
PACKAGES = ("monet-train", "torch", "deepspeed", "megatron-core", "transformers", "datasets", "sentencepiece", "wandb")


def check_run_folder(folder: Path, config: TrainConfig) -> None:
    """Refuse a folder that belongs to something else. Only reads; every rank may call it."""
    config_file = folder / "config.yaml"
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"run.dir={folder} is a file; choose another run.dir")
    if not config_file.exists():
        # a run that ended before it was described leaves these
        if any(path.name not in (LOCK, DATA_CACHE) for path in folder.iterdir()):
            raise UserError(f"run.dir={folder} holds files that are not a run's; choose an empty or new folder")
        return
    owner = OmegaConf.select(OmegaConf.load(config_file), "run.name")
    if owner != config.run.name:
        raise UserError(f"run.dir={folder} belongs to the run {owner}; choose another run.dir or run.name={owner}")
    if config.checkpoint.resume == "never" and completed(checkpoints_folder(folder)):
        raise UserError(
            f"run.dir={folder} has checkpoints and checkpoint.resume=never; "
            "choose another run.dir, or checkpoint.resume=auto to resume"
        )


# Keys that do not change what is trained: where files lie, what is shown, saved and measured, what the run runs on.
# The data and their order are compared by content (``run_identity``); the length has a check of its own.
NOT_TRAINED = (
    "run.dir", "data.path", "data.cache_dir", "train.device", "train.recompute", "train.max_steps", "train.max_tokens",
    "kernels", "callbacks", "checkpoint.", "eval.", "logging.",
)  # fmt: skip


def changed_values(folder: Path, config: TrainConfig) -> dict[str, list[Any]]:
    """What differs from the values that the run was last trained with, by dotted key: [before, now]. Only reads.

    Keys that ``config.yaml`` does not have yet (it was written by an older version) do not count.
    """
    file = folder / "config.yaml"
    if not file.exists():
        return {}
    before, now = dict(_flat(OmegaConf.load(file))), dict(_flat(OmegaConf.structured(config)))
    return {key: [before[key], value] for key, value in now.items() if key in before and before[key] != value}


def check_something_to_train(folder: Path, step: int, steps: int, changed: dict[str, list[Any]]) -> None:
    """Refuse a start that would train nothing although it asks for something else than the run has been.

    Args:
        step: of the checkpoint that the run resumes from. steps: of the whole run.
        changed: see :func:`changed_values`.
    """
    if step < steps:
        return
    remedy = "raise train.max_steps to train on, or choose another run.dir"
    if step > steps:
        raise UserError(f"run.dir={folder} is at step {step} already, this start asks for {steps}: {remedy}")
    differences = [
        f"{key}={now} (it was trained with {before})"
        for key, (before, now) in changed.items()
        if not key.startswith(NOT_TRAINED)
    ]
    if differences:
        raise UserError(
            f"run.dir={folder} is finished at step {step}, nothing would be trained with {', '.join(differences)}: "
            + remedy
        )


def _flat(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    values: Any = OmegaConf.to_container(section) if OmegaConf.is_config(section) else section
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def lock_run_folder(folder: Path) -> IO[str]:
    """Create the folder and hold its lock until the returned file is closed. For the main rank."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise UserError(f"run.dir={folder} cannot be written ({error.strerror}); choose another run.dir") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise UserError(f"run.dir={folder} is being trained by another process; choose another run.dir") from None
    return lock


def write_descriptions(folder: Path, config: TrainConfig, device: torch.device, world_size: int) -> None:
    """Write ``config.yaml`` (resolved) and ``environment.json``. For the main rank."""
    write_atomically(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)).encode())
    described = json.dumps(environment(device, world_size), indent=2) + "\n"
    write_atomically(folder / "environment.json", described.encode())


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """Versions, revision, host and device of this run."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git_revision": _git("rev-parse", "HEAD"),
        "git_modified": bool(_git("status", "--porcelain")),
        "host": socket.gethostname(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "world_size": world_size,
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
