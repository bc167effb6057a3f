"""How much of the devices' peak a run uses: of the model's dense work, and of the work that is really done."""

from __future__ import annotations

from monet_train.model.config import MonetConfig
from monet_train.planning.flops import WorkDone, training_flops_per_token
from monet_train.training.callbacks.base import Callback, Record


class Utilisation(Callback):
    """Adds three figures; it comes after :class:`RouterMonitor`, whose figures it takes.

    ``mfu``: the model's dense FLOPs a second over the peak; ``hfu``: the FLOPs really done over the peak (both None
    where the peak is unknown); ``flops_per_token``: the FLOPs really done for a token.
    """

    def __init__(self, config: MonetConfig, seq_length: int, work: WorkDone, peak_flops: float | None) -> None:
        self.config, self.seq_length, self.work = config, seq_length, work
        self.peak_flops = peak_flops  # of all devices together
        self.dense = training_flops_per_token(config, seq_length)

    def on_step(self, trainer, record: Record) -> None:
        active = [record[f"router/{layer}/active"] for layer in self.config.router_layers]
        done = self.work.flops_per_token(self.config, self.seq_length, active)
        for name, flops in (("mfu", self.dense), ("hfu", done)):
            record[name] = self.peak_flops and flops * record["tokens_per_second"] / self.peak_flops
        record["flops_per_token"] = done
