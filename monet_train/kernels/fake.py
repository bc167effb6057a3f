"""What the native operations return, without computing it: shapes, types and strides.

``torch.compile`` and ``torch.export`` trace with tensors that have no data. Each operation that
``csrc/bindings/schema.cpp`` declares has a function of its name here that stands in for it. The number of active
pairs depends on the logits, so :func:`route` returns tensors of a size that is known only when the program runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BLOCK_TOKENS = 512  # as in csrc/pairs.h


def router_logits(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.shape[0], heads, weight.shape[0] // heads), dtype=dtype)


def router_logits_backward(dlogits: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return _contiguous(x), _contiguous(weight)


def head_moments(logits: Tensor) -> Tensor:
    return logits.new_empty((2, logits.shape[1]), dtype=torch.float64)


def route(logits: Tensor, threshold: Tensor) -> tuple[Tensor, ...]:
    tokens, heads, experts = logits.shape
    pairs = torch.library.get_ctx().new_dynamic_size()
    blocks = (tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    sizes = (pairs, blocks * experts + 1, tokens + 1, pairs)
    return logits.new_empty((pairs, heads)), *(logits.new_empty((size,), dtype=torch.int32) for size in sizes)


def route_backward(dgates: Tensor, gates: Tensor, layout: list[Tensor], experts: int) -> Tensor:
    return dense_gates(gates, layout, experts)


def dense_gates(gates: Tensor, layout: list[Tensor], experts: int) -> Tensor:
    _, _, row_start, _ = layout
    return gates.new_empty((row_start.shape[0] - 1, gates.shape[1], experts))


def sum_over_tokens(gates: Tensor, layout: list[Tensor], experts: int) -> Tensor:
    return gates.new_empty((gates.shape[1], experts))


def sum_of_largest(gates: Tensor, layout: list[Tensor], experts: int) -> Tensor:
    return gates.new_empty((gates.shape[1],))


def of_gates_backward(dout: Tensor, gates: Tensor, layout: list[Tensor], experts: int) -> Tensor:
    return _contiguous(gates)


def vertical_experts(
    x: Tensor, gates1: Tensor, layout1: list[Tensor], gates2: Tensor, layout2: list[Tensor], experts: int,
    mask: Tensor | None, weights: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    return [_contiguous(x), *(_by_pair(gates, u, experts) for gates, u in ((gates1, weights[0]), (gates2, weights[2])))]


def horizontal_experts(
    x: Tensor, gates1: Tensor, layout1: list[Tensor], gates2: Tensor, layout2: list[Tensor], experts: int,
    mask: Tensor | None, weights: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    return [_contiguous(x), _by_pair(gates1, weights[0], experts)]


def vertical_experts_backward(
    dout: Tensor, x: Tensor, gates1: Tensor, layout1: list[Tensor], gates2: Tensor, layout2: list[Tensor],
    experts: int, mask: Tensor | None, weights: list[Tensor], kept: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    inputs, outputs = weights[:4], weights[4:]
    return [*map(_contiguous, (x, gates1, gates2, *inputs)), *map(_as_stored, outputs)]


def horizontal_experts_backward(
    dout: Tensor, x: Tensor, gates1: Tensor, layout1: list[Tensor], gates2: Tensor, layout2: list[Tensor],
    experts: int, mask: Tensor | None, weights: list[Tensor], kept: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    inputs, outputs = weights[:2], weights[2:]
    return [*map(_contiguous, (x, gates1, gates2, *inputs)), *map(_as_stored, outputs)]


def expert_weights(
    gates1: Tensor, layout1: list[Tensor], gates2: Tensor, layout2: list[Tensor], experts: int, mask: Tensor
) -> tuple[Tensor, Tensor]:
    return gates1.new_empty((gates1.shape[0],)), gates2.new_empty((gates2.shape[0],))


def expert_weights_backward(
    dweights1: Tensor, dweights2: Tensor, gates1: Tensor, layout1: list[Tensor], gates2: Tensor,
    layout2: list[Tensor], experts: int, mask: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _contiguous(gates1), _contiguous(gates2)


def expert_bias(gates: Tensor, layout: list[Tensor], b: Tensor) -> Tensor:
    _, _, row_start, _ = layout
    return b.new_empty((row_start.shape[0] - 1, b.shape[1]))


def expert_bias_backward(dout: Tensor, gates: Tensor, layout: list[Tensor], b: Tensor) -> tuple[Tensor, Tensor]:
    return _contiguous(gates), _contiguous(b)


def visit_experts(
    gates1: Tensor, layout1: list[Tensor], gates2: Tensor, layout2: list[Tensor], experts: int, tokens: int,
    hashes: Tensor, unit: int, inputs: list[Tensor], readers: list[Tensor], tally: list[Tensor],
) -> None:  # fmt: skip
    """It changes ``tally`` in place and returns nothing."""


OPERATIONS: dict[str, Callable[..., Any]] = {
    **{
        function.__name__: function
        for function in (
            router_logits, router_logits_backward, head_moments, route, route_backward, dense_gates, sum_over_tokens,
            sum_of_largest, vertical_experts, vertical_experts_backward, horizontal_experts,
            horizontal_experts_backward, expert_weights, expert_weights_backward, expert_bias, expert_bias_backward,
            visit_experts,
        )
    },
    "dense_gates_backward": of_gates_backward,
    "sum_over_tokens_backward": of_gates_backward,
    "sum_of_largest_backward": of_gates_backward,
}  # fmt: skip


def register(library: str = "monet") -> None:
    """Make the functions known to the framework, for the operations of ``torch.ops.<library>``."""
    for name, function in OPERATIONS.items():
        torch.library.register_fake(f"{library}::{name}", function)


def _contiguous(like: Tensor) -> Tensor:
    return like.new_empty(like.shape)


def _as_stored(weight: Tensor) -> Tensor:
    """The gradient of an output weight: by columns where the weight is."""
    if weight.is_contiguous() or not weight.t().is_contiguous():
        return _contiguous(weight)
    return _contiguous(weight.t()).t()


def _by_pair(gates: Tensor, input_weight: Tensor, experts: int) -> Tensor:
    """A value of each pair and inner unit."""
    return gates.new_empty((gates.shape[0], input_weight.shape[0] // experts))
