"""What a model shares with other processes. It imports nothing but torch; the default is one process alone.

The model is written without ranks: wherever other processes may take part, it asks the :class:`Collectives` that its
constructor was given. :mod:`monet_train.model.sharding` makes those of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Collectives:
    """The operations and layers of a model in which other processes take part. No field has a default.

    Two kinds of processes are meant: the data-parallel ranks, which share a micro-step, and the tensor-parallel
    ranks, which share each layer.
    """

    sum_over_batch: Callable[[Tensor], Tensor]  # add a tensor over the ranks that share a micro-step; no gradient
    tensor_size: int  # tensor-parallel ranks over which widths are split
    enter: Callable[[Tensor], Tensor]  # into a split layer: the same value; gradients are added over the ranks
    leave: Callable[[Tensor], Tensor]  # out of a split layer: partial sums are added over the ranks
    embedding: Callable[[int, int], nn.Module]  # (vocabulary, width), split by vocabulary
    column: Callable[[int, int], nn.Module]  # (inputs, outputs) linear without bias, split by outputs
    row: Callable[[int, int], nn.Module]  # (inputs, outputs) linear without bias, split by inputs; outputs added
    cross_entropy: Callable[[Tensor, Tensor], Tensor]  # of each position: logits [B, S, V / ranks], targets [B, S]
    gather_logits: Callable[[Tensor], Tensor]  # [B, S, V / ranks] -> [B, S, V]

    def share(self, width: int) -> int:
        """What this process holds of a split width."""
        share, rest = divmod(width, self.tensor_size)
        if rest:
            raise ValueError(f"a width of {width} does not divide by {self.tensor_size} tensor-parallel ranks")
        return share


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each position in fp32. logits [B, S, V], targets [B, S] -> [B, S]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer without bias."""
    return nn.Linear(inputs, outputs, bias=False)


def unchanged(tensor: Tensor) -> Tensor:
    """What sums and gathers give where there is one process."""
    return tensor


ALONE = Collectives(
    sum_over_batch=unchanged,
    tensor_size=1,
    enter=unchanged,
    leave=unchanged,
    embedding=nn.Embedding,
    column=linear,
    row=linear,
    cross_entropy=cross_entropy,
    gather_logits=unchanged,
)
