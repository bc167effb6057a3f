"""Runs several trainings one after another in the processes of one torchrun: imports are most of a small run's time."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from monet_train.config.compose import compose
from monet_train.parallel.launch import read_launch
from monet_train.training.callbacks.base import Callback
from monet_train.training.setup import build_trainer


class KilledWhileSaving(Callback):
    """Kills its process in the middle of writing the checkpoint of ``step``: when the callbacks' states are asked."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.due = False

    def on_step(self, trainer, record) -> None:
        self.due = trainer.step == self.step

    def state_dict(self) -> dict[str, Any]:
        if self.due:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # torchrun's own store serves one process group only
    for port, overrides, killed_at in json.loads(Path(sys.argv[1]).read_text()):
        os.environ["MASTER_PORT"] = str(port)
        with build_trainer(compose(overrides), read_launch()) as trainer:
            if killed_at is not None:
                trainer.callbacks.insert(0, KilledWhileSaving(killed_at))
            trainer.fit()
