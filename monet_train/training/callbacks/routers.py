"""How the routers use their experts: the figures that distinguish a healthy Monet from a collapsed one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from monet_train.model.transformer import MonetOutput
from monet_train.training.loop import Callback, Phase, Trainer
from monet_train.training.prepared import Prepared
from monet_train.training.records import Figures, Part, Record

WINDOW_STEPS = 100  # a half-expert that no token used for this many steps counts as unused


@dataclass(frozen=True)
class RouterUsage(Part):
    """How one step used the routers. Every list has one pair per router: [side 1, side 2]."""

    layers: list[int]  # the first layer of each router, by which ``metrics.jsonl`` names it
    active: list[list[float]]  # active half-experts per token
    unused: list[list[float]]  # share of half-experts that no token used in the last 100 steps
    entropy: list[list[float]]  # of the mean gate, nats, averaged over the heads; log E if all are used equally

    def figures(self) -> Figures:
        """As ``router/L/active``, ``router/L/unused`` and ``router/L/entropy``."""
        return {
            f"router/{layer}/{name}": values[index]
            for index, layer in enumerate(self.layers)
            for name, values in (("active", self.active), ("unused", self.unused), ("entropy", self.entropy))
        }


class RouterMonitor(Callback):
    """Adds :class:`RouterUsage`."""

    name = "router_monitor"
    phase = Phase.MEASURE

    def __init__(self, layers: list[int], experts: int) -> None:
        self.layers = layers
        self.last_used = torch.zeros(len(layers), 2, experts, dtype=torch.long)  # step of last use, 0 = none yet
        self.gate_sums: Tensor | None = None  # over the micro-steps of this step: [routers, 2, H, E]
        self.active: Tensor | None = None  # [routers, 2]
        self.micro_steps = 0

    @classmethod
    def build(cls, prepared: Prepared) -> Self:
        model = prepared.config.model
        return cls(list(model.router_layers), model.moe_experts)

    def state_dict(self) -> dict[str, Any]:
        return {"last_used": self.last_used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_used = state["last_used"]

    def on_micro_step(self, trainer: Trainer, output: MonetOutput) -> None:
        gates = torch.stack([router.mean_gates for router in output.routers])
        active = torch.stack([router.active for router in output.routers])
        self.gate_sums = gates if self.gate_sums is None else self.gate_sums + gates
        self.active = active if self.active is None else self.active + active
        self.micro_steps += 1

    def on_step(self, trainer: Trainer, record: Record) -> None:
        assert self.gate_sums is not None and self.active is not None
        mean = (self.gate_sums / self.micro_steps).cpu()
        self.last_used[(mean > 0).any(2)] = trainer.step
        unused = (self.last_used <= max(0, trainer.step - WINDOW_STEPS)).float().mean(-1)
        entropy = torch.special.entr(mean).sum(-1).mean(-1)
        active = self.active / self.micro_steps
        record.add(RouterUsage(self.layers, active.tolist(), unused.tolist(), entropy.tolist()))
        self.gate_sums = self.active = None
        self.micro_steps = 0
