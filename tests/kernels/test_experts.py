"""The native expert layers against the plain definition in fp64, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from monet_train import kernels
from monet_train.kernels import Kernels
from tests.kernels.conftest import Backend, fixed_weights, normal_threshold

pytestmark = pytest.mark.usefixtures("native")

LAYERS = ("vertical", "horizontal", "bias")


@dataclass(frozen=True)
class Shape:
    """Sizes of a case, and how its tokens are routed."""

    tokens: int = 37
    d: int = 34
    experts: int = 23
    m: int = 6
    heads: int = 3
    k: float = 3
    routing: str = "normal"


SHAPES = {
    "odd sizes": Shape(),
    "one token": Shape(tokens=1, d=64, experts=64, m=12, heads=6, k=8),
    "two tokens": Shape(tokens=2, d=64, experts=64, m=12, heads=6, k=8),
    "zero tokens": Shape(tokens=0),
    "one head": Shape(heads=1),
    "one half-expert": Shape(experts=1, k=0.5),
    "one unit a side": Shape(m=2, d=6),
    "many units": Shape(m=34, tokens=21),
    "several token blocks": Shape(tokens=1030, d=18, experts=12, m=4, heads=2, k=1),
    "several column chunks": Shape(tokens=11, d=1102, experts=9, m=14, heads=2, k=2),
    "850m's routing": Shape(tokens=48, d=80, experts=512, m=12, heads=6, k=8),
    "every token alike": Shape(tokens=70, routing="alike"),
    "unused half-experts": Shape(routing="first only"),
    "all active": Shape(routing="all"),
}


@dataclass
class Case:
    """Logits [T, H, E] of both sides, thresholds [H], tokens [T, d] and weights."""

    layer: str
    z: list[Tensor]
    threshold: Tensor
    x: Tensor
    weights: list[Tensor]

    def leaves(self) -> list[Tensor]:
        return [*self.z, self.x, *self.weights]

    def copy(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Case:
        """Leaves of their own that ask for a gradient; logits at least fp32."""

        def leaf(tensor: Tensor, to: torch.dtype | None) -> Tensor:
            # strides are kept: a weight stored by columns stays so
            return tensor.detach().to(device or tensor.device, to or tensor.dtype, copy=True).requires_grad_()

        logits = torch.float32 if dtype == torch.bfloat16 else dtype
        return Case(
            self.layer, [leaf(z, logits) for z in self.z], self.threshold, leaf(self.x, dtype),
            [leaf(weight, dtype) for weight in self.weights],
        )  # fmt: skip

    def output(self, implementation: str) -> Tensor:
        g1, g2 = (Kernels(implementation).route(z, self.threshold.to(z)) for z in self.z)
        if self.layer == "vertical":
            return kernels.vertical_experts(self.x, g1, g2, None, *self.weights)
        if self.layer == "horizontal":
            return kernels.horizontal_experts(self.x, g1, g2, None, *self.weights)
        return kernels.expert_bias(g2, self.weights[0])

    def run(self, implementation: str) -> list[Tensor | None]:
        """Output and the gradient of every leaf."""
        out = self.output(implementation)
        (out * fixed_weights(out)).sum().backward()
        return [out.detach(), *(leaf.grad for leaf in self.leaves())]


def make(layer: str, shape: Shape, dtype: torch.dtype = torch.float64) -> Case:
    """A case in fp64 whose numbers are those of ``dtype``, so that every precision computes the same."""
    generator = torch.Generator().manual_seed(7)

    def normal(*sizes: int, scale: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(*sizes, generator=generator, dtype=torch.float64)).to(to).double()

    T, d, E, m, H = shape.tokens, shape.d, shape.experts, shape.m, shape.heads
    z = [normal(T, H, E, to=torch.float32) for _ in range(2)]
    threshold = normal_threshold(H, E, shape.k).float().double()
    if shape.routing == "alike":
        z = [side[:1].expand(T, -1, -1).contiguous() for side in z]
    elif shape.routing == "first only":
        for side in z:
            side[..., 1 + E // 4 :] -= 100
    elif shape.routing == "all":
        threshold = torch.full_like(threshold, -math.inf)
    inner = E * m // 2
    if layer == "vertical":
        shapes: list[tuple[int, ...]] = [(inner, d), (inner,), (inner, d), (inner,), *[(d // 2, inner)] * 4]
    elif layer == "horizontal":
        shapes = [(E * m, d), (E * m,), (d, E * m)]
    else:
        shapes = [(E, d)]
    return Case(layer, z, threshold, normal(T, d), [normal(*sizes, scale=d**-0.5) for sizes in shapes])


def assert_agree(
    values: list[Tensor | None], reference: list[Tensor | None], dtype: torch.dtype, sparse: bool = True
) -> None:
    """Sums are exact to fp32 (or fp64); a bf16 result is off by one rounding, or by those of the dense products too."""
    relative = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2**-8}[dtype]
    of_largest = 1e-13 if dtype == torch.float64 else 3e-6
    if dtype == torch.bfloat16 and not sparse:
        of_largest = 2**-6
    for value, expected in zip(values, reference, strict=True):
        assert (value is None) == (expected is None)
        if value is not None and expected is not None:
            scale = expected.abs().max().item() if expected.numel() else 0.0
            torch.testing.assert_close(value.double().cpu(), expected, rtol=relative, atol=of_largest * max(scale, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("layer", LAYERS)
def test_against_the_definition(layer: str, shape: Shape, dtype: torch.dtype, backend: Backend) -> None:
    case = make(layer, shape, dtype)
    values = case.copy(dtype, backend.device).run("native")
    assert values[0] is not None and values[0].dtype == dtype
    assert_agree(values, case.copy().run("plain"), dtype, backend.sparse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_instruction_set(instruction_set: str, layer: str, dtype: torch.dtype) -> None:
    shape = Shape(tokens=90, d=230, experts=31, m=10)
    case = make(layer, shape, dtype)
    assert torch.ops.monet.instruction_set() == instruction_set
    assert_agree(case.copy(dtype).run("native"), case.copy().run("plain"), dtype)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradcheck(layer: str, backend: Backend) -> None:
    case = make(layer, Shape(tokens=5, d=6, experts=7, m=4, heads=2, k=2)).copy(device=backend.device)

    def output(*leaves: Tensor) -> Tensor:
        return replace(case, z=list(leaves[:2]), x=leaves[2], weights=list(leaves[3:])).output("native")

    assert torch.autograd.gradcheck(output, case.leaves(), fast_mode=not backend.sparse)


@pytest.mark.parametrize("layer", LAYERS)
def test_same_bits_with_any_number_of_threads(layer: str, with_threads: Callable[[int], None]) -> None:
    case = make(layer, Shape(tokens=1100, d=64, experts=40, m=8, heads=4, k=3), torch.float32)
    with_threads(1)
    first = case.copy(torch.float32).run("native")
    with_threads(3)
    second = case.copy(torch.float32).run("native")
    assert all(a is b or torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("tokens", [3, 37])
@pytest.mark.parametrize("layer", ["vertical", "horizontal"])
def test_weights_stored_by_columns(layer: str, tokens: int, backend: Backend) -> None:
    """The layout for decoding: the same numbers, and gradients in the weight's own layout."""
    case = make(layer, Shape(tokens=tokens), torch.float32).copy(torch.float32, backend.device)
    by_columns = case.copy()
    by_columns.weights = [
        kernels.store_by_columns(weight.detach()).requires_grad_() if weight.shape[0] <= 34 else weight
        for weight in by_columns.weights
    ]
    assert any(not weight.is_contiguous() for weight in by_columns.weights)
    # on a GPU they go through other kernels
    tolerance = 0.0 if backend.sparse else 1e-5
    for value, expected in zip(by_columns.run("native"), case.run("native"), strict=True):
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
    for weight in by_columns.weights:
        assert weight.grad is not None and weight.grad.stride() == weight.stride()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layer", ["vertical", "horizontal"])
