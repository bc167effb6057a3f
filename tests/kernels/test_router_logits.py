"""The projection of the router, whose backward pass visits active logits only."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from monet_train.kernels import AUTO, Kernels, plain
from tests.kernels.conftest import Backend, fixed_weights, normal_threshold

pytestmark = pytest.mark.usefixtures("native")

SIZES = {  # T, d, H, E, k
    "odd sizes": (37, 33, 3, 43, 3),
    "one token": (1, 40, 6, 64, 4),
    "zero tokens": (0, 8, 2, 16, 2),
    "several token blocks": (1100, 20, 2, 30, 2),
    "several column chunks": (20, 530, 2, 30, 2),
    "half of the logits active": (20, 24, 2, 32, 16),
}


def inputs(size: tuple[int, int, int, int, float], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, weight and threshold in fp64, with the numbers of ``dtype``."""
    tokens, d, heads, experts, k = size
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, d, generator=generator, dtype=torch.float64).to(dtype).double()
    weight = torch.randn(heads * experts, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
    return x, weight.to(dtype).double(), normal_threshold(heads, experts, k)


def gradients(
    logits: Callable[[Tensor, Tensor, int], Tensor], x: Tensor, weight: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    z = logits(x, weight, len(threshold))
    dense = Kernels("native").route(z, threshold.to(z.dtype)).dense()
    (dense * fixed_weights(dense)).sum().backward()
    assert x.grad is not None and weight.grad is not None
    assert not x.grad.is_sparse and not weight.grad.is_sparse
    return x.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_gradients(size: tuple[int, int, int, int, float], dtype: torch.dtype, backend: Backend) -> None:
    x, weight, threshold = (tensor.to(backend.device) for tensor in inputs(size, dtype))
    expected = gradients(plain.router_logits, x, weight, threshold)
    found = gradients(AUTO.router_logits, x.to(dtype), weight.to(dtype), threshold)
    for value, reference in zip(found, expected, strict=True):
        assert value.dtype == dtype
        atol = 1e-13 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(value.double(), reference, rtol=0, atol=atol)


def test_bf16() -> None:
    """The logits are rounded to bf16 by the projection, then wide: the same gates, one rounding at the end."""
    x, weight, threshold = (tensor.bfloat16() for tensor in inputs(SIZES["odd sizes"], torch.bfloat16))
    z = AUTO.router_logits(x, weight, 3)
    assert z.dtype == torch.float32
    assert torch.equal(z, plain.router_logits(x, weight, 3))
    expected = gradients(plain.router_logits, x, weight, threshold)
    for value, reference in zip(gradients(AUTO.router_logits, x, weight, threshold), expected, strict=True):
        assert value.dtype == torch.bfloat16
        # the definition rounds the logits' gradient to bf16 before its products
        torch.testing.assert_close(value, reference, rtol=2**-6, atol=2**-6 * reference.abs().max().item())


def products(logits: Callable[[Tensor, Tensor, int], Tensor], size: str) -> tuple[int, tuple[Tensor, Tensor]]:
    """Dense products in the backward pass, and the gradients."""
    x, weight, threshold = inputs(SIZES[size], torch.float64)
    with torch.profiler.profile() as profile:
        found = gradients(logits, x, weight, threshold)
    torch.testing.assert_close(found, gradients(plain.router_logits, x, weight, threshold))
    return sum(event.count for event in profile.key_averages() if event.key == "aten::mm"), found


@pytest.mark.parametrize("size", ["odd sizes", "several token blocks"])
def test_only_active_logits_are_multiplied(size: str) -> None:
    """Whatever stands between the projection and the router passes the zeros on."""
    of_the_definition, _ = products(plain.router_logits, size)
    straight, first = products(AUTO.router_logits, size)
    between, second = products(lambda *args: AUTO.router_logits(*args).clone(), size)
    forward = 1
    assert (straight, between) == (forward, forward)
    assert of_the_definition == 3 * forward
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_gradient_with_few_zeros_takes_the_dense_products() -> None:
    assert products(AUTO.router_logits, "half of the logits active")[0] == 3


def test_sum_with_a_dense_gradient() -> None:
    x, weight, threshold = inputs(SIZES["odd sizes"], torch.float64)

    def loss(logits: Callable[[Tensor, Tensor, int], Tensor], weight: Tensor) -> Tensor:
        z = logits(x, weight, 3)
        dense = Kernels("native").route(z, threshold).dense()
        return (dense * fixed_weights(dense)).sum() + z.square().sum()

    found, expected = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    loss(AUTO.router_logits, found).backward()
    loss(plain.router_logits, expected).backward()
    torch.testing.assert_close(found.grad, expected.grad)


def test_recomputation() -> None:
    x, weight, threshold = inputs(SIZES["odd sizes"], torch.float64)
    weight.requires_grad_()

    def gates(x: Tensor) -> Tensor:
        return Kernels("native").route(AUTO.router_logits(x, weight, 3), threshold).dense()

    dense = checkpoint(gates, x, use_reentrant=False)
    (dense * fixed_weights(dense)).sum().backward()
    torch.testing.assert_close(weight.grad, gradients(plain.router_logits, x, weight.detach(), threshold)[1])


def test_same_bits_with_any_number_of_threads(with_threads: Callable[[int], None]) -> None:
    x, weight, threshold = inputs(SIZES["several token blocks"], torch.float32)
    with_threads(1)
    first = gradients(AUTO.router_logits, x.float(), weight.float(), threshold)
    with_threads(3)
    second = gradients(AUTO.router_logits, x.float(), weight.float(), threshold)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_nan_reaches_the_gradients() -> None:
    x, weight, threshold = inputs(SIZES["odd sizes"], torch.float64)
    x[5, 3] = math.nan
    dx, dweight = gradients(AUTO.router_logits, x, weight, threshold)
    assert dx[5].isnan().all() and dweight.isnan().all()
    assert dx[:5].isfinite().all() and dx[6:].isfinite().all()
