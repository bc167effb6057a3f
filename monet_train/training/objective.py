"""What is minimised: next-token cross-entropy plus the paper's two auxiliary losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monet_train.model.transformer import MonetOutput
from monet_train.training.records import Part


@dataclass(frozen=True)
class Losses(Part):
    """The losses of a step."""

    loss: float  # cross-entropy, averaged over the counted targets of the global batch
    uniformity: float  # averaged over the micro-steps, each of all its tokens
    ambiguity: float  # likewise


@dataclass(frozen=True)
class LanguageModelling:
    """loss = cross-entropy + uniformity_weight * uniformity + ambiguity_weight * ambiguity (paper section 3.4).

    The cross-entropy is the mean over all counted targets of the global batch. So a rank or a micro-step with fewer
    counted targets weighs less, and the topology changes nothing. The auxiliary losses are about the routing of all
    tokens, whether their targets count or not, so each micro-step weighs the same.
    """

    uniformity_weight: float
    ambiguity_weight: float

    def __call__(self, output: MonetOutput, mean_targets: Tensor) -> tuple[Tensor, Tensor]:
        """The scalar to differentiate and the metrics of a micro-step: see :class:`.loop.Objective`."""
        assert output.loss_sum is not None
        loss, uniformity, ambiguity = output.loss_sum / mean_targets, output.uniformity, output.ambiguity
        total = loss + self.uniformity_weight * uniformity + self.ambiguity_weight * ambiguity
        return total, torch.stack([loss, uniformity, ambiguity]).detach().double()

    def record(self, metrics: list[float]) -> Losses:
        """The averaged metrics by name."""
        return Losses(*metrics)

    def held_out(self, output: MonetOutput) -> Tensor:
        """[sum of the cross-entropy over the counted targets, their number], fp64."""
        assert output.loss_sum is not None and output.targets is not None
        return torch.stack([output.loss_sum.double(), output.targets.double()])
