"""Orderly stop: on SIGTERM or SIGUSR1 (Slurm before the time limit) finish the step, save, and end."""

from __future__ import annotations

import signal
from types import FrameType

from monet_train.training.callbacks.base import Callback

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal(Callback):
    """Remembers a stop signal of this process; the loop asks all ranks at the end of each step."""

    def __init__(self) -> None:
        self.stopped = False

    def on_start(self, trainer) -> None:
        def request(number: int, frame: FrameType | None) -> None:
            trainer.stop_requested = True

        for number in SIGNALS:
            signal.signal(number, request)

    def on_end(self, trainer) -> None:
        self.stopped = trainer.step < trainer.total_steps

    def close(self) -> None:
        # launchers send SIGTERM to the ranks that are still there when the first one has left; these have saved too
        # and should leave with the same status
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN if self.stopped else signal.SIG_DFL)
