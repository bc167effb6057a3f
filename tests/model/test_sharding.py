"""Cutting a model over tensor ranks and joining it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from monet_train.errors import UserError
from monet_train.model.config import MonetConfig
from monet_train.model.initialize import initialize
from monet_train.model.parameters import join_shards, local_shard, split_of
from monet_train.model.sharding import check_tensor_size, mark_split_parameters
from monet_train.model.transformer import MonetForCausalLM
from monet_train.parallel.collectives import ALONE, linear
from tests.model.conftest import CPU

HALF = replace(  # the shapes of one of two tensor-parallel ranks, without the other
    ALONE,
    tensor_size=2,
    embedding=lambda vocabulary, width: torch.nn.Embedding(vocabulary // 2, width),
    column=lambda inputs, outputs: linear(inputs, outputs // 2),
    row=lambda inputs, outputs: linear(inputs // 2, outputs),
)
WHOLE_ON_EVERY_RANK = ("norm.weight", "layernorm.weight", "router.w1.weight", "router.w2.weight", ".b", ".b1", ".b2")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_cut_and_joined_is_whole_again(
    size: int, config: MonetConfig, build: Callable[[MonetConfig], MonetForCausalLM]
) -> None:
    for name, parameter in build(config).named_parameters():
        full = torch.arange(parameter.numel()).view(parameter.shape)
        shards = [local_shard(name, full, config, rank, size) for rank in range(size)]
        assert torch.equal(join_shards(name, shards, config), full), name
        whole = size == 1 or name.endswith(WHOLE_ON_EVERY_RANK)
        assert all(shard.numel() == full.numel() // (1 if whole else size) for shard in shards), name
        assert (split_of(name, config) is None) == name.endswith(WHOLE_ON_EVERY_RANK), name


def test_every_rank_has_a_share_of_every_half_expert() -> None:
    experts, units = 3, 4
    config = MonetConfig(moe_experts=experts, moe_dim=2 * units)
    full = torch.arange(experts * units)  # unit u of half-expert e is e * units + u
    first = local_shard("model.layers.0.moe.u1.bias", full, config, rank=0, size=2)
    second = local_shard("model.layers.0.moe.u1.bias", full, config, rank=1, size=2)
    assert first.tolist() == [0, 1, 4, 5, 8, 9]
    assert second.tolist() == [2, 3, 6, 7, 10, 11]
    columns = local_shard("model.layers.0.moe.v12.weight", full[None], config, rank=1, size=2)
    assert columns.tolist() == [second.tolist()]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_initialised_as_its_cut_of_the_whole(
    rank: int, config: MonetConfig, build: Callable[[MonetConfig], MonetForCausalLM]
) -> None:
    """``initialize`` on a model whose parameters have a rank's shapes gives that rank's part of the whole model."""
    whole = build(config)
    with torch.device("meta"):
        part = MonetForCausalLM(config, HALF)
    initialize(part, CPU, seed=0, share=lambda name, full: local_shard(name, full, config, rank, 2))
    mark_split_parameters(part)
    for name, parameter in part.named_parameters():
        assert torch.equal(parameter, local_shard(name, whole.get_parameter(name), config, rank, 2)), name
        assert getattr(parameter, "tensor_model_parallel", False) == (split_of(name, config) is not None), name


def test_initial_weights_depend_on_the_seed_and_the_name(config: MonetConfig) -> None:
    def model(seed: int) -> MonetForCausalLM:
        with torch.device("meta"):
            built = MonetForCausalLM(config)
        initialize(built, CPU, seed)
        return built

    first, again, other = model(1), model(1), model(2)
    drawn = [name for name, p in first.named_parameters() if p.ndim == 2 and not name.endswith((".b", ".b1", ".b2"))]
    for name in drawn:
        weight = first.get_parameter(name)
        assert torch.equal(weight, again.get_parameter(name))
        assert not torch.equal(weight, other.get_parameter(name))
        assert weight.std().item() == pytest.approx(config.initializer_range, rel=0.2)
    assert len({first.get_parameter(name).flatten()[0].item() for name in drawn}) == len(drawn)
    for name, parameter in first.named_parameters():
        if name not in drawn:
            assert (parameter == (1 if "norm" in name else 0)).all(), name


def test_sizes_that_divide_are_named(config: MonetConfig) -> None:
    for size in (1, 2, 4):
        check_tensor_size(config, size)
    with pytest.raises(UserError, match=r"parallel\.tensor=3 does not divide .*use one of 1, 2, 4$"):
        check_tensor_size(config, 3)
    with pytest.raises(UserError, match=r"model\.num_key_value_heads=2; use one of 1, 2$"):
        check_tensor_size(replace(config, num_key_value_heads=2), 4)
