"""When checkpoints are written."""

from __future__ import annotations

from typing import Self

from monet_train.checkpoints.layout import checkpoints_folder, step_name
from monet_train.checkpoints.save import CheckpointWriter
from monet_train.training.events import Save
from monet_train.training.loop import Callback, Phase, Trainer
from monet_train.training.prepared import Prepared
from monet_train.training.records import Record


class Checkpointing(Callback):
    """Saves every ``every`` steps (None: only at the end) and at the end, also when a signal stops the run."""

    name = "checkpointing"
    phase = Phase.SAVE

    def __init__(self, writer: CheckpointWriter, every: int | None) -> None:
        self.writer, self.every = writer, every
        self.saved_step: int | None = None

    @classmethod
    def build(cls, prepared: Prepared) -> Self:
        config = prepared.config
        writer = CheckpointWriter(
            checkpoints_folder(prepared.folder),
            keep=config.checkpoint.keep,
            identity=prepared.identity,
            zero_stage=config.zero.stage,
            tokenizer=prepared.corpus.tokenizer,
        )
        return cls(writer, config.checkpoint.every)

    def on_start(self, trainer: Trainer) -> None:
        self.saved_step = trainer.step if trainer.step else None

    def on_step(self, trainer: Trainer, record: Record) -> None:
        if self.every is not None and trainer.step % self.every == 0:
            self._save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if trainer.step != self.saved_step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self.writer.save(trainer)
        self.saved_step = trainer.step
        trainer.emit(Save(step_name(trainer.step)))
