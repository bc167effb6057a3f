"""Held-out evaluation during training."""

from __future__ import annotations

import torch

from monet_train.data.batches import MicroBatches
from monet_train.training.callbacks.base import Callback, Record


class Evaluation(Callback):
    """Mean cross-entropy on held-out sequences, every ``every`` steps (0: not between) and after the last one.

    The router takes its running statistics here. ``batches`` holds all the sequences as its step 0.
    """

    def __init__(self, batches: MicroBatches, every: int) -> None:
        self.batches, self.every = batches, every

    def on_step(self, trainer, record: Record) -> None:
        last = trainer.step == trainer.total_steps
        if not last and (self.every == 0 or trainer.step % self.every):
            return
        evaluation = {"step": trainer.step, "tokens": record["tokens"], "eval_loss": self._loss(trainer)}
        for callback in trainer.callbacks:
            callback.on_evaluation(trainer, evaluation)

    def close(self) -> None:
        self.batches.close()

    @torch.no_grad()
    def _loss(self, trainer) -> float:
        trainer.engine.eval()
        losses = [trainer.forward(batch).loss.double() for batch in self.batches.of(0)]
        trainer.engine.train()
        return trainer.mean_over_data(torch.stack(losses).mean()).item()
