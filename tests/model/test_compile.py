"""torch.compile and torch.export see through the bare model on the native path: one graph, the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from monet_train.kernels import Kernels, extension
from monet_train.model.attention import KVCache
from monet_train.model.config import MonetConfig
from monet_train.model.transformer import MonetForCausalLM
from tests.model.conftest import tokens

pytestmark = pytest.mark.slow

BACKEND = "aot_eager"  # traces what inductor traces, forward and backward, and runs it without a C++ compiler
ROUTES = 4  # calls of the router: two sides of two routing groups


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled earlier, and the sizes that depend on data traced, as with ``fullgraph=True``."""
    if reason := extension.missing():
        pytest.skip(f"native kernels: {reason}")
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield
    torch._dynamo.reset()


@pytest.fixture
def model(config: MonetConfig, build: Callable[..., MonetForCausalLM]) -> MonetForCausalLM:
    return build(config, kernels=Kernels("native"))


def graphs_and_breaks() -> tuple[int, int]:
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def step(model: nn.Module, ids: Tensor) -> Tensor:
    """The loss of a training step, whose gradients stay in the parameters."""
    out = model(ids, labels=ids)
    loss = out.loss + out.uniformity + out.ambiguity
    loss.backward()
    return loss.detach()


def test_evaluation(model: MonetForCausalLM) -> None:
    """Also with masked experts, and whatever number of pairs is active."""
    compiled = torch.compile(model, backend=BACKEND)
    model.set_expert_mask(1, torch.linspace(0, 2, 16))
    with torch.no_grad():
        for ids in tokens(6, 12).split(2):
            found, expected = (
                of(ids, labels=ids, output_router_probs=True, output_hidden_states=True) for of in (compiled, model)
            )
            assert torch.equal(found.logits, expected.logits)
            assert torch.equal(found.loss, expected.loss)
            for mine, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
                assert torch.equal(mine, theirs)
            assert torch.equal(found.router_probs[0][1], expected.router_probs[0][1])
    assert graphs_and_breaks() == (1, 0)


def test_training(model: MonetForCausalLM) -> None:
    """Loss, gradients and the routers' statistics after several steps."""
    model.train()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend=BACKEND)
    for ids in tokens(6, 12).split(2):
        torch.testing.assert_close(step(compiled, ids), step(eager, ids), rtol=1e-6, atol=0)
    for (name, mine), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad, theirs.grad, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )
    for mine, theirs in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    assert graphs_and_breaks() == (1, 0)


@pytest.mark.parametrize("moe_decompose", ["vertical"], indirect=True)
def test_recomputation(config: MonetConfig, build: Callable[..., MonetForCausalLM]) -> None:
    """Checkpointed groups are graphs of their own; nothing breaks one."""
    model = build(config, kernels=Kernels("native"), recompute=True).train()
    eager = copy.deepcopy(model)
    ids = tokens(2, 12)
    torch.testing.assert_close(step(torch.compile(model, backend=BACKEND), ids), step(eager, ids), rtol=1e-6, atol=0)
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    assert graphs_and_breaks()[1] == 0


@pytest.mark.parametrize("moe_decompose", ["vertical"], indirect=True)
def test_decoding(model: MonetForCausalLM) -> None:
    """A prompt, then one token at a time: the second token's graph serves all that follow."""
    model.store_for_decoding()
    compiled = torch.compile(model, backend=BACKEND)
    ids = tokens(1, 10)
    mine, theirs = KVCache(), KVCache()
    with torch.no_grad():
        for part in ids.split([4, *[1] * 6], dim=1):
            assert torch.equal(compiled(part, cache=mine).logits, model(part, cache=theirs).logits)
    graphs, breaks = graphs_and_breaks()
    assert breaks == 0
    assert graphs <= 3


@pytest.mark.parametrize("moe_decompose", ["vertical"], indirect=True)
def test_without_the_option_each_router_breaks_the_graph(model: MonetForCausalLM) -> None:
    """PyTorch's default: an operation whose output size depends on data ends the graph. The numbers stay right."""
    ids = tokens(2, 12)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=False), torch.no_grad():
        assert torch.equal(torch.compile(model, backend=BACKEND)(ids).logits, model(ids).logits)
    assert graphs_and_breaks()[1] == ROUTES


class Logits(nn.Module):
    """The model as a function of token ids."""

    def __init__(self, model: MonetForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.model(ids).logits
        assert logits is not None
        return logits


@pytest.mark.parametrize(
    ("moe_decompose", "strict"),
    [("vertical", True), ("vertical", False), ("horizontal", False)],
    indirect=["moe_decompose"],
)
def test_export(model: MonetForCausalLM, strict: bool) -> None:
    """One program for any batch and length."""
    sizes = {"ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    with torch.no_grad():
        program = torch.export.export(Logits(model), (tokens(2, 12),), strict=strict, dynamic_shapes=sizes)
        for ids in (tokens(2, 12), tokens(3, 17), tokens(5, 4)):
            assert torch.equal(program.module()(ids), model(ids).logits)
    called = {str(node.target) for node in program.graph.nodes}
    assert {"monet.router_logits.default", "monet.route.default", "monet.expert_bias.default"} <= called


@pytest.mark.slow
@pytest.mark.parametrize("moe_decompose", ["vertical"], indirect=True)
def test_inductor(config: MonetConfig, build: Callable[..., MonetForCausalLM]) -> None:
    """Code that the compiler generates around the native operations."""
    config.num_hidden_layers, config.moe_groups = 1, 1
    model = build(config, kernels=Kernels("native")).train()
    eager = copy.deepcopy(model)
    ids = tokens(2, 12)
    torch.testing.assert_close(step(torch.compile(model), ids), step(eager, ids), rtol=1e-5, atol=0)
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert graphs_and_breaks() == (1, 0)
