"""Checkpoints: everything a run needs to go on bit for bit, and the model in a form that opens without it.

``checkpoints/step_00000100/`` holds DeepSpeed's files (weights, optimizer, ZeRO shards of each rank),
``trainer_rank_*.pt`` (callbacks and random states), ``trainer.json`` (step and what the run is), and the whole
model as ``model.safetensors`` with its ``config.json`` and tokenizer: what export and inspection read. A folder
gets its final name only when every rank has written its part; ``checkpoints/latest`` names the newest.
"""

from __future__ import annotations

import json
import pickle
import random
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from monet_train.checkpoints.consolidate import full_state_dict
from monet_train.checkpoints.weights import published_config
from monet_train.durable import write_whole
from monet_train.errors import FULL, UserError
from monet_train.model.config import MonetConfig
from monet_train.parallel.groups import raise_together

if TYPE_CHECKING:
    from monet_train.training.loop import Trainer

PREFIX = "step_"
DESCRIPTION = "trainer.json"  # written last: a folder that has it is complete
OTHER_CHECKPOINT = "move this checkpoint away to go on from the one before, or choose another run.dir"


class CheckpointFolder:
    """The ``checkpoints`` folder of a run.

    Args:
        path: the folder.
        keep: how many of the newest checkpoints stay; None: all.
        identity: what a run that goes on must share (see :meth:`check_same_run`), JSON-serialisable.
        zero_stage: of the run.
        tokenizer_file: copied into each checkpoint, if any.
    """

    def __init__(
        self,
        path: Path,
        *,
        keep: int | None,
        identity: dict[str, Any],
        zero_stage: int,
        tokenizer_file: Path | None,
    ) -> None:
        self.path, self.keep, self.identity = path, keep, identity
        self.zero_stage, self.tokenizer_file = zero_stage, tokenizer_file

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint of ``trainer``. Every rank calls it; a run killed meanwhile keeps the one before.

        Raises:
            UserError: the disk is full, for this rank at least.
        """
        try:
            self._save(trainer)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not _is_full(error):
                raise
            raise UserError(
                f"{self.path} cannot be written, the disk is full: make room (see checkpoint.keep) "
                "and run the same command again, which goes on from the checkpoint before",
                alone=True,
            ) from None

    def _save(self, trainer: Trainer) -> None:
        name = f"{PREFIX}{trainer.step:08d}"
        partial = self.path / f"partial_{name}"
        final = self.path / name
        is_main = dist.get_rank() == 0
        if is_main:
            for leftover in self.path.glob("partial_*"):
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
        dist.barrier()
        trainer.engine.save_checkpoint(str(self.path), tag=partial.name, save_latest=False)
        torch.save(
            {
                "random": random_state(),
                "callbacks": {type(callback).__name__: callback.state_dict() for callback in trainer.callbacks},
            },
            partial / _rank_file(),
        )
        state = full_state_dict(trainer.engine.module, trainer.topology, self.zero_stage)
        if is_main:
            self._write_model(partial, state, trainer.engine.module.config)
        dist.barrier()  # every rank has written its part
        if is_main:
            self._write_description(partial, trainer)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            write_whole(self.path / "latest", f"{name}\n".encode())
            self._delete_old(final)
        dist.barrier()

    def load(self, trainer: Trainer, checkpoint: Path) -> None:
        """Put ``trainer`` into the state of ``checkpoint``. Every rank calls it."""
        error = None
        try:
            loaded, _ = trainer.engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
            if loaded is None:
                error = UserError(f"{checkpoint} cannot be read by DeepSpeed; {OTHER_CHECKPOINT}")
            # weights_only=False: our own file, which holds numpy and Python random states
            state = torch.load(checkpoint / _rank_file(), weights_only=False)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as problem:
            error = UserError(f"{checkpoint} cannot be read ({problem}); {OTHER_CHECKPOINT}")
        raise_together(error)
        set_random_state(state["random"])
        for callback in trainer.callbacks:
            if saved := state["callbacks"].get(type(callback).__name__):
                callback.load_state_dict(saved)
        trainer.step = _description(checkpoint)["step"]

    def check_same_run(self, checkpoint: Path) -> None:
        """Refuse to go on from a checkpoint of another model, data or topology, naming the first difference."""
        saved = _description(checkpoint)["identity"]
        for part, values in self.identity.items():
            for key in values | saved.get(part, {}):
                before, now = saved.get(part, {}).get(key), values.get(key)
                if before != now:
                    raise UserError(
                        f"{checkpoint} was trained with {part}.{key}={before}, this configuration has {now}; "
                        "set it back, or choose another run.dir for a new run"
                    )

    def _write_model(self, folder: Path, state: dict[str, Tensor], config: MonetConfig) -> None:
        weights = folder / "model.safetensors"
        save_file(state, weights, metadata={"format": "pt"})
        weights.chmod(0o644)  # safetensors leaves it readable by its owner alone
        dtype = state["lm_head.weight"].dtype
        (folder / "config.json").write_text(json.dumps(published_config(config, dtype), indent=2))
        if self.tokenizer_file is not None:
            # a tokenizer.json names its special tokens in the file beside it
            for file in (self.tokenizer_file, self.tokenizer_file.with_name("tokenizer_config.json")):
                if file.exists():
                    shutil.copy(file, folder / file.name)

    def _write_description(self, folder: Path, trainer: Trainer) -> None:
        sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        description = {"step": trainer.step, "identity": self.identity, "files": sizes}
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2))

    def _delete_old(self, newest: Path) -> None:
        others = [folder for folder in completed(self.path) if folder != newest]
        if self.keep is not None:
            for folder in others[: max(0, len(others) - self.keep + 1)]:
                shutil.rmtree(folder)


def _is_full(error: Exception) -> bool:
    """Whether a failed write met a full disk. torch and safetensors say so in their own words."""
    if isinstance(error, OSError):
        return error.errno in FULL
    words = "No space left|Disk quota exceeded|file write failed|PytorchStreamWriter|inline_container"
    return re.search(words, str(error)) is not None


def completed(folder: Path) -> list[Path]:
    """The complete checkpoints of a ``checkpoints`` folder, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / DESCRIPTION).exists())


