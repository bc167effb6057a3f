"""How much of the devices' peak a run uses, counted by the dense model's work and by the work really done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from monet_train.config.schema import TrainConfig
from monet_train.kernels import Kernels
from monet_train.model.config import MonetConfig
from monet_train.planning.devices import peak_flops
from monet_train.planning.flops import WorkDone, training_flops_per_token
from monet_train.training.callbacks.routers import RouterUsage
from monet_train.training.loop import Callback, Phase, Trainer
from monet_train.training.prepared import Prepared
from monet_train.training.records import Part, Record, Timing


@dataclass(frozen=True)
class Work(Part):
    """A step's FLOPs. The shares are None where the devices' peak is unknown."""

    mfu: float | None  # the model's dense FLOPs per second over the peak of all devices
    hfu: float | None  # the FLOPs really done per second over the peak
    flops_per_token: float  # really done


class Utilisation(Callback):
    """Adds :class:`Work`, from the step's :class:`RouterUsage`."""

    name = "utilisation"
    phase = Phase.MEASURE

    def __init__(self, config: MonetConfig, seq_length: int, work: WorkDone, peak_flops: float | None) -> None:
        self.config, self.seq_length, self.work = config, seq_length, work
        self.peak_flops = peak_flops  # of all devices together
        self.dense = training_flops_per_token(config, seq_length)

    @classmethod
    def build(cls, prepared: Prepared) -> Self:
        config = prepared.config
        peak = peak_flops(prepared.device, config.train.precision)
        all_peaks = None if peak is None else peak * prepared.launch.world_size
        return cls(config.model, config.train.seq_length, work_done(config, prepared.device), all_peaks)

    def on_step(self, trainer: Trainer, record: Record) -> None:
        done = self.work.flops_per_token(self.config, self.seq_length, record.get(RouterUsage).active)
        speed = record.get(Timing).tokens_per_second
        mfu, hfu = (self.peak_flops and flops * speed / self.peak_flops for flops in (self.dense, done))
        record.add(Work(mfu, hfu, done))


def work_done(config: TrainConfig, device: torch.device) -> WorkDone:
    """The part of the dense work that the implementation running on ``device`` really does."""
    native = Kernels(config.kernels).is_native(device)
    return WorkDone(
        rows_skipped=native and device.type == "cpu",
        mixing_skipped=native,
        causal=not config.data.reset_attention,
        recompute=config.train.recompute,
        copies=config.parallel.tensor,
    )
