"""The gates of a forward pass as a public output: compact, by routing group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from monet_train import ExpertSet, load_pretrained
from monet_train.kernels import ActivePairs, CompactGates, DenseGates, Gates, Kernels, extension
from monet_train.model.attention import KVCache
from monet_train.model.config import MonetConfig
from monet_train.model.identity import identify
from monet_train.model.parameters import local_shard
from monet_train.model.transformer import MonetForCausalLM, MonetOutput
from tests.model.conftest import tokens
from tests.support import GOLDEN
from tests.support.processes import run_ranks
from tests.support.worker import save_outputs

BATCH, LENGTH = 2, 12
IDS = tokens(BATCH, LENGTH)


@pytest.fixture(params=["plain", "native"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "native" and (reason := extension.missing()):
        pytest.skip(f"native kernels: {reason}")
    return Kernels(request.param)


def scatter(pairs: ActivePairs, shape: torch.Size) -> Tensor:
    """All gates [T, H, E] from the active pairs."""
    dense = pairs.values.new_zeros(shape)
    dense[pairs.token, :, pairs.half_expert] = pairs.values
    return dense


def assert_same_gates(out: MonetOutput, config: MonetConfig) -> None:
    """``gates`` and ``router_probs`` of one output tell the same."""
    assert out.gates is not None and out.router_probs is not None
    assert len(out.gates) == len(config.router_layers)
    for layer, sides in zip(config.router_layers, out.gates, strict=True):
        for gates, probs in zip(sides, out.router_probs[layer], strict=True):
            expected = probs.flatten(0, 1)
            assert torch.equal(gates.dense(), expected)
            pairs = gates.active_pairs()
            assert torch.equal(scatter(pairs, expected.shape), expected)
            assert len(pairs.token) == len(pairs.half_expert) == gates.active()
            assert (pairs.values != 0).any(1).all()


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
def test_they_are_the_router_probs(
    training: bool, recompute: bool, kernels: Kernels, config: MonetConfig, build: Callable[..., MonetForCausalLM]
) -> None:
    model = build(config, kernels=kernels, recompute=recompute).train(training)
    out = model(IDS, labels=IDS, output_gates=True, output_router_probs=True)
    assert_same_gates(out, config)
    kind = CompactGates if kernels.implementation == "native" else DenseGates
    assert all(isinstance(gates, kind) for sides in out.gates for gates in sides)
    out.loss.backward()
    assert_same_gates(out, config)  # also after a recomputation


def test_only_on_request(config: MonetConfig, build: Callable[..., MonetForCausalLM]) -> None:
    model = build(config)
    assert model(IDS).gates is None
    assert model(IDS, output_gates=True).router_probs is None
    assert model(IDS, output_router_probs=True).gates is None


def test_gradients_pass_through_them(
    kernels: Kernels, config: MonetConfig, build: Callable[..., MonetForCausalLM]
) -> None:
    """The gradient of a function of the gates, stored and recomputed, against that through ``router_probs``."""

    def gradients(recompute: bool, read: Callable[[MonetOutput], list[Tensor]]) -> list[Tensor | None]:
        model = build(config, kernels=kernels, recompute=recompute).train()
        out = model(IDS, labels=IDS, output_gates=True, output_router_probs=True)
        (out.loss + sum(values.square().sum() for values in read(out))).backward()
        return [parameter.grad for parameter in model.parameters()]

    def of_pairs(out: MonetOutput) -> list[Tensor]:
        return [gates.active_pairs().values for sides in out.gates for gates in sides]

    def of_probs(out: MonetOutput) -> list[Tensor]:
        return [probs for sides in out.router_probs if sides for probs in sides]

    expected = gradients(False, of_probs)
    for found in (gradients(False, of_pairs), gradients(True, of_pairs)):
        for gradient, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


def test_with_a_cache_they_are_those_of_the_new_tokens(
    kernels: Kernels, config: MonetConfig, build: Callable[..., MonetForCausalLM]
) -> None:
    model, cache = build(config, kernels=kernels), KVCache()
    with torch.no_grad():
        whole = model(IDS, output_gates=True).gates
        pieces = [model(piece, cache=cache, output_gates=True).gates for piece in IDS.split([5, 1, 6], 1)]
    for group, sides in enumerate(whole):
        for side, gates in enumerate(sides):
            found = [piece[group][side].dense().unflatten(0, (BATCH, -1)) for piece in pieces]
            torch.testing.assert_close(torch.cat(found, 1).flatten(0, 1), gates.dense(), rtol=1e-5, atol=1e-6)


def test_a_mask_does_not_change_those_of_its_group(config: MonetConfig, build: Callable[..., MonetForCausalLM]) -> None:
    model = build(config)
    with torch.no_grad():
        before = model(IDS, output_gates=True).gates[0]
        ExpertSet(identify(model), {}).inverted().apply(model)
        after = model(IDS, output_gates=True).gates[0]
    assert all(torch.equal(one.dense(), two.dense()) for one, two in zip(before, after, strict=True))


def test_scores_of_one_token(kernels: Kernels, config: MonetConfig, build: Callable[..., MonetForCausalLM]) -> None:
    """As the documentation of :class:`MonetOutput` reads them."""
    model, t = build(config, kernels=kernels), 7
    with torch.no_grad():
        g1, g2 = model(IDS, output_gates=True).gates[0]
    one, two = g1.active_pairs(), g2.active_pairs()
    of1, of2 = one.token == t, two.token == t
    scores = one.values[of1] @ two.values[of2].T
    expected = torch.einsum("hi,hj->ij", g1.dense()[t], g2.dense()[t])
    found = torch.zeros_like(expected)
    found[one.half_expert[of1][:, None], two.half_expert[of2]] = scores
    torch.testing.assert_close(found, expected)


def test_several_blocks_of_tokens_and_none(kernels: Kernels) -> None:
    generator = torch.Generator().manual_seed(0)
    for count, experts in ((1100, 12), (0, 12), (3, 1)):
        z = torch.randn(count, 2, experts, generator=generator)
        gates: Gates = kernels.route(z, torch.full((2,), 1.3))
        assert torch.equal(scatter(gates.active_pairs(), z.shape), gates.dense())


@pytest.mark.distributed
@pytest.mark.parametrize("moe_decompose", ["vertical", "horizontal"])
def test_tensor_parallel_ranks_have_all_of_them(moe_decompose: str, tmp_path: Path) -> None:
    """Two ranks that share the layers, with masked experts: outputs and gradients are those of the whole model."""
    whole = load_pretrained(GOLDEN / f"tiny_{moe_decompose}")
    chosen = ExpertSet.choose(whole, 0, [(1, None), (None, 3)], factor=-0.5, layers=[1])
    chosen = chosen.union(ExpertSet.choose(whole, 1, [(2, 5)], heads=[0]))
    file = chosen.save(tmp_path / "some.experts.safetensors")
    for done in run_ranks(save_outputs, GOLDEN / f"tiny_{moe_decompose}", file, tmp_path, ranks=2):
        assert done.returncode == 0, done.stderr
    chosen.apply(whole)
    out = whole(torch.arange(24).view(2, 12), output_gates=True)
    out.logits.square().mean().backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"rank_{rank}.pt")
        torch.testing.assert_close(found["logits"], out.logits, rtol=1e-4, atol=1e-5)
        for gates, expected in zip(found["gates"], (g for sides in out.gates for g in sides), strict=True):
            torch.testing.assert_close(gates, expected.dense(), rtol=1e-4, atol=1e-6)
        for name, parameter in whole.named_parameters():
            expected = local_shard(name, parameter.grad, whole.config, rank, 2)
            torch.testing.assert_close(found["gradients"][name], expected, rtol=1e-3, atol=1e-6, msg=name)
