"""Resuming: which checkpoint, whether it is whole and of this run, and putting a training into its state."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from monet_train.checkpoints.layout import DESCRIPTION, OTHER_CHECKPOINT, Description, completed, rank_file
from monet_train.checkpoints.random_state import set_random_state
from monet_train.checkpoints.state import TrainingState
from monet_train.errors import UserError
from monet_train.parallel.agreement import raise_together


def find_resume(choice: str, folder: Path) -> Path | None:
    """The checkpoint that ``checkpoint.resume`` means: the newest of ``folder`` (auto), none (never), or a path.

    A path elsewhere starts the run. Once the run has checkpoints of its own they are newer, and a requeued job, whose
    command still names the path, resumes from them.
    """
    if choice == "never":
        return None
    own = completed(folder)
    newest = own[-1].resolve() if own else None
    if choice == "auto":
        return newest
    path = Path(choice).resolve()
    if not (path / DESCRIPTION).exists():
        raise UserError(
            f"checkpoint.resume={choice} is not a checkpoint; give auto, never or a .../checkpoints/step_* folder"
        )
    if path.parent == folder.resolve() and path != newest:
        raise UserError(f"checkpoint.resume={choice} is older than {newest}; move the newer ones away first")
    return newest or path


def check_complete(checkpoint: Path) -> None:
    """Refuse a checkpoint with a missing or truncated file, naming the file. Only reads the folder."""
    for name, size in Description.read(checkpoint).files.items():
        file = checkpoint / name
        if not file.is_file():
            raise UserError(f"{file} is missing; {OTHER_CHECKPOINT}")
        if file.stat().st_size != size:
            raise UserError(
                f"{file} has {file.stat().st_size} bytes instead of {size} (truncated?); {OTHER_CHECKPOINT}"
            )


def check_same_run(checkpoint: Path, identity: dict[str, dict[str, Any]]) -> None:
    """Refuse to resume from a checkpoint of another model, data or topology, naming the first difference."""
    saved = Description.read(checkpoint).identity
    for section, values in identity.items():
        if section not in saved:
            continue  # the checkpoint is older than this section
        for key in values | saved[section]:
            before, now = saved[section].get(key), values.get(key)
            if before != now:
                raise UserError(
                    f"{checkpoint} was trained with {section}.{key}={before}, this configuration has {now}; "
                    "set it back, or choose another run.dir for a new run"
                )


def restore(training: TrainingState, checkpoint: Path) -> None:
    """Put a training into the state of ``checkpoint``. Every rank calls it.

    Raises:
        UserError: a file cannot be read, on any rank.
    """
    error = None
    try:
        loaded, _ = training.engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if loaded is None:
            error = UserError(f"{checkpoint} cannot be read by DeepSpeed; {OTHER_CHECKPOINT}")
        # weights_only=False: our own file, which holds numpy and Python random states
        state = torch.load(checkpoint / rank_file(dist.get_rank()), weights_only=False)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as problem:
        error = UserError(f"{checkpoint} cannot be read ({problem}); {OTHER_CHECKPOINT}")
    raise_together(error)
    set_random_state(state["random"])
    for callback in training.callbacks:
        if saved := state["callbacks"].get(callback.name):
            callback.load_state_dict(saved)
    training.step = Description.read(checkpoint).step
