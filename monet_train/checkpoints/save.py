"""Writing checkpoints: all that a run needs to resume bit for bit, and the whole model, which opens without the rest.

A folder gets its final name only when every rank has written its part; ``checkpoints/latest`` names the newest.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from monet_train.checkpoints.consolidate import full_state_dict
from monet_train.checkpoints.layout import (
    DESCRIPTION,
    LATEST,
    PARTIAL_PREFIX,
    Description,
    completed,
    rank_file,
    step_name,
)
from monet_train.checkpoints.random_state import random_state
from monet_train.checkpoints.state import TrainingState
from monet_train.checkpoints.weights import write_model
from monet_train.durable import write_atomically
from monet_train.errors import FULL, UserError
from monet_train.tokenizers import StoredTokenizer


class CheckpointWriter:
    """Writes the ``checkpoints`` folder of a run.

    Args:
        folder: where the checkpoints go.
        keep: how many of the newest checkpoints stay; None: all.
        identity: what a run that resumes must share (see :func:`resume.check_same_run`), JSON-serialisable.
        zero_stage: of the run.
        tokenizer: of the data, copied into each checkpoint, if known.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int | None,
        identity: dict[str, dict[str, Any]],
        zero_stage: int,
        tokenizer: StoredTokenizer | None,
    ) -> None:
        self.folder, self.keep, self.identity = folder, keep, identity
        self.zero_stage, self.tokenizer = zero_stage, tokenizer

    def save(self, training: TrainingState) -> None:
        """Write a checkpoint. Every rank calls it. A run that is killed meanwhile keeps the one before.

        Raises:
            UserError: the disk is full, for this rank at least.
        """
        try:
            self._save(training)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not _is_full(error):
                raise
            raise UserError(
                f"{self.folder} cannot be written, the disk is full: make room (see checkpoint.keep) "
                "and run the same command again, which resumes from the checkpoint before",
                alone=True,
            ) from None

    def _save(self, training: TrainingState) -> None:
        final = self.folder / step_name(training.step)
        partial = self.folder / f"{PARTIAL_PREFIX}{final.name}"
        is_main = dist.get_rank() == 0
        if is_main:
            for leftover in self.folder.glob(f"{PARTIAL_PREFIX}*"):
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
        dist.barrier()
        training.engine.save_checkpoint(str(self.folder), tag=partial.name, save_latest=False)
        states = {callback.name: callback.state_dict() for callback in training.callbacks}
        torch.save({"random": random_state(), "callbacks": states}, partial / rank_file(dist.get_rank()))
        model = training.engine.module
        state = full_state_dict(model, training.topology, self.zero_stage)
        if is_main:
            write_model(partial, state, model.config, self.tokenizer)
        dist.barrier()  # every rank has written its part
        if is_main:
            self._complete(partial, final, training.step)
        dist.barrier()

    def _complete(self, partial: Path, final: Path, step: int) -> None:
        files = [file for file in sorted(partial.rglob("*")) if file.is_file()]
        sizes = {file.relative_to(partial).as_posix(): file.stat().st_size for file in files}
        (partial / DESCRIPTION).write_text(Description(step, self.identity, sizes).to_json())
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        write_atomically(self.folder / LATEST, f"{final.name}\n".encode())
        self._delete_old(final)

    def _delete_old(self, newest: Path) -> None:
        others = [folder for folder in completed(self.folder) if folder != newest]
        if self.keep is not None:
            for folder in others[: max(0, len(others) - self.keep + 1)]:
                shutil.rmtree(folder)


def _is_full(error: Exception) -> bool:
    """Whether a write failed because the disk is full. torch and safetensors have their own words for it."""
    if isinstance(error, OSError):
        return error.errno in FULL
    words = "No space left|Disk quota exceeded|file write failed|PytorchStreamWriter|inline_container"
    return re.search(words, str(error)) is not None
