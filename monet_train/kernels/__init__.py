"""The routing and expert operations of a Monet: one public function per operation, whichever implementation runs it."""

from monet_train.kernels.backend import (
    AUTO,
    IMPLEMENTATIONS,
    Kernels,
    expert_bias,
    expert_weights,
    horizontal_experts,
    store_by_columns,
    vertical_experts,
)
from monet_train.kernels.compact import CompactGates
from monet_train.kernels.gates import ActivePairs, DenseGates, Gates

__all__ = [
    "AUTO",
    "IMPLEMENTATIONS",
    "ActivePairs",
    "CompactGates",
    "DenseGates",
    "Gates",
    "Kernels",
    "expert_bias",
    "expert_weights",
    "horizontal_experts",
    "store_by_columns",
    "vertical_experts",
]