def check_complete(checkpoint: Path) -> None:
    """Refuse a checkpoint of which a file is missing or truncated, naming the file. Only reads the folder."""
    for name, size in _description(checkpoint)["files"].items():
        file = checkpoint / name
        if not file.is_file():
            raise UserError(f"{file} is missing; {OTHER_CHECKPOINT}")
        if file.stat().st_size != size:
            raise UserError(
                f"{file} has {file.stat().st_size} bytes instead of {size} (truncated?); {OTHER_CHECKPOINT}"
            )


def find_resume(choice: str, folder: Path) -> Path | None:
    """The checkpoint that ``checkpoint.resume`` means: the newest of ``folder`` (auto), none (never), or a path.

    A path elsewhere starts the run. Once the run has checkpoints of its own they are newer, and a requeued job, whose
    command still names the path, goes on from them.
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
            f"checkpoint.resume={choice} is no checkpoint; give auto, never or a .../checkpoints/step_* folder"
        )
    if path.parent == folder.resolve() and path != newest:
        raise UserError(f"checkpoint.resume={choice} is older than {newest}; move the newer ones away first")
    return newest or path


def random_state() -> dict[str, Any]:
    """The state of every random generator of this process."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Take back what :func:`random_state` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def _description(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / DESCRIPTION).read_text())
    except ValueError as error:
        raise UserError(f"{checkpoint / DESCRIPTION} cannot be read ({error}); {OTHER_CHECKPOINT}") from None


def _rank_file() -> str:
    return f"trainer_rank_{dist.get_rank():05d}.pt"
