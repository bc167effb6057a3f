"""The native router and the compact gates against the plain definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from monet_train.errors import UserError
from monet_train.kernels import AUTO, CompactGates, DenseGates, Kernels, extension, plain
from monet_train.model.config import MonetConfig
from monet_train.model.router import Router
from monet_train.parallel.collectives import ALONE
from tests.kernels.conftest import Backend, fixed_weights, normal_threshold


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("k", "experts"), [(8, 512), (8, 256), (3, 7), (1, 2), (0.5, 1)])
def test_threshold(k: float, experts: int, dtype: torch.dtype) -> None:
    """The quantile is that of fp64, rounded once, and its computation can be compiled."""
    mean, var = torch.linspace(-1, 1, 6, dtype=dtype), torch.linspace(0, 2, 6, dtype=dtype)
    tau = float(math.sqrt(2) * torch.erfinv(torch.tensor(1 - 2 * k / experts, dtype=torch.float64)))
    assert tau == pytest.approx(NormalDist().inv_cdf(1 - k / experts), rel=1e-14, abs=1e-15)
    expected = mean + tau * torch.sqrt(var + 1e-5)
    compiled = torch.compile(plain.activation_threshold, backend="eager", fullgraph=True)
    for function in (plain.activation_threshold, compiled):
        assert torch.equal(function(mean, var, k, experts, 1e-5), expected)


@dataclass
class Case:
    """Logits [T, H, E] and thresholds [H] in fp64."""

    z: Tensor
    threshold: Tensor

    def to(self, device: torch.device) -> Case:
        return Case(self.z.to(device), self.threshold.to(device))


def case(tokens: int, heads: int, experts: int, k: float, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, heads, experts, generator=generator, dtype=torch.float64)
    # rounded to fp32, so that both precisions compare the same numbers
    return Case(z.float().double(), normal_threshold(heads, experts, k).float().double())


def all_active() -> Case:
    found = case(9, 3, 70, 4)
    return Case(found.z, torch.full((3,), -math.inf, dtype=torch.float64))


def only_the_largest() -> Case:
    found = case(9, 3, 70, 4)
    return Case(found.z, torch.full((3,), math.inf, dtype=torch.float64))


def all_alike() -> Case:
    found = case(1, 2, 64, 4)
    return Case(found.z.expand(600, -1, -1).contiguous(), found.threshold)


def all_equal() -> Case:
    return Case(torch.zeros(5, 2, 10, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))


CASES = {
    "one token": case(1, 6, 512, 8),
    "one head": case(33, 1, 64, 4),
    "one half-expert": case(4, 2, 1, 0.5),
    "odd sizes": case(37, 3, 101, 5),
    "several blocks": case(1100, 2, 40, 2),
    "published size": case(70, 6, 512, 8),
    "many half-experts": case(20, 2, 1030, 8),
    "zero tokens": case(0, 2, 16, 2),
    "all active": all_active(),
    "only the largest": only_the_largest(),
    "every token alike": all_alike(),
    "every logit equal": all_equal(),
}
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def routed(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def test_gates_and_their_gradient(routed: Case, dtype: torch.dtype, backend: Backend) -> None:
    z = routed.z.to(backend.device, dtype, copy=True).requires_grad_()
    gates = Kernels("native").route(z, routed.threshold.to(z))
    assert isinstance(gates, CompactGates)
    dense = gates.dense()
    reference_z = routed.z.clone().requires_grad_()
    reference = plain.gates(reference_z, routed.threshold)
    assert dense.dtype == dtype
    torch.testing.assert_close(dense.double().cpu(), reference, rtol=0, atol=TOLERANCE[dtype])
    assert torch.equal((dense != 0).cpu(), reference != 0)

    (dense * fixed_weights(dense)).sum().backward()
    (reference * fixed_weights(reference)).sum().backward()
    torch.testing.assert_close(z.grad.double().cpu(), reference_z.grad, rtol=0, atol=4 * TOLERANCE[dtype])


@pytest.mark.parametrize("method", ["total", "largest_total"])
def test_sums_over_tokens(routed: Case, dtype: torch.dtype, method: str, backend: Backend) -> None:
    z = routed.z.to(backend.device, dtype, copy=True).requires_grad_()
    reference_z = routed.z.clone().requires_grad_()
    value = getattr(Kernels("native").route(z, routed.threshold.to(z)), method)()
    reference = getattr(DenseGates(plain.gates(reference_z, routed.threshold)), method)()
    torch.testing.assert_close(value.double().cpu(), reference, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    (value * fixed_weights(value)).sum().backward()
    (reference * fixed_weights(reference)).sum().backward()
    torch.testing.assert_close(z.grad.double().cpu(), reference_z.grad, rtol=0, atol=4 * TOLERANCE[dtype])


def test_layout(backend: Backend) -> None:
    """Pairs by (block, half-expert, token): the drawing in csrc/README.md."""
    active = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]], device=backend.device)
    gates = Kernels("native").route(active[:, None].float(), torch.ones(1, device=backend.device))
    assert [index.tolist() for index in gates.layout.tensors()] == [
        [0, 2, 1, 0, 2, 1],
        [0, 2, 3, 5, 6],
        [0, 2, 4, 6],
        [0, 3, 2, 5, 1, 4],
    ]


def test_active_pairs(routed: Case, backend: Backend) -> None:
    there = routed.to(backend.device)
    gates = Kernels("native").route(there.z.float(), there.threshold.float())
    assert gates.active() == DenseGates(plain.gates(routed.z, routed.threshold)).active()


@pytest.mark.parametrize(("value", "row_is_nan"), [(math.nan, True), (math.inf, True), (-math.inf, False)])
def test_a_logit_that_is_not_finite(value: float, row_is_nan: bool, backend: Backend) -> None:
    found = case(20, 3, 70, 4).to(backend.device)
    found.z[7, 1, 13] = value
    dense = Kernels("native").route(found.z, found.threshold).dense()
    torch.testing.assert_close(dense, plain.gates(found.z, found.threshold), equal_nan=True)
    assert dense[7, 1].isnan().all() == row_is_nan
    assert dense.isnan().sum() == (70 if row_is_nan else 0)


def test_a_threshold_that_is_nan(backend: Backend) -> None:
    found = case(20, 3, 70, 4).to(backend.device)
    found.threshold[2] = math.nan
    dense = Kernels("native").route(found.z, found.threshold).dense()
    torch.testing.assert_close(dense, plain.gates(found.z, found.threshold), equal_nan=True)
    assert dense[:, 2].isnan().all()


def test_nan_reaches_the_sums(backend: Backend) -> None:
    found = case(20, 3, 70, 4).to(backend.device)
    found.z[7, 1, 13] = math.nan
    gates = Kernels("native").route(found.z, found.threshold)
    assert torch.equal(gates.total().isnan().all(1).cpu(), torch.tensor([False, True, False]))
    assert torch.equal(gates.largest_total().isnan().cpu(), torch.tensor([False, True, False]))


@pytest.mark.usefixtures("native")
def test_same_bits_with_any_number_of_threads(with_threads: Callable[[int], None]) -> None:
    found = case(1500, 4, 96, 6)

    def run(threads: int) -> list[Tensor]:
        with_threads(threads)
        z = found.z.float().requires_grad_()
        gates = Kernels("native").route(z, found.threshold.float())
        total = gates.total()
        (total * fixed_weights(total)).sum().backward()
        return [gates.values, *gates.layout.tensors(), total, AUTO.head_moments(z), z.grad]

    assert all(torch.equal(a, b) for a, b in zip(run(1), run(3), strict=True))


def test_map_carries_the_gradient(backend: Backend) -> None:
    found = case(10, 2, 32, 3).to(backend.device)
    z = found.z.requires_grad_()
    gates = Kernels("native").route(z, found.threshold)
    (gates.map(lambda values: 3 * values).dense() * fixed_weights(z)).sum().backward()
    tripled, z.grad = z.grad, None
    (Kernels("native").route(z, found.threshold).dense() * fixed_weights(z)).sum().backward()
    torch.testing.assert_close(tripled, 3 * z.grad)


def test_strided_logits(backend: Backend) -> None:
    found = case(12, 4, 30, 3).to(backend.device)
    strided = found.z.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    torch.testing.assert_close(
        Kernels("native").route(strided, found.threshold).dense(), plain.gates(found.z, found.threshold)
    )


def test_head_moments(routed: Case, backend: Backend) -> None:
    z = routed.z.to(backend.device).float() + 3
    torch.testing.assert_close(AUTO.head_moments(z), plain.head_moments(z), rtol=1e-12, atol=1e-9)


@pytest.mark.usefixtures("native")
def test_auto_is_native_for_fp32_only() -> None:
    found = case(5, 2, 16, 2)
    assert isinstance(AUTO.route(found.z.float(), found.threshold.float()), CompactGates)
    assert isinstance(AUTO.route(found.z, found.threshold), DenseGates)
    assert "native" in AUTO.describe("cpu")


def test_plain_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MonetConfig(hidden_size=8, num_attention_heads=2, moe_heads=2, moe_experts=16, moe_topk=2)
    router = Router(config, ALONE, Kernels("plain")).train()
    monkeypatch.setattr(torch.ops, "monet", None)  # no native operation can be called
    gates, _, statistics = router.route(torch.randn(5, 8))
    assert isinstance(gates, DenseGates)
    gates.total().sum().backward()
    assert router.w1.weight.grad is not None
    assert statistics is not None
    assert "plain" in Kernels("plain").describe("cpu")


def test_unknown_implementation_is_refused() -> None:
    with pytest.raises(UserError, match="kernels=fast is unknown"):
        Kernels("fast")


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "missing", lambda: "not built")
    found = case(5, 2, 16, 2)
    assert isinstance(AUTO.route(found.z.float(), found.threshold.float()), DenseGates)
    with pytest.raises(UserError, match=r"kernels=native cannot run here \(not built\)"):
        Kernels("native").route(found.z, found.threshold)
    with pytest.raises(UserError, match=r"kernels=native cannot run here \(not built\)"):
        Kernels("native").describe("cpu")
    assert "not built" in AUTO.describe("cpu")
    torch.testing.assert_close(AUTO.head_moments(found.z.float()), plain.head_moments(found.z.float()))
