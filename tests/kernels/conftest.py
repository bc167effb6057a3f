"""What the kernel tests share: real routing at any size, and the instruction sets to run them with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from monet_train.kernels import extension

INSTRUCTION_SETS = ("AVX-512", "AVX2", "portable")


@pytest.fixture
def native() -> None:
    """Skips where the extension is not built."""
    if reason := extension.missing():
        pytest.skip(f"native kernels: {reason}")


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, native: None) -> Iterator[str]:
    """Each instruction set that this machine has."""
    usual = torch.ops.monet.instruction_set()
    if not torch.ops.monet.select_instruction_set(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    torch.ops.monet.select_instruction_set(usual)


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads until the test ends."""
    usual = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(usual)


def normal_threshold(heads: int, experts: int, k: float) -> Tensor:
    """Thresholds [H] that k of E standard normal logits pass, fp64."""
    tau = math.sqrt(2) * torch.erfinv(torch.tensor(1 - 2 * k / experts, dtype=torch.float64))
    return tau.expand(heads).clone()


def fixed_weights(tensor: Tensor) -> Tensor:
    """Weights that make a scalar of a tensor, so that its gradient tells every entry apart; the same in any type."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).bfloat16().to(tensor.dtype)
