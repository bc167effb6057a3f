"""What torch.compile and torch.export need of the native operations: stand-ins, and gradients that can be traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from monet_train import kernels
from monet_train.kernels import fake
from monet_train.kernels.visits import ExpertReader, Tally

pytestmark = pytest.mark.usefixtures("native")

TOKENS, WIDTH, EXPERTS, UNITS, HEADS = 9, 8, 7, 2, 2


class Inputs:
    """Inputs of every operation. Those that can have a gradient ask for one."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.dtype = dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.x = self.leaf(TOKENS, WIDTH)
        self.z = self.leaf(TOKENS, HEADS, EXPERTS, dtype=self.wide)
        self.threshold = torch.full((HEADS,), 0.5, dtype=self.wide)
        self.gates, self.layouts = [], []
        for _ in range(2):
            routed = torch.ops.monet.route(self.normal(TOKENS, HEADS, EXPERTS, dtype=self.wide), self.threshold)
            self.gates.append(routed[0].requires_grad_())
            self.layouts.append(list(routed[1:]))
        self.mask = torch.rand(HEADS, EXPERTS, EXPERTS, generator=self.generator).to(self.wide)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(dtype or self.dtype)

    def leaf(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.normal(*shape, dtype=dtype).requires_grad_()

    def layer(self, decomposition: str, mask: bool, by_columns: bool = False) -> tuple[Any, ...]:
        """Inputs of an expert layer."""
        inner = EXPERTS * UNITS
        if decomposition == "vertical":
            inputs, outputs = [(inner, WIDTH), (inner,)] * 2, [(WIDTH // 2, inner)] * 4
        else:
            inputs, outputs = [(inner, WIDTH), (inner,)], [(WIDTH, inner)]
        weights = [self.leaf(*shape) for shape in inputs]
        for shape in outputs:
            weight = self.normal(*shape)
            weights.append((kernels.store_by_columns(weight) if by_columns else weight).requires_grad_())
        (g1, g2), (layout1, layout2) = self.gates, self.layouts
        return self.x, g1, layout1, g2, layout2, EXPERTS, self.mask if mask else None, weights

    def backward(self, operation: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Inputs of the backward pass of an expert layer."""
        x, g1, layout1, g2, layout2, experts, mask, weights = arguments
        with torch.no_grad():
            _, *kept = getattr(torch.ops.monet, operation)(*arguments)
        constants = [weight.detach() for weight in weights]
        dout = self.normal(TOKENS, WIDTH)
        return dout, x.detach(), g1.detach(), layout1, g2.detach(), layout2, experts, mask, constants, kept


def of_gates(inputs: Inputs) -> tuple[Any, ...]:
    return inputs.gates[0], inputs.layouts[0], EXPERTS


def of_gates_backward(*shape: int) -> Callable[[Inputs], tuple[Any, ...]]:
    return lambda i: (i.normal(*shape, dtype=i.wide), i.gates[0].detach(), i.layouts[0], EXPERTS)


def bias(inputs: Inputs) -> tuple[Any, ...]:
    return inputs.gates[0], inputs.layouts[0], inputs.leaf(EXPERTS, 5)


def both_sides(inputs: Inputs) -> tuple[Any, ...]:
    return *(part for side in zip(inputs.gates, inputs.layouts, strict=True) for part in side), EXPERTS, inputs.mask


def visit(inputs: Inputs, contexts: bool) -> tuple[Any, ...]:
    """Inputs of a visit, which are fp32 and have no gradient."""
    sides = (part for g, layout in zip(inputs.gates, inputs.layouts, strict=True) for part in (g.float(), layout))
    gates1, layout1, gates2, layout2 = (part.detach() if isinstance(part, Tensor) else part for part in sides)
    n = 2 * UNITS + 1
    shapes = [(EXPERTS, UNITS, WIDTH), (EXPERTS, UNITS)] * 2 + [(EXPERTS, n, n)] * 2
    reader = ExpertReader(*(inputs.normal(*shape, dtype=torch.float32) for shape in shapes))
    return (
        gates1, layout1, gates2, layout2, EXPERTS, TOKENS, torch.arange(TOKENS), 3, [inputs.x.detach().float()],
        reader.tensors(), Tally.empty(EXPERTS, contexts).tensors(),
    )  # fmt: skip


def constant(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in arguments)


OPERATIONS: dict[str, list[Callable[[Inputs], tuple[Any, ...]]]] = {
    "router_logits": [lambda i: (i.x, i.leaf(HEADS * EXPERTS, WIDTH), HEADS)],
    "router_logits_backward": [
        lambda i: (
            i.normal(TOKENS, HEADS, EXPERTS, dtype=i.wide), i.x.detach(), i.normal(HEADS * EXPERTS, WIDTH),
        )
    ],
    "head_moments": [lambda i: (i.z.detach(),)],
    "route": [lambda i: (i.z, i.threshold)],
    "route_backward": [lambda i: (torch.ones_like(i.gates[0]), i.gates[0].detach(), i.layouts[0], EXPERTS)],
    "dense_gates": [of_gates],
    "dense_gates_backward": [of_gates_backward(TOKENS, HEADS, EXPERTS)],
    "sum_over_tokens": [of_gates],
    "sum_over_tokens_backward": [of_gates_backward(HEADS, EXPERTS)],
    "sum_of_largest": [of_gates],
    "sum_of_largest_backward": [of_gates_backward(HEADS)],
    **{
        f"{decomposition}_experts": [
            lambda i, d=decomposition: i.layer(d, mask=False),
            lambda i, d=decomposition: i.layer(d, mask=True, by_columns=True),
        ]
        for decomposition in ("vertical", "horizontal")
    },
    **{
        f"{decomposition}_experts_backward": [
            lambda i, d=decomposition: i.backward(f"{d}_experts", i.layer(d, mask=False)),
            lambda i, d=decomposition: i.backward(f"{d}_experts", i.layer(d, mask=True, by_columns=True)),
        ]
        for decomposition in ("vertical", "horizontal")
    },
    "expert_weights": [both_sides],
    "expert_weights_backward": [
        lambda i: (*(torch.ones(len(g), dtype=i.wide) for g in i.gates), *constant(both_sides(i)))
    ],
    "expert_bias": [bias],
    "visit_experts": [lambda i: visit(i, contexts=True), lambda i: visit(i, contexts=False)],
    "expert_bias_backward": [lambda i: (i.normal(TOKENS, 5), *constant(bias(i)))],
}  # fmt: skip


def test_every_operation_is_here() -> None:
    """The operations of the extension that take tensors; the others say how it was built."""
    names = {name.removeprefix("monet::") for name in torch._C._dispatch_get_all_op_names() if "monet::" in name}
    names -= {"built_with", "built_from", "built_for_cuda", "instruction_set", "select_instruction_set"}
    assert names == set(OPERATIONS) == set(fake.OPERATIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_stand_in_agrees_with_the_operation(name: str, dtype: torch.dtype) -> None:
    """Shapes, types, strides and gradients, traced with sizes that are unknown: PyTorch's own check of an operation."""
    operation = getattr(torch.ops.monet, name).default
    for make in OPERATIONS[name]:
        torch.library.opcheck(operation, make(Inputs(dtype)))


@pytest.mark.parametrize("name", [name for name in OPERATIONS if f"{name}_backward" in OPERATIONS])
def test_second_derivatives_are_refused(name: str) -> None:
    """They would be wrong, not just missing."""
    for make in OPERATIONS[name]:
        arguments = make(Inputs())
        found = getattr(torch.ops.monet, name)(*arguments)
        out = found if isinstance(found, Tensor) else found[0]
        leaf = next(value for value in arguments if isinstance(value, Tensor) and value.requires_grad)
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="not implemented"):
            gradient.square().sum().backward()


def test_the_number_of_pairs_is_known_when_the_program_runs() -> None:
    """One traced program serves any number of active pairs."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph

    def largest(z: Tensor, threshold: Tensor) -> Tensor:
        return kernels.Kernels("native").route(z, threshold).largest_total()

    traced = torch.compile(largest, backend=backend, fullgraph=True)
    z = torch.randn(20, HEADS, 64)
    for threshold in (-1.0, 0.0, 1.0, 9.0):
        each = torch.full((HEADS,), threshold)
        assert torch.equal(traced(z, each), largest(z, each))
    assert len(graphs) == 1
