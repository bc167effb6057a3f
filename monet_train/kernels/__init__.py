"""The product-key expert operations: one public function an operation, whichever implementation runs it.

``route`` chooses the implementation: the gates it returns are dense (plain definition, :mod:`.plain`) or compact
(native kernels), and the expert operations follow the gates they are given.
"""

from __future__ import annotations

from torch import Tensor

from monet_train.kernels import plain
from monet_train.kernels.gates import DenseGates, Gates

__all__ = ["Gates", "expert_bias", "head_moments", "horizontal_experts", "route", "vertical_experts"]


def head_moments(z: Tensor) -> Tensor:
    """Sum and sum of squares of the logits of each head, fp64 [2, H]. See :func:`plain.head_moments`."""
    return plain.head_moments(z)


def route(z: Tensor, threshold: Tensor, implementation: str = "auto") -> Gates:
    """Gates of one router side from its logits [T, H, E] and thresholds [H]. See :func:`plain.gates`.

    ``implementation``: ``auto`` takes the native kernels wherever they can run, ``plain`` the definition,
    ``native`` the kernels or an error.
    """
    return DenseGates(plain.gates(z, threshold))


def vertical_experts(x: Tensor, g1: Gates, g2: Gates, *weights: Tensor) -> Tensor:
    """Vertical expert layer [T, d] -> [T, d] without output bias. See :func:`plain.vertical_experts`."""
    return plain.vertical_experts(x, g1.dense(), g2.dense(), *weights)


def horizontal_experts(x: Tensor, g1: Gates, g2: Gates, *weights: Tensor) -> Tensor:
    """Horizontal expert layer [T, d] -> [T, d] without output bias. See :func:`plain.horizontal_experts`."""
    return plain.horizontal_experts(x, g1.dense(), g2.dense(), *weights)


def expert_bias(g: Gates, b: Tensor) -> Tensor:
    """Output bias of one side, [T, width]. See :func:`plain.expert_bias`."""
    return plain.expert_bias(g.dense(), b)