def test_a_token_that_is_not_finite(layer: str, value: float, backend: Backend) -> None:
    case = make(layer, Shape(), torch.float32).copy(torch.float32, backend.device)
    with torch.no_grad():
        case.x[5, 3] = value
        finite = case.output("native").isfinite()
    others = torch.arange(len(case.x), device=finite.device) != 5
    assert finite[others].all()
    assert not finite[5].any()


@pytest.mark.parametrize("layer", LAYERS)
def test_a_logit_that_is_nan(layer: str, backend: Backend) -> None:
    case = make(layer, Shape(), torch.float32).copy(torch.float32, backend.device)
    with torch.no_grad():
        for z in case.z:
            z[5, 1, 2] = math.nan
        finite = case.output("native").isfinite()
    others = torch.arange(len(case.x), device=finite.device) != 5
    assert finite[others].all()
    assert not finite[5].any()


@pytest.mark.parametrize("layer", ["vertical", "horizontal"])
def test_nan_reaches_every_gradient(layer: str, backend: Backend) -> None:
    case = make(layer, Shape(), torch.float32).copy(torch.float32, backend.device)
    with torch.no_grad():
        case.x[5, 3] = math.nan
    for gradient in case.run("native")[1:]:
        assert gradient is not None and gradient.isnan().any()


