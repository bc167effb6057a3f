"""The progress bar, or plain lines where there is no terminal."""

from __future__ import annotations

import sys

from tqdm import tqdm

from monet_train.training.callbacks.base import Callback, Record


class Progress(Callback):
    """A tqdm bar of steps with loss and speed on a terminal; else one line every ``every`` steps."""

    def __init__(self, total: int, every: int, bar: bool) -> None:
        self.total, self.every = total, every
        self.bar_wanted = bar and sys.stderr.isatty()
        self.bar: tqdm | None = None

    def on_start(self, trainer) -> None:
        if self.bar_wanted:
            self.bar = tqdm(total=self.total, initial=trainer.step, unit="step", desc="train", dynamic_ncols=True)

    def on_step(self, trainer, record: Record) -> None:
        shown = f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s"
        if record["mfu"] is not None:
            shown += f"  mfu {record['mfu']:.0%}"
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix_str(shown, refresh=False)
        elif record["step"] % self.every == 0 or record["step"] == self.total:
            print(f"step {record['step']}/{self.total}  {shown}  lr {record['lr']:.2e}", file=sys.stderr, flush=True)

    def on_evaluation(self, trainer, record: Record) -> None:
        tqdm.write(f"step {record['step']}: eval_loss {record['eval_loss']:.4f}", file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
