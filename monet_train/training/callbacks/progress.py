"""The progress bar, or plain lines where there is no terminal."""

from __future__ import annotations

import sys
from typing import Self

from tqdm import tqdm

from monet_train.training.callbacks.utilisation import Work
from monet_train.training.loop import Callback, Phase, Trainer
from monet_train.training.objective import Losses
from monet_train.training.prepared import Prepared
from monet_train.training.records import HeldOutLoss, Record, Timing


class Progress(Callback):
    """A tqdm bar of steps with loss and speed on a terminal; else one line every ``every`` steps."""

    name = "progress"
    phase = Phase.WRITE

    def __init__(self, total: int, every: int, bar: bool) -> None:
        self.total, self.every = total, every
        self.bar_wanted = bar and sys.stderr.isatty()
        self.bar: tqdm | None = None

    @classmethod
    def build(cls, prepared: Prepared) -> Self | None:
        logging = prepared.config.logging
        return cls(prepared.steps, logging.every, logging.progress) if prepared.launch.is_main else None

    def on_start(self, trainer: Trainer) -> None:
        if self.bar_wanted:
            self.bar = tqdm(total=self.total, initial=trainer.step, unit="step", desc="train", dynamic_ncols=True)

    def on_step(self, trainer: Trainer, record: Record) -> None:
        losses, timing, work = record.get(Losses), record.get(Timing), record.get(Work)
        shown = f"loss {losses.loss:.4f}  {timing.tokens_per_second:,.0f} tokens/s"
        if work.mfu is not None:
            shown += f"  mfu {work.mfu:.0%}"
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix_str(shown, refresh=False)
        elif record.step % self.every == 0 or record.step == self.total:
            print(f"step {record.step}/{self.total}  {shown}  lr {timing.lr:.2e}", file=sys.stderr, flush=True)

    def on_evaluation(self, trainer: Trainer, record: Record) -> None:
        tqdm.write(f"step {record.step}: eval_loss {record.get(HeldOutLoss).eval_loss:.4f}", file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
