"""How the routers use their experts: the numbers that tell a healthy Monet from a collapsed one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monet_train.model.transformer import MonetOutput
from monet_train.training.callbacks.base import Callback, Record

WINDOW_STEPS = 100  # a half-expert that no token used for this many steps counts as unused


class RouterMonitor(Callback):
    """Adds, for every router (named by its first layer L), three lists of [side 1, side 2]:

    ``router/L/active``: active half-experts a token; ``router/L/unused``: share of half-experts that no token used
    in the last 100 steps; ``router/L/entropy``: entropy of the mean gate in nats, averaged over the heads
    (log E when all half-experts are used alike).
    """

    def __init__(self, layers: list[int], experts: int) -> None:
        self.layers = layers
        self.last_used = torch.zeros(len(layers), 2, experts, dtype=torch.long)  # step of last use, 0 = none yet
        self.gate_sums: Tensor | None = None  # over the micro-steps of this step: [routers, 2, H, E]
        self.active: Tensor | None = None  # [routers, 2]
        self.micro_steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"last_used": self.last_used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_used = state["last_used"]

    def on_micro_step(self, trainer, output: MonetOutput) -> None:
        gates = torch.stack([router.mean_gates for router in output.routers])
        active = torch.stack([router.active for router in output.routers])
        self.gate_sums = gates if self.gate_sums is None else self.gate_sums + gates
        self.active = active if self.active is None else self.active + active
        self.micro_steps += 1

    def on_step(self, trainer, record: Record) -> None:
        assert self.gate_sums is not None and self.active is not None
        mean = (self.gate_sums / self.micro_steps).cpu()
        self.last_used[(mean > 0).any(2)] = trainer.step
        unused = (self.last_used <= max(0, trainer.step - WINDOW_STEPS)).float().mean(-1)
        entropy = torch.special.entr(mean).sum(-1).mean(-1)
        for index, layer in enumerate(self.layers):
            record[f"router/{layer}/active"] = (self.active[index] / self.micro_steps).tolist()
            record[f"router/{layer}/unused"] = unused[index].tolist()
            record[f"router/{layer}/entropy"] = entropy[index].tolist()
        self.gate_sums = self.active = None
        self.micro_steps = 0
