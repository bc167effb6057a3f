"""How a parameter is split over tensor-parallel ranks. It imports nothing but torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """A parameter is cut along ``axis``; ``by_expert``: within each half-expert, whose units lie side by side."""

    axis: int
    by_expert: bool = False

    def cut(self, full: Tensor, experts: int, rank: int, size: int) -> Tensor:
        """The part of ``full`` that rank ``rank`` of ``size`` holds, contiguous. ``experts``: half-experts per side."""
        if not self.by_expert:
            return full.chunk(size, self.axis)[rank].contiguous()
        units = full.unflatten(self.axis, (experts, -1))
        return units.chunk(size, self.axis + 1)[rank].flatten(self.axis, self.axis + 1).contiguous()

    def join(self, shards: Sequence[Tensor], experts: int) -> Tensor:
        """The full parameter from the parts of all ranks, in rank order."""
        if not self.by_expert:
            return torch.cat(list(shards), self.axis)
        units = [shard.unflatten(self.axis, (experts, -1)) for shard in shards]
        return torch.cat(units, self.axis + 1).flatten(self.axis, self.axis + 1)
