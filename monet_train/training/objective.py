"""What is minimised: next-token cross-entropy plus the paper's two auxiliary losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monet_train.config.schema import TrainSection
from monet_train.model.transformer import MonetOutput

METRICS = ("loss", "uniformity", "ambiguity")


@dataclass(frozen=True)
class Objective:
    """loss = cross-entropy + uniformity_weight * uniformity + ambiguity_weight * ambiguity (paper section 3.4)."""

    uniformity_weight: float
    ambiguity_weight: float

    @classmethod
    def of(cls, config: TrainSection) -> Objective:
        return cls(config.uniformity_weight, config.ambiguity_weight)

    def __call__(self, output: MonetOutput) -> tuple[Tensor, Tensor]:
        """The scalar to differentiate, and the :data:`METRICS` of this process, detached, as one fp64 tensor."""
        assert output.loss is not None
        uniformity, ambiguity = output.uniformity, output.ambiguity
        total = output.loss + self.uniformity_weight * uniformity + self.ambiguity_weight * ambiguity
        return total, torch.stack([output.loss, uniformity, ambiguity]).detach().double()
