"""Masks: factors of single experts, 0 for those that are off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from monet_train.errors import UserError
from monet_train.kernels.plain import expert_factors
from monet_train.model.statistics import FullPrecision


class ExpertMask(FullPrecision):
    """Factors M of the experts of a routing group. Not part of the state dict.

    Each layer of the group has its own; layers that were given the same factors share one tensor.
    """

    def __init__(self, heads: int, experts: int, layers: int) -> None:
        super().__init__()
        self.heads, self.experts = heads, experts
        self.names = [f"layer_{number}" for number in range(layers)]
        for name in self.names:
            self.register_buffer(name, None, persistent=False)

    @property
    def factors(self) -> list[Tensor | None]:
        """Of each layer of the group: [1 or H, E, E], or None where every expert is as it is."""
        return [self._buffers[name] for name in self.names]

    def set(self, mask: Tensor, like: Tensor, layer: int | None = None) -> None:
        """Take a mask that broadcasts to [H, E, E], to the device of ``like``; fp64 where that is fp64, else fp32.

        Args:
            layer: place in the group of the only layer that takes it; None: all of them.
        """
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        try:
            factors = expert_factors(mask, self.heads, self.experts, dtype).to(like.device)
        except ValueError as error:
            raise UserError(str(error)) from None
        for name in self.names if layer is None else [self.names[layer]]:
            setattr(self, name, factors)

    def clear(self) -> None:
        """Every expert as it is."""
        for name in self.names:
            setattr(self, name, None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        moved: dict[int, tuple[Tensor, Tensor]] = {}  # what layers share, they share afterwards

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor, fn(tensor)
            return moved[id(tensor)][1]

        return super()._apply(once, recurse)
