"""As :mod:`tests.training.worker`, with experts switched off in both routing groups."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import torch

from monet_train.config.compose import compose
from monet_train.parallel.launch import read_launch
from monet_train.training.setup import build_trainer

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # torchrun's own store serves one process group only
    for port, overrides, _ in json.loads(Path(sys.argv[1]).read_text()):
        os.environ["MASTER_PORT"] = str(port)
        with build_trainer(compose(overrides), read_launch()) as trainer:
            model = trainer.engine.module
            generator = torch.Generator().manual_seed(0)
            shape = model.config.moe_heads, model.config.moe_experts, model.config.moe_experts
            model.set_expert_mask(0, torch.rand(shape, generator=generator) > 0.5)
            model.set_expert_mask(1, torch.randn(shape[1:], generator=generator))
            trainer.fit()
