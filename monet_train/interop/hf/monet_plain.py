"""The definition of Monet's routing and expert layers. An exported folder carries the definition itself here."""

from monet_train.kernels.plain import (
    activation_threshold,
    expert_bias,
    expert_factors,
    expert_weights,
    gates,
    head_moments,
    horizontal_input,
    split_heads,
    vertical_inputs,
)

__all__ = [
    "activation_threshold",
    "expert_bias",
    "expert_factors",
    "expert_weights",
    "gates",
    "head_moments",
    "horizontal_input",
    "split_heads",
    "vertical_inputs",
]
