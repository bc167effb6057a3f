"""Every decomposition against its definition, whole and cut over two ranks, and a third one added from outside.

``additive`` is a toy: E_ij(x) = v1_i a_i + v2_j c_j + b_i. It is written here as docs/ tells a user to write one, and
everything that asks a decomposition about itself is asked: configuration, initialisation, weight decay, sharding,
FLOPs, masks, checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from monet_train import kernels
from monet_train.checkpoints.load import load_pretrained
from monet_train.checkpoints.weights import write_model
from monet_train.config.schema import OptimizerSection
from monet_train.errors import UserError
from monet_train.kernels import DenseGates, Kernels
from monet_train.kernels.plain import relu_squared
from monet_train.model.config import MonetConfig
from monet_train.model.experts import DECOMPOSITIONS, OUTPUTS, UNITS, ExpertFlops, Experts, Routing, decomposition
from monet_train.model.parameters import local_shard
from monet_train.model.sharding import check_tensor_size
from monet_train.model.transformer import MonetForCausalLM
from monet_train.parallel.collectives import ALONE, Collectives
from monet_train.planning.flops import forward_flops_per_token
from monet_train.training.optimizers import build_optimizer
from tests.model.conftest import tokens

TOKENS, HEADS, EXPERTS = 5, 3, 8
LAYER = "model.layers.0.moe."


class AdditiveExperts(Experts):
    """E_ij(x) = v1_i a_i + v2_j c_j + b_i,  a_i = relu²(u1_i x), c_j = relu²(u2_j x), of m units each."""

    biases = ("b",)
    splits: ClassVar = {
        **dict.fromkeys(("u1.weight", "u1.bias", "u2.weight", "u2.bias"), UNITS),
        **dict.fromkeys(("v1.weight", "v2.weight"), OUTPUTS),
    }
    units_key = "moe_dim"

    def __init__(self, config: MonetConfig, collectives: Collectives) -> None:
        super().__init__(config, collectives)
        d, inner = config.hidden_size, self.inner
        self.u1, self.u2 = nn.Linear(d, inner), nn.Linear(d, inner)
        self.v1, self.v2 = nn.Linear(inner, d, bias=False), nn.Linear(inner, d, bias=False)
        self.b = nn.Parameter(torch.zeros(config.moe_experts, d))

    @classmethod
    def units(cls, config: MonetConfig) -> int:
        return config.moe_dim

    @classmethod
    def flops(cls, config: MonetConfig) -> ExpertFlops:
        d, inner = config.hidden_size, config.moe_experts * config.moe_dim
        products = (2 * d * inner, 2 * d * inner)
        return ExpertFlops(up=products, mixing=(0, 0), down=products, bias=(2 * d * config.moe_experts, 0))

    @classmethod
    def check(cls, config: MonetConfig) -> None:
        if config.moe_dim % 4:
            raise UserError(f"model.moe_dim={config.moe_dim} must be a multiple of 4 for model.moe_decompose=additive")

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        mixed = torch.zeros_like(x)
        for r, u, v in ((routing.r1, self.u1, self.v1), (routing.r2, self.u2, self.v2)):
            weight = r.map(self.enter).dense().sum(1).to(x.dtype)  # of each half-expert, [T, E]
            hidden = relu_squared(u(self.enter(x))).unflatten(-1, (weight.shape[1], -1))
            mixed = mixed + v((hidden * weight.unsqueeze(-1)).flatten(1))
        return self.leave(mixed) + kernels.expert_bias(routing.r1, self.b)


@pytest.fixture(autouse=True)
def additive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DECOMPOSITIONS, "additive", AdditiveExperts)


@pytest.fixture(params=["vertical", "horizontal", "additive"])
def moe_decompose(request: pytest.FixtureRequest) -> str:
    """Instead of the fixture of all model tests: one decomposition more."""
    return request.param


def layer_of(moe_decompose: str, collectives: Collectives = ALONE) -> Experts:
    """An expert layer in fp64 with weights and biases that matter."""
    config = MonetConfig(hidden_size=6, moe_dim=8, moe_heads=HEADS, moe_experts=EXPERTS, moe_decompose=moe_decompose)
    layer = decomposition(moe_decompose)(config, collectives).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return layer


def expert(layer: Experts, i: int, j: int, x: Tensor) -> Tensor:
    """Expert (i, j) applied to tokens [T, d], from the formulas of the paper (and of the toy)."""

    experts = len(layer.get_parameter(layer.biases[0]))

    def hidden(projection: nn.Linear, half: int) -> Tensor:
        weight, bias = projection.weight.unflatten(0, (experts, -1)), projection.bias.unflatten(0, (experts, -1))
        return relu_squared(x @ weight[half].t() + bias[half])

    def out(projection: nn.Linear, half: int, units: Tensor) -> Tensor:
        return units @ projection.weight.unflatten(1, (experts, -1))[:, half].t()

    if isinstance(layer, AdditiveExperts):
        a, c = hidden(layer.u1, i), hidden(layer.u2, j)
        return out(layer.v1, i, a) + out(layer.v2, j, c) + layer.b[i]
    parts = dict(layer.named_children())
    if "u" in parts:
        return out(parts["v"], j, hidden(parts["u"], i)) + layer.b[j]
    a, c = hidden(parts["u1"], i), hidden(parts["u2"], j)
    left = out(parts["v11"], i, a) + out(parts["v12"], i, c) + layer.b1[i]
    right = out(parts["v21"], j, a) + out(parts["v22"], j, c) + layer.b2[j]
    return torch.cat([left, right], -1)


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens [T, d], gates [T, H, E] of both sides, and a mask [H, E, E] of factors."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(2, TOKENS, HEADS, EXPERTS, generator=generator, dtype=torch.float64)
    g1, g2 = logits.masked_fill(logits < 0.3, -9).softmax(-1).requires_grad_().unbind()
    return x, g1, g2, torch.randn(HEADS, EXPERTS, EXPERTS, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_is_the_sum_over_all_its_experts(moe_decompose: str, masked: bool) -> None:
    layer, (x, g1, g2, mask) = layer_of(moe_decompose), inputs()
    factors = mask if masked else None
    found = layer(x, layer.routing(DenseGates(g1), DenseGates(g2), factors))
    weights = torch.einsum("thi,thj,hij->tij", g1, g2, mask if masked else torch.ones_like(mask))
    expected = torch.zeros_like(x)
    for i in range(EXPERTS):
        for j in range(EXPERTS):
            expected = expected + weights[:, i, j, None] * expert(layer, i, j, x)
    torch.testing.assert_close(found, expected)
    leaves = [x, *layer.parameters()]
    for ours, theirs in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


def gradients(out: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    return torch.autograd.grad((out * weights).sum(), leaves, retain_graph=True)


def test_two_ranks_with_half_of_the_units_add_up_to_the_layer(moe_decompose: str) -> None:
    """Weights cut as the class says; ``leave`` of the second rank adds the first one's partial sums."""
    whole, (x, g1, g2, mask) = layer_of(moe_decompose), inputs()
    partial: list[Tensor] = []

    def first(sums: Tensor) -> Tensor:
        partial.append(sums)
        return sums

    config = MonetConfig(moe_experts=EXPERTS, moe_decompose=moe_decompose)
    ranks = []
    for rank, leave in enumerate((first, lambda sums: sums + partial[0])):
        layer = layer_of(moe_decompose, replace(ALONE, tensor_size=2, leave=leave))
        for name, parameter in layer.named_parameters():
            parameter.data = local_shard(LAYER + name, whole.get_parameter(name).detach(), config, rank, 2)
        out = layer(x, layer.routing(DenseGates(g1), DenseGates(g2), mask))
        ranks.append(layer)
    expected = whole(x, whole.routing(DenseGates(g1), DenseGates(g2), mask))
    torch.testing.assert_close(out, expected)

    (dx,) = gradients(out, [x])
    torch.testing.assert_close(dx, gradients(expected, [x])[0])
    for name in whole.splits:
        ours = [gradients(out, [layer.get_parameter(name)])[0] for layer in ranks]
        (full,) = gradients(expected, [whole.get_parameter(name)])
        for rank, gradient in enumerate(ours):
            torch.testing.assert_close(gradient, local_shard(LAYER + name, full, config, rank, 2))


