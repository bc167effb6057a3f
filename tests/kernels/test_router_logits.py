"""The projection of the router, whose backward pass is sparse."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from monet_train.kernels import AUTO, Kernels, plain
from tests.kernels.conftest import fixed_weights, normal_threshold

pytestmark = pytest.mark.usefixtures("native")

SIZES = {  # T, d, H, E, k
    "odd sizes": (37, 33, 3, 23, 3),
    "one token": (1, 40, 6, 64, 4),
    "zero tokens": (0, 8, 2, 16, 2),
    "several token blocks": (1100, 20, 2, 30, 2),
    "several column chunks": (20, 530, 2, 30, 2),
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
def test_gradients(size: tuple[int, int, int, int, float], dtype: torch.dtype) -> None:
    x, weight, threshold = inputs(size, dtype)
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


def test_gradient_is_sparse_only_on_the_straight_way() -> None:
    """Whatever stands between the projection and the router gets a dense gradient, and the sum with one is right."""
    x, weight, threshold = inputs(SIZES["odd sizes"], torch.float64)
    seen: list[bool] = []

    def hooked(between: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, int], Tensor]:
        def logits(x: Tensor, weight: Tensor, heads: int) -> Tensor:
            z = AUTO.router_logits(x, weight, heads)
            z.register_hook(lambda gradient: seen.append(gradient.is_sparse))
            return between(z)

        return logits

    straight = gradients(hooked(lambda z: z), x, weight, threshold)
    doubled = gradients(hooked(lambda z: 2 * z), x, weight, 2 * threshold)
    assert seen == [True, False]
    torch.testing.assert_close(
        doubled, gradients(lambda *args: 2 * plain.router_logits(*args), x, weight, 2 * threshold)
    )
    torch.testing.assert_close(straight, gradients(plain.router_logits, x, weight, threshold))


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
