"""Masks: factors of single experts, 0 for those that are off."""

from __future__ import annotations

import torch
from torch import Tensor

from monet_train.errors import UserError
from monet_train.model.statistics import FullPrecision


class ExpertMask(FullPrecision):
    """Factors M of the experts of a routing group, [1 or H, E, E]; None where every expert is as it is.

    No part of the state dict.
    """

    factors: Tensor | None

    def __init__(self, heads: int, experts: int) -> None:
        super().__init__()
        self.shape = (heads, experts, experts)
        self.register_buffer("factors", None, persistent=False)

    def set(self, mask: Tensor, like: Tensor) -> None:
        """Take a mask that broadcasts to [H, E, E], to the device of ``like``; fp64 where that is fp64, else fp32."""
        if not isinstance(mask, Tensor) or mask.is_complex():
            raise UserError(f"mask must be a tensor of bool (False = off) or real factors, not {_kind(mask)}")
        try:
            mask.expand(self.shape)
        except RuntimeError:
            given, wanted = list(mask.shape), list(self.shape)
            raise UserError(f"mask of shape {given} does not broadcast to [H, E, E] = {wanted}") from None
        factors = mask.detach().to(like.device, torch.float64 if like.dtype == torch.float64 else torch.float32)
        if not factors.isfinite().all():
            raise UserError("mask has values that are not finite; use 0 for an expert that is off")
        heads = len(mask) if mask.dim() == 3 else 1  # heads are kept apart only where they may differ
        self.factors = factors.expand(heads, *self.shape[1:]).clone(memory_format=torch.contiguous_format)

    def clear(self) -> None:
        """Every expert as it is."""
        self.factors = None


def _kind(value: object) -> str:
    return f"{value.dtype} values" if isinstance(value, Tensor) else type(value).__name__
