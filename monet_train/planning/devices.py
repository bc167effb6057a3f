"""The peak of known devices, for the utilisation figures."""

from __future__ import annotations

import torch

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


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of ``device`` in ``precision``, or None where it is not known (CPUs, unlisted GPUs, fp32)."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in BF16_PEAKS.items() if part in name), None)
