"""Masked expert layers: native against the plain definition against every expert written out, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from monet_train import kernels
from monet_train.kernels import Kernels, plain
from tests.kernels.conftest import Backend, fixed_weights, normal_threshold

pytestmark = pytest.mark.usefixtures("native")

DECOMPOSITIONS = ("vertical", "horizontal")


@dataclass(frozen=True)
class Shape:
    """Sizes of a case, and how its tokens are routed."""

    tokens: int = 7
    d: int = 10
    experts: int = 11
    m: int = 6
    heads: int = 3
    k: float = 3
    all_active: bool = False


SHAPES = {
    "odd sizes": Shape(),
    "one token": Shape(tokens=1, d=16, experts=24, m=12, heads=6, k=4),
    "zero tokens": Shape(tokens=0),
    "one head": Shape(heads=1),
    "one half-expert": Shape(experts=1, k=0.5),
    "one unit a side": Shape(m=2, d=6),
    "many units": Shape(m=34),
    "several token blocks": Shape(tokens=1030, d=4, experts=5, m=4, heads=2, k=1),
    "all active": Shape(all_active=True),
}


def by_pair(heads: int, experts: int) -> Tensor:
    return (torch.rand(experts, experts, generator=torch.Generator().manual_seed(3)) > 0.3)[None]


def by_half_expert(heads: int, experts: int) -> Tensor:
    keep = torch.ones(1, experts, experts)
    keep[:, ::2] = 0  # (i, *)
    keep[..., 1 : 1 + experts // 3] = 0  # (*, j)
    return keep


def by_head(heads: int, experts: int) -> Tensor:
    return torch.linspace(0, 2, heads)[:, None, None].expand(heads, experts, experts)


def scales(heads: int, experts: int) -> Tensor:
    """Factors of every expert of every head, of both signs, some 0."""
    generator = torch.Generator().manual_seed(4)
    factors = torch.randn(heads, experts, experts, generator=generator)
    return factors * (torch.rand(factors.shape, generator=generator) > 0.2)


MASKS = (by_pair, by_half_expert, by_head, scales)


@dataclass
class Case:
    """Logits [T, H, E] of both sides, thresholds [H], a mask, tokens [T, d], weights and output biases."""

    decomposition: str
    z: list[Tensor]
    threshold: Tensor
    mask: Tensor | None
    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]

    def leaves(self) -> list[Tensor]:
        return [*self.z, self.x, *self.weights, *self.biases]

    def copy(self, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> Case:
        """Leaves of their own that ask for a gradient; logits at least fp32."""

        def leaf(tensor: Tensor, to: torch.dtype) -> Tensor:
            return tensor.detach().to(device or tensor.device, to, copy=True).requires_grad_()

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return replace(
            self, z=[leaf(z, wide) for z in self.z], x=leaf(self.x, dtype),
            weights=[leaf(w, dtype) for w in self.weights], biases=[leaf(b, dtype) for b in self.biases],
            mask=None if self.mask is None else self.mask.to(device),
        )  # fmt: skip

    def output(self, implementation: str) -> Tensor:
        """The layer with its output bias."""
        g1, g2 = (Kernels(implementation).route(z, self.threshold.to(z)) for z in self.z)
        r1, r2 = kernels.expert_weights(g1, g2, self.mask)
        if self.decomposition == "vertical":
            bias = torch.cat([kernels.expert_bias(r, b) for r, b in zip((r1, r2), self.biases, strict=True)], -1)
            return kernels.vertical_experts(self.x, g1, g2, self.mask, *self.weights) + bias
        bias = kernels.expert_bias(r2, self.biases[0])
        return kernels.horizontal_experts(self.x, g1, g2, self.mask, *self.weights) + bias

    def every_expert(self) -> Tensor:
        """sum_h sum_ij M_ij g1_hi g2_hj E_ij(x) with all experts E_ij(x) [T, E, E, d] in front of us."""
        g1, g2 = (plain.gates(z, self.threshold.to(z)) for z in self.z)
        experts = g1.shape[-1]
        if self.decomposition == "vertical":
            u1, u1_bias, u2, u2_bias, *v = self.weights
            a = F.relu(self.x @ u1.t() + u1_bias).square().unflatten(-1, (experts, -1))
            c = F.relu(self.x @ u2.t() + u2_bias).square().unflatten(-1, (experts, -1))
            v11, v12, v21, v22 = (weight.unflatten(-1, (experts, -1)) for weight in v)
            left_own = torch.einsum("diu,tiu->tid", v11, a) + self.biases[0]
            left_cross = torch.einsum("diu,tju->tijd", v12, c)
            right_own = torch.einsum("dju,tju->tjd", v22, c) + self.biases[1]
            right_cross = torch.einsum("dju,tiu->tijd", v21, a)
            every = torch.cat([left_own[:, :, None] + left_cross, right_cross + right_own[:, None]], -1)
        else:
            u, u_bias, v = self.weights
            a = F.relu(self.x @ u.t() + u_bias).square().unflatten(-1, (experts, -1))
            every = torch.einsum("dju,tiu->tijd", v.unflatten(-1, (experts, -1)), a) + self.biases[0]
        factors = torch.ones(1, experts, experts) if self.mask is None else self.mask
        strength = factors.to(g1.dtype) * g1[..., :, None] * g2[..., None, :]
        return torch.einsum("thij,tijd->td", strength, every)

    def run(self, output: Callable[[], Tensor]) -> list[Tensor]:
        """Output and the gradient of every leaf."""
        out = output()
        (out * fixed_weights(out)).sum().backward()
        return [out.detach(), *(leaf.grad for leaf in self.leaves())]  # type: ignore[list-item]


def make(decomposition: str, shape: Shape, mask: Callable[[int, int], Tensor] | None, dtype: torch.dtype) -> Case:
    """A case in fp64 whose numbers are those of ``dtype``, so that every precision computes the same."""
    generator = torch.Generator().manual_seed(7)

    def normal(*sizes: int, scale: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(*sizes, generator=generator, dtype=torch.float64)).to(to).double()

    T, d, E, m, H = shape.tokens, shape.d, shape.experts, shape.m, shape.heads
    z = [normal(T, H, E, to=torch.float32) for _ in range(2)]
    threshold = normal_threshold(H, E, shape.k).float().double()
    if shape.all_active:
        threshold = torch.full_like(threshold, -math.inf)
    inner = E * m // 2
    if decomposition == "vertical":
        sizes: list[tuple[int, ...]] = [(inner, d), (inner,), (inner, d), (inner,), *[(d // 2, inner)] * 4]
        widths = [d // 2] * 2
    else:
        sizes, widths = [(E * m, d), (E * m,), (d, E * m)], [d]
    weights = [normal(*size, scale=d**-0.5) for size in sizes]
    biases = [normal(E, width) for width in widths]
    return Case(decomposition, z, threshold, mask and mask(H, E), normal(T, d), weights, biases)


def assert_agree(values: list[Tensor], reference: list[Tensor], dtype: torch.dtype, sparse: bool = True) -> None:
    """Sums are exact to fp32 (or fp64). A bf16 output has three roundings: experts, bias and the sum of both; on a GPU
    also those of the dense products."""
    relative = 3 * 2**-8 if dtype == torch.bfloat16 else 0.0
    of_largest = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 3 * 2**-9 if sparse else 2**-6}[dtype]
    for value, expected in zip(values, reference, strict=True):
        scale = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(value.double().cpu(), expected, rtol=relative, atol=of_largest * max(scale, 1.0))


@pytest.mark.parametrize("mask", [*MASKS, None], ids=lambda mask: mask.__name__ if mask else "none")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_against_every_expert(
    decomposition: str, shape: Shape, mask: Callable[[int, int], Tensor] | None, backend: Backend
) -> None:
    """fp64: the definition and the kernels against the expansion."""
    case = make(decomposition, shape, mask, torch.float64)
    written_out = case.copy()
    expected = written_out.run(written_out.every_expert)
    for implementation in ("plain", "native"):
        ours = case.copy(device=backend.device)
        assert_agree(ours.run(lambda ours=ours, name=implementation: ours.output(name)), expected, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.__name__)
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_in_lower_precision(
    decomposition: str, mask: Callable[[int, int], Tensor], dtype: torch.dtype, backend: Backend
) -> None:
    case = make(decomposition, Shape(tokens=40, d=34, experts=23), mask, dtype)
    exact, ours = case.copy(), case.copy(dtype, backend.device)
    values = ours.run(lambda: ours.output("native"))
    assert values[0].dtype == dtype
    assert_agree(values, exact.run(lambda: exact.output("plain")), dtype, backend.sparse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_every_instruction_set(instruction_set: str, decomposition: str, dtype: torch.dtype) -> None:
    """47 units of an expert (side) are pieces of every size."""
    case = make(decomposition, Shape(tokens=40, d=34, m=94 if decomposition == "vertical" else 47), scales, dtype)
    assert torch.ops.monet.instruction_set() == instruction_set
    exact, ours = case.copy(), case.copy(dtype)
    values = ours.run(lambda: ours.output("native"))
    assert_agree(values, exact.run(lambda: exact.output("plain")), dtype)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_gradcheck(decomposition: str, backend: Backend) -> None:
    shape = Shape(tokens=3, d=4, experts=6, m=4, heads=2, k=2)
    case = make(decomposition, shape, scales, torch.float64).copy(device=backend.device)
    count = len(case.weights)

    def output(*leaves: Tensor) -> Tensor:
        z, x, weights, biases = list(leaves[:2]), leaves[2], list(leaves[3 : 3 + count]), list(leaves[3 + count :])
        return replace(case, z=z, x=x, weights=weights, biases=biases).output("native")

    assert torch.autograd.gradcheck(output, case.leaves(), fast_mode=not backend.sparse)


@pytest.mark.parametrize("implementation", ["native", "plain"])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_a_mask_of_ones_changes_nothing(decomposition: str, implementation: str) -> None:
    case = make(decomposition, Shape(tokens=40), None, torch.float64)
    ones = replace(case, mask=torch.ones(1, 11, 11))
    unmasked, masked = case.copy(), ones.copy()
    expected = unmasked.run(lambda: unmasked.output(implementation))
    assert_agree(masked.run(lambda: masked.output(implementation)), expected, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("implementation", ["native", "plain"])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_all_off_is_exactly_zero(decomposition: str, implementation: str, dtype: torch.dtype, backend: Backend) -> None:
    """Also for one token whose own experts alone are off: nothing is subtracted from unmasked sums."""
    case = make(decomposition, Shape(tokens=20), None, dtype).copy(dtype, backend.device)
    case.mask = torch.zeros(1, 11, 11, device=backend.device)
    values = case.run(lambda: case.output(implementation))
    assert all((value == 0).all() for value in values)

    g1, g2 = (plain.gates(z.detach(), case.threshold.to(z))[3] for z in case.z)
    case.mask = (torch.einsum("hi,hj->ij", g1, g2) == 0)[None].float()
    out = case.output(implementation)
    assert (out[3] == 0).all()
    assert (out != 0).any()


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_weights_of_both_signs_that_cancel(decomposition: str, backend: Backend) -> None:
    """A half-expert whose weights sum to exactly 0 still passes a gradient to its gates."""
    shape = Shape(tokens=3, experts=4, heads=1, all_active=True)
    case = make(decomposition, shape, lambda H, E: torch.tensor([1.0, -1.0, 1.0, -1.0]).expand(1, E, E), torch.float64)
    case.z[1].zero_()  # equal gates of side 2
    case.mask = case.mask + case.mask.mT if case.mask is not None else None
    written_out, native = case.copy(), case.copy(device=backend.device)
    expected = written_out.run(written_out.every_expert)
    assert_agree(native.run(lambda: native.output("native")), expected, torch.float64)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_same_bits_with_any_number_of_threads(decomposition: str, with_threads: Callable[[int], None]) -> None:
    case = make(decomposition, Shape(tokens=1100, d=64, experts=40, m=8, heads=4), by_pair, torch.float32)
    with_threads(1)
    one, three = case.copy(torch.float32), case.copy(torch.float32)
    first = one.run(lambda: one.output("native"))
    with_threads(3)
    second = three.run(lambda: three.output("native"))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("what", ["token", "logit"])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_nan_stays_visible(decomposition: str, what: str, backend: Backend) -> None:
    case = make(decomposition, Shape(), by_pair, torch.float32).copy(torch.float32, backend.device)
    with torch.no_grad():
        for tensor in (case.x,) if what == "token" else case.z:
            tensor[5].view(-1)[2] = math.nan
        finite = case.output("native").isfinite()
    others = torch.arange(len(case.x), device=finite.device) != 5
    assert finite[others].all()
    assert not finite[5].any()
    biases = len(case.biases) if what == "token" else 0  # whose gradients do not depend on the tokens
    gradients = case.run(lambda: case.output("native"))[1:]
    assert all(gradient.isnan().any() for gradient in gradients[: len(gradients) - biases])


def test_a_half_expert_that_is_off_has_no_say(backend: Backend) -> None:
    """Whatever it computes: the parameters of half-expert 4 of side 1 do not matter."""
    case = make("vertical", Shape(), None, torch.float32).copy(torch.float32, backend.device)
    with_it = case.output("native")
    case.mask = torch.ones(1, 11, 11, device=backend.device)
    case.mask[:, 4] = 0
    without = case.output("native")
    assert not torch.equal(without, with_it)
    units = slice(4 * 3, 5 * 3)
    with torch.no_grad():
        case.weights[1][units] = 1e9  # bias of u1
        case.weights[4][:, units] = 1e9  # v11
        case.weights[5][:, units] = 1e9  # v12
        case.biases[0][4] = 1e9
    assert torch.equal(case.output("native"), without)


def test_masks_that_do_not_fit_are_refused(backend: Backend) -> None:
    case = make("vertical", Shape(), None, torch.float32).copy(torch.float32, backend.device)
    for mask in (torch.ones(11, 11), torch.ones(2, 11, 11), torch.ones(1, 11, 10)):
        case.mask = mask.to(backend.device)
        with pytest.raises(RuntimeError, match=r"mask must be \[1 or 3, 11, 11\]"):
            case.output("native")
