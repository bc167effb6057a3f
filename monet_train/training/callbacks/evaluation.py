"""Held-out evaluation during training."""

from __future__ import annotations

from typing import Self

from monet_train.data.batches import MicroBatches
from monet_train.training.loop import Callback, Phase, Trainer
from monet_train.training.prepared import Prepared
from monet_train.training.records import Record


class Evaluation(Callback):
    """Evaluates on held-out sequences every ``every`` steps (0: only at the end) and after the last one.

    ``batches`` holds all the sequences as its step 0.
    """

    name = "evaluation"
    phase = Phase.EVALUATE

    def __init__(self, batches: MicroBatches, every: int) -> None:
        self.batches, self.every = batches, every

    @classmethod
    def build(cls, prepared: Prepared) -> Self | None:
        every, batches = prepared.config.eval.every, prepared.held_out_batches()
        return None if every is None or batches is None else cls(batches, every)

    def on_step(self, trainer: Trainer, record: Record) -> None:
        last = trainer.step == trainer.total_steps
        if last or (self.every and trainer.step % self.every == 0):
            trainer.evaluate(self.batches)

    def close(self) -> None:
        self.batches.close()
