"""What only the CUDA kernels have; what they compute is tested with the other implementations."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from monet_train import kernels
from monet_train.kernels import AUTO, Kernels
from tests.kernels import cuda_emulation, test_experts, test_masks
from tests.kernels.conftest import BACKENDS, EMULATED, Backend
from tests.support import REPOSITORY

SOURCES = sorted((REPOSITORY / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc found neither on the PATH nor in CUDA_HOME")
def test_compiles_without_a_warning(tmp_path: Path) -> None:
    """For every architecture, without a GPU. Optimisation is left out: it finds no further warnings."""
    flags = [
        "-std=c++20",
        "-Xcicc=-O0",
        "-Xptxas=-O0",
        "-Werror=all-warnings",
        "-Xcompiler=-fPIC,-Wall,-Wextra,-Werror",
    ]
    flags += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]

    def messages(source: Path) -> str:
        target = tmp_path / f"{source.stem}.o"
        compiled = subprocess.run([NVCC, *flags, "-c", source, "-o", target], capture_output=True, text=True)
        assert target.exists() == (compiled.returncode == 0)
        return compiled.stdout + compiled.stderr

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        assert "".join(pool.map(messages, SOURCES)) == ""


def test_no_framework_in_the_kernels() -> None:
    """Of either device: the bindings alone know PyTorch."""
    csrc = REPOSITORY / "csrc"
    kernels_and_headers = [path for path in csrc.rglob("*.*") if path.parent.name != "bindings"]
    assert {csrc / "pairs.h", csrc / "cpu" / "tiles.inl", *SOURCES} <= set(kernels_and_headers)
    for path in kernels_and_headers:
        included = {line.split()[1] for line in path.read_text().splitlines() if line.startswith("#include")}
        assert not [name for name in included if any(word in name for word in ("torch", "ATen", "c10"))]


def layer(name: str, tokens: int) -> Callable[[], list[Tensor | None]]:
    """A layer's forward and backward pass, output weights by columns: few tokens take kernels of their own."""
    shape = test_experts.Shape(tokens=tokens, d=70, experts=41)
    case = test_experts.make(name, shape, torch.float32).copy(torch.float32)
    first = {"vertical": 4, "horizontal": 2, "bias": 1}[name]
    for i in range(first, len(case.weights)):
        case.weights[i] = kernels.store_by_columns(case.weights[i].detach()).requires_grad_()
    return lambda: case.copy().run("native")


def masked_layer(decomposition: str, tokens: int) -> Callable[[], list[Tensor]]:
    shape = test_masks.Shape(tokens=tokens, d=70, experts=41)
    case = test_masks.make(decomposition, shape, test_masks.scales, torch.float32).copy(torch.float32)

    def run() -> list[Tensor]:
        ours = case.copy(torch.float32)
        return ours.run(lambda: ours.output("native"))

    return run


def router(tokens: int, experts: int) -> list[Tensor]:
    """Gates, their layout, all sums over them, and the gradients of these sums."""
    z = torch.randn(tokens, 3, experts, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gates = Kernels("native").route(z, torch.full((3,), 1.5))
    assert isinstance(gates, kernels.CompactGates)
    total, largest = gates.total(), gates.largest_total()
    (total.square().sum() + largest.square().sum()).backward()
    assert z.grad is not None
    moments = AUTO.head_moments(z)
    return [gates.values, *gates.layout.tensors(), gates.dense(), total, largest, moments, z.grad]


RUNS = {
    **{f"{name} {tokens}": layer(name, tokens) for name in test_experts.LAYERS for tokens in (5, 40)},
    **{
        f"masked {decomposition} {tokens}": masked_layer(decomposition, tokens)
        for decomposition in test_masks.DECOMPOSITIONS
        for tokens in (5, 40)
    },
    "router, several blocks of tokens": lambda: router(600, 70),
    "router, more half-experts than threads": lambda: router(20, 1030),
}


@pytest.mark.parametrize("backend", [EMULATED], indirect=True)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_same_bits_whatever_the_order_of_threads(run: Callable[[], list[Tensor | None]], backend: Backend) -> None:
    """A missing barrier, or two threads that write to one place, would show."""
    emulation = cuda_emulation.load()
    forwards = run()
    emulation.run_backwards(True)
    try:
        backwards = run()
    finally:
        emulation.run_backwards(False)
    for a, b in zip(forwards, backwards, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)
def test_more_half_experts_than_shared_memory_holds(backend: Backend) -> None:
    z = torch.zeros(1, 1, 60_000, device=backend.device)
    with pytest.raises(RuntimeError, match=r"shared memory per block, .* use fewer half-experts"):
        Kernels("native").route(z, torch.zeros(1, device=backend.device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_the_definition_runs_on_a_gpu(native: None) -> None:
    assert "plain PyTorch definition" in AUTO.describe("cuda")
    if torch.version.cuda is None:
        assert "built without CUDA" in AUTO.describe("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("backend", ["CUDA"], indirect=True)
def test_same_bits_twice(backend: Backend) -> None:
    case = test_experts.make("vertical", test_experts.Shape(tokens=600, d=64, experts=64, m=12), torch.bfloat16)
    first, second = (case.copy(torch.bfloat16, backend.device).run("native") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None)
