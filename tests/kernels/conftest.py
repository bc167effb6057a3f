"""What the kernel tests share: real routing at any size, and the devices and instruction sets to run them with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from monet_train.kernels import extension
from tests.kernels import cuda_emulation

INSTRUCTION_SETS = ("AVX-512", "AVX2", "portable")
CUDA = [pytest.param("CUDA", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []
EMULATED = pytest.param("emulated CUDA", marks=pytest.mark.slow)  # compiled anew when its sources have changed
BACKENDS = ("CPU", EMULATED, *CUDA)


@dataclass(frozen=True)
class Backend:
    """Where the native kernels run."""

    device: torch.device
    sparse: bool  # only active pairs are computed, and nothing is rounded between the products


@pytest.fixture
def native() -> None:
    """Skips where the extension is not built."""
    if reason := extension.missing():
        pytest.skip(f"native kernels: {reason}")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, native: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Each implementation of the native operations that this machine can run."""
    if request.param == "CPU":
        yield Backend(torch.device("cpu"), sparse=True)
    elif request.param == "CUDA":
        if not torch.ops.monet.built_for_cuda():
            pytest.skip("native kernels: built without CUDA")
        yield Backend(torch.device("cuda"), sparse=False)
    else:
        if reason := cuda_emulation.missing():
            pytest.skip(f"emulated CUDA: {reason}")
        cuda_emulation.load()
        monkeypatch.setattr(torch.ops, "monet", torch.ops.monet_emulated)
        torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN, so that nothing may stay unwritten
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield Backend(torch.device("cpu"), sparse=False)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


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
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).bfloat16().to(tensor)
