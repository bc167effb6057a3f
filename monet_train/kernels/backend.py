"""Which implementation runs the routing and expert operations: the plain definition or the native kernels.

:class:`Kernels` chooses once per model. The gates that it routes are dense (plain definition, :mod:`.plain`) or
compact (native kernels of ``csrc/``, :mod:`.compact`), and the expert operations follow the gates they are given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monet_train.errors import UserError
from monet_train.kernels import compact, experts, extension, plain
from monet_train.kernels.compact import CompactGates
from monet_train.kernels.gates import DenseGates, Gates

IMPLEMENTATIONS = ("auto", "native", "plain")
NATIVE_TYPES = (torch.float32, torch.bfloat16, torch.float64)  # other tokens (fp16) take the plain definition


@dataclass(frozen=True)
class Kernels:
    """The choice of a model.

    Args:
        implementation: ``auto`` takes the native kernels wherever they can run (fp32 logits), ``plain`` the
            definition, ``native`` the kernels (fp32 or fp64 logits) or an error.

    Raises:
        UserError: there is no such implementation.
    """

    implementation: str = "auto"

    def __post_init__(self) -> None:
        if self.implementation not in IMPLEMENTATIONS:
            raise UserError(f"kernels={self.implementation} is unknown; use one of {', '.join(IMPLEMENTATIONS)}")

    def is_native(self, device: torch.device) -> bool:
        """Whether the native kernels will run on ``device``.

        Raises:
            UserError: native kernels are asked for and cannot run.
        """
        if self.implementation == "plain":
            return False
        reason = _why_not_native(device)
        if self.implementation == "native" and reason is not None:
            raise UserError(f"kernels=native cannot run here ({reason}): build them, or use kernels=auto or plain")
        return reason is None

    def describe(self, device: torch.device | str) -> str:
        """One line for the start of a run: which implementation will run, and why.

        Raises:
            UserError: as :meth:`is_native`.
        """
        device = torch.device(device)
        if self.is_native(device):
            if device.type == "cuda":
                return f"expert kernels: native (CUDA, {torch.cuda.get_device_name(device)})"
            return f"expert kernels: native, sparse (CPU, {torch.ops.monet.instruction_set()})"
        why = "as asked" if self.implementation == "plain" else f"native kernels: {_why_not_native(device)}"
        return f"expert kernels: plain PyTorch definition ({why})"

    def router_logits(self, x: Tensor, weight: Tensor, heads: int) -> Tensor:
        """Logits [T, H, E] of one router side. See :func:`plain.router_logits`.

        The native backward pass multiplies by the logits that have a gradient: the active ones, where :meth:`route`
        took the logits as they are. On a GPU it takes the dense products, as gathering rows would cost more.
        """
        if x.dtype in NATIVE_TYPES and self.is_native(x.device):
            return compact.router_logits(x, weight, heads)
        return plain.router_logits(x, weight, heads)

    def head_moments(self, z: Tensor) -> Tensor:
        """Sum and sum of squares of the logits of each head, fp64 [2, H]. See :func:`plain.head_moments`."""
        if z.dtype == torch.float32 and self.is_native(z.device):
            return torch.ops.monet.head_moments(z.detach())
        return plain.head_moments(z)

    def route(self, z: Tensor, threshold: Tensor) -> Gates:
        """Gates of one router side from its logits [T, H, E] and thresholds [H]. See :func:`plain.gates`."""
        if self.is_native(z.device) and (self.implementation == "native" or z.dtype == torch.float32):
            return compact.route(z, threshold)
        return DenseGates(plain.gates(z, threshold))


AUTO = Kernels()


def vertical_experts(x: Tensor, g1: Gates, g2: Gates, mask: Tensor | None, *weights: Tensor) -> Tensor:
    """Vertical expert layer [T, d] -> [T, d] without output bias. See :func:`plain.vertical_experts`.

    ``mask`` [1 or H, E, E] has the factor of every expert and is a constant: it gets no gradient.
    """
    if isinstance(g1, CompactGates) and isinstance(g2, CompactGates) and x.dtype in NATIVE_TYPES:
        return experts.vertical_experts(x, g1, g2, mask, *weights)
    return plain.vertical_experts(x, g1.dense(), g2.dense(), mask, *weights)


def horizontal_experts(x: Tensor, g1: Gates, g2: Gates, mask: Tensor | None, *weights: Tensor) -> Tensor:
    """Horizontal expert layer [T, d] -> [T, d] without output bias. See :func:`plain.horizontal_experts`.

    ``mask`` [1 or H, E, E] has the factor of every expert and is a constant: it gets no gradient.
    """
    if isinstance(g1, CompactGates) and isinstance(g2, CompactGates) and x.dtype in NATIVE_TYPES:
        return experts.horizontal_experts(x, g1, g2, mask, *weights)
    return plain.horizontal_experts(x, g1.dense(), g2.dense(), mask, *weights)


def expert_weights(g1: Gates, g2: Gates, mask: Tensor | None) -> tuple[Gates, Gates]:
    """What a mask leaves of each half-expert, as gates for :func:`expert_bias`. See :func:`plain.expert_weights`."""
    if mask is None:
        return g1, g2
    if isinstance(g1, CompactGates) and isinstance(g2, CompactGates):
        return experts.expert_weights(g1, g2, mask)
    r1, r2 = plain.expert_weights(g1.dense(), g2.dense(), mask)
    return DenseGates(r1), DenseGates(r2)


def expert_bias(g: Gates, b: Tensor) -> Tensor:
    """Output bias of one side, [T, width]. See :func:`plain.expert_bias`."""
    if isinstance(g, CompactGates) and b.dtype in NATIVE_TYPES:
        return experts.expert_bias(g, b)
    return plain.expert_bias(g.dense(), b)


def store_by_columns(weight: Tensor) -> Tensor:
    """The same matrix with its columns contiguous in memory: how output weights (``v``) are best stored for decoding.

    The native kernels read rows of half-experts, that is columns of ``v``. They rearrange a weight that is stored
    otherwise, which is little work for a batch but more than all the rest for a single token.
    """
    return weight.t().contiguous().t()


def _why_not_native(device: torch.device) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return f"none for {device.type}"
    reason = extension.missing()
    if reason is None and device.type == "cuda" and not extension.built_for_cuda():
        return "built without CUDA"
    return reason
