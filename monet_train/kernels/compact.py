"""Compact gates: only the (token, half-expert) pairs that are active in at least one head are held.

At E = 512, k = 8, H = 6 these are 9% of all pairs. The native kernels make and read this form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from monet_train.kernels import plain
from monet_train.kernels.gates import ActivePairs


@dataclass(frozen=True)
class Layout:
    """Which pairs are active, and their order: (block of tokens, half-expert, token). See ``csrc/pairs.h``.

    The same logits give the same layout on every rank and machine.
    """

    token: Tensor  # int32 [pairs]: token of a pair
    group_start: Tensor  # int32 [blocks * E + 1]: first pair of (block, half-expert)
    row_start: Tensor  # int32 [T + 1]: first entry of a token in row_pair
    row_pair: Tensor  # int32 [pairs]: pairs of a token, by ascending half-expert
    experts: int

    def half_expert(self) -> Tensor:
        """Half-expert of each pair, int64 [pairs]."""
        experts = torch.arange(self.experts, device=self.token.device)
        blocks = (len(self.group_start) - 1) // self.experts
        return experts.repeat(blocks).repeat_interleave(self.group_start.diff(), output_size=len(self.token))

    def tensors(self) -> list[Tensor]:
        """The index tensors, in the order that the native operations expect."""
        return [self.token, self.group_start, self.row_start, self.row_pair]


@dataclass(frozen=True)
class CompactGates:
    """Gates of one router side as [pairs, H] values over a :class:`Layout`; 0 where a head leaves a pair out.

    The gradient with respect to a gate that is 0 is never used (the softmax multiplies it by the gate): whether the
    expert operations leave it 0 is theirs to choose.
    """

    values: Tensor
    layout: Layout

    def dense(self) -> Tensor:
        return _Dense.apply(self.values, self.layout)

    def active_pairs(self) -> ActivePairs:
        return ActivePairs(self.layout.token.long(), self.layout.half_expert(), self.values)

    def total(self) -> Tensor:
        return _Total.apply(self.values, self.layout)

    def largest_total(self) -> Tensor:
        return _LargestTotal.apply(self.values, self.layout)

    def active(self) -> Tensor:
        return (self.values != 0).any(1).sum()

    def map(self, function: Callable[[Tensor], Tensor]) -> CompactGates:
        return CompactGates(function(self.values), self.layout)


def route(z: Tensor, threshold: Tensor) -> CompactGates:
    """Compact gates from logits [T, H, E] and thresholds [H]; the native form of :func:`plain.gates`."""
    values, token, group_start, row_start, row_pair = _Route.apply(z, threshold)
    return CompactGates(values, Layout(token, group_start, row_start, row_pair, experts=z.shape[-1]))


def router_logits(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """Logits [T, H, E] whose backward takes the gradient of :func:`route` in sparse form."""
    return _Logits.apply(x, weight, heads)


class _Logits(torch.autograd.Function):
    """Only active logits have a gradient, under 2% of them: torch's sparse tensors carry it from :class:`_Route`.

    A gradient from elsewhere may be dense, or a sum of both, which autograd makes dense.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        return plain.router_logits(x, weight, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        if not dz.is_sparse:
            dz = dz.flatten(1).to(x.dtype)
            return dz @ weight, dz.t() @ x, None
        token, head, expert = dz._indices()
        row = head * dz.shape[2] + expert
        return *torch.ops.monet.linear_sparse_backward(token, row, dz._values(), x, weight), None


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor) -> tuple[Tensor, ...]:
        values, *layout = torch.ops.monet.route(z, threshold.to(z.dtype))
        ctx.shape = z.shape
        # A sparse gradient is for who expects it: other operations (a view, a cast) refuse one.
        ctx.sparse = getattr(z.grad_fn, "_forward_cls", None) is _Logits
        ctx.save_for_backward(values, *layout)
        ctx.mark_non_differentiable(*layout)
        return values, *layout

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dvalues: Tensor, *_: Tensor | None) -> tuple[Tensor, None]:
        values, *layout = ctx.saved_tensors
        experts = ctx.shape[-1]
        if ctx.sparse:
            indices, active = torch.ops.monet.route_backward_sparse(values, dvalues, layout, experts)
            return torch.sparse_coo_tensor(indices, active, ctx.shape, check_invariants=False), None
        dlogits = torch.ops.monet.route_backward(values, dvalues, layout, experts)
        return torch.ops.monet.scatter_dense(dlogits, layout, experts), None


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(*layout.tensors())
        return torch.ops.monet.scatter_dense(values, layout.tensors(), layout.experts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ddense: Tensor) -> tuple[Tensor, None]:
        return torch.ops.monet.gather_dense(ddense, ctx.saved_tensors), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(*layout.tensors())
        return torch.ops.monet.sum_over_tokens(values, layout.tensors(), layout.experts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, None]:
        return torch.ops.monet.sum_over_tokens_backward(dtotal, ctx.saved_tensors), None


class _LargestTotal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, layout: Layout) -> Tensor:
        ctx.experts = layout.experts
        ctx.save_for_backward(values, *layout.tensors())
        return torch.ops.monet.sum_of_largest(values, layout.tensors(), layout.experts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, None]:
        values, *layout = ctx.saved_tensors
        return torch.ops.monet.sum_of_largest_backward(values, dtotal, layout, ctx.experts), None
