"""When checkpoints are written."""

from __future__ import annotations

from monet_train.checkpoints.save import CheckpointWriter
from monet_train.training.callbacks.base import Callback, Record


class Checkpointing(Callback):
    """Saves every ``every`` steps (None: not between) and at the end, also of a run that is stopped by a signal.

    Last in the trainer's list, so that what it saves has seen the step whole.
    """

    def __init__(self, writer: CheckpointWriter, every: int | None) -> None:
        self.writer, self.every = writer, every
        self.saved_step: int | None = None

    def on_start(self, trainer) -> None:
        self.saved_step = trainer.step if trainer.step else None

    def on_step(self, trainer, record: Record) -> None:
        if self.every is not None and trainer.step % self.every == 0:
            self._save(trainer)

    def on_end(self, trainer) -> None:
        if trainer.step != self.saved_step:
            self._save(trainer)

    def _save(self, trainer) -> None:
        self.writer.save(trainer)
        self.saved_step = trainer.step
