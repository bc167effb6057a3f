"""Floating-point work of a Monet and the peak of known devices, for the model FLOPs utilisation (MFU)."""

from __future__ import annotations

import torch

from monet_train.model.config import MonetConfig

# Dense bf16 tensor-core peaks, FLOP/s, from NVIDIA's data sheets (without sparsity); first match wins.
BF16_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A40": 150e12,
}


def forward_flops_per_token(config: MonetConfig, seq_length: int) -> float:
    """Dense forward FLOPs of one token: the architecture's, whatever a sparse kernel skips.

    A multiply-add counts 2; attention is counted full, not causal. Within 0.5% of the paper's Table 8 for the
    1.4B (6745.30 TFLOP for 2^21 tokens; 8017.81 with a router in every layer).
    """
    d, experts, heads = config.hidden_size, config.moe_experts, config.moe_heads
    inner = experts * config.moe_dim
    attention = 2 * d * (2 * d + 2 * config.kv_heads * config.head_dim) + 4 * seq_length * d
    up_and_down = 2 * d * inner + 2 * d * inner
    # vertical has two mixing products of inner/2 units a side, horizontal two of all units: the same work
    mixing = 2 * 2 * heads * inner
    bias = 2 * experts * d
    router = 2 * d * 2 * heads * experts
    routers = sum(config.has_router(layer) for layer in range(config.num_hidden_layers))
    layers = config.num_hidden_layers * (attention + up_and_down + mixing + bias)
    return layers + routers * router + 2 * d * config.vocab_size


def training_flops_per_token(config: MonetConfig, seq_length: int) -> float:
    """Forward and backward: three times the forward work, recomputation not counted."""
    return 3 * forward_flops_per_token(config, seq_length)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of ``device`` in ``precision``, or None where it is not known (CPUs, unlisted GPUs, fp32)."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in BF16_PEAKS.items() if part in name), None)
