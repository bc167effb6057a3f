"""Names and paths of checkpoints: the one place that spells them.

A run keeps ``checkpoints/step_00000100/`` folders and ``checkpoints/latest``, a text file with the name of the newest.
A step folder holds DeepSpeed's files (weights, optimizer, the ZeRO shards of each rank), ``trainer_rank_*.pt`` (states
of callbacks and random generators), ``trainer.json`` (see :class:`Description`), and the whole model as
``model.safetensors`` with its ``config.json`` and tokenizer, as a Hugging Face folder has them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from monet_train.errors import UserError
from monet_train.typed import from_json

CHECKPOINTS = "checkpoints"  # folder in a run folder
LATEST = "latest"
STEP_PREFIX = "step_"
PARTIAL_PREFIX = "partial_"  # of a step folder that is still being written
DESCRIPTION = "trainer.json"  # written last: a folder that has it is complete
CONFIG = "config.json"
SINGLE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
SHARDED_WEIGHTS = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
OTHER_CHECKPOINT = "move this checkpoint away to resume from the one before, or choose another run.dir"


@dataclass(frozen=True)
class Description:
    """What ``trainer.json`` says of a training checkpoint."""

    step: int  # optimizer steps done
    identity: dict[str, dict[str, Any]]  # what a run that resumes must share, by section and key
    files: dict[str, int]  # size in bytes of every other file

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def read(cls, checkpoint: Path) -> Description:
        """Read it from a step folder.

        Raises:
            UserError: the file is damaged.
        """
        path = checkpoint / DESCRIPTION
        try:
            return from_json(cls, json.loads(path.read_text(encoding="utf-8")), DESCRIPTION)
        except ValueError as error:
            raise UserError(f"{path} cannot be read ({error}); {OTHER_CHECKPOINT}") from None


def checkpoints_folder(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / CHECKPOINTS


def step_name(step: int) -> str:
    """Name of the checkpoint after ``step`` optimizer steps."""
    return f"{STEP_PREFIX}{step:08d}"


def rank_file(rank: int) -> str:
    """Name of the file with the states of one process."""
    return f"trainer_rank_{rank:05d}.pt"


def completed(folder: Path) -> list[Path]:
    """The complete checkpoints of a ``checkpoints`` folder, oldest first."""
    return sorted(path for path in folder.glob(f"{STEP_PREFIX}*") if (path / DESCRIPTION).exists())


def resolve_checkpoint(path: str | Path) -> Path:
    """The folder that holds the weights.

    Args:
        path: a Hugging Face folder, a step folder, a ``checkpoints`` folder or a run folder (the newest step).

    Raises:
        UserError: nothing there can be read.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path} is not a folder; give a run folder, a checkpoint in it, or a downloaded Hugging Face folder"
        )
    if (path / CONFIG).is_file():
        return path
    for folder in (path, checkpoints_folder(path)):
        pointer = folder / LATEST
        if pointer.is_file():
            newest = folder / pointer.read_text(encoding="utf-8").strip()
            if not (newest / CONFIG).is_file():
                raise UserError(f"{pointer} names {newest.name}, which is not a checkpoint; give a step folder instead")
            return newest
    raise UserError(f"{path} holds neither {CONFIG} nor {CHECKPOINTS}/{LATEST}; give a folder with a checkpoint")
