"""Orderly stop: on SIGTERM or SIGUSR1 (Slurm before the time limit) finish the step, save, and end."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from monet_train.training.loop import Callback, Phase, Trainer

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal(Callback):
    """Remembers a stop signal of this process; the loop asks all ranks at the end of each step."""

    name = "stop_signal"
    phase = Phase.CONTROL

    def __init__(self) -> None:
        self.stopped = False
        self.before: dict[signal.Signals, Any] = {}  # the handlers of the process

    def on_start(self, trainer: Trainer) -> None:
        def request(number: int, frame: FrameType | None) -> None:
            trainer.request_stop()

        for number in SIGNALS:
            self.before[number] = signal.signal(number, request)

    def on_end(self, trainer: Trainer) -> None:
        self.stopped = trainer.step < trainer.total_steps

    def close(self) -> None:
        # launchers send SIGTERM to the ranks that remain when the first one has left; these have saved too and should
        # end with the same status
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if self.stopped else handler)
