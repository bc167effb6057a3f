"""The definition of Monet's routing and expert layers. An exported folder carries the definition itself here."""

from monet_train.kernels.plain import (
    activation_threshold,
    expert_bias,
    gates,
    head_moments,
    horizontal_experts,
    vertical_experts,
)

__all__ = [
    "activation_threshold",
    "expert_bias",
    "gates",
    "head_moments",
    "horizontal_experts",
    "vertical_experts",
]