def test_a_weight_that_is_nan(backend: Backend) -> None:
    """It reaches the tokens that use its half-expert; the definition would spoil the others too."""
    case = make("vertical", Shape(), torch.float32).copy(torch.float32, backend.device)
    with torch.no_grad():
        case.weights[0][3 * 4 + 1] = math.nan  # half-expert 4 of side 1
        users = (Kernels("native").route(case.z[0], case.threshold.to(case.z[0])).dense()[..., 4] != 0).any(1)
        finite = case.output("native").isfinite()
    assert users.any() and not users.all()
    assert finite[~users].all()
    assert not finite[users].any()


@pytest.mark.parametrize("layer", LAYERS)
def test_recomputation(layer: str, backend: Backend) -> None:
    case = make(layer, Shape(), torch.float32).copy(torch.float32, backend.device)
    plain_run, recomputed = case.copy(), case.copy()
    expected = plain_run.run("native")
    out = checkpoint(lambda _: recomputed.output("native"), recomputed.x, use_reentrant=False)
    (out * fixed_weights(out)).sum().backward()
    for leaf, gradient in zip(recomputed.leaves(), expected[1:], strict=True):
        assert leaf.grad is gradient or torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("layer", ["vertical", "horizontal"])
def test_little_is_kept_for_backward(layer: str) -> None:
    """Only the activations of active pairs are kept: 9% of those of the definition, which keeps several copies."""
    shape = Shape(tokens=128, d=64, experts=512, m=12, heads=6, k=8)

    def kept(implementation: str) -> int:
        case = make(layer, shape, torch.float32).copy(torch.float32)
        parameters = {weight.data_ptr() for weight in case.weights}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = case.output(implementation)
        assert out.requires_grad
        return sum(sizes.values())

    assert kept("native") * 4 < kept("plain")


def test_dense_gates_take_the_definition() -> None:
    case = make("vertical", Shape(), torch.float32).copy(torch.float32)
    assert torch.equal(case.output("plain"), case.output("plain"))
    native, plain = case.output("native").double(), case.output("plain").double()
    assert not torch.equal(native, plain)  # they sum in another order: each implementation is really taken
    torch.testing.assert_close(native, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_fp16_takes_the_definition(layer: str) -> None:
    case = make(layer, Shape(), torch.float16)
    x, *weights = (tensor.half() for tensor in (case.x, *case.weights))
    half = Case(layer, [z.float() for z in case.z], case.threshold, x, weights)
    outputs = [half.output(implementation) for implementation in ("native", "plain")]
    assert outputs[0].dtype == torch.float16
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    torch.testing.assert_close(outputs[0].double(), case.output("plain"), rtol=0, atol=2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["CUDA"], indirect=True)
def test_weights_on_another_device_are_refused(backend: Backend) -> None:
    case = make("vertical", Shape(), torch.float32).copy(torch.float32, backend.device)
    case.weights[4] = case.weights[4].detach().cpu()
    with pytest.raises(RuntimeError, match="v is on cpu, other tensors on cuda"):
        case.output("native")


def test_sizes_that_do_not_fit_are_refused(backend: Backend) -> None:
    case = make("vertical", Shape(), torch.float32).copy(torch.float32, backend.device)
    case.weights[4] = case.weights[4][:, :-1]
    with pytest.raises(RuntimeError, match="v must be"):
        case.output("native")