def test_what_is_not_split_is_an_output_bias(moe_decompose: str) -> None:
    names = {name for name, _ in layer_of(moe_decompose).named_parameters()}
    assert names == {*decomposition(moe_decompose).splits, *decomposition(moe_decompose).biases}


def test_initial_biases_are_zero_and_exempt_from_weight_decay(
    moe_decompose: str, config: MonetConfig, build: Callable[..., MonetForCausalLM]
) -> None:
    model = build(config)
    exempt = {id(p) for p in build_optimizer(model, OptimizerSection(name="adamw")).param_groups[1]["params"]}
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        is_bias = leaf in ("bias", *decomposition(moe_decompose).biases)
        assert (parameter == 0).all() == is_bias, name
        assert (id(parameter) in exempt) == (is_bias or parameter.dim() == 1), name


def test_a_model_trains_and_is_saved_and_loaded(
    moe_decompose: str, config: MonetConfig, build: Callable[..., MonetForCausalLM], tmp_path: Path
) -> None:
    model = build(config).train()
    model(tokens(2, 8), labels=tokens(2, 8)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    write_model(tmp_path, model.state_dict(), config, None)
    names = {name.removeprefix(LAYER) for name in load_file(tmp_path / "model.safetensors") if name.startswith(LAYER)}
    assert names == {*decomposition(moe_decompose).splits, *decomposition(moe_decompose).biases}
    loaded = load_pretrained(tmp_path)
    assert loaded.config == replace(config, num_key_value_heads=config.kv_heads)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens(2, 8)).logits, model.eval()(tokens(2, 8)).logits)


