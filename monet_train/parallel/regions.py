"""Into a layer that tensor-parallel ranks share, and out of it again: a conjugate pair of operations.

Megatron has the same pair, but in megatron-core 0.16 its backward pass silently adds nothing where the gradient is not
contiguous (it reduces a copy), and where it is contiguous it overwrites a tensor that may belong to another operation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def enter_region(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The same value. Its gradient is added over the ranks, since each has only that of its share."""
    return _Enter.apply(x, group)


def leave_region(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Partial sums, added over the ranks. Each rank gets the gradient of the sum."""
    return _Leave.apply(x, group)


def _sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum(gradient, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
