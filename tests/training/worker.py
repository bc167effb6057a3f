"""Runs several trainings one after another in the processes of one torchrun: imports are most of a small run's time."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

from monet_train.configuration import compose
from monet_train.parallel.launch import read_launch
from monet_train.training.setup import build_trainer

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # torchrun's own store serves one process group only
    for port, overrides in json.loads(Path(sys.argv[1]).read_text()):
        os.environ["MASTER_PORT"] = str(port)
        with build_trainer(compose(overrides), read_launch()) as trainer:
            trainer.fit()