def test_storage_for_decoding_changes_no_value(config: MonetConfig, build: Callable[..., MonetForCausalLM]) -> None:
    model = build(config)
    with torch.no_grad():
        before = model(tokens(1, 8)).logits
        model.store_for_decoding()
        torch.testing.assert_close(model(tokens(1, 8)).logits, before)
    for name in decomposition(config.moe_decompose).splits:
        weight = model.get_parameter(LAYER + name)
        assert weight.is_contiguous() != (name.startswith("v") and weight.dim() == 2), name


def test_flops_are_those_of_the_plain_definition(config: MonetConfig, build: Callable[..., MonetForCausalLM]) -> None:
    model, ids = build(config, kernels=Kernels("plain")), tokens(2, 16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, targets=ids, keep_logits=False)
    assert counter.get_total_flops() / ids.numel() == pytest.approx(forward_flops_per_token(config, 16), rel=1e-3)


def test_the_class_decides_which_sizes_fit(config: MonetConfig) -> None:
    additive = replace(config, moe_decompose="additive")
    additive.validate()
    with pytest.raises(UserError, match=r"model\.moe_dim=6 must be a multiple of 4"):
        replace(additive, moe_dim=6).validate()
    with pytest.raises(UserError, match=r"'other' is unknown; use one of vertical, horizontal, additive$"):
        replace(config, moe_decompose="other").validate()
    with pytest.raises(UserError, match=r"parallel\.tensor=8 does not divide .*; use one of 1, 2, 4$"):
        check_tensor_size(additive, 8)
    with pytest.raises(UserError, match=r"parallel\.tensor=4 does not divide model\.moe_dim/2=2; use one of 1, 2$"):
        check_tensor_size(replace(config, moe_decompose="vertical", moe_dim=4), 4)
