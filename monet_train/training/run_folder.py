"""The run folder: whose it is, what it was trained with, and a lock, so that only one run at a time writes to it."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import MISSING as NO_DEFAULT
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from monet_train.checkpoints.layout import Description, checkpoints_folder, completed
from monet_train.config.schema import MISSING, TrainConfig
from monet_train.durable import write_atomically
from monet_train.errors import UserError
from monet_train.training.events import EVENTS
from monet_train.typed import leaves, show

CONFIG = "config.yaml"
LOCK = ".lock"
DATA_CACHE = "data_cache"  # index cache of the shards, where their own folder cannot be written
SHOWN_CHANGES = 3  # in a refusal
# Keys that may change when a finished run is started again: where files are, what is shown and saved, what the run
# runs on. Data and order are compared by content, length by steps. Not eval or callbacks: they would do nothing.
WITHOUT_EFFECT = (
    "run.dir", "data.path", "data.cache_dir", "train.device", "train.recompute", "train.compile",
    "train.max_steps", "train.max_tokens", "kernels", "checkpoint.", "logging.",
)  # fmt: skip
PACKAGES = ("monet-train", "torch", "deepspeed", "megatron-core", "transformers", "datasets", "sentencepiece", "wandb")


def check_run_folder(folder: Path, config: TrainConfig) -> None:
    """Refuse a folder that belongs to something else. Only reads; every rank may call it."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"run.dir={folder} is a file; choose another run.dir")
    recorded = recorded_values(folder)
    if recorded is None:
        # left by a run that ended before its configuration was written
        if any(path.name not in (LOCK, DATA_CACHE, EVENTS) for path in folder.iterdir()):
            raise UserError(f"run.dir={folder} holds files that are not a run's; choose an empty or new folder")
        return
    owner = recorded.get("run.name")
    if owner != config.run.name:
        raise UserError(f"run.dir={folder} belongs to the run {owner}; choose another run.dir or run.name={owner}")
    if config.checkpoint.resume == "never" and completed(checkpoints_folder(folder)):
        raise UserError(
            f"run.dir={folder} has checkpoints and checkpoint.resume=never; "
            "choose another run.dir, or checkpoint.resume=auto to resume"
        )


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


class Finished(Exception):
    """The run was trained to its end with the values asked for: there is nothing to do."""


def check_work_left(folder: Path, config: TrainConfig, resume: Path, steps: int) -> None:
    """Refuse to resume a run that has no step left. Only reads; every rank may call it.

    Args:
        resume: the checkpoint to continue from.
        steps: of the whole run.

    Raises:
        Finished: the run was trained to its end with the values asked for.
        UserError: it was trained with other values, or is longer, so that this command would not do what it says.
    """
    done = Description.read(resume).step
    if done < steps:
        return
    key = "train.max_steps" if config.train.max_steps == steps else "train.max_tokens"
    remedy = f"raise {key} to train on, or choose another run.dir"
    if resume.parent != checkpoints_folder(folder).resolve():
        raise UserError(
            f"checkpoint.resume={resume} is at step {done} already, this start asks for {steps}: raise {key}"
        )
    if done > steps:
        raise UserError(f"run.dir={folder} is at step {done} already, this start asks for {steps}: {remedy}")
    differences = [
        f"{key}={show(now)} (it was trained with {show(before)})"
        for key, (before, now) in changes(folder, config).items()
        if not key.startswith(WITHOUT_EFFECT)
    ]
    if differences:
        more = f" and {len(differences) - SHOWN_CHANGES} more changes" * (len(differences) > SHOWN_CHANGES)
        raise UserError(
            f"run.dir={folder} is finished at step {done}, nothing would be trained with "
            f"{', '.join(differences[:SHOWN_CHANGES])}{more}: {remedy}"
        )
    raise Finished(f"{config.run.name} is finished: all {steps:,} steps are trained ({resume}); {remedy}")


def changes(folder: Path, config: TrainConfig) -> dict[str, list[Any]]:
    """What ``config`` changes of the values in a run folder's ``config.yaml``: [before, now] by key. Only reads.

    The places of the run and of its checkpoint do not count. A key that is not in ``config.yaml``, since an earlier
    version wrote it, had its default.
    """
    before = recorded_values(folder)
    if before is None:
        return {}
    now = _values(OmegaConf.to_container(OmegaConf.structured(config)))
    return {
        key: [before[key], value]
        for key, value in now.items()
        if key in before and before[key] != value and key not in ("run.dir", "checkpoint.resume")
    }


def recorded_values(folder: Path) -> dict[str, Any] | None:
    """The values of a run folder's ``config.yaml`` by dotted key; None where there is none.

    Raises:
        UserError: it is damaged.
    """
    file = folder / CONFIG
    if not file.exists():
        return None
    try:
        recorded = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} cannot be read ({reason}): restore it, or choose another run.dir") from None
    if not isinstance(recorded, dict):
        raise UserError(f"{file} is not the configuration of a run: restore it, or choose another run.dir")
    return _values(recorded)


def _values(nested: Any) -> dict[str, Any]:
    """A nested configuration by dotted key of the schema, with defaults where it has no value and there is one."""
    values = {}
    for key, field in leaves(TrainConfig):
        value: Any = nested
        for part in key.split("."):
            value = value.get(part, MISSING) if isinstance(value, Mapping) else MISSING
        if value == MISSING:
            value = field.default if field.default_factory is NO_DEFAULT else field.default_factory()
        if value is not NO_DEFAULT and value != MISSING:
            values[key] = list(value) if isinstance(value, tuple) else value
    return values


def write_descriptions(folder: Path, config: TrainConfig, device: torch.device, world_size: int) -> None:
    """Write ``config.yaml`` (resolved) and ``environment.json``, just before the first step. For the main rank."""
    write_atomically(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.structured(config)).encode())
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
